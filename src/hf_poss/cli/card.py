"""`hf-poss card`: the model card of a folder, from what is recorded there."""

import argparse
import sys

from .generate import add_model_arguments, load_target


__all__ = ["add_arguments", "add_record_arguments", "run", "write_records"]

_RECORDED = ("base_model", "license", "positions_per_specialist", "num_draft_positions")


def add_record_arguments(parser: argparse.ArgumentParser) -> None:
    """Options for what the records of a folder should say and do not."""
    parser.add_argument("--base_model", help="Hub name of the target, recorded in the folder")
    parser.add_argument("--license", help="identifier such as apache-2.0, recorded in the folder")
    parser.add_argument(
        "--evaluation", metavar="PATH", help="folder or results.json of `hf-poss evaluate`, recorded in the folder"
    )
    parser.add_argument("--drafter", metavar="LABEL", help="name in that evaluation, if they took part under several")


def write_records(args: argparse.Namespace) -> None:
    """Records in the folder what the options give."""
    from ..hub.record import update_training_record

    if args.evaluation is not None:
        _record_evaluation(args)
    elif args.drafter is not None:
        raise ValueError("--drafter names specialists of an evaluation: it goes with --evaluation.")
    if known := {name: value for name in _RECORDED if (value := getattr(args, name, None)) is not None}:
        update_training_record(args.folder, **known)


def _record_evaluation(args: argparse.Namespace) -> None:
    import transformers

    from ..hub.evaluation import evaluation_record, find_specialists, read_results
    from ..hub.record import write_evaluation_record

    transformers.utils.logging.disable_progress_bar()
    results = read_results(args.evaluation)
    drafter, checkpoint = find_specialists(results, args.folder, args.drafter)
    write_evaluation_record(args.folder, evaluation_record(results, drafter, checkpoint))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="specialists, saved by this package or published")
    parser.add_argument("--repo_id", help="Hub name for the examples (default: the folder's name)")
    add_record_arguments(parser)
    parser.add_argument("--positions_per_specialist", type=int, help="of a published checkpoint that does not say it")
    parser.add_argument("--num_draft_positions", type=int, help="of a published checkpoint that does not say it")
    parser.add_argument("--force", action="store_true", help="replace a README.md that was not written by hf_poss")
    group = parser.add_argument_group("speed", "--target and --prompts time the specialists, and record it, first")
    add_model_arguments(group, required=False)
    group.add_argument("--prompts", metavar="FILE", help="text file, a prompt a line")
    group.add_argument("--max_new_tokens", type=int, default=128, help="tokens a prompt (default: %(default)s)")
    group.add_argument("--repeats", type=int, default=3, help="timed pairs a prompt (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    from ..hub.card import write_card
    from ..hub.folder import read_config

    if (args.target is None) != (args.prompts is None):
        raise ValueError("--target and --prompts go together: timing needs both.")
    read_config(args.folder, args.positions_per_specialist, args.num_draft_positions)  # before anything is written
    write_records(args)
    if args.target is not None:
        _time(args)
    print(write_card(args.folder, args.repo_id, args.force))
    return 0


def _time(args: argparse.Namespace) -> None:
    from pathlib import Path

    import transformers
    from tqdm.auto import tqdm

    from ..hub.record import write_speed_record
    from ..hub.speed import measure_speed
    from ..modeling_poss import PosSModel

    prompts = [line for line in Path(args.prompts).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{args.prompts} holds no prompt; expected one a line.")
    transformers.utils.logging.disable_progress_bar()
    target, tokenizer = load_target(args)
    poss = PosSModel.from_pretrained(args.folder, dtype=target.dtype).to(target.device).eval()
    runs = len(prompts) * (2 + 2 * args.repeats)
    with tqdm(total=runs, desc="runs", leave=False, disable=not sys.stderr.isatty()) as bar:
        record = measure_speed(target, poss, tokenizer, prompts, args.repeats, args.max_new_tokens, on_run=bar.update)
    print(f"speed-up {record.speedup:.2f}x, recorded in {write_speed_record(args.folder, record)}")
