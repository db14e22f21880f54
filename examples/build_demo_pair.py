"""Build the demo pair: a deep and thin Llama that writes Python, and its position specialists.

Everything is learnt from the source text of the Python standard library of the machine this runs on, held-out
modules apart, with fixed seeds. Stages resume where they stopped:

    python examples/build_demo_pair.py --output runs/demo            # all stages
    python examples/build_demo_pair.py --output runs/demo --stage target --max_steps 20   # a quick look

The parts that ship with the package are copied from OUTPUT to `src/hf_poss/assets/demo` by `--install`.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
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

from hf_poss import PosSModel, PosSTrainer, PosSTrainingArguments
from hf_poss.demo import demo_folder, held_out_sources, training_sources


VOCAB_SIZE = 2048
BLOCK_LENGTH = 384
END_OF_TEXT = "<|endoftext|>"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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
        use_cpu=DEVICE == "cpu",
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


def write_samples(file: Path, target_folder: Path, count: int, batch_size: int = 16) -> None:
    """Text that the target writes itself, for the drafters to learn what their target says: half of it greedy, half
    sampled, each going on from the first quarter of a training block."""
    written = len(file.read_text().splitlines()) if file.is_file() else 0
    if written >= count:
        return
    tokenizer = AutoTokenizer.from_pretrained(target_folder)
    target = AutoModelForCausalLM.from_pretrained(target_folder, dtype="float32").to(DEVICE).eval()
    blocks = packed_blocks(tokenizer, training_sources().values())
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0)).tolist()
    with file.open("a") as output:
        for start in tqdm(range(written, count, batch_size), desc="samples"):
            set_seed(start)
            rows = [blocks[index]["input_ids"] for index in order[start : start + batch_size]]
            prompts = torch.stack(rows)[:, : BLOCK_LENGTH // 4].to(DEVICE)
            texts = target.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=BLOCK_LENGTH - prompts.shape[1],
                min_new_tokens=BLOCK_LENGTH - prompts.shape[1],
                **({"do_sample": True, "top_k": 0} if start // batch_size % 2 else {"do_sample": False}),
            )
            output.writelines(json.dumps(text) + "\n" for text in texts.tolist())
            output.flush()


def train_drafter(poss: PosSModel, folder: Path, args: argparse.Namespace, steps: int, learning_rate: float) -> None:
    """Trains `poss` on the target's own text and on the text it came from, and keeps it in bfloat16."""
    target_folder = args.output / "target"
    tokenizer = AutoTokenizer.from_pretrained(target_folder)
    target = AutoModelForCausalLM.from_pretrained(target_folder, dtype="bfloat16").to(DEVICE)
    own = [{"input_ids": json.loads(line)} for line in (args.output / "samples.jsonl").read_text().splitlines()]
    train = 2 * own + packed_blocks(tokenizer, training_sources().values())[::4]
    evaluation = packed_blocks(tokenizer, held_out_sources().values())[::4]
    run_folder = args.output / f"{folder.name}_run"
    arguments = PosSTrainingArguments(
        run_folder,
        max_steps=steps,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        losses="token=1.0",
        feature_noise=0.0,
        bf16=True,
        use_cpu=DEVICE == "cpu",
        logging_steps=20,
        eval_strategy="steps",
        eval_steps=200,
        save_steps=100,
        save_total_limit=1,
        seed=0,
    )
    trainer = PosSTrainer(poss, target, arguments, train_dataset=train, eval_dataset=evaluation)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(run_folder) if run_folder.is_dir() else None)
    (run_folder / "metrics.json").write_text(json.dumps(trainer.evaluate(), indent=2))
    poss.to(torch.bfloat16).save_pretrained(folder)


def train_drafters(args: argparse.Namespace) -> None:
    """An EAGLE layer first, then specialists that start as its copies.

    Both learn from the target's distribution alone, as EAGLE-3 does, without the paper's loss on features.
    """
    eagle_folder, poss_folder = args.output / "eagle", args.output / "poss"
    target = AutoModelForCausalLM.from_pretrained(args.output / "target", dtype="float32")
    if not (eagle_folder / "model.safetensors").is_file():
        set_seed(0)
        eagle = PosSModel.from_target(
            target, positions_per_specialist=1, num_draft_positions=1, target_name_or_path="demo-target"
        )
        train_drafter(eagle, eagle_folder, args, args.eagle_steps, learning_rate=1e-3)
    if not (poss_folder / "model.safetensors").is_file():
        poss = PosSModel.from_eagle(eagle_folder, positions_per_specialist=2, num_draft_positions=6, dtype="float32")
        train_drafter(poss, poss_folder, args, args.poss_steps, learning_rate=3e-3)


def install(output: Path) -> None:
    """Copies what ships from `output` into the package."""
    for name in ("target", "poss"):
        folder = demo_folder() / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(output / name, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--stage", choices=("tokenizer", "target", "poss", "all"), default="all")
    parser.add_argument("--max_steps", type=int, default=1800, help="optimizer steps of the target")
    parser.add_argument("--samples", type=int, default=800, help="texts that the target writes for its drafters")
    parser.add_argument("--eagle_steps", type=int, default=400, help="optimizer steps of the EAGLE layer")
    parser.add_argument("--poss_steps", type=int, default=1600, help="optimizer steps of the specialists")
    parser.add_argument("--install", action="store_true", help="copy the result into the package")
    args = parser.parse_args()
    build_tokenizer(args.output / "target")
    if args.stage in ("target", "all"):
        train_target(args.output / "target", args.output / "target_run", args.max_steps)
    if args.stage in ("poss", "all"):
        write_samples(args.output / "samples.jsonl", args.output / "target", args.samples)
        train_drafters(args)
    if args.install:
        install(args.output)


if __name__ == "__main__":
    main()
