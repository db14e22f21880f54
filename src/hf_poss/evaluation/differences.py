"""Where two texts part."""

from collections.abc import Sequence
from typing import Any


__all__ = ["first_difference"]


def first_difference(one: Sequence[Any], other: Sequence[Any]) -> int | None:
    """Index of the first element that differs; the length of the shorter one, if the other goes on behind it; None if
    they are the same.

    [5, 6, 7] and [5, 9, 7] part at 1, [5, 6] and [5, 6, 7] at 2.

    Args:
        one, other: token ids, or characters of strings.
    """
    for index, (element, its) in enumerate(zip(one, other, strict=False)):
        if element != its:
            return index
    return None if len(one) == len(other) else min(len(one), len(other))
