"""The results of an evaluation, computed from its records: counts, ratios, intervals, comparisons."""

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .drafters import takes_rows
from .records import EvaluationFolder
from .significance import Comparison, compare, corrected
from .tallies import PairedRecord, mean_over, question_values, tally, unit_of


__all__ = ["COMPARED", "compute_results", "paired_records"]

# What is compared between drafters, by question, and what it is called.
COMPARED = {"tau_macro": "tau", "speed_up": "speed-up"}

# Spec-Bench holds all questions of these.
_MT_BENCH, _SPEC_BENCH, _WITHIN_SPEC_BENCH = "mt_bench", "spec_bench", ("mt_bench", "qa", "sum")
# Of ten questions each: together a set of the papers, and a subtask of Spec-Bench (Xia et al., arXiv 2401.07851).
_MT_BENCH_CATEGORIES = frozenset(
    ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
)

_Decoding = tuple[float, int]  # temperature and batch size
_Cells = dict[tuple[_Decoding, str, str], list[PairedRecord]]


def paired_records(folder: str | os.PathLike) -> list[PairedRecord]:
    """Every complete record of an evaluation with that of plain decoding, in an order of their own: which process
    wrote what changes nothing."""
    records = sorted(EvaluationFolder(folder).records(), key=lambda record: record.key)
    plain_labels = _labels(EvaluationFolder(folder).about(), "plain")
    plain = {record.asked: record for record in records if record.drafter in plain_labels}
    return [PairedRecord(record, plain.get(record.asked)) for record in records]


def compute_results(folder: str | os.PathLike) -> dict[str, Any]:
    """Results of the records that a folder holds, complete or not: numbers, strings, lists and dicts.

    Args:
        folder: that `hf-poss evaluate` wrote.

    Returns:
        `evaluation`, what was run; `missing`, the questions without a record by temperature, batch size, set and
        drafter; `mean_over`, the sets that means are over; and `decodings`, an entry a temperature and batch size, the
        lowest first: `benchmarks` by set and drafter, `categories` by set, category and drafter, of sets that have
        several, and `pooled` by drafter hold what [`~hf_poss.evaluation.tallies.tally`] counts, `mean` by drafter what
        [`~hf_poss.evaluation.tallies.mean_over`] gives, and `comparisons` all pairs of drafters over the questions
        of these sets, `comparisons_by_benchmark` over those of each set, `comparisons_over_checkpoints` over
        training seeds. A list of comparisons of one measure is one family for Holm's correction, and so are those of
        all sets.

    Raises:
        FileNotFoundError, ValueError: if no evaluation was begun here, its files are damaged, or hold no record.
    """
    about = EvaluationFolder(folder).about()
    pairs = paired_records(folder)
    if not pairs:
        raise ValueError(
            f"{Path(folder)} holds no complete record yet; expected lines in records-*.jsonl. Run `hf-poss evaluate` "
            "with the same options to go on."
        )
    cells: _Cells = {}
    for pair in pairs:
        record = pair.record
        decoding = record.temperature, record.batch_size
        cells.setdefault((decoding, record.benchmark, record.drafter), []).append(pair)
    decodings = sorted({decoding for decoding, _, _ in cells})
    found = {benchmark for _, benchmark, _ in cells}
    sets = [name for name in _named(about["benchmarks"], found) if name in found]
    over = _mean_sets(sets)
    return {
        "evaluation": about,
        "missing": _missing(about, cells, sets, decodings),
        "mean_over": over,
        "mean_leaves_out": [name for name in sets if name not in over],
        "decodings": [_of_decoding(about, cells, decoding, sets, over) for decoding in decodings],
    }


def _of_decoding(
    about: Mapping[str, Any], cells: _Cells, decoding: _Decoding, sets: Sequence[str], over: Sequence[str]
) -> dict[str, Any]:
    temperature, batch_size = decoding
    labels = _named(about["drafters"], {label for _, _, label in cells})
    sizes = {
        drafter["name"]: (drafter.get("positions_per_specialist"), drafter.get("num_specialists"))
        for drafter in about["drafters"]
    }

    def present(names: Iterable[str]) -> dict[str, dict[str, list[PairedRecord]]]:  # by drafter and set
        by_label = {
            label: {name: cells[decoding, name, label] for name in names if (decoding, name, label) in cells}
            for label in labels
        }
        return {label: by_set for label, by_set in by_label.items() if by_set}

    pooled = {label: _joined(by_set) for label, by_set in present(over).items()}
    drafting = [label for label in pooled if label not in _labels(about, "plain")]
    by_benchmark = {name: {label: _joined(by_set) for label, by_set in present([name]).items()} for name in sets}

    def tallies(by_label: Mapping[str, Sequence[PairedRecord]]) -> dict[str, dict[str, Any]]:
        return {label: tally(pairs, *sizes.get(label, ())) for label, pairs in by_label.items()}

    return {
        "temperature": temperature,
        "batch_size": batch_size,
        "benchmarks": {name: tallies(by_label) for name, by_label in by_benchmark.items()},
        "categories": {
            name: {category: tallies(of_category) for category, of_category in by_category.items()}
            for name, by_category in ((name, _by_category(name, of)) for name, of in by_benchmark.items())
            if len(by_category) > 1
        },
        "pooled": tallies(pooled),
        # A mean over some of the sets would be set beside means over all.
        "mean": {label: mean_over(by_set) for label, by_set in present(over).items() if len(by_set) == len(over)},
        "comparisons": _as_dicts(_compared({"all": pooled}, drafting, batch_size)["all"]),
        "comparisons_by_benchmark": {
            name: _as_dicts(comparisons) for name, comparisons in _compared(by_benchmark, drafting, batch_size).items()
        },
        "comparisons_over_checkpoints": _as_dicts(_over_checkpoints(pooled, drafting)),
    }


