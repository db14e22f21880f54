"""The study's tables of time and memory, from what `hf-poss evaluate` and `hf-poss profile` wrote."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from results import Difference
from tables import difference_table, table

from hf_poss.evaluation.significance import Comparison, Interval, corrected
from hf_poss.evaluation.tallies import unit_of


def read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.is_file() else None


def speed_table(results: Mapping[str, Any] | None, batch_size: int = 1) -> str:
    """tau, rho and speed-up by drafter on the first prompt set, at the lowest temperature.

    A row's tokens a pass are tau, micro, of one row; of several less, since a call lasts as long as its slowest row.
    """
    decoding = _decoding(results, batch_size)
    figures_of = {} if decoding is None else next(iter(decoding["benchmarks"].values()))
    unit, rows = unit_of("speed_up", batch_size), []
    for name, figures in figures_of.items():
        low, high = figures["intervals"]["speed_up"] or (None, None)
        rows.append(
            [
                name,
                str(figures[unit]),
                str(len(figures["runs"]["indices"])) if figures["runs"] else "1",
                f"{figures['tau_macro'] or 1.0:.2f}",
                f"{figures['tokens'] / (figures['passes'] * batch_size):.2f}",
                f"{figures['rho']:.2f}",
                _over_runs(figures, "speed_up"),
                "–" if low is None else f"{low:.2f} to {high:.2f}",
            ]
        )
    told = "prompts" if batch_size == 1 else "calls"
    return table(
        ["drafter", told, "seeds", "tau, macro", "a row's tokens a pass", "rho", "speed-up", f"95% over {told}"], rows
    )


def _decoding(results: Mapping[str, Any] | None, batch_size: int) -> dict[str, Any] | None:
    """The lowest temperature's; None where there is none of that batch size."""
    decodings = [] if results is None else results["decodings"]
    return next((of for of in decodings if of["batch_size"] == batch_size), None)


def _over_runs(figures: Mapping[str, Any], ratio: str) -> str:
    runs = figures["runs"]
    if runs is None:
        return f"{figures[ratio]:.2f}x"
    return f"{runs['mean'][ratio]:.2f}x ± {runs['deviation'][ratio]:.2f}"


def speed_comparisons(results: Mapping[str, Any] | None, pairs: Sequence[tuple[str, str]], batch_size: int = 1) -> str:
    """Speed-up of the first of each pair less that of the second, paired over seeds and over prompts; one family.

    Args:
        pairs: in the order in which `hf-poss evaluate` compares them, the later drafter first; others are left out.
    """
    decoding = _decoding(results, batch_size)
    if decoding is None:
        return table([], [])
    over_seeds, over_prompts = (
        _speed_up_by_pair(decoding[of]) for of in ("comparisons_over_checkpoints", "comparisons")
    )
    found = [pair for pair in pairs if pair in over_seeds and pair in over_prompts]
    by_seed, by_prompt = (corrected([of[pair] for pair in found]) for of in (over_seeds, over_prompts))
    return difference_table([Difference(*of) for of in zip(by_seed, by_prompt, strict=True)], "speed-up")


def _speed_up_by_pair(comparisons: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], Comparison]:
    names = [field.name for field in dataclasses.fields(Comparison)]
    return {
        (of["a"], of["b"]): Comparison(**{name: of[name] for name in names} | {"interval": Interval(*of["interval"])})
        for of in comparisons
        if of["measure"] == "speed-up" and of["interval"] is not None
    }


def memory_table(profile: Mapping[str, Any] | None, unit: str = "MiB") -> str:
    """Bytes by drafter and planned batch: predicted parts, predicted and, where there is one, measured peak."""
    if profile is None:
        return table([], [])
    scale = {"MiB": 2**20, "GiB": 2**30}[unit]
    measured = {(case["context"], case["rows"]): case["memory"] for case in profile["cases"]}
    rows = []
    for index, case in enumerate(profile["planned"]):
        context, batch = case["context"], case["rows"]
        for name, by_case in profile["predictions"].items():
            of, held = by_case[index], measured.get((context, batch), {}).get(name)
            rows.append(
                [
                    f"{context} tokens, {batch} row{'s' if batch > 1 else ''}",
                    name,
                    *(
                        f"{of[part] / scale:.2f}"
                        for part in ("drafter_weights", "copies", "specialist_caches", "target_cache", "peak")
                    ),
                    "–" if held is None else f"{held['peak'] / scale:.2f}",
                ]
            )
    head = ["context", "drafter", "its weights", "copies", "its caches", "target's cache", "peak, predicted"]
    return table([*head, "peak, measured"], rows)
