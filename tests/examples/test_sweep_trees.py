"""The sweep over shapes of drafts, with the shipped pair and few tokens."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[2] / "examples" / "sweep_trees.py"


@pytest.fixture
def sweep():
    spec = importlib.util.spec_from_file_location("sweep_trees", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("batch_size", ["1", "2"])
def test_all_shapes_write_what_plain_generate_writes(sweep, batch_size, tmp_path, monkeypatch, capsys):
    path = tmp_path / "figures.json"
    options = ["--prompts", "2", "--repeats", "1", "--max_new_tokens", "10", "--json", str(path)]
    shapes = ["1x4x3", "4x8x4", "auto"]
    monkeypatch.setattr(sys, "argv", ["sweep_trees.py", *options, "--batch_size", batch_size, "--shapes", *shapes])
    sweep.main()
    figures = json.loads(path.read_text(encoding="utf-8"))
    assert list(figures["shapes"]) == shapes
    for figure in figures["shapes"].values():
        assert figure["identical"]
        assert figure["runs"] == 2 // int(batch_size)
        assert 1 <= figure["tau"] and figure["lowest"] <= figure["speed_up"] <= figure["highest"]
    assert figures["best_fixed"] in shapes[:2]
    assert "| auto |" in capsys.readouterr().out
