"""The index of a feature store: what it was made from, which shards it has, how large it is."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..compatibility import commit_of
from .settings import check_same_settings, deciding_versions, remove_leftovers, write_json
from .sizes import readable


__all__ = ["INDEX_NAME", "Shard", "StoreIndex", "open_store", "plan_store"]

INDEX_NAME = "poss_features.index.json"
_FORMAT = 1
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}


@dataclass(frozen=True)
class Shard:
    """Consecutive samples in one file.

    Args:
        file: its name in the folder of the store.
        first: number of its first sample.
        samples: how many.
        tokens: in all of them.
    """

    file: str
    first: int
    samples: int
    tokens: int


@dataclass(frozen=True)
class StoreIndex:
    """What a store holds once it is complete. A shard is written to another name until it is whole, so that the shards
    that are there are those whose files are there.

    Args:
        settings: `target` (name), `target_commit`, `target_dtype`, `tokenizer`, `dataset` (names), `samples_digest`
            (of all tokens, labels and segments), `dtype` (of the stored features), `feature_layers`, `hidden_size`,
            `packed` and `versions`.
        shards: in the order of the dataset.
    """

    settings: dict[str, Any]
    shards: list[Shard]

    @property
    def num_samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self.settings["dtype"]]

    @property
    def feature_layers(self) -> list[int] | None:
        return self.settings["feature_layers"]

    @property
    def hidden_size(self) -> int:
        return self.settings["hidden_size"]

    def tensors(self, shard: Shard) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor of a shard. The samples lie one behind the other: sample i of the shard is
        `offsets[i]` to `offsets[i + 1]`."""
        tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "offsets": ((shard.samples + 1,), torch.int64),
            "input_ids": ((shard.tokens,), torch.int32),
            "labels": ((shard.tokens,), torch.int32),
        }
        if self.settings["packed"]:
            tensors["segment_ids"] = ((shard.tokens,), torch.int32)
        layers = self.feature_layers
        tensors["features"] = ((shard.tokens, self.hidden_size * len(layers or [-1])), self.dtype)
        if layers is not None:
            tensors["target_features"] = ((shard.tokens, self.hidden_size), self.dtype)
        return tensors

    def bytes_of(self, shards: Sequence[Shard]) -> int:
        """Size of shards on disk, without headers of a few hundred bytes each."""
        return sum(
            torch.Size(shape).numel() * dtype.itemsize
            for shard in shards
            for shape, dtype in self.tensors(shard).values()
        )

    def missing(self, folder: str | os.PathLike) -> list[int]:
        """Numbers of the shards that are not there, or not whole."""
        return [number for number, shard in enumerate(self.shards) if not self._is_whole(Path(folder), shard)]

    def _is_whole(self, folder: Path, shard: Shard) -> bool:
        # A safetensors file is the length of its header (8 bytes, little endian), the header and the tensors.
        try:
            with open(folder / shard.file, "rb") as file:
                header = int.from_bytes(file.read(8), "little")
                size = os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            return False
        return size == 8 + header + self.bytes_of([shard])

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `poss_features.index.json`, atomically."""
        content = {
            "format": _FORMAT,
            "settings": self.settings,
            "num_samples": self.num_samples,
            "num_tokens": self.num_tokens,
            "bytes": self.bytes_of(self.shards),
            "shards": [asdict(shard) for shard in self.shards],
        }
        write_json(Path(folder) / INDEX_NAME, content)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "StoreIndex":
        """Reads `poss_features.index.json`.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it was written by a release whose stores look otherwise.
        """
        path = Path(folder) / INDEX_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} is no feature store: it has no {INDEX_NAME}. `hf-poss extract --output {folder}` makes one."
            )
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("format") != _FORMAT:
            raise ValueError(
                f"{path} has format {content.get('format')!r}; this release reads {_FORMAT}. Extract anew."
            )
        return cls(content["settings"], [Shard(**shard) for shard in content["shards"]])

    def describe(self) -> str:
        """One line: samples, tokens, size."""
        size, shards = self.bytes_of(self.shards), len(self.shards)
        return (
            f"{self.num_samples:,} samples, {self.num_tokens:,} tokens: {readable(size)} in {shards} shard(s) "
            f"({self.settings['dtype']}, {readable(size / self.num_tokens)} a token)"
        )


def plan_store(
    dataset: Any,
    config: PreTrainedConfig,
    feature_layers: Sequence[int] | None = None,
    dtype: torch.dtype | str = torch.bfloat16,
    target_dtype: torch.dtype | str | None = None,
    shard_bytes: int = 2**30,
    target_name: str | None = None,
    tokenizer_name: str | None = None,
    dataset_name: str | None = None,
) -> StoreIndex:
    """The index of the store that a dataset and a target would make. Reads the tokens of the whole dataset.

    Args:
        dataset: samples, see [`prepare_dataset`], with a length.
        config: of the target.
        feature_layers: indices of hidden states, as in [`PosSConfig`].
        dtype: of the stored features: bfloat16, float16 or float32.
        target_dtype: in which the target computes; as in its config by default.
        shard_bytes: size of a shard, at most; one sample more than that makes a shard of its own. A process holds one
            shard in memory, and a killed one loses no more than that.
        target_name, tokenizer_name, dataset_name: for the index.

    Raises:
        ValueError: if the dataset is a stream or empty, or a feature layer or the dtype is none.
    """
    text_config = config.get_text_config()
    layers = None if feature_layers is None else list(feature_layers)
    depth = text_config.num_hidden_layers
    if layers is not None and (not layers or not all(0 <= layer <= depth for layer in layers)):
        raise ValueError(
            f"`feature_layers` is {layers}; expected indices of the target's hidden states, 0 (the embedding's) to "
            f"{depth}, or None for the last."
        )
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"Features cannot be stored as {name!r}; expected one of {', '.join(_DTYPES)}.")
    lengths, digest, packed = _survey(dataset)
    settings = {
        "target": target_name or config.name_or_path,
        "target_commit": commit_of(config),
        "target_dtype": str(target_dtype or config.dtype).removeprefix("torch."),
        "tokenizer": tokenizer_name,
        "dataset": dataset_name,
        "samples_digest": digest,
        "dtype": name,
        "feature_layers": layers,
        "hidden_size": text_config.hidden_size,
        "packed": packed,
        "versions": deciding_versions(),
    }
    token_bytes = StoreIndex(settings, []).bytes_of([Shard("", 0, 0, 1)]) - 8
    return StoreIndex(settings, _cut(lengths, max(shard_bytes // token_bytes, 1)))


def open_store(folder: str | os.PathLike, index: StoreIndex) -> list[int]:
    """Begins a store, or finds it begun with the same index; the numbers of the shards that it lacks.

    Raises:
        ValueError: if `folder` holds something else, or a store that was begun with other settings.
        OSError: if the disk is too small for what is missing.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; expected a folder, a new one or one with a feature store.")
    folder.mkdir(parents=True, exist_ok=True)
    begun = (folder / INDEX_NAME).is_file()
    if begun:
        found = StoreIndex.load(folder)
        check_same_settings(_comparable(found), _comparable(index), f"The feature store {folder}")
    else:
        others = [path.name for path in folder.iterdir() if not path.name.startswith(INDEX_NAME)]
        if others and not (folder / INDEX_NAME).is_file():  # another process may have begun it just now
            raise ValueError(
                f"{folder} holds something else ({', '.join(sorted(others)[:3])}...); expected a new or empty folder, "
                "or one with a feature store. Choose another `--output`."
            )
    missing = index.missing(folder)
    needed, free = index.bytes_of([index.shards[number] for number in missing]), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"The features need {readable(needed)} ({needed:,} bytes) more in {folder}, whose disk has "
            f"{readable(free)} ({free:,} bytes) free. Choose a folder on another disk, fewer or shorter samples, or "
            "train without stored features."
        )
    if not begun:
        index.save(folder)
    if not missing:
        remove_leftovers(folder, INDEX_NAME)
    return missing


