"""How often tokens occur in what is trained on."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..corpus_counts import count_ids


__all__ = ["token_counts"]

logger = logging.get_logger(__name__)


def token_counts(dataset: Any, vocab_size: int, max_samples: int | None = None) -> torch.LongTensor:
    """How often each token counts, int64 [vocab].

    Args:
        dataset: samples, see [`~hf_poss.training.data.prepare_dataset`]; tokens whose label is -100 do not count.
        vocab_size: of the target.
        max_samples: of a dataset without a length, samples to read (default: 10,000).

    Raises:
        ValueError: if a token lies outside the vocabulary.
    """
    total = len(dataset) if has_length(dataset) else None
    if total is None:
        max_samples = 10_000 if max_samples is None else max_samples
        logger.warning(f"Tokens are counted in the first {max_samples:,} samples of a stream.")
    elif max_samples is not None:
        total = min(total, max_samples)
    counts = torch.zeros(vocab_size, dtype=torch.long)
    with tqdm(desc="Counting tokens", unit="samples", total=total) as bar:
        for ids, labels, samples in _token_batches(dataset, max_samples):
            counts += count_ids(ids[labels != -100], vocab_size)
            bar.update(samples)
    return counts


def _token_batches(dataset: Any, max_samples: int | None) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Tokens and labels of samples, each int64 [tokens], and the number of samples."""
    if not hasattr(dataset, "select_columns") or not has_length(dataset):
        for sample in islice(dataset, max_samples):
            ids = torch.as_tensor(sample["input_ids"], dtype=torch.long)
            yield ids, torch.as_tensor(sample.get("labels", ids), dtype=torch.long), 1
        return
    import pyarrow.compute

    # Rows of short texts would take longer to read one by one than to count.
    samples = dataset if max_samples is None else dataset.select(range(min(max_samples, len(dataset))))
    names = [name for name in ("input_ids", "labels") if name in samples.column_names]
    for table in samples.select_columns(names).with_format("arrow").iter(batch_size=1000):
        columns = [pyarrow.compute.list_flatten(table[name]).to_numpy() for name in names]
        ids, labels = (torch.from_numpy(column.astype("int64")) for column in (columns[0], columns[-1]))
        yield ids, labels, len(table)
