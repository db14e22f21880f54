"""Options for a dataset, which commands that read one share."""

import argparse


__all__ = ["add_data_arguments", "load_rows"]


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dataset", required=True, help="file, folder or Hub name: chats, prompts with completions, or plain text"
    )
    parser.add_argument("--dataset_config", help="configuration of a Hub dataset")
    parser.add_argument("--dataset_split", default="train", help="(default: %(default)s)")
    parser.add_argument("--dataset_text_field", default="text", help="column of plain text (default: %(default)s)")
    parser.add_argument("--max_rows", type=int, help="take the first ones only")
    parser.add_argument("--streaming", action="store_true", help="download no more of a dataset than --max_rows")


def load_rows(args: argparse.Namespace):
    """The rows that [`add_data_arguments`] asks for, a `datasets.Dataset`.

    Raises:
        ValueError: if there are none, or a stream without an end is asked for.
    """
    from datasets import Dataset

    from ..training.datasets import load_texts

    limit = args.max_rows
    if limit is not None and limit < 1:
        raise ValueError(f"`--max_rows` is {limit}; expected 1 or more.")
    if args.streaming and limit is None:
        raise ValueError("`--streaming` needs `--max_rows`: the work is divided by the number of rows.")
    dataset = load_texts(args.dataset, args.dataset_config, args.dataset_split, args.streaming)
    if args.streaming:
        dataset = Dataset.from_list(list(dataset.take(limit)))
    elif limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    if not len(dataset):
        raise ValueError(f"{args.dataset} has no rows.")
    return dataset
