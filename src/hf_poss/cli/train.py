"""`hf-poss train`, and what `examples/train_poss.py` runs: specialists for a target, from data to model card."""

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from .generate import add_model_arguments, check_folder, check_loading, load_target, target_names


if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from ..configuration_poss import PosSConfig
    from ..modeling_poss import PosSModel
    from ..training import PosSTrainingArguments


__all__ = ["add_arguments", "main", "make_parser", "run"]

# Rows of a stream among which the next one is drawn.
_SHUFFLED_ROWS = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command and every training argument."""
    from transformers import HfArgumentParser

    from ..training import PosSTrainingArguments

    add_model_arguments(parser)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset",
        nargs="+",
        required=True,
        help="files, folders, feature stores (hf-poss extract) or Hub names; several are joined",
    )
    data.add_argument("--dataset_config", help="configuration of a Hub dataset")
    data.add_argument("--dataset_split", default="train", help="(default: %(default)s)")
    data.add_argument("--streaming", action="store_true", help="read rows as they are needed; needs --max_steps")
    data.add_argument("--eval_dataset", help="file, folder or Hub name")
    data.add_argument("--eval_split", help="split of --eval_dataset (default: that of --dataset)")
    data.add_argument("--eval_share", type=float, default=0.0, help="share of the rows kept for evaluation")
    data.add_argument("--preview", type=int, metavar="N", help="print N samples with what counts coloured, and stop")
    specialists = parser.add_argument_group("specialists")
    specialists.add_argument("--positions_per_specialist", type=int, default=2, help="n (default: %(default)s)")
    specialists.add_argument("--num_draft_positions", type=int, default=6, help="K (default: %(default)s)")
    specialists.add_argument(
        "--feature_layers",
        type=int,
        nargs="+",
        help="hidden states of the target to read, such as 2 16 29 of 32 layers (EAGLE-3; default: the last)",
    )
    specialists.add_argument("--draft_vocab_size", type=int, help="draft the most frequent tokens only, so many")
    specialists.add_argument(
        "--specialist_adapter", type=json.loads, metavar="JSON", help="one layer and adapters: '{\"r\": 16}'"
    )
    specialists.add_argument("--init_from_eagle", help="start every specialist as a copy of this EAGLE layer")
    parser.add_argument(
        "--resume",
        default="auto",
        help="auto: from the newest whole checkpoint in the output folder, if there is one; never: from the start, "
        "into a folder without checkpoints; or a checkpoint",
    )
    known = set(parser._option_string_actions)
    training = parser.add_argument_group("training")
    for action in HfArgumentParser(PosSTrainingArguments, add_help=False)._actions:
        if not known.intersection(action.option_strings):
            training._add_action(action)


def make_parser() -> argparse.ArgumentParser:
    """The parser of a script that trains."""
    parser = argparse.ArgumentParser(description="Train position specialists for a target.")
    add_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Trains, evaluates, saves, and pushes if asked to. What can be known is checked before the target is loaded.

    Raises:
        OSError: if a file or repository is not there.
        ValueError: for anything that does not fit; nothing has been written then.
    """
    from transformers import AutoConfig, AutoTokenizer

    from ..limits import learned_positions
    from ..training import PosSTrainer
    from ..training.preflight import check_evaluation, check_start, choose_checkpoint
    from ..training.whole_models import whole_models

    arguments = _training_arguments(args)
    check_loading(args)
    target_config = AutoConfig.from_pretrained(args.target, **target_names(args))
    tokenizer = AutoTokenizer.from_pretrained(args.target, **target_names(args))
    with whole_models(arguments):
        poss = _from_eagle(args)
    config = _config(args, target_config) if poss is None else poss.config
    check_evaluation(arguments, config.num_draft_positions, bool(args.eval_dataset or args.eval_share))
    check_start(arguments, config, target_config, tokenizer, streaming=args.streaming)
    checkpoint = choose_checkpoint(args.resume_from_checkpoint or args.resume, arguments.output_dir, config)
    with arguments.main_process_first(desc="reading the data"):
        train_dataset, eval_dataset = _datasets(args, arguments, config, tokenizer, learned_positions(target_config))
    prints = arguments.process_index == 0
    if args.preview is not None:
        if prints:
            from ..training.preview import describe_samples
            from .display import uses_color

            print(describe_samples(train_dataset, tokenizer, args.preview, uses_color()))
        return 0

    with whole_models(arguments):
        target, tokenizer = load_target(args, arguments.device)
        poss = _specialists(args, target) if poss is None else poss
    trainer = PosSTrainer(
        poss,
        target,
        arguments,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
    )
    trainer.provenance = _provenance(args)
    trainer.train(resume_from_checkpoint=checkpoint)
    if eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.save_metrics("eval", metrics)
    trainer.save_model()  # pushes, if that is asked for
    trainer.create_model_card()
    if prints:
        folder = arguments.output_dir
        command = f"hf-poss generate --target {args.target} --poss {folder} --prompt ..."
        print(f"Saved to {folder}. Draft with it: {command}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Of a script: `sys.exit(main())`."""
    args = make_parser().parse_args(argv)
    try:
        return run(args)
    except (OSError, ValueError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1


def _training_arguments(args: argparse.Namespace) -> "PosSTrainingArguments":
    from dataclasses import fields

    import torch

    from ..training import PosSTrainingArguments

    given = {f.name: getattr(args, f.name) for f in fields(PosSTrainingArguments) if f.init and hasattr(args, f.name)}
    if args.device == "cpu" or not torch.accelerator.is_available():
        given["use_cpu"] = True  # else Trainer refuses bf16 where there is no accelerator
    if given["output_dir"] is None and args.preview is None:
        raise ValueError("`--output_dir` is missing: the folder to train into.")
    return PosSTrainingArguments(**given)


def _positions(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "positions_per_specialist": args.positions_per_specialist,
        "num_draft_positions": args.num_draft_positions,
        "specialist_adapter": args.specialist_adapter,
    }


def _config(args: argparse.Namespace, target_config: "PreTrainedConfig") -> "PosSConfig":
    from ..configuration_poss import PosSConfig

    reading = {"feature_layers": args.feature_layers, "draft_vocab_size": args.draft_vocab_size}
    return PosSConfig.from_target_config(target_config, **_positions(args), **reading)


def _specialists(args: argparse.Namespace, target: Any) -> "PosSModel":
    """Fresh ones. Their weights are float32; `bf16` and `fp16` compute in half precision."""
    from transformers import set_seed
    from transformers.utils import logging

    from ..modeling_poss import PosSModel
    from ..training import PosSTrainingArguments

    paper = PosSTrainingArguments.learning_rate
    if args.learning_rate == paper:
        logging.get_logger(__name__).warning(
            f"The learning rate is {paper}, the paper's for specialists that start from an EAGLE layer "
            "(`--init_from_eagle`). These start from random weights, which learn slowly with it: small drafters took "
            "`--learning_rate 1e-3`."
        )
    set_seed(args.seed)
    reading = {"feature_layers": args.feature_layers, "draft_vocab_size": args.draft_vocab_size}
    return PosSModel.from_target(target, **_positions(args), **reading).float()


def _from_eagle(args: argparse.Namespace) -> "PosSModel | None":
    from transformers import set_seed

    from ..modeling_poss import PosSModel

    if not args.init_from_eagle:
        return None
    if args.feature_layers:
        raise ValueError(
            "An EAGLE layer reads the target's last hidden states. Leave out `--feature_layers`, or start without "
            "`--init_from_eagle`."
        )
    check_folder(args.init_from_eagle)
    set_seed(args.seed)
    poss = PosSModel.from_eagle(
        args.init_from_eagle, **_positions(args), draft_vocab_size=args.draft_vocab_size, dtype="float32"
    )
    poss.config.target_name_or_path = args.target
    return poss


def _datasets(
    args: argparse.Namespace,
    arguments: "PosSTrainingArguments",
    config: "PosSConfig",
    tokenizer: "PreTrainedTokenizerBase",
    positions: int | None,
) -> tuple[Any, Any]:
    """Samples for training and for evaluation, or None for those, in which no text is longer than `positions`."""
    from datasets import concatenate_datasets

    from ..training.checks import check_samples
    from ..training.data import prepare_dataset
    from ..training.feature_store import FeatureDataset, is_feature_store

    def prepare(dataset: Any) -> Any:
        samples = prepare_dataset(
            dataset, tokenizer, arguments.max_length, arguments.packing, arguments.dataset_text_field
        )
        check_samples(samples, config.num_draft_positions, positions)
        return samples

    if not 0 <= args.eval_share < 1:
        raise ValueError(f"`--eval_share` is {args.eval_share}; expected a share from 0 to 1.")
    eval_dataset = _load(args, args.eval_dataset, args.eval_split or args.dataset_split) if args.eval_dataset else None
    stores = [name for name in args.dataset if is_feature_store(name)]
    if args.eval_share and (stores or args.streaming):
        raise ValueError(
            f"`--eval_share` cannot divide {'a feature store' if stores else 'a stream'}. Name evaluation data with "
            "`--eval_dataset`."
        )
    if stores:
        if len(args.dataset) > 1:
            raise ValueError(f"{stores[0]} is a feature store, which cannot be joined with other data. Name it alone.")
        store = FeatureDataset(stores[0])
        store.check(config)
        check_samples(store.without_features(), config.num_draft_positions)
        return store, None if eval_dataset is None else prepare(eval_dataset)
    train, held_out = [], []
    for name in args.dataset:
        dataset = _load(args, name, args.dataset_split)
        if args.streaming:
            dataset = dataset.shuffle(seed=arguments.seed, buffer_size=_SHUFFLED_ROWS)
        elif args.eval_share and eval_dataset is None:
            parts = dataset.train_test_split(args.eval_share, seed=arguments.seed)
            dataset = parts["train"]
            held_out.append(prepare(parts["test"]))
        train.append(prepare(dataset))
    if eval_dataset is not None:
        held_out = [prepare(eval_dataset)]
    return concatenate_datasets(train), concatenate_datasets(held_out) if held_out else None


def _load(args: argparse.Namespace, name: str, split: str) -> Any:
    from ..training.datasets import load_texts

    return load_texts(name, args.dataset_config, split=split, streaming=args.streaming)


def _provenance(args: argparse.Namespace) -> dict[str, Any]:
    from ..hub.provenance import dataset_fields

    return {**dataset_fields(args.dataset), "init_from": args.init_from_eagle}