def _by_category(
    benchmark: str, by_label: Mapping[str, Sequence[PairedRecord]]
) -> dict[str, dict[str, list[PairedRecord]]]:
    """Records by category and drafter, the largest categories first."""
    found: dict[str, dict[str, list[PairedRecord]]] = {}
    for label, pairs in by_label.items():
        for pair in pairs:
            category = pair.record.category
            if benchmark in (_MT_BENCH, _SPEC_BENCH) and category in _MT_BENCH_CATEGORIES:
                category = _MT_BENCH
            if category:
                found.setdefault(category, {}).setdefault(label, []).append(pair)
    return dict(sorted(found.items(), key=lambda of: (-max(map(len, of[1].values())), of[0])))


def _mean_sets(sets: Sequence[str]) -> list[str]:
    """Sets that a mean is over: no question counts twice."""
    if any(name in sets for name in _WITHIN_SPEC_BENCH):
        return [name for name in sets if name != _SPEC_BENCH]
    return list(sets)


def _missing(
    about: Mapping[str, Any], cells: _Cells, sets: Sequence[str], decodings: Sequence[_Decoding]
) -> list[dict[str, Any]]:
    """Questions that a drafter has no record of in any run, where some are."""
    wanted = {benchmark["name"]: benchmark.get("questions") for benchmark in about["benchmarks"]}
    result = []
    for decoding, name, entry in itertools.product(decodings, sets, about["drafters"]):
        temperature, batch_size = decoding
        if not takes_rows(entry["kind"], batch_size):
            continue
        drafter = entry["name"]
        found = len({pair.record.question for pair in cells.get((decoding, name, drafter), [])})
        if wanted.get(name) and found < wanted[name]:
            result.append(
                {
                    "temperature": temperature,
                    "batch_size": batch_size,
                    "benchmark": name,
                    "drafter": drafter,
                    "questions": found,
                    "of": wanted[name],
                }
            )
    return result


# ---- Comparisons ----


def _compared(
    families: Mapping[str, Mapping[str, Sequence[PairedRecord]]], drafting: Sequence[str], batch_size: int
) -> dict[str, list[Comparison]]:
    """All pairs of drafters by prompt set and measure; those of one measure are one family over all sets.

    Of speed-up plain decoding is compared, too: whether drafting pays.
    """
    result: dict[str, list[Comparison]] = {name: [] for name in families}
    for ratio, measure in COMPARED.items():
        tested = []
        for name, by_label in families.items():
            values = {
                label: question_values(pairs, ratio)
                for label, pairs in by_label.items()
                if label in drafting or ratio == "speed_up"
            }
            # The later one first: drafters are listed from the simplest on.
            tested += [
                (name, compare(values[b], values[a], names=(b, a), measure=measure, unit=unit_of(ratio, batch_size)))
                for a, b in itertools.combinations([label for label in values if values[label]], 2)
            ]
        for (name, _), comparison in zip(tested, corrected([of for _, of in tested]), strict=True):
            result[name].append(comparison)
    return result


def _over_checkpoints(pooled: Mapping[str, Sequence[PairedRecord]], drafting: Sequence[str]) -> list[Comparison]:
    """Pairs of drafters that have several checkpoints, trained from the same seeds in the same order: whether another
    training run would agree."""
    result = []
    for ratio, measure in COMPARED.items():
        values = {}
        for label in drafting:
            by_checkpoint: dict[int, list[PairedRecord]] = {}
            for pair in pooled[label]:
                by_checkpoint.setdefault(pair.record.checkpoint, []).append(pair)
            if len(by_checkpoint) > 1:
                values[label] = {index: _mean(question_values(of, ratio)) for index, of in by_checkpoint.items()}
        tested = [
            compare(values[b], values[a], names=(b, a), measure=measure, unit="training seeds")
            for a, b in itertools.combinations(values, 2)
        ]
        result += corrected(tested)
    return result


def _mean(values: Mapping[tuple[str, str | int], float]) -> float:
    return sum(values.values()) / len(values)


def _as_dicts(comparisons: Iterable[Comparison]) -> list[dict[str, Any]]:
    return [comparison.to_dict() for comparison in comparisons]


# ---- Names ----


def _labels(about: Mapping[str, Any], kind: str) -> set[str]:
    return {drafter["name"] for drafter in about["drafters"] if drafter["kind"] == kind}


def _named(entries: Sequence[Mapping[str, Any]], found: Iterable[str]) -> list[str]:
    """Names in the order in which they were asked for, then what else there is."""
    names = [entry["name"] for entry in entries]
    return [*names, *sorted(set(found) - set(names))]


def _joined(by_set: Mapping[str, Sequence[PairedRecord]]) -> list[PairedRecord]:
    return [pair for pairs in by_set.values() for pair in pairs]
