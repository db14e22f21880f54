"""The order of training samples: a function of seed and epoch alone."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import IterableDataset, Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import get_length_grouped_indices


__all__ = ["EpochSampler", "RepeatedStream", "SetSamplerEpoch"]


class EpochSampler(Sampler[int]):
    """Shuffles anew in every epoch, and the same way in every process and in a run that is resumed in that epoch.

    Args:
        size: samples of the dataset.
        seed: of the order; with the epoch it says all.
        lengths: tokens of each sample. If given, samples of like length come together, the longest first.
        group_size: samples of like length that come together: those of one optimizer step.
    """

    def __init__(self, size: int, seed: int, lengths: Sequence[int] | None = None, group_size: int = 1):
        if lengths is not None and len(lengths) != size:
            raise ValueError(f"`lengths` has {len(lengths)} entries; expected one a sample, {size}.")
        self.size = size
        self.seed = seed
        self.lengths = lengths
        self.group_size = group_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.lengths is None:
            yield from torch.randperm(self.size, generator=generator).tolist()
        else:
            yield from get_length_grouped_indices(self.lengths, self.group_size, generator=generator)


class SetSamplerEpoch(TrainerCallback):
    """Tells the sampler of a trainer its epoch. What stands around a sampler that several processes share, or that
    skips the batches of a resumed epoch, does not hand the epoch on."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        sampler = getattr(self.trainer, "train_sampler", None)
        if sampler is not None:
            sampler.set_epoch(int(state.epoch))


class RepeatedStream(IterableDataset):
    """Passes over a streamed dataset again and again, shuffled anew in each pass if the dataset is.

    A trainer counts the batches of a stream from its very beginning, whereas each pass would begin at 0: a run that is
    resumed in the second pass finds its place only if there is one stream.

    Args:
        dataset: iterable; `set_epoch`, if it has one, chooses the order of a pass.
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        for passes in itertools.count():
            if hasattr(self.dataset, "set_epoch"):
                self.dataset.set_epoch(passes)
            sample = None
            for sample in self.dataset:
                yield sample
            if sample is None:
                return
