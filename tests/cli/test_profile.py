"""`hf-poss profile` on tiny models: predictions, measurements, what pays, and runs that go on."""

import json
import os
import subprocess
import sys

import pytest
from conftest import make_poss, make_target
from tiny_chat import word_tokenizer

from hf_poss.cli import main


SMALL = ["--contexts", "12", "--batch_sizes", "1", "2", "--new_tokens", "12", "--repeats", "2", "--device", "cpu"]
SHAPE = ["--shape", "tiny", "--num_draft_positions", "4", "--positions_per_specialist", "2"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("pair")
    target = make_target("llama")
    target.save_pretrained(folder / "target")
    word_tokenizer().save_pretrained(folder / "target")
    make_poss(target, num_draft_positions=4).save_pretrained(folder / "poss")
    make_poss(target, num_draft_positions=4, positions_per_specialist=4).save_pretrained(folder / "eagle")
    (folder / "prompts.jsonl").write_text('{"prompt": "w7 w8 w9"}\n')
    return ["--target", str(folder / "target"), "--poss", f"PosS-2={folder / 'poss'}", f"EAGLE={folder / 'eagle'}"]


def profile(capsys, *arguments: str) -> str:
    assert main(["profile", *arguments]) == 0
    return capsys.readouterr().out


def test_a_pair_is_predicted_measured_and_judged(pair, tmp_path, capsys):
    path = tmp_path / "new" / "profile.json"
    prompts = pair[1].replace("target", "prompts.jsonl")
    told = profile(capsys, *pair, *SMALL, "--prompts", prompts, "--output", str(path))
    for title in ("Memory", "Latency", "Switching specialists", "What pays"):
        assert f"## {title}" in told
    result = json.loads(path.read_text())
    for key in ("command", "hardware", "device", "versions", "threads"):
        assert result[key]
    assert [(case["context"], case["rows"]) for case in result["cases"]] == [(12, 1), (12, 2)]
    assert list(result["predictions"]) == ["plain", "PosS-2", "EAGLE"]
    for index, case in enumerate(result["cases"]):
        for name, memory in case["memory"].items():
            assert result["predictions"][name][index]["peak"] == pytest.approx(memory["peak"], rel=0.05)
    assert result["acceptance"]["from"].startswith("1 prompts")
    assert len(result["break_even"]["rounds"]) == 2 * 2 and len(result["break_even"]["batches"]) == 2
    pytest.importorskip("matplotlib")
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_shapes_are_predicted_without_weights(monkeypatch, capsys):
    def made(*args, **kwargs):
        raise AssertionError("weights were made")

    monkeypatch.setattr("hf_poss.evaluation.shapes.random_target", made)
    told = profile(capsys, *SHAPE, *SMALL, "--predict_only")
    assert "| PosS-2 |" in told and "| EAGLE |" in told and "Latency" not in told


def test_a_profile_alone_is_printed():
    """In a process of its own, in which torch's profiler has not been asked yet how much it may tell."""
    command = [sys.executable, "-m", "hf_poss.cli", "profile", *SHAPE, *SMALL, "--predict_only"]
    environment = {name: value for name, value in os.environ.items() if name != "KINETO_LOG_LEVEL"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "predicted peak" in ran.stdout and not ran.stderr


def test_shapes_are_measured_and_their_acceptance_is_assumed(capsys, tmp_path):
    path = tmp_path / "profile.json"
    sizes = ["--batch_sizes", "1", "--acceptance", "0.9,0.8", "--draft_vocab_size", "100"]
    told = profile(capsys, *SHAPE, *SMALL, *sizes, "--output", str(path))
    result = json.loads(path.read_text())
    assert result["acceptance"] == {
        "from": "assumed: 0.9,0.8",
        "rates": {name: [0.9, 0.8, 0.8, 0.8] for name in ("EAGLE", "PosS-2")},
    }
    assert "random weights" in told and "Acceptance: assumed: 0.9,0.8." in told
    assert result["predictions"]["PosS-2"][0]["peak"] == pytest.approx(
        result["cases"][0]["memory"]["PosS-2"]["peak"], rel=0.05
    )


def test_acceptance_comes_from_results_by_name(pair, tmp_path, capsys):
    results, path = tmp_path / "results.json", tmp_path / "profile.json"
    pooled = {"PosS-2": {"rounds": 20, "accepted": [10, 4]}, "EAGLE": {"rounds": 10, "accepted": [3]}}
    results.write_text(json.dumps({"decodings": [{"pooled": pooled}]}))
    sizes = ["--batch_sizes", "1", "--results", str(results), "--output", str(path)]
    profile(capsys, *pair, *SMALL, *sizes)
    rounds = json.loads(path.read_text())["break_even"]["rounds"]
    assert {entry["drafter"]: entry["acceptance"][:2] for entry in rounds} == {
        "PosS-2": [0.5, 0.4],
        "EAGLE": [0.3] * 2,
    }
    results.write_text(json.dumps({"decodings": [{"pooled": {"other": {"rounds": 2, "accepted": [1]}}}]}))
    assert main(["profile", *pair, *SMALL, *sizes]) == 1
    assert "no acceptance of PosS-2, EAGLE; it has other" in capsys.readouterr().err


def test_an_interrupted_run_keeps_its_batches_and_goes_on(capsys, tmp_path, monkeypatch):
    from hf_poss.evaluation import profile as profiles

    path, measure, done = tmp_path / "profile.json", profiles.measure_case, []

    def interrupted(plan, pair, case, *arguments):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(case)
        return measure(plan, pair, case, *arguments)

    monkeypatch.setattr(profiles, "measure_case", interrupted)
    assert main(["profile", *SHAPE, *SMALL, "--output", str(path)]) == 130
    told = capsys.readouterr()
    assert "interrupted after 1 of 2 batches" in told.err and "## What pays" in told.out
    before = json.loads(path.read_text())["cases"]
    monkeypatch.setattr(profiles, "measure_case", measure)
    profile(capsys, *SHAPE, *SMALL, "--output", str(path), "--resume")
    after = json.loads(path.read_text())["cases"]
    assert after[0] == before[0] and len(after) == 2
    assert main(["profile", *SHAPE, *SMALL, "--repeats", "3", "--output", str(path), "--resume"]) == 1
    assert "other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "x", "--shape", "tiny"], "expected one of them"),
        (["--target", "x"], "go together"),
        ([*SHAPE, "--prompts", "x"], "goes with trained models"),
        ([*SHAPE, "--acceptance", "5", "--results", "x"], "goes with trained models"),
        ([*SHAPE, "--new_tokens", "1"], "expected 2 or more"),
        ([*SHAPE, "--batch_sizes", "0"], "expected numbers of 1 or more"),
        ([*SHAPE, "--contexts", "4096"], "do not fit into the 2048 positions"),
        ([*SHAPE, "--resume"], "name it"),
        ([*SHAPE, "--depth", "0"], "expected an integer of 1 or more"),
        (["--shape", "no-such-shape"], "no shape"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, message, capsys):
    assert main(["profile", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_packed_targets_are_not_predicted(pair, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hf_poss.cli.profile._unpredictable", lambda args: "Packed as they are loaded.")
    told = profile(capsys, *pair, *SMALL, "--predict_only")
    assert "not predicted" in told and "Packed as they are loaded." in told
