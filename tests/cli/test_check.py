"""`hf-poss check`: verdict, exit status, and what is told before weights are read."""

import json
from pathlib import Path

import pytest
import torch
from conftest import small_target
from sound_pair import own_prompts, sound_pair

from hf_poss.cli import main


@pytest.fixture
def folders(tmp_path) -> Path:
    target, poss, tokenizer = sound_pair()
    target.save_pretrained(tmp_path / "small-target")
    tokenizer.save_pretrained(tmp_path / "small-target")
    poss.save_pretrained(tmp_path / "poss")
    prompts = [{"prompt": text} for text in tokenizer.batch_decode(own_prompts())]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    return tmp_path


def check(folders: Path, *arguments: str) -> int:
    pair = ["--target", str(folders / "small-target"), "--poss", str(folders / "poss"), "--device", "cpu"]
    return main(["check", *pair, "--prompts", str(folders / "prompts.jsonl"), *arguments])


def test_a_sound_pair(folders, capsys):
    path = folders / "new" / "check.json"
    assert check(folders, "--fast", "--num_prompts", "6", "--json", str(path)) == 0
    told = capsys.readouterr().out
    assert "verdict: sound (13 ok)" in told
    lines = told.splitlines()
    assert [line.split()[0] for line in lines[:13]] == ["ok"] * 13
    assert "what to do" not in told
    result = json.loads(path.read_text())
    assert result["verdict"] == "sound"
    assert [finding["name"] for finding in result["findings"]][:3] == ["geometry", "names", "tokenizer"]
    assert result["command"].startswith("hf-poss") and len(result["prompts"]) == 6
    assert result["target"]["parameters"] > 0 and result["drafter"]["specialists"] == 2


def test_a_pair_that_is_not_sound(folders, capsys):
    """Exit status 1, with what to do, and JSON that everything can read."""
    target, poss, _ = sound_pair()
    poss.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    poss.save_pretrained(folders / "poss")
    path = folders / "check.json"
    assert check(folders, "--fast", "--json", str(path)) == 1
    told = capsys.readouterr().out
    assert "verdict: not sound (" in told and "NaN" in told and "what to do: " in told

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    findings = json.loads(path.read_text(), parse_constant=refuse)["findings"]
    assert findings[3]["verdict"] == "failure" and findings[-1]["verdict"] == "skipped"


def test_geometry_is_told_before_the_targets_weights_are_read(folders, capsys):
    other = small_target(hidden_size=64)
    other.config.save_pretrained(folders / "small-target")
    (folders / "small-target" / "model.safetensors").unlink()
    assert check(folders) == 1
    told = capsys.readouterr().out
    assert told.startswith("failure  geometry") and "hidden size of 32" in told and "64" in told
    assert "verdict: not sound (1 failure)" in told


def test_what_is_recorded_with_the_drafter_is_compared(folders, capsys):
    (folders / "poss" / "training_record.json").write_text('{"base_model": "someone/another-target"}')
    assert check(folders, "--fast") == 0
    told = capsys.readouterr().out
    assert "another-target (training_record.json)" in told and "verdict: sound with warnings" in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--target", "a"], "`--target` and `--poss` go together"),
        (["--target", "a", "--poss", "b", "--demo"], "expected one of them"),
        (["--num_prompts", "0"], "`--num_prompts 0`; expected 1 or more"),
        (["--target", "./no-such", "--poss", "./none"], "There is no folder ./none"),
        (["--prompts", "no-such-set"], "no prompt set 'no-such-set'"),
        (["--chat", "on"], "no chat template"),
    ],
)
def test_what_cannot_be_checked_is_refused(arguments, told, capsys):
    assert main(["check", *arguments]) == 1
    assert told in capsys.readouterr().err


def test_an_interrupted_check_has_no_verdict(folders, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_poss.evaluation.check.run.greedy_texts", interrupted)
    assert check(folders, "--fast") == 130
    told = capsys.readouterr()
    assert "ok       outputs" in told.out and "verdict" not in told.out
    assert "there is no verdict" in told.err
