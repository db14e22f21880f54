"""Features of a target on disk: extracted once, read in training instead of running the target."""

import os
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from ..checkpoints import repository_name
from ..configuration_poss import PosSConfig
from .collator import PosSDataCollator
from .features import target_features
from .settings import UNFINISHED, publish, remove_leftovers
from .shares import Share
from .store_index import INDEX_NAME, Shard, StoreIndex, open_store, plan_store


__all__ = ["FeatureDataset", "extract_features", "fill_store", "is_feature_store"]

logger = logging.get_logger(__name__)


def is_feature_store(path: str | os.PathLike) -> bool:
    """Whether `path` is a folder that [`extract_features`] made or began."""
    return (Path(path) / INDEX_NAME).is_file()


class FeatureDataset(Dataset):
    """The samples of a feature store, in the order of the dataset that they were extracted from.

    A sample is a dict: `input_ids` and `labels` (lists of integers), `segment_ids` if it is packed, `features`
    [tokens, width], which specialists read, and `target_features` [tokens, hidden], which the target's head reads, if
    the two differ (`feature_layers`). A sample's rows alone are read; open files are kept, by process.

    Args:
        path: folder of the store.
        features: whether samples hold features; without, reading the tokens of a whole store is cheap.

    Raises:
        FileNotFoundError: if there is no store.
        ValueError: if shards are missing.

    Attributes:
        index: the [`StoreIndex`].
        lengths: tokens of every sample.
        column_names: keys of a sample.
    """

    def __init__(self, path: str | os.PathLike, features: bool = True):
        self.path = Path(path)
        self.index = StoreIndex.load(path)
        missing = self.index.missing(path)
        if missing:
            there, shards = len(self.index.shards) - len(missing), len(self.index.shards)
            made_by = f"--target {self.index.settings['target']} --dataset {self.index.settings['dataset']}"
            raise ValueError(
                f"The feature store {path} is incomplete: {there} of {shards} shards are there. Go on with the "
                f"command that began it: hf-poss extract {made_by} --output {path}, with the same options."
            )
        self.column_names = [
            name
            for name in self.index.tensors(self.index.shards[0])
            if name != "offsets" and (features or not name.endswith("features"))
        ]
        self._first_samples = [shard.first for shard in self.index.shards]
        self._opened: dict[int, tuple[Any, list[int]]] = {}
        self._opened_by = os.getpid()

    def check(self, config: PosSConfig) -> None:
        """Refuses specialists that read other features than those that are stored.

        Raises:
            ValueError: if `feature_layers` or `hidden_size` differ.
        """
        for name in ("feature_layers", "hidden_size"):
            stored, wanted = self.index.settings[name], getattr(config, name)
            if stored != wanted:
                raise ValueError(
                    f"The feature store {self.path} holds features of `{name}` {stored}; the specialists read "
                    f"{wanted}. Extract the features anew, or configure specialists for those that are there."
                )
        target, expected = self.index.settings["target"], config.target_name_or_path
        if target and expected and repository_name(target) != repository_name(expected):
            logger.warning_once(
                f"The features in {self.path} are those of {target}; the specialists are made for {expected}."
            )

    def without_features(self) -> "FeatureDataset":
        """The same samples, tokens alone."""
        return FeatureDataset(self.path, features=False)

    def __len__(self) -> int:
        return self.index.num_samples

    def __getitem__(self, number: int) -> dict[str, Any]:
        number = range(len(self))[number]  # counts from the end if negative; an IndexError beyond
        shard = bisect_right(self._first_samples, number) - 1
        file, offsets = self._open(shard)
        inside = number - self._first_samples[shard]
        rows = slice(offsets[inside], offsets[inside + 1])
        sample = {name: file.get_slice(name)[rows] for name in self.column_names}
        return {name: rows if name.endswith("features") else rows.tolist() for name, rows in sample.items()}

    @cached_property
    def lengths(self) -> list[int]:
        lengths: list[int] = []
        for shard in range(len(self.index.shards)):
            offsets = self._open(shard)[1]
            lengths += (end - start for start, end in zip(offsets, offsets[1:], strict=False))
        return lengths

    def _open(self, shard: int) -> tuple[Any, list[int]]:
        """An open shard and where its samples begin."""
        if self._opened_by != os.getpid():
            self._opened, self._opened_by = {}, os.getpid()
        if shard not in self._opened:
            path = self.path / self.index.shards[shard].file
            try:
                file = safe_open(path, framework="pt")
                self._opened[shard] = file, file.get_tensor("offsets").tolist()
            except (SafetensorError, FileNotFoundError) as error:
                raise ValueError(
                    f"{path} cannot be read ({error}). Remove it and run the `hf-poss extract` that made the store "
                    "again: it writes what is missing."
                ) from error
        return self._opened[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}