def _comparable(index: StoreIndex) -> Mapping[str, Any]:
    sizes = [shard.samples for shard in index.shards]
    layout = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()
    return {**index.settings, "shards": f"{len(sizes)} ({layout[:8]})"}


def _survey(dataset: Any) -> tuple[list[int], str, bool]:
    """Length of every sample, a digest of all of them, and whether documents are packed."""
    if not hasattr(dataset, "__len__"):
        raise ValueError(
            "The dataset is a stream, whose size nobody knows. Extract from a dataset with a length: leave out "
            "`--streaming`, or take the first samples."
        )
    lengths, digest, packed = [], hashlib.sha256(), False
    for sample in dataset:
        lengths.append(len(sample["input_ids"]))
        for name in ("input_ids", "labels", "segment_ids"):
            values = sample.get(name)
            digest.update(b"-" if values is None else torch.as_tensor(values, dtype=torch.int32).numpy().tobytes())
        packed |= sample.get("segment_ids") is not None
    if not sum(lengths):
        raise ValueError("The dataset has no sample with a token; there is nothing to extract.")
    return lengths, digest.hexdigest(), packed


def _cut(lengths: Sequence[int], limit: int) -> list[Shard]:
    """Shards of up to `limit` tokens, or of one longer sample."""
    groups: list[list[int]] = []
    room = 0
    for length in lengths:
        if length > room or not groups:
            groups.append([])
            room = limit
        groups[-1].append(length)
        room -= length
    shards, first = [], 0
    for number, group in enumerate(groups, start=1):
        name = f"features-{number:05d}-of-{len(groups):05d}.safetensors"
        shards.append(Shard(name, first, len(group), sum(group)))
        first += len(group)
    return shards
