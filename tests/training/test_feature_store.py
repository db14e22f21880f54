"""Stored features against those of the target, and stores whose making was stopped."""

import copy
import os
import pickle
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from conftest import make_poss, make_target
from killing import kill_at, run_apart
from torch.utils.data import DataLoader

from hf_poss import PosSTrainer, PosSTrainingArguments
from hf_poss.training import feature_store
from hf_poss.training.collator import PosSDataCollator
from hf_poss.training.feature_store import FeatureDataset, extract_features, is_feature_store
from hf_poss.training.features import target_features
from hf_poss.training.shares import Share
from hf_poss.training.store_index import INDEX_NAME, open_store, plan_store


LENGTHS = (9, 24, 5, 17, 30, 12, 8, 21)
# In float32 a token of width 32 takes 128 bytes and 8 of ids: shards of about two samples.
SHARD_BYTES = 36 * 136


def make_samples(lengths=LENGTHS) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(1)
    samples = [{"input_ids": torch.randint(3, 97, (length,), generator=generator).tolist()} for length in lengths]
    return [{**sample, "labels": [-100, *sample["input_ids"][1:]]} for sample in samples]


def packed_samples() -> list[dict[str, list[int]]]:
    """Two samples of several documents each."""
    samples = []
    for lengths in ((9, 5, 4), (2, 12)):
        documents = make_samples(lengths)
        samples.append({name: sum((document[name] for document in documents), []) for name in documents[0]})
        samples[-1]["segment_ids"] = [number for number, length in enumerate(lengths, 1) for _ in range(length)]
    return samples


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def samples():
    return make_samples()


@pytest.fixture(scope="module")
def target():
    return make_target("llama", scale=3.0)


@pytest.fixture(scope="module")
def store(target, samples, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("store") / "features"
    extract_features(target, samples, folder, dtype=torch.float32, shard_bytes=SHARD_BYTES, batch_size=3)
    return folder


@pytest.fixture
def unfinished(store, tmp_path) -> Path:
    """A copy of the store that lacks two shards."""
    folder = tmp_path / "features"
    shutil.copytree(store, folder)
    for shard in FeatureDataset(store).index.shards[1:3]:
        (folder / shard.file).unlink()
    return folder


def hidden_states(target, token_ids: list[int]) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        states = target(input_ids=torch.tensor([token_ids]), output_hidden_states=True).hidden_states
    return tuple(state[0] for state in states)


@pytest.mark.parametrize("layers", [None, [0, 1], [2]])
def test_samples_come_back_in_order_with_the_hidden_states_of_each(target, samples, layers, tmp_path):
    extract_features(target, samples, tmp_path, feature_layers=layers, dtype="float32", shard_bytes=9000, batch_size=3)
    dataset = FeatureDataset(tmp_path)
    assert len(dataset.index.shards) > 1
    assert len(dataset) == len(samples) and dataset.lengths == list(LENGTHS)
    for stored, sample in zip(dataset, samples, strict=True):
        assert {name: stored[name] for name in sample} == sample
        states = hidden_states(target, sample["input_ids"])
        wanted = {"features": states[-1]} if layers is None else {"target_features": states[-1]}
        if layers is not None:
            wanted["features"] = torch.cat([states[layer] for layer in layers], dim=-1)
        assert list(stored) == dataset.column_names
        assert set(stored) == {*sample, *wanted}
        for name, expected in wanted.items():
            torch.testing.assert_close(stored[name], expected, rtol=1e-5, atol=1e-5)


def test_documents_of_packed_samples_do_not_see_each_other(target, tmp_path):
    packed = packed_samples()
    extract_features(target, packed, tmp_path, dtype="float32")
    for stored, sample in zip(FeatureDataset(tmp_path), packed, strict=True):
        assert stored["segment_ids"] == sample["segment_ids"]
        segments = torch.tensor(sample["segment_ids"])
        for segment in segments.unique():
            rows = segments == segment
            alone = hidden_states(target, torch.tensor(sample["input_ids"])[rows].tolist())[-1]
            torch.testing.assert_close(stored["features"][rows], alone, rtol=1e-5, atol=1e-5)


def test_bfloat16_by_default(target, samples, tmp_path):
    extract_features(target, samples, tmp_path)
    features = FeatureDataset(tmp_path)[4]["features"]
    assert features.dtype == torch.bfloat16
    torch.testing.assert_close(
        features.float(), hidden_states(target, samples[4]["input_ids"])[-1], rtol=2**-8, atol=1e-4
    )


def test_the_index_says_what_is_stored_and_how_large_it_is(target, samples, store):
    index = FeatureDataset(store).index
    files = [store / shard.file for shard in index.shards]
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in files)
    assert index.bytes_of(index.shards) == sum(path.stat().st_size for path in files) - headers
    assert all(shard.tokens <= 36 for shard in index.shards)
    assert sum(shard.tokens for shard in index.shards) == index.num_tokens == sum(LENGTHS)
    told = {"target_dtype": "float32", "dtype": "float32", "feature_layers": None, "hidden_size": 32, "packed": False}
    assert index.settings.items() >= told.items()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layers", [None, [0, 1, 2]])
