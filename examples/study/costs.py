"""The study's tables of time and memory, from what `hf-poss evaluate` and `hf-poss profile` wrote."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tables import p_text, table


def read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.is_file() else None


def speed_table(results: Mapping[str, Any] | None) -> str:
    """tau, rho and speed-up by drafter on the first prompt set, at the first temperature."""
    rows = []
    for name, figures in _figures(results).items():
        low, high = figures["intervals"]["speed_up"] or (None, None)
        rows.append(
            [
                name,
                str(figures["questions"]),
                str(len(figures["runs"]["indices"])) if figures["runs"] else "1",
                f"{figures['tau_macro'] or 1.0:.2f}",
                f"{figures['rho']:.2f}",
                _over_runs(figures, "speed_up"),
                "–" if low is None else f"{low:.2f} to {high:.2f}",
            ]
        )
    return table(["drafter", "prompts", "seeds", "tau, macro", "rho", "speed-up", "95% over prompts"], rows)


def _figures(results: Mapping[str, Any] | None) -> dict[str, Any]:
    if results is None:
        return {}
    return next(iter(results["temperatures"][0]["benchmarks"].values()))


def _over_runs(figures: Mapping[str, Any], ratio: str) -> str:
    runs = figures["runs"]
    if runs is None:
        return f"{figures[ratio]:.2f}x"
    return f"{runs['mean'][ratio]:.2f}x ± {runs['deviation'][ratio]:.2f}"


def speed_comparisons(results: Mapping[str, Any] | None, pairs: Sequence[tuple[str, str]]) -> str:
    """Speed-up of the first of each pair less that of the second, paired over prompts; Holm over all pairs that
    `hf-poss evaluate` compared."""
    rows = []
    comparisons = [] if results is None else results["temperatures"][0]["comparisons"]
    for a, b in pairs:
        for of in comparisons:
            if of["measure"] == "speed-up" and {of["a"], of["b"]} == {a, b}:
                sign = 1 if of["a"] == a else -1
                low, high = sorted(sign * end for end in of["interval"])
                rows.append(
                    [
                        f"{a} – {b}",
                        f"{sign * of['difference']:+.3f}",
                        f"{low:+.3f} to {high:+.3f}",
                        "–" if of["effect_size"] is None else f"{sign * of['effect_size']:.2f}",
                        f"{p_text(of['p_adjusted'])} (n = {of['n']})",
                        "significant" if of["significant"] else "not significant",
                    ]
                )
    return table(["speed-up of", "difference", "95% over prompts", "d_z", "p", "verdict"], rows)


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
