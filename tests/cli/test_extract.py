"""`hf-poss extract` on tiny models: a store that is told, made, shared and resumed."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from conftest import make_target
from tiny_chat import word_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_poss.cli import main
from hf_poss.training.data import prepare_dataset
from hf_poss.training.datasets import load_texts
from hf_poss.training.feature_store import FeatureDataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """target/ and chats.jsonl."""
    folder = tmp_path_factory.mktemp("extract")
    make_target("llama", scale=3.0).save_pretrained(folder / "target")
    word_tokenizer().save_pretrained(folder / "target")
    with open(folder / "chats.jsonl", "w") as file:
        for row in range(9):
            answer = " ".join(f"w{20 + row + i}" for i in range(2 * row + 1))
            messages = [{"role": "user", "content": "w7 w8"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return folder


def command(folder: Path, output: Path, *more: str) -> list[str]:
    return [
        *("extract", "--target", f"{folder}/target", "--dataset", f"{folder}/chats.jsonl", "--output", str(output)),
        *("--device", "cpu", "--max_length", "20", "--batch_size", "2", "--shard_size", "2e-6", *more),  # 2 KiB
    ]


@pytest.fixture(scope="module")
def store(folder) -> Path:
    assert main(command(folder, folder / "features")) == 0
    return folder / "features"


@pytest.mark.parametrize("packing", [False, True])
def test_the_store_holds_the_samples_of_training(folder, tmp_path, packing, capsys):
    assert main(command(folder, tmp_path, *["--packing"] * packing)) == 0
    told = capsys.readouterr().out
    samples = prepare_dataset(load_texts(folder / "chats.jsonl"), word_tokenizer(), max_length=20, packing=packing)
    dataset = FeatureDataset(tmp_path)
    names = ["input_ids", "labels"] + ["segment_ids"] * packing
    assert [{name: stored[name] for name in names} for stored in dataset] == [
        {name: sample[name] for name in names} for sample in samples
    ]
    assert all(stored["features"].shape == (len(stored["input_ids"]), 32) for stored in dataset)
    tokens = sum(dataset.lengths)
    assert f"{len(samples)} samples, {tokens} tokens" in told and "hf-poss train" in told


def test_layers_and_dtype_can_be_chosen(folder, tmp_path):
    assert main(command(folder, tmp_path, "--feature_layers", "0", "2", "--feature_dtype", "float32")) == 0
    sample = FeatureDataset(tmp_path)[0]
    assert sample["features"].dtype == sample["target_features"].dtype == torch.float32
    assert sample["features"].shape[1] == 2 * sample["target_features"].shape[1] == 64


def test_the_size_is_told_before_anything_is_done(folder, tmp_path, store, capsys, monkeypatch):
    monkeypatch.setattr("hf_poss.cli.extract.load_target", None)
    capsys.readouterr()
    assert main(command(folder, tmp_path / "features", "--estimate")) == 0
    index = FeatureDataset(store).index
    kibibytes = index.bytes_of(index.shards) / 1024
    assert f"{kibibytes:.1f} KiB" in capsys.readouterr().out
    assert not any(tmp_path.iterdir())


def test_processes_share_the_shards(folder, store, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in "201":
        monkeypatch.setenv("RANK", rank)
        assert main(command(folder, tmp_path)) == 0
        if rank != "1":
            with pytest.raises(ValueError, match="incomplete"):
                FeatureDataset(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        path.name: path.read_bytes() for path in store.iterdir()
    }


def test_a_complete_store_needs_no_target(folder, store, capsys, monkeypatch):
    monkeypatch.setattr("hf_poss.cli.extract.load_target", None)
    assert main(command(folder, store)) == 0
    assert "hf-poss train" in capsys.readouterr().out


def test_other_settings_are_refused_before_the_target_is_loaded(folder, store, capsys, monkeypatch):
    monkeypatch.setattr("hf_poss.cli.extract.load_target", None)
    assert main(command(folder, store, "--feature_dtype", "float16")) == 1
    assert "'bfloat16' then" in capsys.readouterr().err
    assert main(command(folder, store, "--max_length", "10")) == 1
    assert "samples_digest" in capsys.readouterr().err


def test_the_revision_is_that_of_config_tokenizer_and_target(folder, tmp_path, revisions_asked):
    assert main(command(folder, tmp_path / "features", "--revision", "v2")) == 0
    assert revisions_asked == dict.fromkeys((AutoConfig, AutoTokenizer, AutoModelForCausalLM), {"v2"})


def test_a_short_disk_is_refused_before_the_target_is_loaded(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hf_poss.cli.extract.load_target", None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "total used free")(4096, 0, 4096))
    assert main(command(folder, tmp_path)) == 1
    message = capsys.readouterr().err
    assert "4,096 bytes" in message and "disk" in message


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (("--feature_layers", "9"), "feature_layers"),
        (("--batch_size", "0"), "batch_size"),
        (("--shard_size", "0"), "shard_size"),
        (("--num_shards", "2"), "--shard"),
        (("--dataset", "none.jsonl"), "none.jsonl"),
    ],
)
def test_wrong_use_is_told_before_the_target_is_loaded(folder, tmp_path, option, told, capsys, monkeypatch):
    monkeypatch.setattr("hf_poss.cli.extract.load_target", None)
    assert main(command(folder, tmp_path, *option)) == 1
    assert told in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
