"""Samples as a person reads them."""

from collections.abc import Sequence
from itertools import groupby, islice, pairwise
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .packing import document_starts


__all__ = ["describe_samples"]

_COUNTED, _OTHER, _RESET = "\033[32m", "\033[2m", "\033[0m"


def describe_samples(dataset: Any, tokenizer: PreTrainedTokenizerBase, count: int, color: bool) -> str:
    """The first `count` samples as text, with what counts in green and the rest dim, or, without `color`, with what
    counts in ⟦ ⟧; for each its number of tokens, of those that count, and of documents.

    Args:
        dataset: samples, see [`~hf_poss.training.data.prepare_dataset`].
        tokenizer: that made them.
        count: samples to show.
        color: whether to write terminal colours.

    Raises:
        ValueError: if `count` is less than 1.
    """
    if count < 1:
        raise ValueError(f"{count} samples to show (`--preview`); expected 1 or more.")
    samples = islice(dataset, count)
    return "\n\n".join(
        _describe(sample, tokenizer, f"sample {number}", color) for number, sample in enumerate(samples, start=1)
    )


def _describe(sample: dict[str, Any], tokenizer: PreTrainedTokenizerBase, title: str, color: bool) -> str:
    ids = torch.as_tensor(sample["input_ids"])
    labels = torch.as_tensor(sample.get("labels", ids))
    segments = sample.get("segment_ids")
    starts = document_starts(len(ids), None if segments is None else torch.as_tensor(segments))
    # As in a batch, nothing predicts the first token of a document.
    counts = (labels != -100) & ~starts
    borders = [*starts.nonzero().flatten().tolist(), len(ids)]
    documents = [
        _marked(tokenizer, ids[start:end].tolist(), counts[start:end].tolist(), color)
        for start, end in pairwise(borders)
    ]
    noun = "document" if len(documents) == 1 else "documents"
    head = f"--- {title}: {len(ids)} tokens, {int(counts.sum())} count, {len(documents)} {noun} ---"
    if len(documents) > 1:
        documents = [f"[document {number}]\n{text}" for number, text in enumerate(documents, start=1)]
    return "\n".join([head, *documents])


def _marked(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], counts: Sequence[bool], color: bool) -> str:
    """Text of a document, its runs of tokens that count marked."""
    pieces, written, end = [], "", 0
    for counted, run in groupby(counts):
        end += len(list(run))
        # Decoded alone a run could lose the space in front of it.
        text = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        piece, written = text[len(written) :], text
        if color:
            style = _COUNTED if counted else _OTHER
            # A colour that spans a line break would run to the edge in some terminals.
            pieces += ["\n".join(f"{style}{line}{_RESET}" if line else "" for line in piece.split("\n"))]
        else:
            pieces += [f"⟦{piece}⟧" if counted else piece]
    return "".join(pieces)
