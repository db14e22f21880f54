"""Pushing to a stand-in of the Hub, and loading what was pushed."""

import json
import re
import socket
import subprocess
import sys

import pytest
import torch
from conftest import make_poss, make_target
from hub_stand_in import READ_TOKEN, WRITE_TOKEN, Refusal, _Handler
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file, save_file

from hf_poss.hub.folder import publishable_files
from hf_poss.hub.push import PushError, complete_folder, create_repo, describe_upload, push_folder, push_or_explain
from hf_poss.hub.record import write_training_record


@pytest.fixture
def folder(tmp_path):
    """What a training leaves behind: specialists among much that is nobody else's concern."""
    folder = tmp_path / "PosS2-tiny"
    make_poss(make_target(), num_draft_positions=4).save_pretrained(folder)
    write_training_record(folder, {"base_model": "me/target", "samples": 3})
    for name in ("checkpoint-5/optimizer.pt", "checkpoint-5/model.safetensors", "runs/events", "training_args.bin"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"junk")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "tokenizer.json", "notes.py"):
        (folder / name).write_bytes(b"junk")
    return folder


JUNK = (
    "checkpoint-",
    "optimizer",
    "scheduler",
    "rng_state",
    "runs",
    "training_args",
    "trainer_state",
    "tokenizer.json",
)


# ---- There and back ----


ROUND_TRIP = """
import json, sys
from huggingface_hub import ModelCard
from transformers import AutoModel
from hf_poss import PosSModel
for load in (PosSModel.from_pretrained, AutoModel.from_pretrained):
    poss = load("me/PosS2-tiny")
    print(json.dumps({name: value.double().sum().item() for name, value in sorted(poss.state_dict().items())}))
    poss.save_pretrained(sys.argv[1] + "/" + load.__qualname__)
print(ModelCard.load("me/PosS2-tiny").data.base_model)
"""


def test_what_is_pushed_comes_back(hub, folder, tmp_path):
    write_training_record(folder, {"base_model": "me/target", "metrics": {"eval_tau": 2.5, "eval_pos_acc_1": 0.5}})
    plans = []
    url = push_folder(folder, "me/PosS2-tiny", token=WRITE_TOKEN, on_plan=plans.append)
    assert url == f"{hub.endpoint}/me/PosS2-tiny"
    files = hub.repos["me/PosS2-tiny"].files()
    assert sorted(files) == publishable_files(folder) and len(hub.committed) == 1
    assert all(file.content == (folder / path).read_bytes() for path, file in files.items())
    assert {"README.md", "config.json", "generation_config.json", "model.safetensors"} <= files.keys()
    assert {"tokenizer_reference.json", "training_record.json", "custom_generate/generate.py"} <= files.keys()
    assert not [path for path in files if any(junk in path for junk in JUNK)]
    assert all(path in plans[0] for path in files) and "left out: checkpoint-5, notes.py, optimizer.pt" in plans[0]

    result = subprocess.run(
        [sys.executable, "-c", ROUND_TRIP, str(tmp_path)],
        capture_output=True,
        text=True,
        env=hub.environment(tmp_path / "cache"),
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "me/target"
    weights = load_file(folder / "model.safetensors")
    saved = [path.parent for path in tmp_path.glob("*/model.safetensors") if path.parent != folder]
    assert len(saved) == 2
    for copy in saved:
        loaded = load_file(copy / "model.safetensors")
        assert loaded.keys() == weights.keys()
        assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())


def test_a_second_push_sends_only_what_changed(hub, folder):
    push_folder(folder, "me/PosS2-tiny", token=WRITE_TOKEN)
    push_folder(folder, "me/PosS2-tiny", token=WRITE_TOKEN)
    assert len(hub.committed) == 1 and len(hub.stored) == len(set(hub.stored))
    sent = len(hub.stored)
    write_training_record(folder, {"base_model": "me/target", "samples": 4})
    push_folder(folder, "me/PosS2-tiny", token=WRITE_TOKEN)
    assert hub.committed[1:] == [["README.md", "training_record.json"]]
    assert len(hub.stored) == sent


def test_the_card_names_the_repository_with_its_owner(hub, folder):
    push_folder(folder, "PosS2-tiny", token=WRITE_TOKEN)
    text = hub.repos["me/PosS2-tiny"].files()["README.md"].content.decode()
    assert 'PosSModel.from_pretrained("me/PosS2-tiny"' in text


