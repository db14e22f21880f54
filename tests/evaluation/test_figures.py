"""Figures: what they show, and that they are the same each time, in the colours of the page."""

import re
import xml.etree.ElementTree as ElementTree

import pytest
from made_up_records import MadeUp, MadeUpEvaluation

from hf_poss.evaluation.figures import COLORS, DARK_COLORS, draw_figures, inline_svg, png
from hf_poss.evaluation.results import compute_results


pytest.importorskip("matplotlib")

POSS = MadeUp("PosS-2", [0.9, 0.8, 0.7, 0.6], n=2)
EAGLE = MadeUp("EAGLE", [0.8, 0.5, 0.4, 0.3], n=4)
LOOKUP = MadeUp("prompt-lookup", [0.3], kind="prompt-lookup")
NAMES = ["tau", "speed_up", "pos_acc", "specialists", "drift", "round"]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    return compute_results(MadeUpEvaluation([LOOKUP, EAGLE, POSS]).write(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def figures(results) -> dict:
    return {drawn.name: drawn for drawn in draw_figures(results)}


def luminance(color: str) -> float:
    """Relative, by WCAG 2."""
    channels = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("palette", [COLORS, DARK_COLORS], ids=["light", "dark"])
def test_colors_stand_out_from_the_page(palette):
    assert set(palette) == set(COLORS)
    for name, color in palette.items():
        if name.startswith("series"):
            assert contrast(color, palette["paper"]) >= 3, name
    assert contrast(palette["ink"], palette["paper"]) >= 7
    assert contrast(palette["muted"], palette["paper"]) >= 4.5


def test_all_that_was_measured_is_drawn(figures):
    assert list(figures) == NAMES
    assert all(drawn.title and drawn.reading.endswith(".") for drawn in figures.values())


def test_several_temperatures_have_figures_each(tmp_path):
    results = compute_results(MadeUpEvaluation([POSS], {"gsm8k": 2}, temperatures=(0.0, 0.7)).write(tmp_path))
    names = [drawn.name for drawn in draw_figures(results)]
    assert names == [f"{name}_t{temperature}" for temperature in ("0", "0.7") for name in NAMES]


def test_batch_sizes_have_figures_each_and_one_across(tmp_path):
    evaluation = MadeUpEvaluation([LOOKUP, POSS], temperatures=(0.0, 1.0), batch_sizes=(1, 4))
    results = compute_results(evaluation.write(tmp_path))
    drawn = {figure.name: figure for figure in draw_figures(results)}
    suffixes = [f"_t{temperature}_b{size}" for temperature in (0, 1) for size in (1, 4)]
    of_each = [f"{name}{suffix}" for suffix in suffixes for name in NAMES]
    assert list(drawn) == [*of_each, "batch_size_t0", "batch_size_t1"]
    (axes,) = drawn["batch_size_t0"].figure.axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "4"]
    curves = {line.get_label(): list(line.get_ydata()) for line in axes.lines if not line.get_label().startswith("_")}
    speeds = [of["mean"]["PosS-2"]["speed_up"] for of in results["decodings"][:2]]
    assert curves == {"PosS-2": speeds}  # prompt lookup has one row only
    assert f"PosS-2 {speeds[0]:.2f}x to {speeds[1]:.2f}x" in drawn["batch_size_t0"].reading


def test_what_was_not_measured_is_not_drawn(tmp_path):
    results = compute_results(MadeUpEvaluation([LOOKUP]).write(tmp_path))
    assert [drawn.name for drawn in draw_figures(results)] == ["tau", "speed_up"]


def test_curves_are_pos_acc(results, figures):
    (axes,) = figures["pos_acc"].figure.axes
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    pooled = results["decodings"][0]["pooled"]
    assert lines == {label: pytest.approx(pooled[label]["pos_acc"]) for label in ("EAGLE", "PosS-2")}
    markers = {line.get_marker() for line in axes.lines}
    assert len(markers) == 2  # not by colour alone


def test_bars_are_tau_with_its_interval(results, figures):
    (axes,) = figures["tau"].figure.axes
    groups = [*results["decodings"][0]["benchmarks"].values(), results["decodings"][0]["mean"]]
    wanted = [by_label[label] for by_label in groups for label in ("prompt-lookup", "EAGLE", "PosS-2")]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([figures["tau_macro"] for figures in wanted])
    ends = [tuple(line.get_xdata()) for line in axes.lines[1::2]]  # each on a halo
    assert ends == [pytest.approx(tuple(figures["intervals"]["tau_macro"])) for figures in wanted]
    assert len({bar.get_hatch() for bar in axes.patches}) == 3  # not by colour alone
    assert [label.get_text() for label in axes.get_yticklabels()] == ["mt_bench", "gsm8k", "mean"]


def test_plain_decoding_is_in_the_figure_where_all_lose(tmp_path):
    slow = MadeUp("slow", [0.1], rho=4.0)
    drawn = draw_figures(compute_results(MadeUpEvaluation([slow], {"gsm8k": 3}).write(tmp_path)))
    (axes,) = next(each for each in drawn if each.name == "speed_up").figure.axes
    assert max(bar.get_width() for bar in axes.patches) < 0.5 and axes.get_xlim()[1] > 1


def test_a_specialists_bar_is_as_wide_as_its_span(results, figures):
    eagle, poss = figures["specialists"].figure.axes
    acceptance = results["decodings"][0]["pooled"]["PosS-2"]["specialists"]["acceptance"]
    spans = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in poss.patches]
    assert [bar.get_height() for bar in poss.patches] == pytest.approx(acceptance)
    assert [(round(start + 0.5), round(end - 0.5)) for start, end in spans] == [(1, 2), (3, 4)]
    assert len(eagle.patches) == 1


