"""Timing specialists for their card."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..evaluation import SpeedComparison, compare_speed
from ..modeling_poss import PosSModel
from ..statistics import GenerationStatistics
from .provenance import command_line, describe_hardware, package_versions
from .record import SpeedRecord


__all__ = ["measure_speed", "speed_record"]


def measure_speed(
    target: PreTrainedModel,
    poss: PosSModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    repeats: int = 3,
    max_new_tokens: int = 128,
    on_run: Callable[[], Any] | None = None,
) -> SpeedRecord:
    """Greedy `generate` on each prompt, with and without specialists in turns, see [`compare_speed`].

    Args:
        prompts: texts, one run alone each; a chat template is the caller's to apply.
        repeats: timed pairs a prompt.
        on_run: called after every run, `len(prompts) * (2 + 2 * repeats)` times.

    Raises:
        ValueError: if there are no prompts, or `repeats` is below 1.
    """
    if not prompts or repeats < 1:
        raise ValueError(f"{len(prompts)} prompts and {repeats} repeats; expected 1 or more of each.")
    comparisons = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt").to(target.device)
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        comparisons.append(
            compare_speed(target, poss, inputs, repeats, on_run, max_new_tokens=max_new_tokens, do_sample=False)
        )
    settings = {
        "decoding": "greedy",
        "batch size": 1,
        "max_new_tokens": max_new_tokens,
        "dtype": str(target.dtype).removeprefix("torch."),
    }
    return speed_record(comparisons, target.config.name_or_path or None, settings)


def speed_record(
    comparisons: Sequence[SpeedComparison], target: str | None = None, settings: dict[str, Any] | None = None
) -> SpeedRecord:
    """The record of comparisons that ran in this process, on this machine."""
    ratios = [ratio for comparison in comparisons for ratio in comparison.ratios]
    stats = GenerationStatistics([record for comparison in comparisons for record in comparison.statistics.records])
    seconds = {
        "drafting": stats.drafting_seconds,
        "verifying": stats.verifying_seconds,
        "other": stats.other_seconds,
    }
    return SpeedRecord(
        target=target,
        plain_rate=statistics.median(comparison.plain_rate for comparison in comparisons),
        poss_rate=statistics.median(comparison.poss_rate for comparison in comparisons),
        speedup=statistics.median(ratios),
        lowest=min(ratios),
        highest=max(ratios),
        runs=len(ratios),
        tau=stats.tau if stats.rounds else None,
        tokens=stats.tokens,
        rounds=stats.rounds,
        pos_acc=stats.pos_acc,
        time_shares={name: part / sum(seconds.values()) for name, part in seconds.items()} if stats.rounds else {},
        prompts=len(comparisons),
        identical=sum(comparison.identical for comparison in comparisons),
        settings=settings or {},
        hardware=describe_hardware(),
        versions=package_versions(),
        command=command_line(),
    )
