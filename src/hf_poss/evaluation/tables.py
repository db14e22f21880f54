"""Results as tables: one as the paper's, and what its cells say besides."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .contestants import PLAIN
from .drafters import takes_rows


__all__ = [
    "Cell",
    "ResultsTable",
    "batch_sizes",
    "by_temperature",
    "comparison_of",
    "decoding_text",
    "main_figures",
    "paper_table",
    "results_tables",
    "shown_ratio",
    "temperature_text",
]

MEAN = "mean"
UNKNOWN = "–"
_MEASURES = (("tau", "tau_macro", "{:.2f}", ""), ("speed-up", "speed_up", "{:.2f}", "x"))


@dataclass(frozen=True)
class Cell:
    """A figure of the table.

    Args:
        text: with the standard deviation over runs, where there are several.
        best: whether no other drafter's is higher.
        leads: whether it is significantly above that of every other drafter.
        interval: of 95% over questions, or batches of them, as text; "" for none.
    """

    text: str
    best: bool = False
    leads: bool = False
    interval: str = ""

    def __str__(self) -> str:
        text = f"**{self.text}**" if self.best else self.text
        return text + (r"\*" if self.leads else "")


@dataclass
class ResultsTable:
    """Rows are drafters, columns tau and speed-up of every prompt set, then of their mean; or of a set's categories,
    or of every batch size.

    Args:
        title: says the temperature.
        columns: prompt sets and the mean of them, categories, or batch sizes.
        rows: by drafter a pair of cells, tau and speed-up, for each column.
        notes: what the figures are.
    """

    title: str
    columns: list[str]
    rows: dict[str, list[tuple[Cell, Cell]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def results_tables(results: Mapping[str, Any]) -> list[ResultsTable]:
    """A table for each temperature and batch size of what [`~hf_poss.evaluation.results.compute_results`] gives, and
    behind it one for each prompt set that has several categories, as Spec-Bench; where there are several batch sizes,
    one across them for each temperature.

    tau is the macro average, as in the paper; speed-up is of whole calls over plain decoding. The mean is over prompt
    sets.
    """
    tables = []
    for of in results["decodings"]:
        tables.append(_table(results, of))
        tables += [_category_table(results, name, by_category, of) for name, by_category in of["categories"].items()]
    if len(batch_sizes(results)) > 1:
        tables += [_batch_size_table(results, *of) for of in by_temperature(results).items()]
    return tables


def paper_table(results: Mapping[str, Any]) -> str:
    """The tables as Markdown, which reads well in a terminal, too."""
    return "\n\n".join(_markdown(table) for table in results_tables(results)) + "\n"


def temperature_text(temperature: float) -> str:
    """0 and 1 rather than 0.0 and 1.0."""
    return f"{temperature:g}"


def batch_sizes(results: Mapping[str, Any]) -> list[int]:
    """Those of which there are results, from the lowest."""
    return sorted({of["batch_size"] for of in results["decodings"]})


def by_temperature(results: Mapping[str, Any]) -> dict[float, list[Mapping[str, Any]]]:
    """The entries of `decodings`, from the lowest temperature, each with its batch sizes from the lowest."""
    entries: dict[float, list[Mapping[str, Any]]] = {}
    for of in results["decodings"]:
        entries.setdefault(of["temperature"], []).append(of)
    return entries


def decoding_text(results: Mapping[str, Any], of: Mapping[str, Any]) -> str:
    """What an entry of `decodings` is called: its temperature, and its batch size where there are several."""
    text = f"temperature {temperature_text(of['temperature'])}"
    return f"{text}, batch size {of['batch_size']}" if len(batch_sizes(results)) > 1 else text


def main_figures(of: Mapping[str, Any]) -> Mapping[str, Any]:
    """By drafter what stands for an entry of `decodings` as a whole: the means over prompt sets, or, where no drafter
    has them all yet, what there is of it."""
    return of["mean"] if of["mean"].keys() - {PLAIN} else of["pooled"]


def comparison_of(comparisons: Sequence[Mapping[str, Any]], one: str, other: str, measure: str) -> Mapping | None:
    """The comparison of two drafters, whichever stands first; None if they were not compared."""
    for comparison in comparisons:
        if comparison["measure"] == measure and {comparison["a"], comparison["b"]} == {one, other}:
            return comparison
    return None


def shown_ratio(figures: Mapping[str, Any], ratio: str) -> float | None:
    """The mean over runs where there are several, so that the standard deviation beside it is around it."""
    runs = figures["runs"]
    if runs is not None and runs["mean"][ratio] is not None:
        return runs["mean"][ratio]
    return figures[ratio]


def _table(results: Mapping[str, Any], of: Mapping[str, Any]) -> ResultsTable:
    columns = [(name, by_label, of["comparisons_by_benchmark"][name]) for name, by_label in of["benchmarks"].items()]
    if len(results["mean_over"]) > 1:
        columns.append((MEAN, of["mean"], of["comparisons"]))
    return _filled(decoding_text(results, of).capitalize(), columns, _notes(results, of))


def _category_table(
    results: Mapping[str, Any], name: str, by_category: Mapping[str, Any], of: Mapping[str, Any]
) -> ResultsTable:
    """Of one prompt set. Categories are not compared one by one: their set is."""
    columns = [(category, by_label, ()) for category, by_label in by_category.items()]
    return _filled(f"{name} by category, {decoding_text(results, of)}", columns, [_questions_note(by_category)])


def _batch_size_table(
    results: Mapping[str, Any], temperature: float, entries: Sequence[Mapping[str, Any]]
) -> ResultsTable:
    """Of one temperature. Each speed-up is over plain decoding of as many rows."""
    columns = [(f"batch size {of['batch_size']}", main_figures(of), of["comparisons"]) for of in entries]
    over = results["mean_over"]
    notes = [f"Of {over[0]}." if len(over) == 1 else f"Mean over {', '.join(over)}."]
    notes.append("Speed-up: over plain decoding of as many rows a call.")
    alone = [
        of["name"] for of in results["evaluation"]["drafters"] if not takes_rows(of["kind"], batch_sizes(results)[-1])
    ]
    notes += [f"transformers runs {' and '.join(alone)} with one row a call only."] if alone else []
    return _filled(f"By batch size, temperature {temperature_text(temperature)}", columns, notes)


def _filled(
    title: str, columns: Sequence[tuple[str, Mapping[str, Any], Sequence[Mapping[str, Any]]]], notes: list[str]
) -> ResultsTable:
    """A table of columns: a name, figures by drafter, and comparisons."""
    labels = list(dict.fromkeys(label for _, by_label, _ in columns for label in by_label))
    cells = [
        [_column(by_label, comparisons, *measure) for measure in _MEASURES] for _, by_label, comparisons in columns
    ]
    rows = {
        label: [tuple(of_measure.get(label, Cell(UNKNOWN)) for of_measure in column) for column in cells]
        for label in labels
    }
    return ResultsTable(title, [name for name, _, _ in columns], rows, notes)


def _column(
    by_label: Mapping[str, Any],
    comparisons: Sequence[Mapping[str, Any]],
    measure: str,
    ratio: str,
    form: str,
    unit: str,
) -> dict[str, Cell]:
    """Cells of a prompt set and measure by drafter."""
    values = {label: shown_ratio(figures, ratio) for label, figures in by_label.items()}
    known = {label: value for label, value in values.items() if value is not None}
    best = max(known.values(), default=None)
    cells = {}
    for label, value in values.items():
        if value is None:
            cells[label] = Cell(UNKNOWN)
            continue
        text = form.format(value)
        deviation = ((by_label[label]["runs"] or {}).get("deviation") or {}).get(ratio)
        if deviation is not None:
            text += f" ± {form.format(deviation)}"
        interval = (by_label[label]["intervals"] or {}).get(ratio)
        is_best = value == best and len(known) > 1
        cells[label] = Cell(
            f"{text}{unit}",
            best=is_best,
            leads=is_best and _leads(label, known, comparisons, measure),
            interval="" if interval is None else f"{form.format(interval[0])}–{form.format(interval[1])}",
        )
    return cells


def _leads(label: str, known: Mapping[str, float], comparisons: Sequence[Mapping[str, Any]], measure: str) -> bool:
    """Whether every comparison with another drafter is significant and in favour of `label`."""
    tested = [comparison_of(comparisons, label, other, measure) for other in known if other != label]
    tested = [comparison for comparison in tested if comparison is not None]
    return bool(tested) and all(
        comparison["significant"] and (comparison["difference"] > 0) == (comparison["a"] == label)
        for comparison in tested
    )


def _questions_note(by_column: Mapping[str, Mapping[str, Any]]) -> str:
    return f"n: {_counted(by_column, 'questions')} questions."


def _counted(by_column: Mapping[str, Mapping[str, Any]], of: str) -> str:
    counts = {name: max(figures[of] for figures in by_label.values()) for name, by_label in by_column.items()}
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _notes(results: Mapping[str, Any], of: Mapping[str, Any]) -> list[str]:
    notes = [
        _questions_note(of["benchmarks"]),
        "tau: mean over texts of tokens a round, the target's own included. Speed-up: tokens a second over those of "
        "plain decoding, whole calls.",
        "Bold: best of the column. *: significantly above every other drafter (paired t-test and paired bootstrap "
        "over questions, Holm's correction, p < 0.05).",
    ]
    if of["batch_size"] > 1:
        told = _counted(of["benchmarks"], "batches")
        notes.append(
            f"Questions of a batch share its time: intervals and tests of speed-up are over batches ({told})."
        )
    runs = [
        figures["runs"] for by_label in of["benchmarks"].values() for figures in by_label.values() if figures["runs"]
    ]
    if runs:
        over = sorted({f"{len(run['indices'])} {run['over']}s" for run in runs})
        notes.append(f"±: standard deviation over {' or '.join(over)} (n - 1); the figure before is their mean.")
    if len(results["mean_over"]) > 1:
        left_out = results["mean_leaves_out"]
        without = f"; {', '.join(left_out)} repeats questions of these and is left out" if left_out else ""
        notes.append(f"Mean: over {', '.join(results['mean_over'])}, each with the same weight{without}.")
    missing = [
        entry for entry in results["missing"] if all(entry[name] == of[name] for name in ("temperature", "batch_size"))
    ]
    if missing:
        gaps = ", ".join(
            f"{entry['drafter']} on {entry['benchmark']} {entry['questions']} of {entry['of']}" for entry in missing
        )
        notes.append(f"Not complete: {gaps}.")
    return notes


def _markdown(table: ResultsTable) -> str:
    header = ["drafter", *(f"{column} {measure}" for column in table.columns for measure, *_ in _MEASURES)]
    rows = [[_escaped(label), *(str(cell) for pair in pairs for cell in pair)] for label, pairs in table.rows.items()]
    header = [_escaped(name) for name in header]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    # Padded, so that columns line up in a terminal.
    lines = [f"### {table.title}", "", _row(header, widths), "|---|" + "--:|" * (len(header) - 1)]
    lines += [_row(row, widths) for row in rows]
    return "\n".join([*lines, "", *(f"- {_escaped(note)}" for note in table.notes)])


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = cells
    padded = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
    return f"| {' | '.join(padded)} |"


def _escaped(text: str) -> str:
    """Text whose characters Markdown takes for themselves."""
    for character in ("\\", "|", "*", "<"):
        text = text.replace(character, f"\\{character}")
    return text