@pytest.mark.parametrize("packed", [False, True])
def test_losses_are_those_of_online_features(dtype, layers, packed, tmp_path):
    """Exactly: the target computes in the stored dtype, on the same batches."""
    target = make_target("llama", scale=3.0).to(dtype)
    data = packed_samples() if packed else make_samples((24, 17))
    poss = make_poss(target, positions_per_specialist=2, num_draft_positions=3, feature_layers=layers)
    extract_features(target, data, tmp_path, feature_layers=layers, dtype=dtype, batch_size=2)
    collate = PosSDataCollator()
    stored = collate(list(FeatureDataset(tmp_path)))
    online = collate(data)
    inputs = {name: online.get(name) for name in ("attention_mask", "segment_ids", "position_ids")}
    features, last = target_features(target, online["input_ids"], feature_layers=layers, **inputs)
    weights = {"feature": 1.0, "token": 0.1, "topk": 1.0, "acceptance": 1.0}
    wanted = poss(**online, features=features, target_features=last, losses=weights)
    stored.setdefault("target_features", stored["features"])
    given = poss(**stored, losses=weights)
    assert wanted.loss > 0
    assert torch.equal(given.loss, wanted.loss)
    assert torch.equal(given.loss_sums, wanted.loss_sums)
    assert torch.equal(given.counts, wanted.counts)


def test_the_trainer_learns_the_same_from_a_store(tmp_path):
    """Noise, shuffling and grouping by length included; batches meet other neighbours than when they were stored."""
    target, data = make_target("llama", scale=3.0), make_samples()
    extract_features(target, data, tmp_path / "store", dtype="float32", batch_size=3)
    losses = []
    for dataset in (data, FeatureDataset(tmp_path / "store")):
        poss = make_poss(target, positions_per_specialist=2, num_draft_positions=3)
        args = PosSTrainingArguments(
            str(tmp_path / "run"),
            use_cpu=True,
            max_steps=4,
            logging_steps=1,
            save_strategy="no",
            learning_rate=1e-2,
            per_device_train_batch_size=2,
            train_sampling_strategy="group_by_length",
            disable_tqdm=True,
        )
        trainer = PosSTrainer(poss, target, args, train_dataset=dataset)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_it_is_a_dataset_for_workers(store, samples):
    dataset = FeatureDataset(store)
    first = dataset[0]["features"]  # opened here, then again in every worker
    loader = DataLoader(dataset, batch_size=3, collate_fn=PosSDataCollator(), num_workers=2)
    assert sum(int(batch["attention_mask"].sum()) for batch in loader) == sum(LENGTHS)
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again[0]["features"], first)
    assert dataset[-1]["input_ids"] == samples[-1]["input_ids"]
    with pytest.raises(IndexError):
        dataset[len(samples)]


def test_tokens_can_be_read_without_features(store, samples):
    assert list(FeatureDataset(store).without_features()) == samples


def test_a_store_is_told_from_other_folders(store, tmp_path):
    assert is_feature_store(store) and not is_feature_store(tmp_path) and not is_feature_store(store / INDEX_NAME)
    with pytest.raises(FileNotFoundError, match="hf-poss extract"):
        FeatureDataset(tmp_path)


@pytest.mark.parametrize(("field", "value"), [("feature_layers", [1]), ("hidden_size", 64)])
def test_specialists_that_read_other_features_are_refused(store, target, field, value):
    config = make_poss(target, num_draft_positions=2).config
    FeatureDataset(store).check(config)
    other = copy.deepcopy(config)
    setattr(other, field, value)
    with pytest.raises(ValueError, match=field):
        FeatureDataset(store).check(other)


# ---- stopped, resumed, shared


def test_an_incomplete_store_is_refused_with_what_is_missing(unfinished):
    shards = len(list(unfinished.glob("*.safetensors"))) + 2
    with pytest.raises(ValueError, match=f"{shards - 2} of {shards} shards.*hf-poss extract"):
        FeatureDataset(unfinished)


def test_shards_that_are_not_whole_are_made_again(target, samples, store, tmp_path):
    folder = tmp_path / "features"
    shutil.copytree(store, folder)
    files = sorted(folder.glob("*.safetensors"))
    files[0].write_bytes(files[0].read_bytes()[:-1])
    files[1].write_bytes(b"")
    with pytest.raises(ValueError, match="incomplete"):
        FeatureDataset(folder)
    extract_features(target, samples, folder, dtype=torch.float32, shard_bytes=SHARD_BYTES, batch_size=3)
    assert files_in(folder) == files_in(store)


def test_shards_that_are_there_are_not_made_again(target, samples, unfinished, store):
    kept = {path: path.stat().st_ino for path in unfinished.glob("*.safetensors")}
    extract_features(target, samples, unfinished, dtype=torch.float32, shard_bytes=SHARD_BYTES, batch_size=3)
    assert files_in(unfinished) == files_in(store)
    assert all(path.stat().st_ino == number for path, number in kept.items())


