"""`hf-poss vocabulary`: saved specialists that draft from the most frequent tokens of a dataset."""

import argparse

from .data import add_data_arguments, load_rows


__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="folder or Hub name of specialists, published checkpoints too")
    parser.add_argument("destination", metavar="DST", help="folder to write")
    extent = parser.add_mutually_exclusive_group(required=True)
    extent.add_argument("--size", type=int, help="tokens to draft from")
    extent.add_argument("--coverage", type=float, help="share of the dataset's tokens to make up, such as 0.99")
    add_data_arguments(parser)
    parser.add_argument("--max_length", type=int, default=2048, help="tokens of a text (default: %(default)s)")
    parser.add_argument("--tokenizer", help="folder or Hub name (default: the target that SRC was made for)")
    parser.add_argument("--positions_per_specialist", type=int, help="where the name of SRC does not say it")


def run(args: argparse.Namespace) -> int:
    import transformers
    from transformers import AutoTokenizer

    from ..modeling_poss import PosSModel
    from ..training.data import prepare_dataset
    from ..training.token_counts import token_counts

    transformers.utils.logging.disable_progress_bar()
    rows = load_rows(args)
    given = (
        {} if args.positions_per_specialist is None else {"positions_per_specialist": args.positions_per_specialist}
    )
    poss = PosSModel.from_pretrained(args.source, **given)
    name = args.tokenizer or poss.config.target_name_or_path
    if name is None:
        raise ValueError(f"{args.source} does not say which target it was made for. Name it: `--tokenizer TARGET`.")
    tokenizer = AutoTokenizer.from_pretrained(name)
    samples = prepare_dataset(rows, tokenizer, args.max_length, text_field=args.dataset_text_field)
    counts = token_counts(samples, poss.config.vocab_size)
    poss.set_draft_vocabulary(counts, args.size, args.coverage, tokenizer)
    poss.save_pretrained(args.destination)
    covered = counts[poss.draft_vocabulary].sum() / counts.sum()
    print(
        f"{args.destination}: drafts from {len(poss.draft_vocabulary):,} of {poss.config.vocab_size:,} tokens, "
        f"{covered:.2%} of the {counts.sum():,} that count in {args.dataset}"
    )
    return 0
