"""Files, folders and names of datasets."""

import bz2
import gzip
import json
import lzma

import pytest

from hf_poss.training import load_texts


datasets = pytest.importorskip("datasets")

ROWS = [{"text": f"row {index}"} for index in range(5)]
LINES = "\n".join(map(json.dumps, ROWS))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


def write(folder, name: str) -> None:
    """The rows in the form that the name asks for."""
    path, dataset = folder / name, datasets.Dataset.from_list(ROWS)
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix, opened in ((".gz", gzip.open), (".bz2", bz2.open), (".xz", lzma.open)):
        if name.endswith(suffix):
            with opened(path, "wt") as file:
                file.write(LINES)
            return
    if name.endswith(".parquet"):
        dataset.to_parquet(path)
    elif name.endswith(".csv"):
        dataset.to_csv(path)
    else:
        texts = {".txt": "\n".join(row["text"] for row in ROWS), ".json": json.dumps(ROWS, indent=1), ".jsonl": LINES}
        path.write_text(texts[path.suffix])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "suffix", [".jsonl", ".json", ".txt", ".csv", ".parquet", ".jsonl.gz", ".json.bz2", ".jsonl.xz"]
)
def test_files(folder, suffix, streaming):
    write(folder, f"a{suffix}")
    dataset = load_texts(folder / f"a{suffix}", streaming=streaming)
    assert list(dataset) == ROWS
    assert isinstance(dataset, datasets.IterableDataset if streaming else datasets.Dataset)


@pytest.mark.parametrize("streaming", [False, True])
def test_folders(folder, streaming):
    write(folder, "a.jsonl")
    write(folder, "more/b.json")
    assert list(load_texts(str(folder), streaming=streaming)) == ROWS * 2


def test_splits_of_a_folder(folder):
    write(folder, "train.jsonl")
    (folder / "test.jsonl").write_text(json.dumps({"text": "held out"}))
    assert list(load_texts(folder)) == ROWS
    assert list(load_texts(folder, split="test")) == [{"text": "held out"}]
    assert list(load_texts(folder, split="train[:2]")) == ROWS[:2]
    with pytest.raises(ValueError, match='"validation"'):
        load_texts(folder, split="validation")


def test_patterns(folder):
    for name in ("a.jsonl", "b.jsonl", "other.txt"):
        write(folder, name)
    assert list(load_texts(folder / "*.jsonl")) == ROWS * 2


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_of_save_to_disk(folder, streaming):
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(folder / "one")
    datasets.DatasetDict(train=dataset, test=dataset.select([0])).save_to_disk(folder / "two")
    assert list(load_texts(folder / "one", streaming=streaming)) == ROWS
    assert list(load_texts(folder / "two", split="test", streaming=streaming)) == ROWS[:1]
    with pytest.raises(ValueError, match=r"no split 'dev'.*\['test', 'train'\]"):
        load_texts(folder / "two", split="dev", streaming=streaming)


@pytest.mark.parametrize("name", ["chats.jsonl", "chats", "missing/chats.jsonl", "chats.jsnl"])
def test_a_missing_path_is_told_with_what_lies_nearby(folder, name):
    for other in ("chats.json", "text.txt"):
        write(folder, other)
    with pytest.raises(FileNotFoundError, match=rf"{name}\. In .*data there are: chats.json, text.txt\."):
        load_texts(folder / name)


def test_folders_that_hold_no_dataset(folder):
    with pytest.raises(ValueError, match=r"no data files: expected \.jsonl.*is empty"):
        load_texts(folder)
    (folder / "README.md").write_text("Nothing here.")
    with pytest.raises(ValueError, match="no data files.*README.md"):
        load_texts(folder)
    with pytest.raises(ValueError, match="README.md is not a data file"):
        load_texts(folder / "README.md")
    write(folder, "a.jsonl")
    write(folder, "b.txt")
    with pytest.raises(ValueError, match=r"1 json \(a.jsonl, ...\), 1 text \(b.txt, ...\)"):
        load_texts(folder)


def test_a_broken_file_is_named(folder):
    (folder / "a.jsonl").write_text('{"text": "fine"}\n{"text": ')
    with pytest.raises(ValueError, match="a.jsonl cannot be read"):
        load_texts(folder / "a.jsonl")


def test_lines_that_are_no_objects_are_refused_with_what_is_expected(folder):
    (folder / "a.jsonl").write_text('"one"\n"two"\n')
    with pytest.raises(ValueError, match=r"a.jsonl cannot be read.*an object on every line"):
        load_texts(folder / "a.jsonl")


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", ""), ("a.jsonl", "\n\n"), ("a.json", "[]"), ("a.txt", ""), ("a.csv", ""), ("a.csv", "text\n")],
)
def test_an_empty_file_is_named(folder, name, content):
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name} is empty"):
        load_texts(folder / name)


def test_an_empty_stream_is_named(folder):
    (folder / "a.jsonl").write_text("")
    with pytest.raises(ValueError, match="a.jsonl is empty"):
        load_texts(folder / "a.jsonl", streaming=True)


def test_names_go_to_the_hub(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        raise datasets.exceptions.DatasetNotFoundError("no such dataset")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *args, **kwargs: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(FileNotFoundError, match="'me/chats', neither here nor on the Hub.*there are"):
        load_texts("me/chats", "large", "test", streaming=True)
    assert asked == [(("me/chats",), {"name": "large", "split": "test", "streaming": True})]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_out_of_reach_is_asked_once(monkeypatch, streaming):
    asked = []

    def dataset_info(self, name, **kwargs):
        asked.append(name)
        raise ConnectionError("no network")

    def fail(*args, **kwargs):
        pytest.fail("asked again")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    monkeypatch.setattr("huggingface_hub.HfApi.hf_hub_download", fail)
    with pytest.raises(OSError, match="no file or folder 'chats' here, and the Hub cannot be asked.*no network"):
        load_texts("chats", streaming=streaming)
    assert asked == ["chats"] and not datasets.config.HF_HUB_OFFLINE