def test_processes_share_a_store_and_their_number_may_change(target, samples, store, tmp_path):
    plan = {"dtype": torch.float32, "shard_bytes": SHARD_BYTES}
    extract_features(target, samples, tmp_path, batch_size=3, share=Share(1, 3), **plan)
    with pytest.raises(ValueError, match="incomplete"):
        FeatureDataset(tmp_path)
    for process in (1, 0):
        extract_features(target, samples, tmp_path, batch_size=3, share=Share(process, 2), **plan)
    assert files_in(tmp_path) == files_in(store)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"dtype": "bfloat16"}, "dtype: 'float32' then, 'bfloat16' now"),
        ({"feature_layers": [1]}, "feature_layers: None then"),
        ({"shard_bytes": 9000}, "shards"),
        ({"target_name": "another"}, "another"),
    ],
)
def test_other_settings_are_refused(target, samples, store, other, told):
    plan = {"dtype": torch.float32, "shard_bytes": SHARD_BYTES, **other}
    with pytest.raises(ValueError, match=told):
        extract_features(target, samples, store, **plan)


def test_other_samples_are_refused(target, samples, store):
    changed = copy.deepcopy(samples)
    changed[3]["labels"][4] = -100
    with pytest.raises(ValueError, match="samples_digest"):
        extract_features(target, changed, store, dtype=torch.float32, shard_bytes=SHARD_BYTES)


def test_a_folder_with_something_else_is_refused(target, samples, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="thesis.tex"):
        extract_features(target, samples, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_short_disk_is_refused_with_the_numbers(target, samples, unfinished, monkeypatch):
    index = plan_store(samples, target.config, dtype="float32", target_dtype="float32", shard_bytes=SHARD_BYTES)
    missing = index.bytes_of(index.shards[1:3])
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, missing - 1))
    before = files_in(unfinished)
    with pytest.raises(OSError, match=rf"{missing:,} bytes.*{missing - 1:,} bytes"):
        open_store(unfinished, index)
    assert files_in(unfinished) == before
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, missing))
    assert open_store(unfinished, index) == [1, 2]


def test_a_short_disk_is_refused_before_anything_is_written(target, samples, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "total used free")(1000, 0, 1000))
    with pytest.raises(OSError, match="free"):
        extract_features(target, samples, tmp_path)
    assert not is_feature_store(tmp_path)


@pytest.mark.parametrize(
    ("data", "plan", "told"),
    [
        ([], {}, "no sample"),
        (iter(()), {}, "stream"),
        (None, {"dtype": "int8"}, "int8"),
        (None, {"feature_layers": [3]}, "feature_layers"),
        (None, {"feature_layers": []}, "feature_layers"),
    ],
)
def test_what_cannot_be_planned_is_refused(target, samples, data, plan, told):
    with pytest.raises(ValueError, match=told):
        plan_store(samples if data is None else data, target.config, **plan)


def test_a_killed_extraction_goes_on_where_it_was(tmp_path):
    """Killed at several moments, once or again and again: byte for byte the store of one go."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, __file__, str(tmp_path)], check=True, env=environment)
    whole = files_in(tmp_path / "whole")
    killed = sorted(tmp_path.glob("killed-*"))
    assert len(killed) == 8
    assert len(whole) == 6
    for folder in killed:
        assert files_in(folder) == whole, folder


def drive(root: Path) -> None:
    """Makes a store in one go, and others with kills in between."""

    target = make_target("llama", scale=3.0)

    def extract(folder: Path, replace=os.replace, save=feature_store.save_file) -> None:
        os.replace, feature_store.save_file = replace, save
        extract_features(target, make_samples(), folder, dtype="float32", shard_bytes=SHARD_BYTES, batch_size=3)

    replace, save = os.replace, feature_store.save_file

    def save_half(tensors, path, **kwargs):
        save(tensors, path, **kwargs)
        os.truncate(path, os.path.getsize(path) // 2)

    assert run_apart(extract, root / "whole")
    kills = [
        {"replace": kill_at(replace, 0)},  # the first file that gets its name is the index
        {"replace": kill_at(replace, 0, replace)},
        {"replace": kill_at(replace, 2)},
        {"replace": kill_at(replace, 2, replace)},
        {"replace": kill_at(replace, 5)},
        {"save": kill_at(save, 0, save_half)},
        {"save": kill_at(save, 2, save_half)},
    ]
    for number, kill in enumerate(kills):
        folder = root / f"killed-{number}"
        assert not run_apart(extract, folder, **kill)
        assert run_apart(extract, folder)
    again = root / "killed-7"
    for _ in range(4):  # every attempt lives to write one shard more
        assert not run_apart(extract, again, save=kill_at(save, 1, save_half))
    assert run_apart(extract, again)


if __name__ == "__main__":
    drive(Path(sys.argv[1]))
