"""Documents to samples of even length."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import pairwise

import torch


__all__ = ["best_fit_decreasing", "document_starts", "pieces"]


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Groups of documents whose lengths add up to at most `capacity`; the longest first, each where it fits tightest
    (best-fit decreasing bin packing; Ding et al., "Fewer Truncations Improve Language Modeling", 2024).

    Returns:
        Indices into `lengths`, each once, ascending in a group.
    """
    groups: list[list[int]] = []
    room: list[tuple[int, int]] = []  # tokens left and group, ascending
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = bisect_left(room, (lengths[index], -1))
        if place == len(room):
            left, group = capacity, len(groups)
            groups.append([])
        else:
            left, group = room.pop(place)
        groups[group].append(index)
        insort(room, (left - lengths[index], group))
    return [sorted(group) for group in groups]


def pieces(length: int, max_length: int) -> list[slice]:
    """A text of `length` tokens in pieces of at most `max_length`. None has one token, in which nothing is predicted,
    unless `length` is 1 or `max_length` leaves no other way."""
    borders = [*range(0, length, max_length), length]
    if len(borders) > 2 and borders[-1] - borders[-2] == 1 and max_length > 2:
        borders[-2] -= 1
    return [slice(start, end) for start, end in pairwise(borders)]


def document_starts(length: int, segment_ids: torch.Tensor | None = None) -> torch.Tensor:
    """Bool [tokens]: where a document begins.

    Args:
        length: number of tokens.
        segment_ids: int64 [tokens], the document of every token; None if all are of one.
    """
    starts = torch.zeros(length, dtype=torch.bool)
    if segment_ids is not None:
        starts[1:] = segment_ids[1:] != segment_ids[:-1]
    starts[:1] = True
    return starts
