"""The README's table of families, made from what the family suite ran.

`python tests/family_table.py` runs the suite and prints the table; `--write` puts it into the README as well.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import transformers
from families import FAMILIES, REFUSED, Family


__all__ = ["ATTENTIONS", "README", "Outcomes", "between_markers", "render", "with_table"]

README = Path(__file__).parents[1] / "README.md"
SUITE = Path(__file__).with_name("test_families.py")
BEGIN, END = "<!-- families:begin -->", "<!-- families:end -->"
ATTENTIONS = ["sdpa", "eager"]
COLUMNS = ["Family", "Class", *ATTENTIONS, "Windows", "Note"]


class Outcomes(dict[tuple[str | None, ...], set[str]]):
    """A pytest plugin that gathers "passed", "skipped" and "failed" by the family and attention of a test, attention
    being None where a test has none."""

    def __init__(self):
        super().__init__()
        self._cases: dict[str, tuple[str | None, ...]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            if "family" in parameters:
                self._cases[item.nodeid] = (parameters["family"].key, parameters.get("attention"))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.nodeid in self._cases and (report.when == "call" or not report.passed):
            self.setdefault(self._cases[report.nodeid], set()).add(report.outcome)


def render(outcomes: Mapping[tuple[str | None, ...], set[str]], versions: str) -> str:
    """What stands between the README's markers.

    Args:
        outcomes: as [`Outcomes`] gathers them.
        versions: of the packages that ran.
    """
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    for family in FAMILIES:
        cells = [_cell(family, outcomes.get((family.key, attention), set())) for attention in ATTENTIONS]
        lines.append([family.name, f"`{family.target}`", *cells, family.windows, family.note])
    refused = [f"{family.name} (`{family.target}`)" for family in REFUSED if outcomes[family.key, None] == {"passed"}]
    table = "\n".join("|" + "|".join(f" {cell} " if cell else " " for cell in line) + "|" for line in lines)
    return f"{table}\n\nRefused before any work, by name: {', '.join(refused)}.\n\nRan with {versions}."


def _cell(family: Family, outcomes: set[str]) -> str:
    if outcomes == {"passed"}:
        return "chains" if family.chains else "trees"
    return "–" if outcomes == {"skipped"} else "fails"


def between_markers(text: str) -> str:
    """The table of a README, without its markers."""
    return text.partition(BEGIN)[2].partition(END)[0].strip()


def with_table(text: str, table: str) -> str:
    """A README with another table between its markers.

    Raises:
        ValueError: if a marker is missing, or there are several.
    """
    if (text.count(BEGIN), text.count(END)) != (1, 1):
        raise ValueError(f"{README} has not one {BEGIN} and one {END}; put them where the table belongs.")
    return text.partition(BEGIN)[0] + f"{BEGIN}\n{table}\n{END}" + text.partition(END)[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into the README, if the suite passes")
    write = parser.parse_args().write

    outcomes = Outcomes()
    status = pytest.main([str(SUITE), "-q", "-k", "not readme"], plugins=[outcomes])
    table = render(outcomes, f"transformers {transformers.__version__} and torch {torch.__version__.split('+')[0]}")
    print(table)
    if write and status == pytest.ExitCode.OK:
        README.write_text(with_table(README.read_text(encoding="utf-8"), table), encoding="utf-8")
    return int(status)


if __name__ == "__main__":
    raise SystemExit(main())
