"""`hf-poss regenerate`: the target answers the prompts of a dataset itself."""

import argparse
import hashlib
from typing import Any

from .data import add_data_arguments, load_rows
from .generate import add_model_arguments, check_loading, load_target, target_names


__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_data_arguments(parser)
    parser.add_argument("--prompt_tokens", type=int, default=64, help="kept of plain text (default: %(default)s)")
    parser.add_argument("--output", required=True, help="the jsonl file to write; the same command again goes on")
    parser.add_argument("--max_new_tokens", type=int, default=1024, help="of an answer (default: %(default)s)")
    parser.add_argument("--max_length", type=int, help="of a prompt and its answer (default: the target's positions)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 for greedy (default: %(default)s)")
    parser.add_argument("--top_p", type=float, default=1.0, help="(default: %(default)s)")
    parser.add_argument("--top_k", type=int, default=0, help="0 for all tokens (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help="prompts at once (default: %(default)s)")
    parser.add_argument("--poss", help="folder or Hub name of specialists that draft: the same text, sooner")
    parser.add_argument("--positions_per_specialist", type=int, help="for published checkpoints that do not say it")
    parser.add_argument("--drop_unfinished", action="store_true", help="leave out answers cut at --max_new_tokens")
    parser.add_argument("--shard", type=int, help="number of this launch, from 0, of --num_shards")
    parser.add_argument("--num_shards", type=int, help="launches that share the work, beside torchrun's processes")
    parser.add_argument("--merge", action="store_true", help="only join what all processes wrote")


def run(args: argparse.Namespace) -> int:
    from transformers import AutoConfig, AutoTokenizer

    from ..training.regenerated import RegeneratedData
    from ..training.regeneration import Sampling
    from ..training.requests import request_maker
    from ..training.shares import Share

    data = RegeneratedData(args.output)
    if args.merge:
        return _join(data, args)
    share = Share.of_process(args.shard, args.num_shards)
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, args.top_k, args.seed)
    if args.batch_size < 1:
        raise ValueError(f"`--batch_size` is {args.batch_size}; expected 1 or more.")
    check_loading(args)
    dataset = load_rows(args)
    config = AutoConfig.from_pretrained(args.target, **target_names(args))
    tokenizer = AutoTokenizer.from_pretrained(args.target, **target_names(args))
    if args.max_length is None:
        args.max_length = getattr(config.get_text_config(), "max_position_embeddings", None)
    if args.max_length is not None and args.max_length <= args.max_new_tokens:
        raise ValueError(
            f"`--max_new_tokens` is {args.max_new_tokens}, and a prompt with its answer has {args.max_length} tokens "
            "at most: there is no room for a prompt. Lower it, or raise `--max_length`."
        )
    make = request_maker(dataset.column_names, tokenizer, args.dataset_text_field, args.prompt_tokens)
    make(0, dataset[0])  # a dataset that cannot be asked shows here, not when the target is loaded
    data.begin(_settings(args, config, tokenizer, dataset, sampling))
    if not data.is_whole:
        finished = data.records.finished()
        own = [number for number in range(len(dataset)) if share.owns(number)]
        missing = [number for number in own if number not in finished]
        if missing:
            requests = (make(number, dataset[number]) for number in missing)
            _write(args, data, requests, sampling, share, total=len(own), initial=len(own) - len(missing))
        there = len(data.records.finished())
        if there < len(dataset):
            print(f"{there} of {len(dataset)} records are there; the process that writes the last one joins them.")
            return 0
        return _join(data, args)
    return _tell(args)


def _settings(args: argparse.Namespace, config: Any, tokenizer: Any, dataset: Any, sampling: Any) -> dict[str, Any]:
    """All that the text of the records depends on."""
    from dataclasses import asdict

    from transformers import GenerationConfig

    from ..compatibility import commit_of
    from ..training.regenerated import rows_digest
    from ..training.settings import deciding_versions

    try:
        of_target = GenerationConfig.from_pretrained(args.target, revision=args.revision).to_diff_dict()
    except OSError:  # it has none
        of_target = {}
    of_target = {
        name: value for name, value in of_target.items() if name not in ("transformers_version", "_from_model_config")
    }
    dtype = "nf4" if args.load_in_4bit else config.dtype if args.dtype == "auto" else args.dtype
    template = tokenizer.chat_template
    return {
        "target": args.target,
        "target_commit": commit_of(config),
        "target_dtype": str(dtype).removeprefix("torch."),
        "target_generation_config": of_target,
        "chat_template": None if template is None else hashlib.sha256(str(template).encode()).hexdigest(),
        "dataset": args.dataset,
        "dataset_config": args.dataset_config,
        "dataset_split": args.dataset_split,
        "dataset_text_field": args.dataset_text_field,
        "rows": len(dataset),
        "rows_digest": rows_digest(dataset),
        "prompt_tokens": args.prompt_tokens,
        "max_length": args.max_length,
        **asdict(sampling),
        "versions": deciding_versions(),
    }


def _write(args: argparse.Namespace, data: Any, requests: Any, sampling: Any, share: Any, **progress: int) -> None:
    from tqdm.auto import tqdm

    from ..modeling_poss import PosSModel, placement
    from ..training.regeneration import end_tokens, regenerate

    share.take_device()
    target, tokenizer = load_target(args)
    poss = None
    if args.poss:
        positions = args.positions_per_specialist
        given = {} if positions is None else {"positions_per_specialist": positions}
        poss = PosSModel.from_pretrained(args.poss, **given).to(placement(target)[0]).eval()
    with (
        data.records.of_process(share.index) as output,
        tqdm(desc="Regenerating", unit="record", disable=not share.shows_progress, **progress) as bar,
    ):
        ends = end_tokens(target, tokenizer)
        for _ in regenerate(target, requests, output, sampling, ends, args.batch_size, args.max_length, poss):
            bar.update()


def _join(data: Any, args: argparse.Namespace) -> int:
    counts = data.join(args.drop_unfinished)
    print(
        f"{args.output}: {counts['written']} records; {counts['unfinished']} reached --max_new_tokens"
        f"{' and were left out' if args.drop_unfinished else ''}, {counts['skipped']} rows could not be answered "
        f"(why: `skipped` in {data.parts})."
    )
    if not counts["written"]:
        raise ValueError(f"No record of {args.dataset} is left; there is nothing to train on.")
    return _tell(args)


def _tell(args: argparse.Namespace) -> int:
    print(f"Train on it: hf-poss train --target {args.target} --dataset {args.output} --output_dir ...")
    return 0
