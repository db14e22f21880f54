"""`hf-poss card`."""

import json
import re

import pytest
from conftest import make_poss, make_target
from huggingface_hub import ModelCard

from hf_poss.cli import main
from hf_poss.demo import demo_folder


@pytest.fixture
def folder(tmp_path):
    make_poss(make_target(), num_draft_positions=4).save_pretrained(tmp_path / "PosS2-tiny")
    return tmp_path / "PosS2-tiny"


def test_a_card_is_written_again_from_the_folder(folder, capsys):
    arguments = ["card", str(folder), "--repo_id", "me/PosS2-tiny"]
    assert main([*arguments, "--base_model", "me/target", "--license", "mit"]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "README.md")
    first = (folder / "README.md").read_text()
    assert (ModelCard(first).data.base_model, ModelCard(first).data.license) == ("me/target", "mit")
    (folder / "README.md").unlink()
    assert main(arguments) == 0  # what was said once is recorded
    assert (folder / "README.md").read_text() == first


def test_somebody_elses_card_needs_force(folder, capsys):
    (folder / "README.md").write_text("# Mine\n")
    assert main(["card", str(folder)]) == 1
    assert "hf-poss card: " in (told := capsys.readouterr().err) and "--force" in told
    assert (folder / "README.md").read_text() == "# Mine\n"
    assert main(["card", str(folder), "--force"]) == 0
    assert ModelCard.load(folder / "README.md").data.library_name == "hf_poss"


def test_wrong_folders_are_refused_before_anything_is_written(tmp_path, capsys):
    assert main(["card", str(tmp_path), "--base_model", "me/target"]) == 1
    assert "No config.json" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_timing_needs_both_of_its_options(folder, capsys):
    assert main(["card", str(folder), "--target", "x"]) == 1
    assert "--prompts" in capsys.readouterr().err


def test_a_timing_is_recorded_with_machine_and_command(tmp_path, capsys, monkeypatch):
    """The pair that ships, whose drafts are accepted."""
    folder, target = tmp_path / "poss", demo_folder() / "target"
    folder.mkdir()
    for file in (demo_folder() / "poss").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (tmp_path / "prompts.txt").write_text("import os\n\ndef main():\n")
    arguments = ["card", str(folder), "--target", str(target), "--prompts", str(tmp_path / "prompts.txt")]
    arguments += ["--max_new_tokens", "12", "--repeats", "1", "--device", "cpu", "--dtype", "float32"]
    monkeypatch.setattr("sys.argv", ["/usr/bin/hf-poss", *arguments])
    assert main(arguments) == 0
    record = json.loads((folder / "speed.json").read_text())
    assert (record["prompts"], record["identical"], record["runs"]) == (2, 2, 2)
    assert record["settings"]["max_new_tokens"] == 12 and record["tau"] > 1
    assert record["lowest"] <= record["speedup"] <= record["highest"]
    assert record["command"].startswith("hf-poss card ") and record["hardware"]
    text = ModelCard.load(folder / "README.md").text
    assert f"{record['speedup']:.2f}x, median of 2 paired runs" in text and record["hardware"] in text
    assert "hf-poss card" in text and f"{record['tau']:.2f} ({record['tokens']} tokens in" in text
    assert re.search(r"speed-up \d+\.\d\dx, recorded in .*speed.json", capsys.readouterr().out)
