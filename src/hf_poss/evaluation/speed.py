"""Paired timing of `generate` with and without position specialists."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from ..measures import speed_up
from ..modeling_poss import PosSModel
from ..statistics import GenerationStatistics, collect_statistics
from .timing import timed_generate


__all__ = ["SpeedComparison", "compare_speed"]


@dataclass
class SpeedComparison:
    """Times of one prompt, run in turns with and without specialists.

    Args:
        prompt_length: tokens of the prompt.
        plain_output, poss_output: int64 [tokens], of the last pair.
        plain_seconds, poss_seconds: one time a pair, in the order of the runs.
        statistics: of a run apart from the timed ones, since collecting costs time.
    """

    prompt_length: int
    plain_output: torch.LongTensor
    poss_output: torch.LongTensor
    statistics: GenerationStatistics
    plain_seconds: list[float] = field(default_factory=list)
    poss_seconds: list[float] = field(default_factory=list)

    @property
    def identical(self) -> bool:
        """Whether both wrote the same tokens."""
        return torch.equal(self.plain_output, self.poss_output)

    @property
    def plain_rate(self) -> float:
        """New tokens a second without specialists, median over pairs; the prompt's pass is in the time."""
        return statistics.median((len(self.plain_output) - self.prompt_length) / s for s in self.plain_seconds)

    @property
    def poss_rate(self) -> float:
        """New tokens a second with specialists, median over pairs; the prompt's pass is in the time."""
        return statistics.median((len(self.poss_output) - self.prompt_length) / s for s in self.poss_seconds)

    @property
    def ratios(self) -> list[float]:
        """Tokens a second with specialists over without, pair by pair."""
        lengths = [len(output) - self.prompt_length for output in (self.plain_output, self.poss_output)]
        return [
            speed_up(lengths[1], poss, lengths[0], plain)
            for plain, poss in zip(self.plain_seconds, self.poss_seconds, strict=True)
        ]


def compare_speed(
    target: PreTrainedModel,
    poss: PosSModel,
    inputs: dict[str, torch.Tensor],
    repeats: int = 3,
    on_run: Callable[[], None] | None = None,
    **generate_kwargs: Any,
) -> SpeedComparison:
    """Times `generate` on one prompt in turns: plain, with specialists, plain, ...

    A run of each before the first timed one warms up; the drafted one's statistics are collected.

    Args:
        inputs: `input_ids` int64 [1, tokens] and `attention_mask`.
        repeats: timed pairs.
        on_run: called after every run, for progress.
        generate_kwargs: of both.
    """

    def run(assistant: dict[str, Any]) -> tuple[torch.LongTensor, float]:
        output, seconds = timed_generate(target, inputs, **assistant, **generate_kwargs)
        if on_run is not None:
            on_run()
        return output[0], seconds

    with collect_statistics() as stats:
        poss_output, _ = run({"assistant_model": poss})
    plain_output, _ = run({})
    result = SpeedComparison(inputs["input_ids"].shape[1], plain_output, poss_output, stats)
    for _ in range(repeats):
        result.plain_output, seconds = run({})
        result.plain_seconds.append(seconds)
        result.poss_output, seconds = run({"assistant_model": poss})
        result.poss_seconds.append(seconds)
    return result