def test_a_branch_is_made(hub, folder):
    url = push_folder(folder, "me/PosS2-tiny", revision="dev", token=WRITE_TOKEN, commit_message="first")
    repo = hub.repos["me/PosS2-tiny"]
    assert url.endswith("/tree/dev") and repo.files("main") == {} and "config.json" in repo.files("dev")
    assert repo.messages == ["first"]


def test_private_is_private(hub, folder):
    push_folder(folder, "me/secret", private=True, token=WRITE_TOKEN)
    assert hub.repos["me/secret"].private
    push_folder(folder, "me/open", token=WRITE_TOKEN)
    assert not hub.repos["me/open"].private
    with pytest.raises(ValueError, match="me/open exists and is public"):
        push_folder(folder, "me/open", private=True, token=WRITE_TOKEN)
    push_folder(folder, "me/secret", private=True, token=WRITE_TOKEN)


def test_a_card_of_somebody_else_is_uploaded_as_it_is(hub, folder):
    (folder / "pictures").mkdir()
    (folder / "pictures" / "a.png").write_bytes(b"picture")
    (folder / "README.md").write_text("---\ntags: [mine]\n---\n# Mine\n\n![a](pictures/a.png) ![b](../secret.png)\n")
    (folder.parent / "secret.png").write_bytes(b"secret")
    push_folder(folder, "me/PosS2-tiny", token=WRITE_TOKEN)
    files = hub.repos["me/PosS2-tiny"].files()
    assert files["README.md"].content.startswith(b"---\ntags: [mine]")
    assert files["pictures/a.png"].content == b"picture"
    assert not [path for path in files if "secret" in path]


def test_the_hub_checks_the_metadata(hub, folder):
    (folder / "README.md").write_text("---\ntags: mine\n---\n# Mine\n")
    with pytest.raises(PushError, match='does not take it.*"tags" must be an array.*hf-poss push'):
        push_folder(folder, "me/PosS2-tiny", token=WRITE_TOKEN)
    assert hub.committed == []


# ---- Refusals and silence ----


@pytest.mark.parametrize(
    ("token", "repo_id", "status", "advice"),
    [
        ("hf_unknown", "me/new", 401, "hf auth login"),
        (READ_TOKEN, "me/new", 403, "write access to me/new"),
        (READ_TOKEN, "me/there", 403, "write access to me/there"),
        (WRITE_TOKEN, "others/new", 403, "write access to others/new"),
    ],
)
def test_refusals_are_told_with_the_command_for_later(hub, folder, token, repo_id, status, advice):
    create_repo("me/there", "", token=WRITE_TOKEN)
    with pytest.raises(PushError) as refusal:
        push_folder(folder, repo_id, private=True if repo_id == "me/new" else None, revision="dev", token=token)
    assert refusal.value.status == status
    private = " --private" if repo_id == "me/new" else ""
    message = str(refusal.value)
    assert f"{hub.endpoint} answered {status}" in message and advice in message
    assert message.endswith(f"hf-poss push {folder} {repo_id}{private} --revision dev")
    assert hub.committed == [] and (folder / "README.md").is_file()


def test_a_repository_that_is_gone_in_between(hub, folder, monkeypatch):
    monkeypatch.setattr("hf_poss.hub.push.create_repo", lambda repo_id, *args: repo_id)
    with pytest.raises(PushError, match="404.*knows no me/gone") as refusal:
        push_folder(folder, "me/gone", token=WRITE_TOKEN)
    assert refusal.value.status == 404


@pytest.mark.parametrize(
    ("step", "status", "told"),
    [
        ("repos/create", 409, r"cannot be reached, or its answer not be read \(KeyError"),  # says of no repository
        ("repos/create", 503, "answered 503. It has trouble of its own: push again"),
        ("branch", 500, "answered 500. It has trouble of its own: push again"),
        ("commit", 412, "answered 412. Somebody else changes me/PosS2-tiny at the same time: push again"),
        ("commit", 400, "does not take it: .*on purpose[.] "),
    ],
)
def test_failures_at_every_step_name_the_command_for_later(hub, folder, monkeypatch, step, status, told):
    route = _Handler._route

    def failing(handler, parts):
        if step in "/".join(parts):
            raise Refusal(status, "on purpose")
        route(handler, parts)

    monkeypatch.setattr(_Handler, "_route", failing)
    with pytest.raises(PushError, match=told) as error:
        push_folder(folder, "me/PosS2-tiny", revision="dev", token=WRITE_TOKEN)
    assert str(error.value).endswith(f" Push later: hf-poss push {folder} me/PosS2-tiny --revision dev")
    assert hub.committed == [] and (folder / "README.md").is_file()


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_without_a_network_the_folder_is_complete(folder, monkeypatch, warnings_seen):
    endpoint = f"http://127.0.0.1:{closed_port()}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert push_or_explain(folder, "me/PosS2-tiny", token=WRITE_TOKEN, endpoint=endpoint) is None
    (warning,) = warnings_seen()
    assert f"{endpoint} cannot be reached" in warning and f"hf-poss push {folder} me/PosS2-tiny" in warning
    assert WRITE_TOKEN not in warning
    assert ModelCard.load(folder / "README.md").data.base_model == "me/target"
    with pytest.raises(PushError) as error:
        push_folder(folder, "me/PosS2-tiny", token=WRITE_TOKEN, endpoint=endpoint)
    assert error.value.status is None


