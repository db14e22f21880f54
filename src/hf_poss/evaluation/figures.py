"""The figures of a report: each drawn once, saved as a PNG and as SVG that follows the page's colours.

Figures are as narrow as a phone, so that their text keeps its size there. No time, version or random name is inside:
the same results give the same bytes.
"""

import io
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import TYPE_CHECKING, Any

from .tables import MEAN, batch_sizes, by_temperature, main_figures, shown_ratio, temperature_text
from .tallies import unit_of


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


__all__ = ["COLORS", "DARK_COLORS", "ReportFigure", "draw_figures", "inline_svg", "png"]

# By CSS variable what it is on a light page; figures are drawn in these. Series are told apart by markers and hatches,
# too; their colours by Okabe and Ito, darkened to a contrast of 3 or more on white.
COLORS = {
    "paper": "#ffffff",
    "ink": "#1b1f24",
    "muted": "#5d6673",
    "rule": "#d3d8de",
    "series-1": "#0072b2",
    "series-2": "#c4500a",
    "series-3": "#00805e",
    "series-4": "#a8478a",
    "series-5": "#946200",
    "series-6": "#1789b8",
    "series-7": "#6b5fc7",
    "series-8": "#7a6a58",
}
# The same on a dark page, lightened to a contrast of 3 or more.
DARK_COLORS = {
    "paper": "#14171b",
    "ink": "#e8eaed",
    "muted": "#a0a8b2",
    "rule": "#363c44",
    "series-1": "#5aa9e6",
    "series-2": "#f0894b",
    "series-3": "#35b98f",
    "series-4": "#d98cc4",
    "series-5": "#d3a33c",
    "series-6": "#6cc7ea",
    "series-7": "#a79cf0",
    "series-8": "#b8a48c",
}
_SERIES = [color for name, color in COLORS.items() if name.startswith("series")]
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_HATCHES = ("", "////", "----", "\\\\\\\\", "xxxx", "||||", "++++", "//")  # of lines: dots are long paths in SVG
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.3)), (0, (5, 1.5, 1, 1.5)))
_SMALL = 10
_LONGEST = 22  # characters of a name
_WIDTH = 4.6  # inches of 72 points, of which a phone shows one as a CSS pixel
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 10.5,
    "axes.edgecolor": COLORS["muted"],
    "axes.labelcolor": COLORS["ink"],
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": COLORS["paper"],
    "axes.facecolor": "none",
    "grid.color": COLORS["rule"],
    "hatch.color": COLORS["paper"],
    "hatch.linewidth": 1.0,
    "legend.frameon": False,
    "legend.fontsize": _SMALL,
    "svg.fonttype": "none",
    "svg.hashsalt": "hf_poss",
    "text.color": COLORS["ink"],
    "xtick.color": COLORS["muted"],
    "xtick.labelcolor": COLORS["ink"],
    "ytick.color": COLORS["muted"],
    "ytick.labelcolor": COLORS["ink"],
}


@dataclass(frozen=True)
class ReportFigure:
    """A figure with what is said of it.

    Args:
        name: of its file, without ending.
        title: what it shows.
        reading: what is to be seen, in a sentence or two that follow from the numbers.
        figure: of matplotlib.
    """

    name: str
    title: str
    reading: str
    figure: "Figure"


def draw_figures(results: Mapping[str, Any]) -> list[ReportFigure]:
    """Every figure that the results have data for, in the order of a report.

    Args:
        results: of [`~hf_poss.evaluation.results.compute_results`].
    """
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        return list(_figures(results))


def png(figure: "Figure") -> bytes:
    """The figure on a light ground, for pages and cards."""
    return _saved(figure, "png", dpi=160, metadata={"Software": None})


