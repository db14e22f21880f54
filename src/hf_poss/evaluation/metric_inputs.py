"""Inputs of the `evaluate` modules, one entry a text: from what `generate` counted, or from an evaluation's records.

A name means the same in every module, so that one call serves modules that are combined.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..statistics import GenerationStatistics


if TYPE_CHECKING:
    from .records import QuestionRecord, TurnRecord


__all__ = ["record_inputs", "statistics_inputs"]


def statistics_inputs(statistics: GenerationStatistics) -> dict[str, Any]:
    """Inputs of `acceptance_length` and `position_acceptance`: a text is a row of a `generate` call.

    Args:
        statistics: of [`collect_statistics`].

    Returns:
        `tokens`, `rounds`, `drafted`, `reached` and `accepted` by text; and `positions_per_specialist` and
        `num_specialists`, if all calls share them.

    Example:

    ```python
    >>> with collect_statistics(timed=False) as stats:
    ...     target.generate(**inputs, assistant_model=poss)
    >>> AcceptanceLength().compute(**statistics_inputs(stats))
    ```"""
    calls = statistics.calls
    names = ("tokens", "rounds", "drafted", "reached", "accepted")
    columns: dict[str, Any] = {name: [getattr(call, name) for call in calls] for name in names}
    for name in ("positions_per_specialist", "num_specialists"):
        if len(values := {getattr(call, name) for call in calls}) == 1:
            columns[name] = values.pop()
    return columns


def record_inputs(
    records: Iterable["QuestionRecord"], plain: Iterable["QuestionRecord"] | None = None
) -> dict[str, list[Any]]:
    """Inputs of the modules from records of `hf-poss evaluate`: a text is an answer, one a turn of a question.

    Args:
        records: of one drafter.
        plain: records of plain decoding, which may hold more questions; without them only inputs of
            `acceptance_length` and `position_acceptance` are returned.

    Returns:
        `tokens`, `rounds`, `drafted`, `reached` and `accepted` by text; with `plain` also `predictions` and
        `references` (token ids), `new_tokens`, `seconds`, `prompt_seconds` and `passes`, and these four and `tokens`
        of plain decoding, their names with `plain_` before them.

    Raises:
        ValueError: if plain decoding did not answer all turns of a question at the same temperature, seed and
            batch size.
    """
    records = list(records)
    turns = [turn for record in records for turn in record.turns]
    columns = _columns(turns, ("tokens", "rounds", "drafted", "reached", "accepted"))
    if plain is None:
        return columns
    answers = {record.asked: record.turns for record in plain}
    if missing := [record for record in records if len(answers.get(record.asked, ())) < len(record.turns)]:
        raise ValueError(
            f"Plain decoding has no answer to {len(missing)} of {len(records)} questions, the first of them "
            f"{missing[0].asked}. Give the records of plain decoding of the same evaluation."
        )
    plain_turns = [turn for record in records for turn in answers[record.asked][: len(record.turns)]]
    columns |= _timed(turns) | {f"plain_{name}": values for name, values in _timed(plain_turns).items()}
    return columns | {
        "predictions": [turn.token_ids for turn in turns],
        "references": [turn.token_ids for turn in plain_turns],
    }


def _columns(turns: Sequence["TurnRecord"], names: Sequence[str]) -> dict[str, list[Any]]:
    return {name: [getattr(turn, name) for turn in turns] for name in names}


def _timed(turns: Sequence["TurnRecord"]) -> dict[str, list[Any]]:
    columns = _columns(turns, ("tokens", "seconds", "prompt_seconds", "passes"))
    return columns | {"new_tokens": [len(turn.token_ids) for turn in turns]}
