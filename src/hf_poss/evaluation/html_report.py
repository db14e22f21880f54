"""The report of an evaluation: one HTML file that needs nothing else, with the figures and tables beside it."""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..training.settings import write_json
from .authored_texts import AuthoredText, authored_texts
from .headline import headline, identity_sentence
from .results import compute_results
from .tables import batch_sizes, decoding_text, paper_table, results_tables, temperature_text


__all__ = ["check_packages", "report_page", "write_report"]

_PACKAGES = ("jinja2", "matplotlib", "scipy")
_UNDERLINES = ("solid", "dashed", "dotted", "double", "wavy")
_MARKS = str.maketrans("", "", "`[]")  # of documentation, not of a page
_SHOWN_APART = ("command", "hardware", "versions", "target", "drafters", "benchmarks")


def check_packages() -> None:
    """Refuses to begin what ends in a report where that could not be written.

    Raises:
        ValueError: naming packages that are not installed.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"A report needs {', '.join(missing)}: pip install 'hf-poss[evaluation]'.")


def write_report(
    folder: str | os.PathLike, output: str | os.PathLike | None = None, title: str | None = None
) -> list[Path]:
    """Computes the results of an evaluation's records anew and writes them: `results.json`, `table.md`, a PNG for each
    figure and `report.html`. The same records give the same bytes.

    Args:
        folder: that `hf-poss evaluate` wrote.
        output: folder of the files; `folder` by default.
        title: of the page.

    Returns:
        the files, the page last.

    Raises:
        FileNotFoundError, ValueError: if there are no records, or packages are missing.
    """
    check_packages()
    from .figures import draw_figures, png

    results = compute_results(folder)
    output = Path(folder if output is None else output)
    output.mkdir(parents=True, exist_ok=True)
    figures = draw_figures(results)
    contents = {
        "table.md": f"{headline(results)}\n\n{paper_table(results)}".encode(),
        **{f"{drawn.name}.png": png(drawn.figure) for drawn in figures},
        "report.html": report_page(results, authored_texts(folder, results["evaluation"]), figures, title).encode(),
    }
    write_json(output / "results.json", results)
    for name, content in contents.items():
        (output / name).write_bytes(content)
    return [output / "results.json", *(output / name for name in contents)]


def report_page(
    results: Mapping[str, Any], texts: Sequence[AuthoredText], figures: Sequence[Any], title: str | None = None
) -> str:
    """The page, as HTML.

    Args:
        results: of [`compute_results`].
        texts: shown token by token.
        figures: of [`~hf_poss.evaluation.figures.draw_figures`].
        title: a target's name by default.
    """
    import jinja2
    from markupsafe import Markup

    from .figures import COLORS, DARK_COLORS, inline_svg

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (files("hf_poss") / "assets" / "report" / name).read_text("utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    about = results["evaluation"]
    specialists = max(
        (piece.specialist for text in texts for piece in text.pieces if piece.specialist is not None), default=-1
    )
    return environment.get_template("report.html").render(
        title=title or f"Speculative decoding of {_plain_name(about['target']['name'])}",
        headline=headline(results),
        identity=identity_sentence(results),
        about=about,
        facts=_facts(about),
        tables=results_tables(results),
        figures=[(drawn, Markup(inline_svg(drawn))) for drawn in figures],
        decodings=[(decoding_text(results, of), of) for of in results["decodings"]],
        mean_over=results["mean_over"],
        batched=batch_sizes(results)[-1] > 1,
        single_checkpoint=all(len(each["checkpoints"]) < 2 for each in about["drafters"]),
        texts=texts,
        specialists=specialists + 1,
        underlines=_UNDERLINES,
        colors=COLORS,
        dark_colors=DARK_COLORS,
        series=len([name for name in COLORS if name.startswith("series")]),
        definitions=_definitions(),
    )


def _facts(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What one needs to run this again, as rows."""
    target = about["target"]
    size = f", {target['parameters'] / 1e6:,.1f}M parameters" if target.get("parameters") else ""
    rows = [
        ("Target", f"{target['name']}{size}{', ' + target['dtype'] if target.get('dtype') else ''}"),
        ("Machine", about["hardware"]),
        ("Versions", ", ".join(f"{name} {version}" for name, version in about["versions"].items())),
        ("Prompt sets", "; ".join(_set(benchmark) for benchmark in about["benchmarks"])),
        ("Temperatures", ", ".join(map(temperature_text, about["temperatures"]))),
        ("Seeds", ", ".join(map(str, about["seeds"]))),
    ]
    rows += [
        (name.replace("_", " ").capitalize(), _value(value))
        for name, value in about.items()
        if name not in (*_SHOWN_APART, "temperatures", "seeds") and value not in (None, {}, [])
    ]
    return [(name, value) for name, value in rows if value]


def _plain_name(name: str) -> str:
    """A name on the Hub as it is; of a path the last part."""
    return os.path.basename(os.path.normpath(name)) if name.startswith((".", "~", os.sep)) else name


def _set(benchmark: Mapping[str, Any]) -> str:
    details = [f"{benchmark['questions']} questions"]
    details += [f"{benchmark['skipped']} skipped as too long"] if benchmark.get("skipped") else []
    details += [str(benchmark[name]) for name in ("source", "license") if benchmark.get(name)]
    return f"{benchmark['name']} ({', '.join(details)})"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {each}" for name, each in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _definitions() -> list[tuple[str, str]]:
    """Measures with the first lines of their documentation, which say formula and source."""
    from .. import measures

    named = (
        ("tau, macro", measures.mean_acceptance_length_macro),
        ("tau, micro", measures.mean_acceptance_length),
        ("pos-acc", measures.position_acceptance),
        ("Acceptance per node", measures.node_acceptance),
        ("Speed-up", measures.speed_up),
        ("rho", measures.round_cost),
        ("Drift", measures.DriftSums),
    )
    return [(name, " ".join(of.__doc__.split("Args:")[0].translate(_MARKS).split())) for name, of in named]
