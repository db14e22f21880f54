"""Text datasets: tokenizing, packing, collating."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase


__all__ = ["PosSDataCollator", "tokenize_texts"]


def tokenize_texts(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    packing: bool = False,
    text_field: str = "text",
) -> Any:
    """A dataset with `input_ids` of 2 to `max_length` tokens; one that has them already comes back as it is.

    Each text ends with the end-of-sequence token, where the tokenizer has one.

    Args:
        dataset: a `datasets.Dataset` or `IterableDataset`, a sequence of strings, or a sequence of dicts.
        tokenizer: of the target.
        max_length: tokens a sample; a longer text is cut off, or goes on in the next sample if packed.
        packing: joins texts, so that samples are full.
        text_field: column or key of the text.

    Raises:
        ValueError: if there is no text field, or no text of two tokens or more.
    """
    from datasets import Dataset, IterableDataset

    if not isinstance(dataset, (Dataset, IterableDataset)):
        dataset = _from_sequence(dataset, text_field)
        if not isinstance(dataset, Dataset):
            return dataset
    columns = list(dataset.column_names or next(iter(dataset)))
    if "input_ids" in columns:
        return dataset
    if text_field not in columns:
        raise ValueError(
            f"The dataset has no column {text_field!r}; it has {columns}. Name the column that holds the text with "
            "`dataset_text_field`."
        )

    def tokenize(batch: dict[str, list]) -> dict[str, list]:
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        samples = [ids + end for ids in tokenizer(batch[text_field], verbose=False)["input_ids"]]
        samples = _pack(samples, max_length) if packing else [sample[:max_length] for sample in samples]
        return {"input_ids": [sample for sample in samples if len(sample) > 1]}

    progress = {} if isinstance(dataset, IterableDataset) else {"desc": "Tokenizing"}
    tokenized = dataset.map(tokenize, batched=True, remove_columns=columns, **progress)
    if isinstance(tokenized, Dataset) and len(tokenized) == 0:
        raise ValueError(
            f"The dataset has {len(dataset)} rows and no text of two tokens or more in {text_field!r}; there is "
            "nothing to learn."
        )
    return tokenized


def _from_sequence(dataset: Sequence[Any], text_field: str) -> Any:
    from datasets import Dataset

    if len(dataset) == 0:
        raise ValueError("The dataset is empty; there is nothing to learn.")
    if isinstance(dataset[0], str):
        return Dataset.from_dict({text_field: list(dataset)})
    if isinstance(dataset[0], dict) and "input_ids" not in dataset[0]:
        return Dataset.from_list(list(dataset))
    return dataset


def _pack(samples: Iterable[list[int]], max_length: int) -> list[list[int]]:
    stream = [token for sample in samples for token in sample]
    return [stream[start : start + max_length] for start in range(0, len(stream), max_length)]


@dataclass
class PosSDataCollator:
    """Pads samples on the right.

    A sample is a dict with `input_ids` and, if some tokens do not count, `labels` with -100 there. In the batch
    `labels` are -100 at padding and at the first token, whose feature nothing predicts, so that the number of other
    labels is the number of rows that count.

    Args:
        pad_token_id: what to pad `input_ids` with; never attended to.
    """

    pad_token_id: int = 0

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """int64 [batch, tokens] each: `input_ids`, `attention_mask`, `labels`."""
        rows = [torch.as_tensor(sample["input_ids"], dtype=torch.long) for sample in samples]
        labels = [torch.as_tensor(sample.get("labels", sample["input_ids"]), dtype=torch.long) for sample in samples]
        shape = (len(rows), max(len(row) for row in rows))
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, -100),
        }
        for index, (row, label) in enumerate(zip(rows, labels, strict=True)):
            batch["input_ids"][index, : len(row)] = row
            batch["attention_mask"][index, : len(row)] = 1
            batch["labels"][index, 1 : len(row)] = label[1:]
        return batch
