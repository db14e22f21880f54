"""`hf-poss report`: tables, figures and the report of an evaluation, made anew from its records."""

import argparse
import json


__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="that `hf-poss evaluate --output` wrote, complete or not")
    parser.add_argument("--output", help="folder of the files (default: the evaluation's)")
    parser.add_argument("--title", help="of the page (default: the target's name)")


def run(args: argparse.Namespace) -> int:
    from ..evaluation.html_report import write_report
    from ..evaluation.tables import paper_table

    written = write_report(args.folder, args.output, args.title)
    results = json.loads(written[0].read_text(encoding="utf-8"))
    print(paper_table(results))
    for path in written:
        print(path)
    return 0
