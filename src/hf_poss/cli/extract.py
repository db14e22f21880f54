"""`hf-poss extract`: a target's features on disk, for training without running it."""

import argparse

from .data import add_data_arguments, load_rows
from .generate import add_model_arguments, check_loading, load_target, target_names


__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_data_arguments(parser)
    parser.add_argument("--output", required=True, help="folder of the features; the same command again goes on")
    parser.add_argument("--max_length", type=int, default=2048, help="tokens a sample (default: %(default)s)")
    parser.add_argument("--packing", action="store_true", help="put several texts into a sample")
    parser.add_argument("--feature_layers", type=int, nargs="+", help="hidden states to store (default: the last)")
    parser.add_argument(
        "--feature_dtype",
        default="bfloat16",
        choices=("bfloat16", "float16", "float32"),
        help="of what is stored (default: %(default)s)",
    )
    parser.add_argument("--shard_size", type=float, default=1.0, help="GiB a file (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help="samples at once (default: %(default)s)")
    parser.add_argument("--shard", type=int, help="number of this launch, from 0, of --num_shards")
    parser.add_argument("--num_shards", type=int, help="launches that share the work, beside torchrun's processes")
    parser.add_argument("--estimate", action="store_true", help="only say how large it will be")


def run(args: argparse.Namespace) -> int:
    from transformers import AutoConfig, AutoTokenizer

    from ..training.checks import check_tokenizer
    from ..training.data import prepare_dataset
    from ..training.feature_store import fill_store
    from ..training.shares import Share
    from ..training.store_index import open_store, plan_store

    share = Share.of_process(args.shard, args.num_shards)
    if args.batch_size < 1:
        raise ValueError(f"`--batch_size` is {args.batch_size}; expected 1 or more.")
    if args.shard_size <= 0:
        raise ValueError(f"`--shard_size` is {args.shard_size}; expected more than 0 GiB.")
    check_loading(args)
    rows = load_rows(args)
    config = AutoConfig.from_pretrained(args.target, **target_names(args))
    tokenizer = AutoTokenizer.from_pretrained(args.target, **target_names(args))
    check_tokenizer(tokenizer, config)
    samples = prepare_dataset(rows, tokenizer, args.max_length, args.packing, args.dataset_text_field)
    index = plan_store(
        samples,
        config,
        args.feature_layers,
        args.feature_dtype,
        target_dtype="nf4" if args.load_in_4bit else None if args.dtype == "auto" else args.dtype,
        shard_bytes=int(args.shard_size * 2**30),
        target_name=args.target,
        tokenizer_name=tokenizer.name_or_path,
        dataset_name=args.dataset,
    )
    if share.shows_progress:
        print(index.describe())
    if args.estimate:
        return 0
    missing = open_store(args.output, index)
    if any(share.owns(number) for number in missing):
        share.take_device()
        target, _ = load_target(args)
        fill_store(target, samples, args.output, index, args.batch_size, share)
        missing = index.missing(args.output)
    if missing:
        print(f"{len(missing)} of {len(index.shards)} shards are missing: those of other processes.")
        return 0
    layers = "" if args.feature_layers is None else f" --feature_layers {' '.join(map(str, args.feature_layers))}"
    print(f"Train on it: hf-poss train --target {args.target} --dataset {args.output}{layers} --output_dir ...")
    return 0
