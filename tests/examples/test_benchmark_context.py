"""Cost against context and depth: figures by setting, and a plot."""

import importlib.util
import json
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[2] / "examples" / "benchmark_context.py"


def test_a_table_json_and_a_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    figures, picture = tmp_path / "figures.json", tmp_path / "plot.png"
    sizes = ["--shape", "tiny", "--layers", "1", "--contexts", "8", "24", "--depths", "1", "3", "--context", "8"]
    runs = ["--depth", "2", "--acceptance", "2", "--new_tokens", "12", "--repeats", "1", "--device", "cpu"]
    script.main([*sizes, *runs, "--json", str(figures), "--plot", str(picture)])
    result = json.loads(figures.read_text())
    assert [row["context"] for row in result["by_context"]] == [8, 24]
    assert [row["depth"] for row in result["by_depth"]] == [1, 3]
    for row in result["by_context"] + result["by_depth"]:
        assert len(row["draft_pass_milliseconds"]) == row["depth"]
        assert 0 < row["drafting_milliseconds"] and 0 < row["plain_step_milliseconds"]
        assert 1 <= row["tau"] <= row["depth"] + 1
    assert result["simulated"] and result["shape"] == "tiny with 1 layers"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("\n| ") == 1 + 4
