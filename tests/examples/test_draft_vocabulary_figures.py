"""The figures of draft vocabularies, on the shipped pair and a tiny one."""

import importlib.util
import json
from pathlib import Path

from conftest import make_poss, make_target


SCRIPT = Path(__file__).parents[2] / "examples" / "draft_vocabulary.py"


def test_every_size_is_measured_and_writes_the_same(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    target = make_target(scale=3.0)
    target.save_pretrained(tmp_path / "target")
    make_poss(target).save_pretrained(tmp_path / "poss")
    sizes = "--shares 1 0.25 --prompts 1 --max_new_tokens 8 --repeats 2 --sources 3 --texts 64 --head_repeats 1"
    pair = ["--target", f"{tmp_path}/target", "--poss", f"{tmp_path}/poss", "--heads", "16x40"]
    script.main([*sizes.split(), *pair, "--json", f"{tmp_path}/figures/vocabulary.json"])
    output = capsys.readouterr().out
    saved = json.loads((tmp_path / "figures" / "vocabulary.json").read_text())
    assert str(tmp_path) not in json.dumps(saved)
    assert [pair["pair"] for pair in saved["pairs"]] == ["demo", "poss"]
    for pair in saved["pairs"]:
        full, cut = pair["sizes"]
        assert full["size"] == pair["vocabulary"] and cut["size"] == round(pair["vocabulary"] / 4)
        assert full["covered"] == full["covered_of_the_text"] == 1.0 >= cut["covered"] > 0
        assert full["identical"] and cut["identical"]
        assert all(len(row["seconds"]) == 2 and row["tau"] >= 1 for row in (full, cut))
        assert f"| {cut['size']} |" in output
    assert saved["heads"][0]["milliseconds"].keys() == {"40", "10"}
