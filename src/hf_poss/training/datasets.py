"""Where training data lies: files, folders, the Hub."""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


__all__ = ["load_texts"]

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
_COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
_SHOWN = 8
_PATIENCE = 10.0  # seconds
_EMPTY = "{} is empty; there is nothing to learn."
# What the builders of `datasets` say of files without a row.
_TOLD_OF_EMPTY = ("corresponds to no data", "at least one example", "No columns to parse")


def load_texts(
    name: str | Path, config: str | None = None, split: str = "train", streaming: bool = False
) -> "Dataset | IterableDataset":
    """A dataset from a file, a folder or the Hub.

    - A `.jsonl`, `.json` (one array, or a line an object), `.parquet`, `.csv` or `.txt` file (a row a line), also
      compressed (`.gz`, `.bz2`, `.xz`; `.zst` with the package zstandard), or a pattern such as `data/*.jsonl`.
    - A folder of such files, all of one kind. Files named after splits (`test.jsonl`, `data/train-00000.parquet`) are
      taken as those splits, as `datasets.load_dataset` does.
    - A folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote.
    - Any other name: a dataset on the Hub.

    Args:
        name: path or Hub name.
        config: configuration of a Hub dataset.
        split: name of the split, or a part of one, such as `"train[:10%]"`.
        streaming: reads rows as they are asked for; nothing is copied to the cache.

    Raises:
        FileNotFoundError: if there is no such file, folder or Hub dataset; tells what lies nearby.
        ValueError: if files cannot be read, a folder holds files of several kinds or none, or there is no such split.
        OSError: if the Hub cannot be reached.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return _load_folder(path, config, split, streaming)
    if (builder := _builder(path)) is not None:
        if not path.is_file() and not any(path.parent.glob(path.name)):
            raise FileNotFoundError(f"No dataset at {path}. {_nearby(path)}")
        return _load(builder, path, data_files=str(path), split=split, streaming=streaming)
    if path.is_file():
        raise ValueError(f"{path} is not a data file: expected {', '.join(_BUILDERS)}, or one of them compressed.")
    if path.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1:
        raise FileNotFoundError(f"No dataset at {path}. {_nearby(path)}")
    return _load_from_hub(str(name), config, split, streaming)


def _builder(path: Path) -> str | None:
    """The loader of `datasets` for a file of that name."""
    return _BUILDERS.get((path.with_suffix("") if path.suffix in _COMPRESSIONS else path).suffix)


def _load_folder(path: Path, config: str | None, split: str, streaming: bool) -> "Dataset | IterableDataset":
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _load_from_disk(path, split, streaming)
    kinds: dict[str, list[Path]] = {}
    for file in _data_files(path):
        kinds.setdefault(_builder(file), []).append(file)
    if not kinds:
        raise ValueError(f"{path} holds no data files: expected {', '.join(_BUILDERS)}. {_nearby(path / '*')}")
    if len(kinds) > 1:
        found = ", ".join(f"{len(files)} {kind} ({files[0].name}, ...)" for kind, files in sorted(kinds.items()))
        raise ValueError(f"{path} holds files of several kinds: {found}. Put one kind in a folder, or name one file.")
    return _load(str(path), path, name=config, split=split, streaming=streaming)


def _data_files(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)
        described = file.name in ("dataset_info.json", "dataset_infos.json", "README.txt", "LICENSE.txt")
        if _builder(file) is not None and file.is_file() and not hidden and not described:
            yield file


def _load_from_disk(path: Path, split: str, streaming: bool) -> "Dataset | IterableDataset":
    from datasets import DatasetDict, load_from_disk

    dataset = load_from_disk(str(path))
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise ValueError(f"{path} has no split {split!r}; it has {sorted(dataset)}.")
        dataset = dataset[split]
    return dataset.to_iterable_dataset() if streaming else dataset


def _load_from_hub(name: str, config: str | None, split: str, streaming: bool) -> "Dataset | IterableDataset":
    from datasets import config as settings
    from datasets.exceptions import DatasetNotFoundError

    silence, was_offline = _silence_of_hub(name), settings.HF_HUB_OFFLINE
    # Offline the cache is looked into at once; otherwise a Hub out of reach is asked again for half a minute.
    settings.HF_HUB_OFFLINE = was_offline or silence is not None
    try:
        return _load(name, name, name=config, split=split, streaming=streaming)
    except DatasetNotFoundError as error:
        raise FileNotFoundError(
            f"No dataset {name!r}, neither here nor on the Hub ({error}). {_nearby(Path(name))}"
        ) from error
    except OSError as error:
        raise OSError(
            f"There is no file or folder {name!r} here, and the Hub cannot be asked for it ({silence or error}). "
            f"{_nearby(Path(name))}"
        ) from error
    finally:
        settings.HF_HUB_OFFLINE = was_offline


def _silence_of_hub(name: str) -> Exception | None:
    """Why the Hub says nothing of a dataset; None if it answers, whatever it says."""
    from datasets import config as settings
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi(endpoint=settings.HF_ENDPOINT).dataset_info(name, timeout=_PATIENCE)
    except (HfHubHTTPError, HFValidationError):
        return None
    except Exception as error:  # what is raised depends on who carries the bytes (httpx, its successor)
        return error
    return None


def _load(builder: str, source: Path | str, **kwargs: Any) -> "Dataset | IterableDataset":
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        return load_dataset(builder, **kwargs)
    except StopIteration as error:
        raise ValueError(_EMPTY.format(source)) from error
    except (DatasetGenerationError, ValueError) as error:
        reason = str(error.__cause__ or error)
        if any(told in reason for told in _TOLD_OF_EMPTY):
            raise ValueError(_EMPTY.format(source)) from error
        form = " A .jsonl file has an object on every line, a .json file an array of them." * (builder == "json")
        raise ValueError(f"{source} cannot be read as a dataset: {reason.rstrip('.')}.{form}") from error


def _nearby(path: Path) -> str:
    """What lies where `path` was looked for, most similar names first."""
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    names = [entry.name + "/" * entry.is_dir() for entry in sorted(folder.iterdir()) if entry.name[0] != "."]
    if not names:
        return f"{folder.resolve()} is empty."
    names.sort(key=lambda name: -difflib.SequenceMatcher(None, path.name, name).ratio())
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"In {folder.resolve()} there are: {', '.join(names[:_SHOWN])}{more}."
