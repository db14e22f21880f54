"""`hf-poss push`, against a stand-in of the Hub."""

import pytest
from conftest import make_poss, make_target
from hub_stand_in import READ_TOKEN, WRITE_TOKEN, hub_stand_in
from huggingface_hub import constants

from hf_poss.cli import main


@pytest.fixture
def folder(tmp_path):
    make_poss(make_target(), num_draft_positions=4).save_pretrained(tmp_path / "PosS2-tiny")
    return tmp_path / "PosS2-tiny"


def test_a_folder_is_pushed(hub, folder, capsys):
    capsys.readouterr()
    options = ["--private", "--base_model", "me/target", "--token", WRITE_TOKEN]
    assert main(["push", str(folder), "PosS2-tiny", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"{hub.endpoint}/me/PosS2-tiny"
    repo = hub.repos["me/PosS2-tiny"]
    assert repo.private and lines[0].startswith(f"{len(repo.files())} files of ")
    assert {line.split()[0] for line in lines[1:-1]} == set(repo.files())
    assert b"base_model: me/target" in repo.files()["README.md"].content


def test_a_refusal_is_a_message_and_a_status(hub, folder, capsys):
    assert main(["push", str(folder), "me/x", "--token", READ_TOKEN]) == 1
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith(f"hf-poss push: {hub.endpoint} answered 403")
    assert told.endswith(f"Push later: hf-poss push {folder} me/x")


def test_without_a_network_the_folder_is_complete(folder, monkeypatch, capsys):
    with hub_stand_in() as hub:
        hub.serve(monkeypatch)
    assert main(["push", str(folder), "me/x", "--token", WRITE_TOKEN]) == 1  # the stand-in is gone by now
    output = capsys.readouterr()
    assert f"{hub.endpoint} cannot be reached" in output.err and f"hf-poss push {folder} me/x" in output.err
    assert WRITE_TOKEN not in output.out + output.err
    assert (folder / "README.md").is_file() and (folder / "tokenizer_reference.json").is_file()


def test_a_hub_that_is_switched_off(folder, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["push", str(folder), "me/x"]) == 1
    assert "HF_HUB_OFFLINE" in capsys.readouterr().err


def test_a_dry_run_asks_nobody(folder, capsys, monkeypatch):
    monkeypatch.setattr("hf_poss.hub.push.HfApi", None)
    (folder / "optimizer.pt").write_bytes(b"junk")
    assert main(["push", str(folder), "me/x", "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "model.safetensors" in printed and "left out: optimizer.pt" in printed
    assert (folder / "README.md").is_file()


def test_wrong_folders_and_names_are_refused(folder, tmp_path, capsys):
    assert main(["push", str(tmp_path / "none"), "me/x"]) == 1
    assert "no such folder" in capsys.readouterr().err
    assert main(["push", str(folder), "not a name"]) == 1
    assert "'not a name' is no name on the Hub" in capsys.readouterr().err
    (folder / "model.safetensors").unlink()
    assert main(["push", str(folder), "me/x"]) == 1
    assert "No model.safetensors" in capsys.readouterr().err