def inline_svg(drawn: ReportFigure) -> str:
    """The figure as an element for an HTML page that defines `--paper`, `--ink`, `--series-1`... and `--font`; see
    [`COLORS`]. Names inside are the figure's own, so that a page may hold several; the title is its label."""
    svg = _saved(drawn.figure, "svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}).decode()
    svg = svg[svg.index("<svg") :]
    for name, color in COLORS.items():
        svg = svg.replace(color, f"var(--{name})")
    svg = re.sub(r"'DejaVu Sans'[^;\"]*sans-serif", "var(--font)", svg)
    svg = re.sub(r'\bid="', f'id="{drawn.name}-', svg)
    svg = svg.replace('href="#', f'href="#{drawn.name}-').replace("url(#", f"url(#{drawn.name}-")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups()
    opening = (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-labelledby="{drawn.name}-title" '
        'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    title = f'<title id="{drawn.name}-title">{escape(f"{drawn.title}. {drawn.reading}")}</title>'
    return opening + title + svg[svg.index(">") + 1 :]


def _saved(figure: "Figure", form: str, **options: Any) -> bytes:
    import matplotlib

    content = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(content, format=form, **options)
    return content.getvalue()


# ---- Each figure ----


def _figures(results: Mapping[str, Any]) -> Iterator[ReportFigure]:
    labels = [drafter["name"] for drafter in results["evaluation"]["drafters"]]
    styles = {label: index for index, label in enumerate(label for label in labels if label != "plain")}
    temperatures = by_temperature(results)
    drawn = [
        (draw(results, of, styles), of["temperature"], of["batch_size"])
        for of in results["decodings"]
        for draw in (_tau, _speed_up, _pos_acc, _specialists, _drift, _round)
    ]
    drawn += [(_by_batch_size(results, of, styles), temperature, None) for temperature, of in temperatures.items()]
    for figure, temperature, batch_size in drawn:
        if figure is not None:
            suffix, at = "", ""
            if len(temperatures) > 1:
                suffix, at = f"_t{temperature_text(temperature)}", f", temperature {temperature_text(temperature)}"
            if batch_size is not None and len(batch_sizes(results)) > 1:
                suffix, at = f"{suffix}_b{batch_size}", f"{at}, batch size {batch_size}"
            yield replace(figure, name=f"{figure.name}{suffix}", title=f"{figure.title}{at}")


def _tau(results, of, styles) -> ReportFigure | None:
    return _bars(of, styles, "tau", "tau_macro", "Mean acceptance length (tau)", "tokens a round", "{:.2f}", None)


def _speed_up(results, of, styles) -> ReportFigure | None:
    title, axis = "Speed-up over plain decoding", "speed-up; the line is plain decoding"
    return _bars(of, styles, "speed_up", "speed_up", title, axis, "{:.2f}x", 1.0)


def _bars(of, styles, name, ratio, title, axis, form, line) -> ReportFigure | None:
    """Bars by prompt set and drafter with intervals."""
    groups = dict(of["benchmarks"])
    if len(groups) > 1 and of["mean"]:
        groups[MEAN] = of["mean"]
    values = {
        (group, label): (shown_ratio(by_label[label], ratio), (by_label[label]["intervals"] or {}).get(ratio))
        for group, by_label in groups.items()
        for label in styles
        if label in by_label and shown_ratio(by_label[label], ratio) is not None
    }
    labels = [label for label in styles if any(label == of_label for _, of_label in values)]
    if not labels:
        return None
    figure, axes = _new(0.19 * len(groups) * (len(labels) + 0.9) + 0.75 + _legend_height(labels))
    ticks, place = {}, 0.0
    for group in groups:
        ticks[group] = place + (len(labels) - 1) / 2
        for label in labels:
            if (group, label) in values:
                _bar(axes, place, *values[group, label], label, styles[label], form)
            place += 1
        place += 0.9
    if line is not None:
        axes.axvline(line, color=COLORS["ink"], linewidth=1, linestyle=_DASHES[1])
    right = max(max(value, *(interval or [])) if interval else value for value, interval in values.values())
    right = max(right, line or 0)
    axes.set(xlabel=axis, xlim=(0, 1.17 * right), ylim=(place - 1.3, -0.6))
    axes.set_yticks(list(ticks.values()), [_short(name) for name in ticks])
    axes.tick_params(axis="y", length=0)
    _legend(figure, axes)
    last = list(groups)[-1]
    ranked = sorted((value, label) for (group, label), (value, _) in values.items() if group == last)
    where = "in the mean over sets" if last == MEAN else f"on {last}"
    reading = f"Lines are 95% intervals over {unit_of(ratio, of['batch_size'])}."
    if len(ranked) == 1:
        reading = f"{ranked[0][1]} has {form.format(ranked[0][0])} {where}. {reading}"
    elif ranked:
        (low, lowest), (high, highest) = ranked[0], ranked[-1]
        best = f"{highest} is highest {where} with {form.format(high)}"
        reading = f"{best}, {lowest} lowest with {form.format(low)}. {reading}"
    return ReportFigure(name, title, reading, figure)


def _bar(axes, place, value, interval, label, style, form) -> None:
    axes.barh(place, value, 0.82, label=label, **_bar_style(style))
    if interval is not None:
        # On a halo: a line across the hatches would not be seen.
        for color, width in ((COLORS["paper"], 3.2), (COLORS["ink"], 1.2)):
            axes.plot(interval, [place, place], color=color, linewidth=width, solid_capstyle="butt")
    end = max(value, interval[1]) if interval else value
    ground = {"boxstyle": "square,pad=0.1", "facecolor": COLORS["paper"], "edgecolor": "none"}  # over the line of 1
    axes.annotate(
        form.format(value),
        (end, place),
        (5, 0),
        textcoords="offset points",
        va="center",
        fontsize=_SMALL,
        bbox=ground,
    )


def _pos_acc(results, of, styles) -> ReportFigure | None:
    """A line for each drafter of specialists, with its interval as a band."""
    curves = {label: figures for label, figures in of["pooled"].items() if figures["reached"] and label in styles}
    if not curves:
        return None
    figure, axes = _new(3.5 + _legend_height(curves))
    for label, figures in curves.items():
        known = [index for index, count in enumerate(figures["reached"]) if count]
        style = styles[label]
        axes.plot(
            [index + 1 for index in known],
            [figures["pos_acc"][index] for index in known],
            label=label,
            **_line_style(style),
        )
        bands = [(index + 1, figures["intervals"]["pos_acc"][index]) for index in known if figures["intervals"]]
        bands = [(position, interval) for position, interval in bands if interval]
        if bands:
            positions, intervals = zip(*bands, strict=True)
            lows, highs = zip(*intervals, strict=True)
            axes.fill_between(positions, lows, highs, color=_SERIES[style % len(_SERIES)], alpha=0.13, linewidth=0)
    axes.set(xlabel="draft position", ylabel="pos-acc", xticks=_positions(curves.values(), "reached"))
    axes.set_ylim(None, min(axes.get_ylim()[1], 1.02))
    axes.grid(axis="y")
    _legend(figure, axes)
    ends = {label: _known(figures["pos_acc"], figures["reached"]) for label, figures in curves.items()}
    falls = ", ".join(f"{label} {rates[0]:.0%} to {rates[-1]:.0%}" for label, rates in ends.items() if rates)
    reading = f"From the first position to the last: {falls}. Bands are 95% intervals over questions."
    return ReportFigure("pos_acc", "Acceptance by draft position (pos-acc)", reading, figure)


def _specialists(results, of, styles) -> ReportFigure | None:
    """A panel for each drafter: a bar as wide as its specialist's span."""
    drawn = {label: figures for label, figures in of["pooled"].items() if figures["specialists"] and label in styles}
    if not drawn:
        return None
    sizes = {drafter["name"]: drafter for drafter in results["evaluation"]["drafters"]}
    figure, panels = _new(0.6 + 1.15 * len(drawn), rows=len(drawn))
    panels = panels if len(drawn) > 1 else [panels]
    positions = max(len(figures["drafted"]) for figures in drawn.values())
    lowest = []
    for axes, (label, figures) in zip(panels, drawn.items(), strict=True):
        spans = _spans(sizes[label]["positions_per_specialist"], len(figures["drafted"]), figures["specialists"])
        for _, rate, (first, last) in spans:
            axes.bar((first + last) / 2, rate, last - first + 0.9, **_bar_style(styles[label]))
            axes.annotate(
                f"{rate:.0%}",
                ((first + last) / 2, rate),
                (0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=_SMALL,
            )
        if len(spans) > 1:
            index, rate, _ = min(spans, key=lambda span: span[1])
            lowest.append(f"{label}'s specialist {index + 1} ({rate:.0%})")
        axes.set(ylim=(0, 1.25), xlim=(0.4, positions + 0.6), yticks=(0, 0.5, 1), yticklabels=("0", "50%", "100%"))
        axes.set_title(label, loc="left", fontsize=10.5, pad=2)
        axes.set_xticks(range(1, positions + 1))
    panels[-1].set_xlabel("draft position; a bar is a specialist")
    reading = "Accepted, of the positions that a round reached, by who drafted them."
    if lowest:
        reading += f" Lowest: {', '.join(lowest)}."
    return ReportFigure("specialists", "Acceptance by specialist", reading, figure)


def _spans(positions_per_specialist, positions, specialists) -> list[tuple[int, float, tuple[int, int]]]:
    """Of each specialist that was reached its index, acceptance, and first and last draft position."""
    result = []
    for index, (rate, reached) in enumerate(zip(specialists["acceptance"], specialists["reached"], strict=True)):
        first = index * positions_per_specialist + 1
        is_last = index + 1 == len(specialists["reached"])  # it serves what lies beyond its span, too
        if reached:
            result.append((index, rate, (first, positions if is_last else first + positions_per_specialist - 1)))
    return result


def _drift(results, of, styles) -> ReportFigure | None:
    """Cosine similarity above the ratio of norms."""
    drifts = {
        label: figures["drift"] for label, figures in of["pooled"].items() if figures["drift"] and label in styles
    }
    if not drifts:
        return None
    figure, (cosines, norms) = _new(5.0 + _legend_height(drifts), rows=2)
    for label, drift in drifts.items():
        known = [index for index, rows in enumerate(drift["rows"]) if rows]
        for axes, name in ((cosines, "mean_cosine"), (norms, "mean_norm_ratio")):
            axes.plot(
                [index + 1 for index in known],
                [drift[name][index] for index in known],
                label=label,
                **_line_style(styles[label]),
            )
    norms.axhline(1, color=COLORS["ink"], linewidth=1, linestyle=(0, (4, 2)))
    cosines.set(ylabel="cosine similarity")
    norms.set(xlabel="draft position", ylabel="ratio of norms")
    for axes in (cosines, norms):
        axes.set_xticks(_positions(drifts.values(), "rows"))
        axes.grid(axis="y")
    _legend(figure, cosines)
    ends = {label: _known(drift["mean_cosine"], drift["rows"]) for label, drift in drifts.items()}
    ends = [f"{label} {cosine[-1]:.2f}" for label, cosine in ends.items() if cosine]
    reading = f"Drafted against the target's features; 1 is no drift. Cosine at the last position: {', '.join(ends)}."
    return ReportFigure("drift", "Feature drift by draft position", reading, figure)


def _round(results, of, styles) -> ReportFigure | None:
    """Where the time of a round goes, one stacked bar a drafter."""
    splits = {label: figures["parts"] for label, figures in of["pooled"].items() if figures["parts"]}
    splits = {
        label: parts for label, parts in splits.items() if parts["passes"] and sum(parts["seconds"].values()) > 0
    }
    if not splits:
        return None
    names = list(
        dict.fromkeys(part for parts in splits.values() for part, value in parts["seconds"].items() if value > 0)
    )
    figure, axes = _new(0.8 + 0.42 * len(splits) + _legend_height(names))
    longest = max(1e3 * sum(parts["seconds"].values()) / parts["passes"] for parts in splits.values())
    for place, parts in enumerate(splits.values()):
        start = 0.0
        for index, name in enumerate(names):
            width = 1e3 * parts["seconds"].get(name, 0.0) / parts["passes"]
            axes.barh(place, width, 0.7, left=start, label=name, **_bar_style(index))
            if width > 0.09 * longest:
                box = {"boxstyle": "round,pad=0.15", "facecolor": COLORS["paper"], "edgecolor": "none"}
                axes.text(
                    start + width / 2,
                    place,
                    f"{_shares(parts)[name]:.0%}",
                    ha="center",
                    va="center",
                    fontsize=_SMALL,
                    bbox=box,
                )
            start += width
    axes.set(xlabel="milliseconds a round", ylim=(len(splits) - 0.5, -0.5))
    axes.set_yticks(range(len(splits)), [_short(name) for name in splits])
    axes.tick_params(axis="y", length=0)
    _legend(figure, axes)
    shares = {label: max(_shares(parts).items(), key=lambda item: item[1]) for label, parts in splits.items()}
    largest = ", ".join(f"{label} {name} ({share:.0%})" for label, (name, share) in shares.items())
    texts = sum(parts["texts"] for parts in splits.values())
    reading = f"What takes longest: {largest}. Timed part by part on {texts:,} texts, in runs apart."
    return ReportFigure("round", "Where the time of a round goes", reading, figure)


def _by_batch_size(results, entries, styles) -> ReportFigure | None:
    """Speed-up at one temperature, a line for each drafter that has several batch sizes."""
    curves: dict[str, dict[int, tuple[float, Sequence[float] | None]]] = {}
    for of in entries:
        for label, figures in main_figures(of).items():
            speed = shown_ratio(figures, "speed_up")
            if label in styles and speed is not None:
                interval = (figures["intervals"] or {}).get("speed_up")
                curves.setdefault(label, {})[of["batch_size"]] = speed, interval
    curves = {label: curve for label, curve in curves.items() if len(curve) > 1}
    if not curves:
        return None
    sizes = batch_sizes(results)
    figure, axes = _new(3.2 + _legend_height(curves))
    for label, curve in curves.items():
        places = [sizes.index(size) for size in curve]
        axes.plot(places, [speed for speed, _ in curve.values()], label=label, **_line_style(styles[label]))
        intervals = [interval for _, interval in curve.values()]
        if None not in intervals:
            color = _SERIES[styles[label] % len(_SERIES)]
            axes.fill_between(places, *zip(*intervals, strict=True), color=color, alpha=0.13, linewidth=0)
    axes.axhline(1, color=COLORS["ink"], linewidth=1, linestyle=_DASHES[1])
    axes.set(xlabel="batch size", ylabel="speed-up")
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.grid(axis="y")
    _legend(figure, axes)
    speeds = {label: [speed for speed, _ in curve.values()] for label, curve in curves.items()}
    ends = ", ".join(f"{label} {of_label[0]:.2f}x to {of_label[-1]:.2f}x" for label, of_label in speeds.items())
    reading = (
        f"Over plain decoding of as many rows, from the smallest batch to the largest: {ends}. Bands are 95% "
        "intervals over batches of questions."
    )
    return ReportFigure("batch_size", "Speed-up by batch size", reading, figure)


def _shares(parts: Mapping[str, Any]) -> dict[str, float]:
    total = sum(parts["seconds"].values())
    return {name: seconds / total for name, seconds in parts["seconds"].items()}


def _known(rates: Sequence[float], counts: Sequence[float]) -> list[float]:
    """The rates of which something was counted."""
    return [rate for rate, count in zip(rates, counts, strict=True) if count]


# ---- Style ----


def _new(height: float, rows: int = 1) -> tuple["Figure", Any]:
    """A figure of the common width, `height` in inches; a panel, or a list of panels that share positions."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, 1, sharex=rows > 1, squeeze=False)[:, 0]
    return figure, list(panels) if rows > 1 else panels[0]


def _bar_style(index: int) -> dict[str, Any]:
    return {
        "facecolor": _SERIES[index % len(_SERIES)],
        "edgecolor": COLORS["paper"],
        "linewidth": 0.5,
        "hatch": _HATCHES[index % len(_HATCHES)],
    }


def _line_style(index: int) -> dict[str, Any]:
    return {
        "color": _SERIES[index % len(_SERIES)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "markersize": 5.5,
        "markeredgecolor": COLORS["paper"],
        "markeredgewidth": 0.6,
        "linestyle": _DASHES[index % len(_DASHES)],
    }


def _legend(figure: "Figure", axes: "Axes") -> None:
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))  # each label once
    labels = [_short(label) for label in handles]
    figure.legend(
        handles.values(), labels, loc="outside upper left", ncols=_legend_columns(handles), columnspacing=1.0
    )


def _legend_columns(labels: Iterable[str]) -> int:
    """As many as are sure to fit, with a key of 34 points and letters of 7 at the most."""
    widest = max(34 + 7 * len(_short(label)) for label in labels)
    return max(1, min(3, int(72 * _WIDTH / widest)))


def _legend_height(labels: Collection[str]) -> float:
    """In inches."""
    return 0.2 * -(-len(labels) // _legend_columns(labels))


def _short(name: str) -> str:
    """A name whose middle is left out where it is long."""
    half = (_LONGEST - 1) // 2
    return name if len(name) <= _LONGEST else f"{name[:half]}…{name[-half:]}"


def _positions(curves: Sequence[Mapping[str, Any]], counts: str) -> range:
    return range(1, max(len(curve[counts]) for curve in curves) + 1)
