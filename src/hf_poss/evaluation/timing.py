"""Timing `generate`, and what a list of times says."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel


__all__ = ["Spread", "new_token_counts", "synchronize", "timed_generate"]


@dataclass(frozen=True)
class Spread:
    """What a list of measurements says.

    Args:
        median, lower_quartile, upper_quartile: linearly interpolated; of one value all are that value.
        lowest, highest: of all.
        count: of measurements.
    """

    median: float
    lowest: float
    lower_quartile: float
    upper_quartile: float
    highest: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        """Of one measurement or more; None of none."""
        if not values:
            return None
        quartiles = [values[0]] * 3 if len(values) == 1 else statistics.quantiles(values, n=4, method="inclusive")
        return cls(quartiles[1], min(values), quartiles[0], quartiles[2], max(values), len(values))

    def to_dict(self) -> dict[str, float | int]:
        return asdict(self)


def synchronize(device: torch.device) -> None:
    """Waits until `device` has done all that it was given."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


def timed_generate(
    target: PreTrainedModel, inputs: dict[str, torch.Tensor], **generate_kwargs: Any
) -> tuple[torch.LongTensor, float]:
    """One `generate` call.

    Args:
        inputs: `input_ids` int64 [rows, tokens] and `attention_mask`.

    Returns:
        int64 [rows, tokens] on the CPU, and the seconds until it was there.
    """
    synchronize(target.device)
    start = time.perf_counter()
    output = target.generate(**inputs, **generate_kwargs).cpu()
    return output, time.perf_counter() - start


def new_token_counts(output: torch.LongTensor, prompt_length: int, eos_token_ids: Sequence[int]) -> list[int]:
    """Tokens that each row of [rows, tokens] gained: up to its first end of sequence, which counts."""
    new = output[:, prompt_length:]
    ends = torch.isin(new, torch.tensor(list(eos_token_ids), dtype=new.dtype, device=new.device))
    ended_before = ends.long().cumsum(-1) - ends.long()  # ends strictly before a token
    return (ended_before == 0).sum(-1).tolist()
