"""`hf-poss train`: specialists for a target, from text."""

import argparse
from pathlib import Path

from .generate import add_model_arguments, load_target


__all__ = ["add_arguments", "run"]

_LOADERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from transformers import HfArgumentParser

    from ..training import PosSTrainingArguments

    add_model_arguments(parser)
    parser.add_argument("--dataset", required=True, help="a .txt, .jsonl, .parquet or .csv file, or a Hub name")
    parser.add_argument("--dataset_config", help="configuration of a Hub dataset")
    parser.add_argument("--dataset_split", default="train", help="(default: %(default)s)")
    parser.add_argument("--eval_share", type=float, default=0.0, help="share of the rows kept for evaluation")
    parser.add_argument("--positions_per_specialist", type=int, default=2, help="n (default: %(default)s)")
    parser.add_argument("--num_draft_positions", type=int, default=6, help="K (default: %(default)s)")
    parser.add_argument("--init_from_eagle", help="start every specialist as a copy of this EAGLE layer")
    group = HfArgumentParser(PosSTrainingArguments, add_help=False)
    known = set(parser._option_string_actions)
    for action in group._actions:
        if not known.intersection(action.option_strings):
            parser._add_action(action)


def run(args: argparse.Namespace) -> int:
    from dataclasses import fields

    from transformers.trainer_utils import get_last_checkpoint

    from ..modeling_poss import PosSModel
    from ..training import PosSTrainer, PosSTrainingArguments

    arguments = PosSTrainingArguments(
        **{f.name: getattr(args, f.name) for f in fields(PosSTrainingArguments) if f.init and hasattr(args, f.name)}
    )
    dataset = _load(args)
    target, tokenizer = load_target(args)
    positions = {
        "positions_per_specialist": args.positions_per_specialist,
        "num_draft_positions": args.num_draft_positions,
    }
    if args.init_from_eagle:
        poss = PosSModel.from_eagle(args.init_from_eagle, **positions).to(target.device)
    else:
        poss = PosSModel.from_target(target, **positions)
    poss.float()  # master weights; bf16=True and fp16=True compute in half precision
    splits = {"train": dataset, "test": None}
    if args.eval_share:
        splits = dataset.train_test_split(args.eval_share, seed=arguments.seed)
    trainer = PosSTrainer(
        poss,
        target,
        arguments,
        train_dataset=splits["train"],
        eval_dataset=splits["test"],
        processing_class=tokenizer,
    )
    folder = arguments.output_dir
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if Path(folder).is_dir() else None)
    trainer.save_model()
    if splits["test"] is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    print(f"Saved to {folder}. Draft with it: hf-poss generate --target {args.target} --poss {folder} --prompt ...")
    return 0


def _load(args: argparse.Namespace):
    from datasets import load_dataset

    path = Path(args.dataset)
    if path.suffix not in _LOADERS:
        return load_dataset(args.dataset, args.dataset_config, split=args.dataset_split)
    if not path.is_file():
        raise FileNotFoundError(f"No dataset at {path}.")
    return load_dataset(_LOADERS[path.suffix], data_files=str(path), split="train")
