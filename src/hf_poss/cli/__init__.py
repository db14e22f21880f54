"""The command `hf-poss`: one file a subcommand, each with `add_arguments` and `run`."""

import argparse
import os
import sys
from importlib import import_module


__all__ = ["main"]

COMMANDS = {
    "demo": "complete held-out code with the pair that ships with the package",
    "benchmark": "time all ways to decode in turns, and break a round down",
    "evaluate": "the papers' experiments: drafters side by side on prompt sets, with tables, statistics and a report",
    "report": "tables, figures and the report of an evaluation, made anew from its records",
    "profile": "memory and latency of specialists, predicted and measured, and what pays",
    "check": "is this pair of a target and its specialists sound? what is wrong, and what to do",
    "generate": "complete a prompt with a target and its specialists",
    "train": "train specialists for a target, from chats or text to a model card",
    "regenerate": "let a target write the answers of a dataset itself",
    "extract": "store a target's features of a dataset, for training without running it",
    "convert": "turn a published PosS, EAGLE or HASS checkpoint into this package's layout",
    "vocabulary": "make saved specialists draft from the most frequent tokens of a dataset",
    "card": "write the model card of a folder from what is recorded there",
    "push": "upload specialists to the Hub, with their model card",
}


def main(argv: list[str] | None = None) -> int:
    """Runs a subcommand; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler would tell of each start and stop
    parser = argparse.ArgumentParser(prog="hf-poss", description="Position specialists for transformers' generate.")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, text in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=text, description=text)
        if argv[:1] == [name]:  # only the command that runs is imported
            import_module(f".{name}", __name__).add_arguments(subparser)
    args = parser.parse_args(argv)
    try:
        return import_module(f".{args.command}", __name__).run(args)
    except (OSError, ValueError) as error:
        print(f"hf-poss {args.command}: {error}", file=sys.stderr)
        return 1
