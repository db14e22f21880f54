"""Lengths of samples, without reading more of them than their tokens."""

from typing import Any

from transformers.trainer_utils import has_length


__all__ = ["sample_lengths"]


def sample_lengths(dataset: Any) -> list[int] | None:
    """Tokens of each sample; None for a stream, which does not know them.

    Args:
        dataset: prepared samples with `input_ids`, or one that has `lengths` itself (a feature store).
    """
    if not has_length(dataset):
        return None
    if hasattr(dataset, "lengths"):
        return list(dataset.lengths)
    if "length" in (getattr(dataset, "column_names", None) or ()):
        return list(dataset["length"])
    if hasattr(dataset, "select_columns"):  # a `datasets.Dataset`: Arrow knows lengths without reading the lists
        import pyarrow.compute

        tables = dataset.select_columns("input_ids").with_format("arrow").iter(batch_size=10_000)
        lengths = (pyarrow.compute.list_value_length(table["input_ids"]) for table in tables)
        return [length for column in lengths for length in column.to_pylist()]
    return [len(sample["input_ids"]) for sample in dataset]
