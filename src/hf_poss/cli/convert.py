"""`hf-poss convert`: a published checkpoint in this package's layout."""

import argparse


__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="folder or Hub name of a PosS, EAGLE-1/2 or HASS checkpoint")
    parser.add_argument("destination", metavar="DST", help="folder to write")
    parser.add_argument("--positions_per_specialist", type=int, help="where the name of SRC does not say it")
    parser.add_argument("--num_draft_positions", type=int, help="(default: positions per specialist times layers)")
    parser.add_argument(
        "--copies", action="store_true", help="SRC is one EAGLE layer; DST starts every specialist as a copy of it"
    )


def run(args: argparse.Namespace) -> int:
    import transformers

    from ..modeling_poss import PosSModel

    transformers.utils.logging.disable_progress_bar()
    names = ("positions_per_specialist", "num_draft_positions")
    positions = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    poss = (PosSModel.from_eagle if args.copies else PosSModel.from_pretrained)(args.source, **positions)
    poss.save_pretrained(args.destination)
    config = poss.config
    print(
        f"{args.destination}: {config.num_specialists} specialist(s), {config.positions_per_specialist} position(s) "
        f"each, {config.num_draft_positions} in all, hidden size {config.hidden_size}, "
        f"vocabulary {config.vocab_size}, {str(poss.dtype).removeprefix('torch.')}"
    )
    return 0
