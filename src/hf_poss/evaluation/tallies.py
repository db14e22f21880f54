"""What a drafter's records of some questions add up to: counts, then ratios, then their intervals over questions.

Questions that share a call share its time. What is timed varies by batch of questions, therefore: with several rows a
call these are what intervals resample and what comparisons pair."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from ..measures import (
    DriftSums,
    added,
    by_specialist,
    expected_tau,
    mean_acceptance_length,
    mean_acceptance_length_macro,
    node_acceptance,
    position_acceptance,
    round_cost,
    speed_up,
)
from ..statistics import TARGET
from .differences import first_difference
from .records import QuestionRecord, TurnRecord
from .significance import bootstrap_sums_interval, mean_and_deviation


__all__ = ["RATIOS", "PairedRecord", "mean_over", "question_values", "tally", "unit_of"]

# What is a ratio of sums over texts; of these there are means over prompt sets, and intervals.
RATIOS = ("tau", "tau_macro", "speed_up", "decoding_speed_up")
_TIMED = ("speed_up", "decoding_speed_up")

# Columns of a question's sums, see `_sums`.
_TAUS, _TEXTS, _TOKENS, _ROUNDS = range(4)
_NEW, _SECONDS, _PLAIN_NEW, _PLAIN_SECONDS = range(4, 8)
_DECODED, _DECODING, _PLAIN_DECODED, _PLAIN_DECODING = range(8, 12)
_COLUMNS = 12


class PairedRecord(NamedTuple):
    """A drafter's record, and that of plain decoding of the same question, temperature, seed and batch
    size, if there is one."""

    record: QuestionRecord
    plain: QuestionRecord | None

    @property
    def turns(self) -> list[tuple[TurnRecord, TurnRecord | None]]:
        plain = [] if self.plain is None else self.plain.turns
        return [(turn, plain[index] if index < len(plain) else None) for index, turn in enumerate(self.record.turns)]


def tally(
    pairs: Sequence[PairedRecord],
    positions_per_specialist: int | None = None,
    num_specialists: int | None = None,
    intervals: bool = True,
) -> dict[str, Any]:
    """Counts of a drafter's records, their ratios, and what these vary by.

    Args:
        pairs: of one drafter, temperature and batch size, of one prompt set or several.
        positions_per_specialist, num_specialists: n and S, where specialists draft.
        intervals: whether to resample questions.

    Returns:
        counts first (`questions`, `batches`, `texts`, `new_tokens`, `tokens`, `rounds`, `passes`, `seconds`,
        `prompt_seconds`; `paired`, the sums of the texts that plain decoding wrote, too, with its own; `identical`,
        at temperature 0 the texts that are the same; `drafted`, `reached` and `accepted` by draft position; `written`
        by author; `drift`; `parts`), then the ratios of [`hf_poss.measures`], None where nothing was counted,
        `intervals` of 95%, and `runs`: the ratios by checkpoint or seed with mean and standard deviation.
    """
    turns = [(turn, plain) for pair in pairs for turn, plain in pair.turns]
    own = [turn for turn, _ in turns]
    paired = [(turn, plain) for turn, plain in turns if plain is not None]
    counts = {
        "questions": len(_units(pairs, "tau")),
        "batches": len(_units(pairs, "speed_up")),
        "texts": len(own),
        **_totals(own),
        "paired": {
            "texts": len(paired),
            **_totals([turn for turn, _ in paired]),
            **{f"plain_{name}": value for name, value in _totals([plain for _, plain in paired]).items()},
        },
        "identical": _identical(pairs),
        "drafted": _by_position(own, "drafted"),
        "reached": _by_position(own, "reached"),
        "accepted": _by_position(own, "accepted"),
        "written": _written(own),
        "drift": _drift(own),
        "parts": _parts(own),
    }
    counts["specialists"] = (
        _specialists(counts, positions_per_specialist, num_specialists)
        if num_specialists and counts["drafted"]
        else None
    )
    return {
        **counts,
        **_ratios(pairs),
        "rho": _rho(counts["paired"]),
        "pos_acc": position_acceptance(counts["accepted"], counts["reached"]),
        "node_acceptance": node_acceptance(counts["accepted"], counts["drafted"]),
        "expected_tau": _expected_tau(counts),
        "intervals": _intervals(pairs, len(counts["reached"])) if intervals else None,
        "runs": _runs(pairs),
    }


def mean_over(pairs: Mapping[str, Sequence[PairedRecord]]) -> dict[str, Any]:
    """Unweighted means of the ratios over prompt sets, as in the paper's table: a small set weighs as a large one.

    Intervals resample the questions, or batches, of each set apart.

    Args:
        pairs: of one drafter, temperature and batch size, by set.
    """
    names = list(pairs)
    by_set = [_sums_by_ratio(of) for of in pairs.values()]
    sums = {name: _side_by_side([of[name] for of in by_set]) for name in RATIOS}

    def mean_of(name: str, sums: np.ndarray) -> np.ndarray:  # [..., sets * columns] to [...]
        return _FROM_SUMS[name](sums.reshape(*sums.shape[:-1], len(names), _COLUMNS)).mean(-1)

    return {
        "benchmarks": names,
        "questions": len(sums["tau"][1]),
        "batches": len(sums["speed_up"][1]),
        **{name: _finite(mean_of(name, columns.sum(axis=0))) for name, (columns, _) in sums.items()},
        "intervals": {
            name: _listed(bootstrap_sums_interval(columns, lambda sums, name=name: mean_of(name, sums), strata=strata))
            for name, (columns, strata) in sums.items()
        },
        "runs": _mean_runs([_runs(pairs[name]) for name in names]),
    }


def _side_by_side(matrices: Sequence[np.ndarray]) -> tuple[np.ndarray, list[int]]:
    """Sums of several sets as one matrix [rows of all, sets * columns], each set in columns of its own, and the set of
    each row."""
    columns = np.zeros((sum(map(len, matrices)), len(matrices) * _COLUMNS))
    strata: list[int] = []
    for index, sums in enumerate(matrices):
        columns[len(strata) : len(strata) + len(sums), index * _COLUMNS : (index + 1) * _COLUMNS] = sums
        strata += [index] * len(sums)
    return columns, strata


def unit_of(name: str, batch_size: int) -> str:
    """What a ratio varies by: "questions", or "batches" where it is timed and several rows share a call."""
    return "batches" if name in _TIMED and batch_size > 1 else "questions"


def question_values(pairs: Sequence[PairedRecord], name: str) -> dict[tuple[str, str | int], float]:
    """A ratio by question, (prompt set, id), or by batch, (prompt set, index), see [`unit_of`]: over turns,
    checkpoints and seeds. Those without it are left out.

    Args:
        name: "tau_macro", the mean of the turns' tau, or another of [`RATIOS`].
    """
    units = _units(pairs, name)
    values = _FROM_SUMS[name](_sums(units))
    return {key: float(value) for key, value in zip(units, values, strict=True) if np.isfinite(value)}


# ---- Counts ----


def _units(pairs: Sequence[PairedRecord], name: str) -> dict[tuple[str, str | int], list[PairedRecord]]:
    """Records by what a ratio varies by, see [`unit_of`], in the order of the first ones."""
    units = defaultdict(list)
    for pair in pairs:
        record = pair.record
        is_batch = unit_of(name, record.batch_size) == "batches"
        units[record.benchmark, record.batch if is_batch else record.question].append(pair)
    return dict(units)


def _totals(turns: Sequence[TurnRecord]) -> dict[str, float]:
    return {
        "new_tokens": sum(len(turn.token_ids) for turn in turns),
        "tokens": sum(turn.tokens for turn in turns),
        "rounds": sum(turn.rounds for turn in turns),
        "passes": sum(turn.passes for turn in turns),
        "seconds": sum(turn.seconds for turn in turns),
        "prompt_seconds": sum(turn.prompt_seconds for turn in turns),
    }


def _identical(pairs: Sequence[PairedRecord]) -> dict[str, Any] | None:
    """Texts that plain decoding wrote just so, of how many; None where texts are drawn."""
    if any(pair.record.temperature for pair in pairs):
        return None
    same, of, differences = 0, 0, []
    for pair in pairs:
        for index, (turn, plain) in enumerate(pair.turns):
            if plain is None:
                continue
            of += 1
            place = first_difference(turn.token_ids, plain.token_ids)
            if place is None:
                same += 1
                continue
            differences.append(
                {
                    "benchmark": pair.record.benchmark,
                    "question": pair.record.question,
                    "turn": index,
                    "checkpoint": pair.record.checkpoint,
                    "token": place,
                }
            )
    return {"texts": same, "of": of, "differences": differences}


def _by_position(turns: Sequence[TurnRecord], name: str) -> list[int]:
    total: list[int] = []
    for turn in turns:
        total = added(total, getattr(turn, name))
    return total


def _written(turns: Sequence[TurnRecord]) -> dict[str, Any]:
    """New tokens by author: those that the target picked, and drafted ones by draft position - 1."""
    authors = [author for turn in turns for author in turn.authors]
    drafted = [0] * max(authors, default=0)
    for author in authors:
        if author != TARGET:
            drafted[author - 1] += 1
    return {"target": len(authors) - sum(drafted), "drafted": drafted}


def _drift(turns: Sequence[TurnRecord]) -> dict[str, Any] | None:
    measured = [turn.drift for turn in turns if turn.drift is not None]
    if not measured:
        return None
    sums = sum(measured, DriftSums())
    return {**asdict(sums), "mean_cosine": sums.mean_cosine, "mean_norm_ratio": sums.mean_norm_ratio}


def _parts(turns: Sequence[TurnRecord]) -> dict[str, Any] | None:
    """Seconds by part of a round, of the texts that were timed by part, without the pass over the prompt."""
    timed = [turn for turn in turns if turn.parts]
    if not timed:
        return None
    seconds: dict[str, float] = {}
    for turn in timed:
        for part, value in turn.parts.items():
            if part != "prompt":
                seconds[part] = seconds.get(part, 0.0) + value
    draft_passes: list[float] = []
    for turn in timed:
        draft_passes = added(draft_passes, turn.pass_seconds or [])
    return {
        "texts": len(timed),
        "passes": sum(turn.passes for turn in timed),
        "seconds": seconds,
        "draft_pass_seconds": draft_passes,
    }


def _specialists(counts: dict[str, Any], positions_per_specialist: int, num_specialists: int) -> dict[str, Any]:
    def dealt(values: Sequence[float]) -> list[float]:
        return by_specialist(values, positions_per_specialist, num_specialists)

    sums = {name: dealt(counts[name]) for name in ("drafted", "reached", "accepted")}
    return {
        **sums,
        "written": dealt(counts["written"]["drafted"]),
        "acceptance": position_acceptance(sums["accepted"], sums["reached"]),
        "node_acceptance": node_acceptance(sums["accepted"], sums["drafted"]),
    }


# ---- Ratios ----


def _ratios(pairs: Sequence[PairedRecord]) -> dict[str, float | None]:
    turns = [turn for pair in pairs for turn in pair.record.turns]
    paired = [(turn, plain) for pair in pairs for turn, plain in pair.turns if plain is not None]
    ours, plains = _totals([turn for turn, _ in paired]), _totals([plain for _, plain in paired])
    tokens, rounds = [turn.tokens for turn in turns], [turn.rounds for turn in turns]
    return {
        "tau": mean_acceptance_length(sum(tokens), sum(rounds)) or None,
        "tau_macro": mean_acceptance_length_macro(tokens, rounds) or None,
        "speed_up": speed_up(ours["new_tokens"], ours["seconds"], plains["new_tokens"], plains["seconds"]) or None,
        "decoding_speed_up": _decoding_speed_up(ours, plains),
    }


def _decoding_speed_up(ours: Mapping[str, float], plains: Mapping[str, float]) -> float | None:
    decoding = [of["seconds"] - of["prompt_seconds"] for of in (ours, plains)]
    if min(decoding) <= 0:  # the clock found no time behind the prompt
        return None
    return speed_up(ours["tokens"], decoding[0], plains["tokens"], decoding[1]) or None


def _rho(paired: Mapping[str, float]) -> float | None:
    seconds = paired["seconds"] - paired["prompt_seconds"]
    plain_seconds = paired["plain_seconds"] - paired["plain_prompt_seconds"]
    if min(seconds, plain_seconds) <= 0:
        return None
    return round_cost(seconds, paired["passes"], plain_seconds, paired["plain_passes"]) or None


def _expected_tau(counts: Mapping[str, Any]) -> float | None:
    return expected_tau(position_acceptance(counts["accepted"], counts["reached"])) if counts["reached"] else None


# ---- By question or batch, and by run ----


def _sums_by_ratio(pairs: Sequence[PairedRecord]) -> dict[str, np.ndarray]:
    """[units, columns] by ratio."""
    of_counts = of_times = _sums(_units(pairs, "tau"))
    if any(pair.record.batch_size > 1 for pair in pairs):
        of_times = _sums(_units(pairs, "speed_up"))
    return {name: of_times if name in _TIMED else of_counts for name in RATIOS}


def _sums(units: Mapping[tuple[str, str | int], Sequence[PairedRecord]]) -> np.ndarray:
    """[units, columns]: what the ratios are of."""
    rows = []
    for of_unit in units.values():
        row = [0.0] * _COLUMNS
        for turn, plain in (turns for pair in of_unit for turns in pair.turns):
            if turn.rounds:
                row[_TAUS] += turn.tokens / turn.rounds
                row[_TEXTS] += 1
            row[_TOKENS] += turn.tokens
            row[_ROUNDS] += turn.rounds
            if plain is not None:
                for column, value in (
                    (_NEW, len(turn.token_ids)),
                    (_SECONDS, turn.seconds),
                    (_PLAIN_NEW, len(plain.token_ids)),
                    (_PLAIN_SECONDS, plain.seconds),
                    (_DECODED, turn.tokens),
                    (_DECODING, turn.seconds - turn.prompt_seconds),
                    (_PLAIN_DECODED, plain.tokens),
                    (_PLAIN_DECODING, plain.seconds - plain.prompt_seconds),
                ):
                    row[column] += value
        rows.append(row)
    return np.array(rows, dtype=float).reshape(-1, _COLUMNS)


def _divided(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """NaN where there is nothing to divide by, or times are not above 0."""
    valid = denominator > 0
    return np.where(valid, numerator / np.where(valid, denominator, 1.0), np.nan)


def _rates(sums: np.ndarray, tokens: int, seconds: int, plain_tokens: int, plain_seconds: int) -> np.ndarray:
    rate = _divided(sums[..., tokens], sums[..., seconds])
    return _divided(rate, _divided(sums[..., plain_tokens], sums[..., plain_seconds]))


# The measures of `hf_poss.measures`, of arrays of sums [..., columns], which is what resampling takes.
_FROM_SUMS = {
    "tau": lambda sums: _divided(sums[..., _TOKENS], sums[..., _ROUNDS]),
    "tau_macro": lambda sums: _divided(sums[..., _TAUS], sums[..., _TEXTS]),
    "speed_up": lambda sums: _rates(sums, _NEW, _SECONDS, _PLAIN_NEW, _PLAIN_SECONDS),
    "decoding_speed_up": lambda sums: _rates(sums, _DECODED, _DECODING, _PLAIN_DECODED, _PLAIN_DECODING),
}


def _intervals(pairs: Sequence[PairedRecord], positions: int) -> dict[str, Any]:
    """95% intervals over questions or batches; of pos-acc by draft position."""
    result: dict[str, Any] = {
        name: _listed(bootstrap_sums_interval(sums, _FROM_SUMS[name])) for name, sums in _sums_by_ratio(pairs).items()
    }
    questions = _units(pairs, "tau")
    counts = np.zeros((len(questions), positions, 2))
    for row, of_question in enumerate(questions.values()):
        for turn in (turn for pair in of_question for turn in pair.record.turns):
            counts[row, : len(turn.accepted), 0] += turn.accepted
            counts[row, : len(turn.reached), 1] += turn.reached
    result["pos_acc"] = [
        _listed(bootstrap_sums_interval(counts[:, position], lambda of: _divided(of[..., 0], of[..., 1])))
        for position in range(positions)
    ]
    return result


def _runs(pairs: Sequence[PairedRecord]) -> dict[str, Any] | None:
    """The ratios by checkpoint where there are several, else by seed; None of one run."""
    for over in ("checkpoint", "seed"):
        groups = defaultdict(list)
        for pair in pairs:
            groups[getattr(pair.record, over)].append(pair)
        if len(groups) > 1:
            return _spread(over, {run: _ratios(groups[run]) for run in sorted(groups)})
    return None


def _spread(over: str, by_run: Mapping[int, Mapping[str, float | None]]) -> dict[str, Any]:
    """`over` "checkpoint" or "seed", the `indices` of the runs, and by ratio `values`, `mean` and `deviation`."""
    result: dict[str, Any] = {"over": over, "indices": list(by_run), "values": {}, "mean": {}, "deviation": {}}
    for name in RATIOS:
        values = [ratios[name] for ratios in by_run.values()]
        result["values"][name] = values
        known = None not in values
        result["mean"][name], result["deviation"][name] = mean_and_deviation(values) if known else (None, None)
    return result


def _mean_runs(by_set: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Mean over prompt sets of each run; None where sets have not the same runs, or one."""
    if None in by_set or len({(runs["over"], *runs["indices"]) for runs in by_set}) != 1:
        return None

    def mean(name: str, index: int) -> float | None:
        values = [runs["values"][name][index] for runs in by_set]
        return None if None in values else sum(values) / len(values)

    indices = by_set[0]["indices"]
    by_run = {run: {name: mean(name, index) for name in RATIOS} for index, run in enumerate(indices)}
    return _spread(by_set[0]["over"], by_run)


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _listed(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else list(interval)
