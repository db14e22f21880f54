"""The figure of a model card."""

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.utils import logging


if TYPE_CHECKING:
    from matplotlib.figure import Figure


__all__ = ["blank_figure", "plot_acceptance"]

logger = logging.get_logger(__name__)

_SERIES = ("#1f77b4", "#d62728", "#2ca02c")
_BANDS = ("#eef3f8", "#ffffff")


def blank_figure(size: tuple[float, float], without: str) -> "Figure | None":
    """A figure that needs no display; None without matplotlib, of which one line of log tells.

    Args:
        size: width and height in inches.
        without: what is missing then, and what to install.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning_once(f"matplotlib is not installed: {without}.")
        return None
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plot_acceptance(
    path: str | os.PathLike,
    pos_acc: Mapping[str, Sequence[float]],
    tau: Mapping[str, float],
    positions_per_specialist: int,
    num_specialists: int,
) -> bool:
    """Draws pos-acc by draft position beside tau, as a PNG.

    The left panel has a line for each way of measuring, over bands that are the specialists' spans; the right panel
    has a bar for each.

    Args:
        path: of the PNG.
        pos_acc: by way of measuring the rate of draft position 1, 2...
        tau: by way of measuring, the names as in `pos_acc`.
        positions_per_specialist, num_specialists: n and S.

    Returns:
        Whether it was drawn: without matplotlib, one line of log says that it was not.
    """
    figure = blank_figure((8, 3.2), "the model card has tables without their plot. pip install 'hf-poss[hub]'")
    if figure is None:
        return False

    names = list(dict.fromkeys((*pos_acc, *tau)))
    colors = dict(zip(names, itertools.cycle(_SERIES), strict=False))
    rates, lengths = figure.subplots(1, 2, width_ratios=(5, 2))

    last = max((len(values) for values in pos_acc.values()), default=0)
    for index in range(num_specialists):
        start = index * positions_per_specialist + 0.5
        end = start + positions_per_specialist if index + 1 < num_specialists else last + 0.5
        if start < last:
            rates.axvspan(start, max(start, min(end, last + 0.5)), color=_BANDS[index % 2], zorder=0)
            rates.text(start + 0.05, 1.03, f"specialist {index + 1}", color="0.45", fontsize=7)
    for name, values in pos_acc.items():
        rates.plot(range(1, len(values) + 1), values, marker="o", color=colors[name], label=name)
    rates.set(xlabel="draft position", ylabel="pos-acc", ylim=(0, 1.02), xticks=range(1, last + 1))
    if pos_acc:
        rates.set_xlim(0.5, last + 0.5)
        rates.legend(fontsize=8)

    bars = lengths.bar(range(len(tau)), list(tau.values()), color=[colors[name] for name in tau], width=0.6)
    lengths.bar_label(bars, fmt="%.2f", fontsize=8)
    lengths.axhline(1, color="0.5", linewidth=0.8, linestyle="--")
    lengths.set(ylabel="tau, tokens a round", xticks=range(len(tau)), xlim=(-0.7, max(len(tau), 1) - 0.3))
    lengths.set_xticklabels(tau, fontsize=7)
    lengths.margins(y=0.12)
    for axis in (rates, lengths):
        axis.spines[["top", "right"]].set_visible(False)
    # No time and version inside: a card that is written again with the same figures is the same to the last byte.
    figure.savefig(Path(path), format="png", metadata={"Software": None})
    return True
