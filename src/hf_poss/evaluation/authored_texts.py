"""Answers token by token, with who wrote each: the target, or which specialist."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..configuration_poss import specialist_index
from ..statistics import TARGET
from .records import QuestionRecord
from .results import paired_records


__all__ = ["AuthoredPiece", "AuthoredText", "authored_texts"]

_SHOWN_TOKENS = 240


@dataclass(frozen=True)
class AuthoredPiece:
    """A token.

    Args:
        text: of it.
        specialist: that drafted it (0-based); None if the target picked it.
        position: the draft position, 0 for the target.
    """

    text: str
    specialist: int | None
    position: int


@dataclass(frozen=True)
class AuthoredText:
    """An answer.

    Args:
        title: prompt set, question and drafter.
        pieces: its first tokens.
        left_out: tokens behind these.
        shares: by author, how many tokens of the whole answer.
    """

    title: str
    pieces: list[AuthoredPiece]
    left_out: int
    shares: list[tuple[str, int]]


def authored_texts(folder: str | os.PathLike, about: Mapping[str, Any]) -> list[AuthoredText]:
    """Of each prompt set one question, as each drafter of specialists answered it at the lowest temperature and
    batch size.

    Args:
        folder: of the evaluation.
        about: its `evaluation.json`.
    """
    sizes = {
        drafter["name"]: (drafter["positions_per_specialist"], drafter["num_specialists"])
        for drafter in about["drafters"]
        if drafter["kind"] == "poss"
    }
    records = [pair.record for pair in paired_records(folder) if pair.record.drafter in sizes]
    lowest = min(((record.temperature, record.batch_size) for record in records), default=None)
    questions: dict[str, str] = {}
    chosen: dict[tuple[str, str], QuestionRecord] = {}
    for record in records:
        if (record.temperature, record.batch_size) != lowest:
            continue
        if record.question == questions.setdefault(record.benchmark, record.question):
            chosen.setdefault((record.benchmark, record.drafter), record)
    return [
        text
        for benchmark in questions
        for drafter, size in sizes.items()
        if (benchmark, drafter) in chosen
        for text in _answers(chosen[benchmark, drafter], *size)
    ]


def _answers(record: QuestionRecord, positions_per_specialist: int, num_specialists: int) -> Iterator[AuthoredText]:
    def specialist(position: int) -> int | None:
        return None if position == TARGET else specialist_index(position, positions_per_specialist, num_specialists)

    for number, turn in enumerate(record.turns, start=1):
        pieces = [
            AuthoredPiece(text, specialist(position), position)
            for text, position in zip(turn.pieces, turn.authors, strict=True)
        ]
        authors = [piece.specialist for piece in pieces]
        shares = [("target", authors.count(None))]
        shares += [(f"specialist {index + 1}", authors.count(index)) for index in range(num_specialists)]
        of_turn = f", turn {number}" if len(record.turns) > 1 else ""
        yield AuthoredText(
            f"{record.benchmark}, question {record.question}{of_turn}: {record.drafter}",
            pieces[:_SHOWN_TOKENS],
            max(len(pieces) - _SHOWN_TOKENS, 0),
            shares,
        )
