"""What goes between the host and a device, with as little waiting as possible."""

from collections.abc import Mapping, Sequence

import torch


__all__ = ["read_together", "upload"]


def upload(values: Sequence, device: torch.device) -> torch.Tensor:
    """Integers (nested lists of one shape) as an int64 tensor on `device`, without waiting for the device."""
    tensor = torch.tensor(values, dtype=torch.long)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def read_together(parts: Mapping[str, torch.Tensor]) -> dict[str, list[list]]:
    """Reads tensors [rows, n] of float32, or of integers (below 2^24 beside these), from the device, waiting for it
    once.

    Returns:
        for each the lists of its rows.
    """
    mixed = any(part.is_floating_point() for part in parts.values())
    joined = torch.cat([part.float() if mixed else part for part in parts.values()], dim=1).tolist()
    found, start = {}, 0
    for name, part in parts.items():
        end = start + part.shape[1]
        found[name] = [row[start:end] for row in joined]
        if mixed and not part.is_floating_point():
            found[name] = [[int(value) for value in row] for row in found[name]]
        start = end
    return found
