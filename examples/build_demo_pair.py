"""Build the demo pair: a deep and thin Llama that writes Python, and its position specialists.

Everything is learnt from the source text of the Python standard library of the machine this runs on, held-out
modules apart, with fixed seeds. Stages resume where they stopped:

    python examples/build_demo_pair.py --output runs/demo            # all stages
    python examples/build_demo_pair.py --output runs/demo --stage target --max_steps 20   # a quick look

The parts that ship with the package are copied from OUTPUT to `src/hf_poss/assets/demo` by `--install`.
"""

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from hf_poss.demo import held_out_sources, training_sources


VOCAB_SIZE = 2048
BLOCK_LENGTH = 384
END_OF_TEXT = "<|endoftext|>"


def build_tokenizer(folder: Path) -> None:
    """Byte-level BPE over the training sources; runs of spaces become single tokens."""
    if (folder / "tokenizer.json").is_file():
        return
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(training_sources().values(), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def packed_blocks(tokenizer, texts) -> list[dict[str, torch.Tensor]]:
    """Texts joined by the end-of-text token and cut into blocks of `BLOCK_LENGTH` tokens."""
    stream = []
    for text in texts:
        stream.append(tokenizer.bos_token_id)
        stream.extend(tokenizer(text).input_ids)
    count = len(stream) // BLOCK_LENGTH
    blocks = torch.tensor(stream[: count * BLOCK_LENGTH]).view(count, BLOCK_LENGTH)
    return [{"input_ids": block, "labels": block} for block in blocks]


def train_target(folder: Path, run_folder: Path, max_steps: int) -> None:
    """A Llama of 28 layers and width 128, kept in bfloat16."""
    if (folder / "model.safetensors").is_file():
        return
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=28,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    arguments = TrainingArguments(
        output_dir=run_folder,
        max_steps=max_steps,
        per_device_train_batch_size=10,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=min(100, max_steps // 10),
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=20,
        eval_strategy="steps",
        eval_steps=200,
        per_device_eval_batch_size=16,
        save_steps=100,
        save_total_limit=1,
        report_to="none",
        seed=0,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=packed_blocks(tokenizer, training_sources().values()),
        eval_dataset=packed_blocks(tokenizer, held_out_sources().values()),
        data_collator=default_data_collator,
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(run_folder) if run_folder.is_dir() else None)
    (run_folder / "metrics.json").write_text(json.dumps(trainer.evaluate(), indent=2))
    # Rounded here, once: the drafter learns from the very weights that ship.
    model.to(torch.bfloat16).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--stage", choices=("tokenizer", "target", "poss", "all"), default="all")
    parser.add_argument("--max_steps", type=int, default=2400, help="optimizer steps of the target")
    args = parser.parse_args()
    build_tokenizer(args.output / "target")
    if args.stage in ("target", "all"):
        train_target(args.output / "target", args.output / "target_run", args.max_steps)


if __name__ == "__main__":
    main()
