"""Running a pair in another floating dtype than it was loaded in."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from ...limits import device_memory


__all__ = ["dtype_name", "in_dtype", "obstacle_to_dtype"]


def obstacle_to_dtype(model: nn.Module, dtype: torch.dtype) -> str | None:
    """Why [`in_dtype`] cannot be used, or None."""
    weights = list(_weights(model))
    if any(not weight.dtype.is_floating_point or weight.dtype.itemsize < 2 for weight in weights if weight.dim() > 1):
        return "the target's weights are packed (quantised)"
    if any(weight.is_meta for weight in weights):
        return "some of the target's weights are offloaded"
    added: dict[torch.device, int] = {}
    for weight in weights:
        size = dtype.itemsize + (weight.dtype.itemsize if dtype.itemsize < weight.dtype.itemsize else 0)
        added[weight.device] = added.get(weight.device, 0) + weight.numel() * size
    for device, needed in added.items():
        available = device_memory(device)
        if available is not None and needed > available:
            return f"in {dtype_name(dtype)} the target takes {needed:.1e} bytes, {device} has {available:.1e}"
    return None


@contextlib.contextmanager
def in_dtype(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Casts weights inside the block, in place, and gives them back bit by bit.

    Buffers that are computed and not saved (rotary frequencies) keep their dtype, as they do in `from_pretrained`.
    """
    changed = []
    try:
        for weight in _weights(model):
            if weight.dtype.is_floating_point and weight.dtype != dtype:
                # What a narrower dtype held comes back from a wider one exactly; else the values are kept.
                kept = None if weight.dtype.itemsize < dtype.itemsize else weight.data
                changed.append((weight, weight.dtype, kept))
                weight.data = weight.data.to(dtype)
        yield
    finally:
        for weight, before, kept in changed:
            weight.data = weight.data.to(before) if kept is None else kept


def _weights(model: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters and saved buffers, tied ones once."""
    seen = set()
    for weight in model.state_dict(keep_vars=True).values():
        if isinstance(weight, torch.Tensor) and id(weight) not in seen:
            seen.add(id(weight))
            yield weight


def dtype_name(dtype: torch.dtype) -> str:
    """As in "bfloat16"."""
    return str(dtype).removeprefix("torch.")
