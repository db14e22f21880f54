"""A target was fine-tuned with LoRA: its drafter is retrained briefly, on what the adapted target says now.

    python examples/adapt_lora_target.py --output runs/adapted       # the shipped pair, some minutes on a CPU
    python examples/adapt_lora_target.py --output runs/adapted --target TARGET --adapter ADAPTER --poss DRAFTER \\
        --texts texts.jsonl

Without `--adapter` the target is fine-tuned here first; without `--texts` on the prose of Python's own documentation,
which the demo target, trained on code, has hardly seen. Each step prints what it measured: tau is the mean number of
tokens a round, of real `generate` calls of the adapted target on texts that no training saw.
"""

import argparse
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_poss import PosSModel, PosSTrainer, PosSTrainingArguments, collect_statistics
from hf_poss.demo import load_demo_pair


HELD_OUT_EVERY = 8
PROMPT_TOKENS = 48
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def read_texts(name: str | None) -> list[str]:
    """Texts of a dataset (file, folder or Hub name), or the topics of Python's own help."""
    if name is None:
        from pydoc_data.topics import topics

        return [topics[topic] for topic in sorted(topics)]
    from hf_poss.training.datasets import load_texts

    return list(load_texts(name)["text"])


def blocks_of(tokenizer: Any, texts: list[str], length: int) -> list[dict[str, list[int]]]:
    """Texts joined by the end-of-sequence token and cut into blocks of `length` tokens."""
    stream = [token for text in texts for token in (*tokenizer(text).input_ids, tokenizer.eos_token_id)]
    blocks = [stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]
    return [{"input_ids": block, "labels": block} for block in blocks]


def fine_tune(target: Any, blocks: list[dict[str, list[int]]], args: argparse.Namespace) -> peft.PeftModel:
    """`target` with a LoRA that learned `blocks`, also saved to OUTPUT/adapter."""
    adapted = peft.get_peft_model(
        target, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    arguments = TrainingArguments(
        args.output / "adapter_run",
        max_steps=args.adapter_steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        use_cpu=DEVICE == "cpu",
        logging_steps=10,
        save_strategy="no",
        report_to="none",
    )
    Trainer(adapted, arguments, train_dataset=blocks, data_collator=default_data_collator).train()
    adapted.save_pretrained(args.output / "adapter")
    return adapted


def retrain(
    poss: PosSModel, target: peft.PeftModel, blocks: list[dict[str, list[int]]], args: argparse.Namespace
) -> None:
    """Trains the drafter with the adapter on, and saves it to OUTPUT/poss."""
    arguments = PosSTrainingArguments(
        args.output / "poss_run",
        max_steps=args.poss_steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        losses="token=1.0",
        feature_noise=0.0,
        use_cpu=DEVICE == "cpu",
        logging_steps=10,
        save_strategy="no",
        report_to="none",
    )
    PosSTrainer(poss, target, arguments, train_dataset=blocks).train()
    poss.save_pretrained(args.output / "poss")


def measure_tau(target: Any, poss: PosSModel, tokenizer: Any, texts: list[str], max_new_tokens: int) -> float:
    """Tokens a round, over greedy continuations of the beginnings of `texts`."""
    target.eval()
    poss.eval()
    with collect_statistics() as stats:
        for text in texts:
            prompt = tokenizer(text, return_tensors="pt").to(DEVICE)
            prompt = {name: value[:, :PROMPT_TOKENS] for name, value in prompt.items()}
            target.generate(
                **prompt,
                assistant_model=poss,
                max_new_tokens=max_new_tokens,
                min_new_tokens=max_new_tokens,
                do_sample=False,
            )
    return stats.tau


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the adapter and the retrained drafter")
    parser.add_argument("--target", help="folder or Hub name (default: the demo target)")
    parser.add_argument("--poss", help="the drafter to retrain (default: the demo drafter)")
    parser.add_argument("--adapter", help="a LoRA of the target (default: one is trained here)")
    parser.add_argument("--texts", help="dataset of texts (default: the topics of Python's own help)")
    parser.add_argument("--adapter_steps", type=int, default=60)
    parser.add_argument("--poss_steps", type=int, default=60)
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="of the drafter")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--block_length", type=int, default=256)
    parser.add_argument("--prompts", type=int, default=8, help="texts that are held out to measure on")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    args = parser.parse_args()
    if (args.target is None) != (args.poss is None):
        parser.error("--target and --poss go together: give both, or neither for the demo pair")
    set_seed(0)

    if args.target is None:
        target, poss, tokenizer = load_demo_pair()
    else:
        target = AutoModelForCausalLM.from_pretrained(args.target)
        poss, tokenizer = PosSModel.from_pretrained(args.poss), AutoTokenizer.from_pretrained(args.target)
    target, poss = target.to(DEVICE), poss.to(DEVICE)
    texts = read_texts(args.texts)
    held_out = texts[::HELD_OUT_EVERY][: args.prompts]
    blocks = blocks_of(tokenizer, [text for text in texts if text not in held_out], args.block_length)

    def report(what: str) -> None:
        tau = measure_tau(target, poss, tokenizer, held_out, args.max_new_tokens)
        print(f"{what}: tau {tau:.2f}", flush=True)

    report("target as it was, drafter as it was")
    if args.adapter is None:
        target = fine_tune(target, blocks, args)
    else:
        target = peft.PeftModel.from_pretrained(target, args.adapter)
    report("adapted target, drafter as it was")
    retrain(poss, target, blocks, args)
    report("adapted target, drafter retrained")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}")


if __name__ == "__main__":
    main()
