"""The study's figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from plan import POSITIONS
from results import Results
from tables import title

from hf_poss.evaluation.significance import student_interval


# Okabe and Ito's palette, with a marker each.
_STYLES = (("#000000", "o"), ("#E69F00", "s"), ("#0072B2", "^"), ("#009E73", "D"), ("#CC79A7", "v"), ("#D55E00", "P"))


def _band(axis: Axes, places: Sequence[float], by_seed: Sequence[Sequence[float]], label: str, index: int) -> None:
    """A line of means with Student's 95% interval over seeds."""
    columns = list(zip(*by_seed, strict=True))
    means = [sum(column) / len(column) for column in columns]
    color, marker = _STYLES[index % len(_STYLES)]
    axis.plot(places, means, color=color, marker=marker, markersize=4, label=label)
    intervals = [student_interval(column) for column in columns]
    if all(interval is not None for interval in intervals):
        axis.fill_between(places, *zip(*intervals, strict=True), color=color, alpha=0.15, linewidth=0)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def draw_pos_acc(results: Results, panels: Mapping[str, Sequence[str]], path: Path) -> None:
    figure, axes = plt.subplots(1, len(panels), figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, (name, conditions) in zip(axes, panels.items(), strict=True):
        for index, condition in enumerate(conditions):
            by_seed = list(results.pos_acc_by_seed(condition, "chain").values())
            if by_seed:
                _band(axis, range(1, POSITIONS + 1), by_seed, title(condition), index)
        axis.set(title={"token": "token loss", "paper": "feature and token loss"}[name], xlabel="draft position")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("pos-acc")
    axes[-1].legend(fontsize=8)
    _save(figure, path)


def draw_depths(results: Results, conditions: Sequence[str], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    for index, condition in enumerate(condition for condition in conditions if results.seeds(condition)):
        suites = [*(f"chain, depth {depth}" for depth in range(1, POSITIONS)), "chain"]
        taus = [results.tau_by_seed(condition, suite) for suite in suites]
        seeds = sorted(set.intersection(*map(set, taus)))
        if seeds:
            by_seed = [[of[seed] for of in taus] for seed in seeds]
            _band(axis, range(1, POSITIONS + 1), by_seed, title(condition), index)
    axis.set(xlabel="depth of the chain", ylabel="tau")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8)
    _save(figure, path)


def draw_curves(results: Results, conditions: Sequence[str], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    for index, condition in enumerate(conditions):
        runs = [run["training"]["simulated"] for run in results.seeds(condition).values()]
        if runs:
            steps = [int(step) for step in runs[0]]
            by_seed = [[of["tau"] for of in run.values()] for run in runs]
            label = f"{title(condition)}, {steps[-1]} steps"
            _band(axis, steps, by_seed, label, index)
    axis.set(xlabel="step", ylabel="simulated tau, held-out text")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8)
    _save(figure, path)
