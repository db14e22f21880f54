"""Text with every token in the colour of who wrote it, and what a run measured."""

import os
import sys
from collections.abc import Sequence
from itertools import groupby
from typing import Any, TextIO

from ..statistics import CallStatistics, GenerationStatistics


__all__ = ["colored_text", "describe_authors", "describe_statistics", "legend", "uses_color"]

_RESET = "\033[0m"
_TARGET_STYLE = "\033[1m"
# Dark and light backgrounds both show these; after the last, colours start again.
_SPECIALIST_STYLES = ("\033[32m", "\033[36m", "\033[35m", "\033[33m", "\033[34m", "\033[31m")


def uses_color(stream: TextIO | None = None) -> bool:
    """Whether `stream`, the standard output by default, is a terminal that wants colours (https://no-color.org)."""
    stream = sys.stdout if stream is None else stream
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def _style(specialist: int | None) -> str:
    return _TARGET_STYLE if specialist is None else _SPECIALIST_STYLES[specialist % len(_SPECIALIST_STYLES)]


def colored_text(tokenizer: Any, tokens: Sequence[int], call: CallStatistics, color: bool) -> str:
    """The new tokens of a call as text, in the colours of `call.authors`; plain text without `color`."""
    if not color:
        return tokenizer.decode(tokens, skip_special_tokens=True)
    pieces = []
    runs = groupby(zip(tokens, call.authors, strict=True), key=lambda pair: call.specialist_of(pair[1]))
    for specialist, run in runs:
        text = tokenizer.decode([token for token, _ in run], skip_special_tokens=True)
        # A colour that spans a line break would run to the edge in some terminals.
        pieces.append("\n".join(f"{_style(specialist)}{line}{_RESET}" if line else "" for line in text.split("\n")))
    return "".join(pieces)


def legend(num_specialists: int) -> str:
    """One coloured word for each who may have written a token."""
    names = [f"{_style(index)}specialist {index + 1}{_RESET}" for index in range(num_specialists)]
    return "  ".join([f"{_style(None)}target{_RESET}", *names])


def describe_authors(stats: GenerationStatistics) -> str:
    """Who wrote how many of the new tokens."""
    authors = [call.specialist_of(author) for call in stats.calls for author in call.authors]
    specialists = max((call.num_specialists for call in stats.calls), default=0)
    parts = [f"target {authors.count(None)}"]
    parts += [f"specialist {index + 1} {authors.count(index)}" for index in range(specialists)]
    return f"written by: {', '.join(parts)} (tokens)"


def describe_statistics(stats: GenerationStatistics) -> str:
    """tau, pos-acc and the time of a round's parts."""
    rates = "  ".join(f"{k}: {rate:.2f}" for k, rate in enumerate(stats.pos_acc, start=1))
    lines = [f"tau {stats.tau:.2f} ({stats.tokens} tokens in {stats.rounds} rounds)", f"pos-acc  {rates}"]
    if stats.rounds:
        parts = {
            "drafting": stats.drafting_seconds,
            "verifying": stats.verifying_seconds,
            "other": stats.other_seconds,
        }
        total = sum(parts.values())
        lines.append("time  " + ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in parts.items()))
    return "\n".join(lines)
