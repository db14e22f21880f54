"""Samples to batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .packing import document_starts


__all__ = ["PosSDataCollator"]

_STORED = ("features", "target_features")


@dataclass
class PosSDataCollator:
    """Pads samples on the right.

    A sample is a dict with `input_ids`; `labels` with -100 where a token does not count; `segment_ids`, 1, 2, 3... by
    document, if several are packed into it; and `features`, [tokens, width], and `target_features`, [tokens, hidden],
    if they were stored. All but `input_ids` may be missing.

    In the batch `labels` are -100 at padding and at the first token of every document, whose feature nothing predicts,
    so that the number of other labels is the number of rows that count.

    Args:
        pad_token_id: what to pad `input_ids` with; never attended to.
    """

    pad_token_id: int = 0

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Tensors of a batch, int64 [batch, tokens] but for features.

        Returns:
            `input_ids`; `attention_mask`, 0 at padding; `labels`. If a sample is packed `segment_ids`, 0 at padding,
            and `position_ids`, which restart at every document. If samples have them, `features`
            [batch, tokens, width] and `target_features` [batch, tokens, hidden] in their dtype, 0 at padding.

        Raises:
            ValueError: if parts of a sample differ in length, or some samples have features and others not.
        """
        rows = [_as_ids(sample["input_ids"]) for sample in samples]
        labels = [_as_ids(sample.get("labels", sample["input_ids"])) for sample in samples]
        segments = [
            _as_ids(sample["segment_ids"]) if "segment_ids" in sample else torch.ones_like(row)
            for sample, row in zip(samples, rows, strict=True)
        ]
        for name, parts in (("labels", labels), ("segment_ids", segments)):
            _check_lengths(rows, parts, name)
        starts = [document_starts(len(row), segment) for row, segment in zip(rows, segments, strict=True)]
        labels = [label.masked_fill(start, -100) for label, start in zip(labels, starts, strict=True)]
        batch = {
            "input_ids": _padded(rows, self.pad_token_id),
            "attention_mask": _padded([torch.ones_like(row) for row in rows], 0),
            "labels": _padded(labels, -100),
        }
        if any("segment_ids" in sample for sample in samples):
            batch["segment_ids"] = _padded(segments, 0)
            batch["position_ids"] = _padded([_positions(start) for start in starts], 0)
        for name in _STORED:
            given = [sample[name] for sample in samples if name in sample]
            if given and len(given) < len(samples):
                raise ValueError(f"{len(given)} of {len(samples)} samples have `{name}`; expected all or none.")
            if given:
                given = [torch.as_tensor(features) for features in given]
                _check_lengths(rows, given, name)
                batch[name] = _padded(given, 0)
        return batch


def _as_ids(values: Any) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.long)


def _positions(starts: torch.Tensor) -> torch.Tensor:
    """int64 [tokens]: places in the document, from its bool [tokens] of first tokens."""
    places = torch.arange(len(starts))
    return places - places.masked_fill(~starts, 0).cummax(0).values


def _padded(parts: Sequence[torch.Tensor], value: int) -> torch.Tensor:
    padded = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=value)
    if padded.shape[1] < 2:  # a batch of single tokens has nothing to predict, which is no reason to end a run
        padded = torch.cat((padded, torch.full_like(padded, value)), dim=1)
    return padded


def _check_lengths(rows: Sequence[torch.Tensor], parts: Sequence[torch.Tensor], name: str) -> None:
    for row, part in zip(rows, parts, strict=True):
        if len(part) != len(row):
            raise ValueError(f"A sample has {len(row)} `input_ids` and {len(part)} `{name}`; expected one a token.")
