"""The study's tables, in Markdown, each by a function of the results."""

from collections.abc import Sequence

from plan import POSITIONS
from results import Difference, Results, differences

from hf_poss.evaluation.significance import mean_and_deviation, student_interval
from hf_poss.measures import expected_tau


NOT_MEASURED = "Not measured yet."
TITLES = {
    "start": "EAGLE start",
    "eagle": "EAGLE",
    "hass": "HASS, one layer",
    "poss1": "PosS-1",
    "poss2": "PosS-2",
    "poss3": "PosS-3",
    "poss4": "PosS-4",
    "wide": "one wide layer",
    "lora2": "PosS-2, adapters",
    "eagle-compute": "EAGLE, steps x 8",
}


def title(condition: str) -> str:
    return TITLES.get(condition.split("/")[-1], condition)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return NOT_MEASURED
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def deviation(values: Sequence[float], form: str = ".2f") -> str:
    mean, spread = mean_and_deviation(list(values))
    return format(mean, form) if spread is None else f"{mean:{form}} ± {spread:{form}}"


def p_text(value: float | None) -> str:
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def tau_table(results: Results, conditions: Sequence[str], suites: dict[str, str]) -> str:
    """tau by condition, mean and standard deviation over seeds.

    Args:
        suites: their names with the heads of their columns.
    """
    several = len({name.partition("/")[0] for name in conditions if "/" in name}) > 1
    told = {name: f"{title(name)} (`{name}`)" if several else title(name) for name in conditions}
    rows = []
    for name in conditions:
        if not results.seeds(name):
            continue
        cells = [_tau_cell(results, name, suite) for suite in suites]
        rows.append([told[name], str(len(results.seeds(name))), f"{results.parameters(name):,}", *cells])
    return table(["drafter", "seeds", "parameters", *suites.values()], rows)


def _tau_cell(results: Results, name: str, suite: str) -> str:
    return deviation(results.tau_by_seed(name, suite).values()) if results.has(name, suite) else "–"


def pos_acc_table(results: Results, conditions: Sequence[str], suite: str = "chain") -> str:
    """pos-acc by draft position in percent, mean ± standard deviation over seeds."""
    rows = []
    for name in conditions:
        by_seed = list(results.pos_acc_by_seed(name, suite).values())
        if by_seed:
            depth = min(map(len, by_seed))
            rows.append([title(name), *(deviation([100 * of[k] for of in by_seed], ".1f") for k in range(depth))])
    return table(["drafter", *map(str, range(1, POSITIONS + 1))], rows)


def slope_table(results: Results, conditions: Sequence[str], suite: str = "chain") -> str:
    """Change of pos-acc from each draft position to the next in points, with Student's 95% interval over seeds."""
    rows = []
    for name in conditions:
        by_seed = list(results.pos_acc_by_seed(name, suite).values())
        if len(by_seed) < 2:
            continue
        cells = []
        for k in range(1, min(map(len, by_seed))):
            changes = [100 * (of[k] - of[k - 1]) for of in by_seed]
            low, high = student_interval(changes)
            mean, _ = mean_and_deviation(changes)
            cells.append(f"{mean:+.1f} ({low:+.1f} to {high:+.1f})")
        rows.append([title(name), *cells])
    return table(["drafter", *(f"{k} to {k + 1}" for k in range(1, POSITIONS))], rows)


def position_differences(
    results: Results, pairs: Sequence[tuple[str, str]], positions: Sequence[int], suite: str = "chain"
) -> str:
    """pos-acc of the first of each pair less that of the second in points, by seed, with Student's 95% intervals."""
    rows = []
    for a, b in pairs:
        ours, theirs = results.pos_acc_by_seed(a, suite), results.pos_acc_by_seed(b, suite)
        common = sorted(set(ours) & set(theirs))
        if not common:
            continue
        cells = []
        for k in positions:
            changes = [100 * (ours[seed][k - 1] - theirs[seed][k - 1]) for seed in common]
            mean, _ = mean_and_deviation(changes)
            interval = student_interval(changes)
            told = "" if interval is None else f" ({interval.low:+.1f} to {interval.high:+.1f})"
            cells.append(f"{mean:+.1f}{told}")
        rows.append([f"{a} – {b}", *cells, str(len(common))])
    return table(["pos-acc of", *(f"position {k}" for k in positions), "n"], rows)


