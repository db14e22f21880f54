"""Where the time of a round goes, how many kernels it launches and how often the host waits for the device."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ..statistics import GenerationStatistics, collect_statistics


__all__ = ["count_kernels", "count_waits", "profiled_call", "round_parts"]

_PARTS = {
    "context": "context fill",
    "passes": "draft passes",
    "tree": "tree building",
    "verification": "verification forward",
    "walk": "walk",
    "cache": "cache upkeep",
    "other": "host time",
}
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")  # and their variants, which begin like them


def profiled_call(generate: Callable[[int], Any], new_tokens: int) -> tuple[GenerationStatistics, float]:
    """Statistics of a `generate` call with specialists, and the seconds in it in which they read the prompt.

    Args:
        generate: runs the call with the number of new tokens that it is given.
        new_tokens: of the call.
    """
    with collect_statistics() as first:  # of two tokens the first is the prompt's, the other needs no draft
        generate(2)
    with collect_statistics() as whole:
        generate(new_tokens)
    return whole, first.seconds["context"]


def round_parts(stats: GenerationStatistics, prompt_fill: float) -> dict[str, Any]:
    """Milliseconds a round and shares of it.

    Args:
        stats: of the calls.
        prompt_fill: seconds that the specialists needed to read the prompts of these calls, which are no part of a
            round.
    """
    rounds = max(stats.passes, 1)
    seconds = {name: stats.seconds[part] for part, name in _PARTS.items()}
    seconds["context fill"] = max(seconds["context fill"] - prompt_fill, 0.0)
    total = sum(seconds.values()) or 1.0
    return {
        "rounds": stats.passes,
        "round_milliseconds": 1e3 * sum(seconds.values()) / rounds,
        "parts": {
            name: {"milliseconds": 1e3 * part / rounds, "share": part / total} for name, part in seconds.items()
        },
        "draft_pass_milliseconds": [1e3 * part / rounds for part in stats.pass_seconds],
        "prompt_milliseconds": 1e3 * stats.seconds["prompt"] / max(len(stats.records), 1),
        "prompt_context_fill_milliseconds": 1e3 * prompt_fill / max(len(stats.records), 1),
    }


def count_kernels(run: Callable[[], Any]) -> dict[str, int]:
    """Kernels that ran on a CUDA device during `run`, and calls of the host that launched one or a graph of them."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.accelerator.synchronize()
    events = profiler.events()
    kernels = (
        event
        for event in events
        if event.device_type == DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset"))
    )
    launches = (event for event in events if event.device_type == DeviceType.CPU and event.name.startswith(_LAUNCHES))
    return {"kernels": sum(1 for _ in kernels), "launches": sum(1 for _ in launches)}


def count_waits(run: Callable[[], Any]) -> int:
    """How often the host waited for a CUDA device during `run`."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing" in str(warning.message) for warning in caught)
