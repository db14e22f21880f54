"""`hf-poss report`."""

import pytest
from made_up_records import MadeUp, MadeUpEvaluation

from hf_poss.cli import main


pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")


@pytest.fixture
def folder(tmp_path):
    evaluation = MadeUpEvaluation([MadeUp("PosS-2", [0.8, 0.6])], {"gsm8k": 3})
    return evaluation.write(tmp_path / "run")


def test_a_report_is_made_anew_from_records(folder, capsys):
    assert main(["report", str(folder), "--title", "Mine & yours"]) == 0
    told = capsys.readouterr().out
    assert "### Temperature 0" in told and "| PosS-2" in told
    assert str(folder / "report.html") in told.splitlines()
    first = (folder / "report.html").read_bytes()
    assert b"<title>Mine &amp; yours</title>" in first
    (folder / "report.html").unlink()
    assert main(["report", str(folder), "--title", "Mine & yours"]) == 0
    assert (folder / "report.html").read_bytes() == first


def test_files_may_lie_elsewhere(folder, tmp_path, capsys):
    before = sorted(folder.iterdir())
    assert main(["report", str(folder), "--output", str(tmp_path / "out")]) == 0
    assert sorted(folder.iterdir()) == before
    assert {"results.json", "table.md", "report.html", "tau.png"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }


def test_wrong_folders_are_told(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 1
    assert "hf-poss report: No evaluation.json" in capsys.readouterr().err
