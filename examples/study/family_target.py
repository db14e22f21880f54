"""A target of another family for the study: a small GPT-2 that learns the stories which a Llama writes.

python examples/study/family_target.py --teacher STORIES260K --output runs/study/gpt2
"""

import argparse
from pathlib import Path

import torch
from texts import continued
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)


TEXTS = 6144
LENGTH = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--max_steps", type=int, default=1500)
    args = parser.parse_args()
    teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype="float32").eval()
    texts = continued(teacher, [[teacher.config.bos_token_id]] * TEXTS, LENGTH, seed=7)
    samples = [{"input_ids": torch.tensor(text), "labels": torch.tensor(text)} for text in texts]
    set_seed(0)
    target = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=teacher.config.vocab_size,
            n_embd=64,
            n_layer=5,
            n_head=8,
            n_positions=512,
            bos_token_id=teacher.config.bos_token_id,
            eos_token_id=teacher.config.eos_token_id,
            pad_token_id=teacher.config.pad_token_id,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
        )
    )
    arguments = TrainingArguments(
        args.output / "trainer",
        max_steps=args.max_steps,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=100,
        weight_decay=0.1,
        logging_steps=100,
        per_device_eval_batch_size=32,
        save_strategy="no",
        use_cpu=not torch.accelerator.is_available(),
        report_to="none",
    )
    trainer = Trainer(
        target, arguments, train_dataset=samples[256:], eval_dataset=samples[:256], data_collator=default_data_collator
    )
    trainer.train()
    print(f"loss a token on held-out texts: {trainer.evaluate()['eval_loss']:.3f}")
    target.save_pretrained(args.output)
    AutoTokenizer.from_pretrained(args.teacher).save_pretrained(args.output)


if __name__ == "__main__":
    main()