def extract_features(
    target: PreTrainedModel,
    dataset: Any,
    path: str | os.PathLike,
    *,
    batch_size: int = 8,
    share: Share | None = None,
    **plan: Any,
) -> StoreIndex:
    """Stores the features of prepared samples, or goes on where an earlier call stopped.

    Any number of processes may work at a store, now and later: each writes the shards whose numbers are its own.

    Args:
        target: the language model to draft for; runs in evaluation mode.
        dataset: samples, see [`prepare_dataset`].
        path: folder of the store.
        batch_size: samples that the target runs at once.
        share: of the shards; all by default.
        plan: further arguments of [`plan_store`].

    Raises:
        ValueError: if `path` holds something else or a store with other settings, or the dataset is empty or a stream.
        OSError: if the disk is too small.

    Example:

    ```python
    >>> samples = prepare_dataset(dataset, tokenizer, max_length=2048)
    >>> extract_features(target, samples, "features")
    >>> PosSTrainer(poss, target, args, train_dataset=FeatureDataset("features")).train()
    ```"""
    plan.setdefault("target_dtype", target.dtype)
    index = plan_store(dataset, target.config, **plan)
    open_store(path, index)
    fill_store(target, dataset, path, index, batch_size, share)
    return index


def fill_store(
    target: PreTrainedModel,
    dataset: Any,
    path: str | os.PathLike,
    index: StoreIndex,
    batch_size: int = 8,
    share: Share | None = None,
) -> None:
    """Writes the shards of this process that a store lacks; see [`extract_features`] and [`open_store`]."""
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}; expected 1 or more.")
    folder, share = Path(path), Share() if share is None else share
    own = [shard for number, shard in enumerate(index.shards) if share.owns(number)]
    missing = [index.shards[number] for number in index.missing(folder) if share.owns(number)]
    target.eval()
    with tqdm(
        desc="Extracting features",
        unit="tok",
        unit_scale=True,
        total=sum(shard.tokens for shard in own),
        initial=sum(shard.tokens for shard in own if shard not in missing),
        disable=not share.shows_progress,
    ) as bar:
        for shard in missing:
            tensors = _extract_shard(target, dataset, index, shard, batch_size, bar)
            unfinished = folder / f"{shard.file}{UNFINISHED}"
            save_file(tensors, unfinished, metadata={"format": "pt"})
            publish(unfinished, folder / shard.file)
    if not index.missing(folder):
        remove_leftovers(folder, INDEX_NAME)


def _extract_shard(
    target: PreTrainedModel, dataset: Any, index: StoreIndex, shard: Shard, batch_size: int, bar: tqdm
) -> dict[str, torch.Tensor]:
    packed = index.settings["packed"]
    samples = [_tokens_of(dataset[number], packed) for number in range(shard.first, shard.first + shard.samples)]
    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    if lengths.sum() != shard.tokens:
        raise ValueError("The dataset gives other samples than when it was measured; expected it to stay as it is.")
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in index.tensors(shard).items()}
    tensors["offsets"][1:] = lengths.cumsum(0)
    for name in tensors.keys() & {"input_ids", "labels", "segment_ids"}:
        tensors[name].copy_(torch.cat([torch.as_tensor(sample[name]) for sample in samples]))
    collate = PosSDataCollator()
    # Samples of like length run together; the store keeps their order.
    for group in lengths.argsort(descending=True, stable=True).split(batch_size):
        batch = collate([samples[number] for number in group.tolist()])
        arguments = {name: batch.get(name) for name in ("attention_mask", "segment_ids", "position_ids")}
        features, last = target_features(
            target, batch["input_ids"], feature_layers=index.feature_layers, **arguments
        )  # [batch, tokens, width], [batch, tokens, hidden]
        for row, number in enumerate(group.tolist()):
            start, end = tensors["offsets"][number : number + 2].tolist()
            tensors["features"][start:end] = features[row, : end - start]
            if "target_features" in tensors:
                tensors["target_features"][start:end] = last[row, : end - start]
        bar.update(int(lengths[group].sum()))
    return tensors


def _tokens_of(sample: dict[str, Any], packed: bool) -> dict[str, Sequence[int]]:
    """Tokens, labels and, in a packed dataset, segments of a sample, which may say the first alone."""
    token_ids = sample["input_ids"]
    defaults = {"input_ids": token_ids, "labels": token_ids} | (
        {"segment_ids": [1] * len(token_ids)} if packed else {}
    )
    return {name: default if sample.get(name) is None else sample[name] for name, default in defaults.items()}
