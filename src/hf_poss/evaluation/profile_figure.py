"""The figure of a profile."""

import itertools
import os
from collections.abc import Mapping
from typing import Any

from ..hub.plots import blank_figure
from .contestants import PLAIN


__all__ = ["plot_profile"]

_PARTS = ("target_weights", "drafter_weights", "copies", "target_cache", "specialist_caches", "activations")
_COLORS = ("#44546a", "#1f77b4", "#9ecae1", "#2ca02c", "#98df8a", "#d62728")
_STYLES = ("-", "--", ":", "-.")
_LINES = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#e377c2", "#17becf")
_MARKERS = ("o", "s", "^", "D", "v")


def plot_profile(path: str | os.PathLike, result: Mapping[str, Any]) -> bool:
    """Draws memory by part and, where it was measured, the time of rounds and the speed-up by depth, as a PNG.

    Args:
        path: of the PNG.
        result: of `hf-poss profile`.

    Returns:
        Whether it was drawn: without matplotlib, one line of log says that it was not.
    """
    measured = result["cases"]
    without = "the profile has no figure. pip install 'hf-poss[evaluation]'"
    figure = blank_figure((12 if measured else 6, 4), without)
    if figure is None:
        return False
    panels = figure.subplots(1, 3 if measured else 1, squeeze=False)[0]
    _draw_memory(panels[0], result)
    if measured:
        _draw_rounds(panels[1], measured)
    if "break_even" in result:
        _draw_depths(panels[2], result["break_even"]["rounds"])
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", metadata={"Software": None})
    return True


def _draw_memory(panel: Any, result: Mapping[str, Any]) -> None:
    """Stacked parts of the last case, with a mark at what was predicted."""
    index = max(len(result["cases"]) - 1, 0) if result["cases"] else len(result["planned"]) - 1
    case = result["planned"][index]
    names, parts, marks = [], [], []
    for name, of in result["predictions"].items():
        predicted = None if "reason" in of else of[index]
        held = result["cases"][index]["memory"][name] if result["cases"] else predicted
        if held is not None:
            names.append(name)
            parts.append(held)
            marks.append(None if predicted is None else predicted["peak"])
    bottom = [0.0] * len(names)
    for part, color in zip(_PARTS, _COLORS, strict=True):
        if part == "activations":  # what the peak has above all else
            heights = [max(held["peak"] / 2**20 - floor, 0.0) for held, floor in zip(parts, bottom, strict=True)]
        else:
            heights = [held[part] / 2**20 for held in parts]
        panel.bar(names, heights, bottom=bottom, color=color, width=0.6, label=part.replace("_", " "))
        bottom = [floor + height for floor, height in zip(bottom, heights, strict=True)]
    for place, mark in enumerate(marks):
        if mark is not None:
            panel.hlines(mark / 2**20, place - 0.38, place + 0.38, color="black", linewidth=1.2)
    panel.set(ylabel="MiB", title=f"memory, {case['rows']} x {case['context']} tokens (line: predicted)")
    panel.title.set_fontsize(9)
    panel.tick_params(axis="x", labelsize=7)
    panel.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3)


def _draw_rounds(panel: Any, measured: Any) -> None:
    names, rows = list(measured[0]["latency"]), sorted({case["rows"] for case in measured})
    colors, markers = _drafter_colors(names), dict(zip(rows, itertools.cycle(_MARKERS), strict=False))
    for count in rows:
        cases = sorted((case for case in measured if case["rows"] == count), key=lambda case: case["context"])
        for name in names:
            spreads = [case["latency"][name].get("step") or case["latency"][name]["round"] for case in cases]
            panel.plot(
                [case["context"] for case in cases],
                [1e3 * spread["median"] for spread in spreads],
                marker=markers[count],
                markersize=4,
                color=colors[name],
            )
    panel.set(xlabel="tokens of context", ylabel="ms", ylim=(0, None), title="a round, or a plain step")
    panel.title.set_fontsize(9)
    _legend(panel, colors, markers)


def _draw_depths(panel: Any, rounds: Any) -> None:
    names = list(dict.fromkeys(entry["drafter"] for entry in rounds))
    colors, rows = _drafter_colors(names), sorted({entry["rows"] for entry in rounds})
    markers = dict(zip(rows, itertools.cycle(_MARKERS), strict=False))
    styles = dict(zip(sorted({entry["context"] for entry in rounds}), itertools.cycle(_STYLES), strict=False))
    for entry in rounds:
        panel.plot(
            range(len(entry["speed_up_by_depth"])),
            entry["speed_up_by_depth"],
            color=colors[entry["drafter"]],
            linestyle=styles[entry["context"]],
            linewidth=1.0,
            marker=markers[entry["rows"]],
            markersize=3,
        )
    panel.axhline(1, color="0.5", linewidth=0.8, linestyle="--")
    panel.set(xlabel="draft positions a round", ylabel="tau / rho", title="speed-up by depth")
    panel.title.set_fontsize(9)
    _legend(panel, colors, markers, styles)


def _drafter_colors(names: list[str]) -> dict[str, str]:
    """A color a drafter, the same in every panel; plain decoding, which is none, is grey."""
    drafters = [name for name in names if name != PLAIN]
    return {PLAIN: "0.4"} | dict(zip(drafters, itertools.cycle(_LINES), strict=False))


def _legend(panel: Any, colors: Mapping[str, str], markers: Mapping[int, str], styles: Mapping | None = None) -> None:
    """Below the panel: what colors, markers and styles stand for, one entry each."""
    from matplotlib.lines import Line2D

    drawn = {line.get_color() for line in panel.lines}
    entries = [Line2D([], [], color=color, label=name) for name, color in colors.items() if color in drawn]
    entries += [
        Line2D([], [], color="black", linestyle="", marker=marker, markersize=4, label=f"{rows} row{'s' * (rows > 1)}")
        for rows, marker in markers.items()
    ]
    entries += [
        Line2D([], [], color="black", linestyle=style, label=f"{context} tokens")
        for context, style in (styles or {}).items()
    ]
    panel.legend(handles=entries, fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=5)