def test_drift_has_a_panel_for_direction_and_one_for_length(results, figures):
    cosines, norms = figures["drift"].figure.axes
    drift = results["decodings"][0]["pooled"]["PosS-2"]["drift"]
    assert list(cosines.lines[1].get_ydata()) == pytest.approx(drift["mean_cosine"])
    assert list(norms.lines[1].get_ydata()) == pytest.approx(drift["mean_norm_ratio"])


def test_a_rounds_parts_are_milliseconds(results, figures):
    (axes,) = figures["round"].figure.axes
    parts = results["decodings"][0]["pooled"]["EAGLE"]["parts"]
    bars = [bar for bar in axes.patches if round(bar.get_y() + bar.get_height() / 2) == 0]
    assert sum(bar.get_width() for bar in bars) == pytest.approx(
        1e3 * sum(parts["seconds"].values()) / parts["passes"]
    )


def test_the_same_results_give_the_same_bytes(results, figures):
    for again in draw_figures(results):
        assert png(again.figure) == png(figures[again.name].figure)
        assert inline_svg(again) == inline_svg(figures[again.name])


def test_svg_is_of_the_pages_colours_and_text(figures):
    for drawn in figures.values():
        svg = inline_svg(drawn)
        ElementTree.fromstring(svg)
        assert not re.search(r"#[0-9a-f]{6}", svg), "a colour that the page does not choose"
        assert set(re.findall(r"var\(--([\w-]+)\)", svg)) <= {*COLORS, "font"}
        assert "<text" in svg and "var(--font)" in svg
        assert "<metadata" not in svg and "Matplotlib" not in svg and "<!DOCTYPE" not in svg


def test_names_in_svg_are_the_figures_own(figures):
    ids = [name for drawn in figures.values() for name in re.findall(r'\bid="([^"]+)"', inline_svg(drawn))]
    assert len(ids) == len(set(ids))
    for drawn in figures.values():
        svg = inline_svg(drawn)
        used = re.findall(r'(?:url\(#|href="#)([^)"]+)', svg)
        assert used and set(used) <= set(re.findall(r'\bid="([^"]+)"', svg))


def test_the_label_is_escaped(tmp_path):
    results = compute_results(MadeUpEvaluation([MadeUp('<b>&"', [0.5, 0.5])], {"gsm8k": 2}).write(tmp_path))
    for drawn in draw_figures(results):
        ElementTree.fromstring(inline_svg(drawn))


def test_long_names_fit(tmp_path):
    """Every text lies inside its figure."""
    drafters = [MadeUp(f"a-rather-long-name-of-a-drafter-{index}", [0.6, 0.5], n=1) for index in range(4)]
    results = compute_results(MadeUpEvaluation(drafters, {"a_set_with_a_long_name_of_its_own": 2}).write(tmp_path))
    for drawn in draw_figures(results):
        figure = drawn.figure
        figure.draw_without_rendering()
        for text in (*figure.legends, *(label for axes in figure.axes for label in axes.get_yticklabels())):
            box = text.get_window_extent()
            assert box.x0 >= -1 and box.x1 <= figure.bbox.width + 1, drawn.name