def depth_table(results: Results, conditions: Sequence[str]) -> str:
    """tau of chains by depth, each depth drafted for itself, beside what pos-acc at depth 8 makes expect."""
    rows = []
    for name in conditions:
        cells = []
        for depth in range(1, POSITIONS + 1):
            suite = "chain" if depth == POSITIONS else f"chain, depth {depth}"
            cells.append(_tau_cell(results, name, suite))
        rates = list(results.pos_acc_by_seed(name, "chain").values())
        if rates:
            rows.append([title(name), *cells, deviation([expected_tau(of) for of in rates])])
    return table(["drafter", *map(str, range(1, POSITIONS + 1)), "expected at 8"], rows)


def difference_table(found: Sequence[Difference], measure: str = "tau") -> str:
    """The measure of the first less that of the second, with what seeds and what prompts say of it."""
    rows = []
    for difference in found:
        seeds, prompts = difference.by_seed, difference.by_prompt
        rows.append(
            [
                f"{seeds.a} – {seeds.b}",
                f"{seeds.difference:+.3f} ({100 * seeds.difference / seeds.mean_b:+.1f}%)",
                "–" if seeds.interval is None else f"{seeds.interval.low:+.3f} to {seeds.interval.high:+.3f}",
                "–" if seeds.effect_size is None else f"{seeds.effect_size:.2f}",
                f"{p_text(seeds.p_adjusted)} (n = {seeds.n})",
                f"{prompts.interval.low:+.3f} to {prompts.interval.high:+.3f}",
                f"{p_text(prompts.p_adjusted)} (n = {prompts.n})",
                _verdict(difference),
            ]
        )
    head = ["difference", "95% over seeds", "d_z", "p, seeds", "95% over prompts", "p, prompts", "verdict"]
    return table([f"{measure} of", *head], rows)


def _verdict(difference: Difference) -> str:
    """Significant only if another seed and other prompts would both agree."""
    told = [of.p_adjusted is not None and of.p_adjusted < 0.05 for of in (difference.by_seed, difference.by_prompt)]
    return "significant" if all(told) else "not significant"


def curve_table(results: Results, conditions: Sequence[str]) -> str:
    """Simulated tau on held-out text by share of the steps, mean ± standard deviation over seeds."""
    rows = []
    for name in conditions:
        runs = [list(run["training"]["simulated"].items()) for run in results.seeds(name).values()]
        if runs:
            steps = [step for step, _ in runs[0]]
            cells = [
                f"{step}: {deviation([run[index][1]['tau'] for run in runs])}" for index, step in enumerate(steps)
            ]
            rows.append([name, *cells])
    width = max((len(row) for row in rows), default=1)
    return table(
        ["condition", *[f"point {k}" for k in range(width - 1)]], [row + [""] * (width - len(row)) for row in rows]
    )


def against(results: Results, pairs: Sequence[tuple[str, str]], suite: str = "chain") -> str:
    return difference_table(differences(results, pairs, suite))


def suite_differences(results: Results, condition: str, suites: Sequence[str], base: str) -> str:
    """tau of one condition by other suites less that by `base`, over seeds alone: prompts differ."""
    rows = []
    theirs = results.tau_by_seed(condition, base)
    for suite in suites:
        ours = results.tau_by_seed(condition, suite)
        changes = [ours[seed] - theirs[seed] for seed in sorted(set(ours) & set(theirs))]
        if changes:
            interval = student_interval(changes)
            told = "–" if interval is None else f"{interval.low:+.3f} to {interval.high:+.3f}"
            rows.append([title(condition), suite, deviation(changes, "+.3f"), told, str(len(changes))])
    return table(["drafter", "tested on", f"tau less that of {base}", "95% over seeds", "n"], rows)
