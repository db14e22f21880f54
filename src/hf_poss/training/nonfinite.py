"""Features, a loss or a gradient that are not finite: which batch they came from, and what to do."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase


__all__ = ["WatchedBatch", "describe_features", "describe_step", "rows_not_finite"]

_SHOWN_TOKENS = 12
_SHOWN_SAMPLES = 8


@dataclass
class WatchedBatch:
    """What is kept of a batch until its step is known to be sound; nothing here waits for the device.

    Args:
        input_ids: int64 [batch, tokens].
        loss: scalar.
        loss_sums: float32 [batch, losses, positions].
    """

    input_ids: torch.Tensor
    loss: torch.Tensor
    loss_sums: torch.Tensor


def rows_not_finite(values: torch.Tensor) -> torch.BoolTensor:
    """[batch]: samples of [batch, ...] with a value that is NaN or infinite."""
    return ~torch.isfinite(values.flatten(1)).all(1)


def describe_features(
    when: str,
    input_ids: torch.Tensor,
    bad_rows: torch.Tensor,
    target_dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> str:
    """Which samples of a batch have features that are not finite, and what to do.

    Args:
        when: "Step 12", or "Evaluation".
        input_ids: int64 [batch, tokens].
        bad_rows: bool [batch].
        target_dtype: what the features were computed in.
        tokenizer: to show the beginnings of samples.
    """
    samples = [
        f"sample {row + 1} of {len(input_ids)}: {_beginning(input_ids[row], tokenizer)}"
        for row in bad_rows.nonzero().flatten().tolist()
    ]
    if target_dtype == torch.float16:
        advice = "Hidden states of the target leave the range of float16: load it in bfloat16 or float32 (`--dtype`)."
    else:
        advice = "Check the target's weights, and run it in bfloat16 or float32 (`--dtype`)."
    return f"{when}: the target's features hold NaN or infinite values in{_listing(samples)}\n{advice}"


def describe_step(
    when: str,
    batches: Sequence[WatchedBatch],
    losses: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> str:
    """Which samples make the loss of a step NaN or infinite, and what to do; if none does, its gradients are.

    Args:
        when: "Step 12", or "Evaluation".
        batches: those of the step in this process.
        losses: names, in the order of `loss_sums`.
        tokenizer: to show the beginnings of samples.
    """
    samples = []
    for number, batch in enumerate(batches, start=1):
        for row in rows_not_finite(batch.loss_sums).nonzero().flatten().tolist():
            bad = (~torch.isfinite(batch.loss_sums[row])).nonzero().tolist()
            found = ", ".join(f"{losses[index]} loss of position {position + 1}" for index, position in bad[:3])
            more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
            name = f"batch {number} of {len(batches)}, sample {row + 1} of {len(batch.input_ids)}"
            samples.append(f"{name} ({found}{more}): {_beginning(batch.input_ids[row], tokenizer)}")
    advice = (
        "Lower the learning rate, compute in bfloat16 or float32 rather than float16, or leave such samples out. "
        "Checkpoints were written before it happened."
    )
    if samples:
        return f"{when}: the loss is NaN or infinite in{_listing(samples)}\n{advice}"
    beginnings = [
        f"batch {number} of {len(batches)} begins with {_beginning(batch.input_ids[0], tokenizer)}"
        for number, batch in enumerate(batches, start=1)
    ]
    return (
        f"{when}: gradients are NaN or infinite, here or in another process, though every loss here is finite:"
        f"{_listing(beginnings)}\n{advice}"
    )


def _listing(lines: list[str]) -> str:
    more = len(lines) - _SHOWN_SAMPLES
    return "".join(f"\n  {line}" for line in lines[:_SHOWN_SAMPLES]) + (f"\n  and {more} more" if more > 0 else "")


def _beginning(tokens: torch.Tensor, tokenizer: PreTrainedTokenizerBase | None) -> str:
    shown = tokens[:_SHOWN_TOKENS].tolist()
    return f"tokens {shown}..." if tokenizer is None else f"{tokenizer.decode(shown)!r}..."
