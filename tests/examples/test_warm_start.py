"""The comparison of starts, on a tiny target."""

import importlib.util
import json
from pathlib import Path

from conftest import make_target


SCRIPT = Path(__file__).parents[2] / "examples" / "warm_start.py"


def test_both_starts_are_measured_at_the_same_steps(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    make_target(scale=3.0).save_pretrained(tmp_path / "target")
    sizes = "--eagle_steps 30 --steps 4 --eval_steps 2 --seeds 0 --samples 8 --length 12 --prompts 2 --new_tokens 8"
    script.main(["--target", str(tmp_path / "target"), "--output", str(tmp_path / "out"), *sizes.split()])
    output = capsys.readouterr().out
    assert [f"| {step} |" in output for step in (0, 2, 4)] == [True] * 3
    saved = json.loads((tmp_path / "out" / "curves.json").read_text())
    assert {start: [list(curve) for curve in curves] for start, curves in saved["curves"].items()} == {
        start: [["0", "2", "4"]] for start in ("random", "EAGLE")
    }
    assert str(tmp_path) not in json.dumps(saved)