def test_a_hub_that_is_switched_off(folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PushError, match="HF_HUB_OFFLINE.*hf-poss push"):
        push_folder(folder, "me/PosS2-tiny")


# ---- Checks before anything is sent ----


def test_a_published_checkpoint_is_to_be_converted_first(hub, tmp_path):
    target = make_target()
    folder = tmp_path / "PosS1-tiny"
    make_poss(target, positions_per_specialist=1, num_draft_positions=2).save_pretrained(tmp_path / "own")
    folder.mkdir()
    target.config.save_pretrained(folder)
    save_file(load_file(tmp_path / "own" / "model.safetensors"), folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"layout of the public code.*hf-poss convert {folder} NEW_FOLDER"):
        push_folder(folder, "me/PosS1-tiny", token=WRITE_TOKEN)
    assert hub.requests == []


def test_names_that_cannot_be_are_refused_first(hub, folder):
    with pytest.raises(ValueError, match="'a/b/c' is no name on the Hub"):
        push_folder(folder, "a/b/c", token=WRITE_TOKEN)
    assert hub.requests == []


def damaged_key(weights, config):
    weights["embed_tokens.weight"] = torch.zeros(97, 32)


def missing_key(weights, config):
    del weights["fc.weight"]


def other_shape(weights, config):
    weights["fc.weight"] = torch.zeros(32, 63)


def more_positions(weights, config):
    config["num_draft_positions"] = 6


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (damaged_key, "unexpected: embed_tokens.weight"),
        (missing_key, "missing: fc.weight"),
        (other_shape, "of another shape: .*fc.weight"),
        (more_positions, "missing: layers.2"),
    ],
)
def test_weights_that_do_not_fit_are_not_sent(hub, folder, change, told):
    weights = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    change(weights, config)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=told):
        push_folder(folder, "me/PosS2-tiny", token=WRITE_TOKEN)
    assert hub.requests == [] and not (folder / "README.md").exists()


def test_a_file_that_was_cut_off_is_not_sent(hub, folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(ValueError, match="cannot be read.*corrupt, truncated"):
        push_folder(folder, "me/PosS2-tiny", token=WRITE_TOKEN)
    assert hub.requests == []


def test_shards_go_with_their_index(hub, folder):
    weights = load_file(folder / "model.safetensors")
    make_poss(make_target(), num_draft_positions=4).save_pretrained(folder, max_shard_size="50KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "model-00009-of-00009.safetensors").write_bytes(b"left over")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    push_folder(folder, "me/PosS2-tiny", token=WRITE_TOKEN)
    sent = {path for path in hub.repos["me/PosS2-tiny"].files() if "model" in path and not path.endswith(".py")}
    assert sent == {"model.safetensors.index.json", *index["weight_map"].values()} and len(sent) > 2
    assert index["weight_map"].keys() == weights.keys()
    (folder / sorted(sent)[0]).unlink()
    with pytest.raises(FileNotFoundError, match="lacks model-00001"):
        push_folder(folder, "me/PosS2-tiny", token=WRITE_TOKEN)


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="No model.safetensors"):
        complete_folder(folder)


def test_links_of_a_cache_are_followed(folder, tmp_path):
    """A snapshot in the Hub's cache holds links to blobs elsewhere."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).symlink_to(folder / name)
    assert publishable_files(snapshot) == ["config.json", "model.safetensors"]


def test_the_plan_asks_for_the_name_of_a_local_target(folder):
    assert "--base_model" not in describe_upload(folder)
    (folder / "training_record.json").unlink()
    assert re.search("target is not named; .*--base_model OWNER/NAME", describe_upload(folder))


def test_the_tokenizer_is_named_not_copied(folder):
    complete_folder(folder)
    reference = json.loads((folder / "tokenizer_reference.json").read_text())
    assert reference == {"name_or_path": "me/target", "revision": None, "vocab_size": 97}
