"""Buffers that kernels take for themselves while they run: found by running each kernel once."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from .memory import memory_watch, storage_bytes


__all__ = ["Kernel", "kernel_buffers", "takes_buffers"]

# A kernel that would multiply more than this is not run as it is.
_MOST_PRODUCTS = 2**30


@dataclass(frozen=True)
class _Operand:
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Kernel:
    """An operation with the sizes of its operands."""

    operation: Callable
    arguments: tuple
    keyword_arguments: tuple

    @classmethod
    def of(cls, operation: Callable, arguments: tuple, keyword_arguments: dict[str, Any]) -> "Kernel":
        return cls(
            operation,
            tuple(_described(argument) for argument in arguments),
            tuple((name, _described(argument)) for name, argument in sorted(keyword_arguments.items())),
        )


def takes_buffers(operation: Callable) -> bool:
    """Whether an operation is of a kind whose kernels take more than a few bytes. Some copy operands that do not lie
    as they want, such as a matrix that all rows of a batch share."""
    name = str(operation)
    return name.startswith(("aten.mm.", "aten.addmm.", "aten.bmm.")) or "_scaled_dot_product" in name


@torch.no_grad()
def kernel_buffers(kernels: Iterable[Kernel], device: torch.device) -> dict[Kernel, int]:
    """Bytes that each takes at its peak beside its operands and results.

    Large products of batches, which may copy an operand, are run on some of their columns, and their buffers taken to
    grow with these; other large kernels, whose buffers are those of a tile, are left out.
    """
    tried = {kernel: _affordable(kernel) for kernel in kernels}
    kernels, results = [kernel for kernel, share in tried.values() if share], []
    if not kernels:
        return dict.fromkeys(tried, 0)
    with memory_watch(device) as watch:
        for kernel in kernels:
            arguments = [_made(argument, device) for argument in kernel.arguments]
            keyword_arguments = {name: _made(argument, device) for name, argument in kernel.keyword_arguments}
            kernel.operation(*arguments, **keyword_arguments)  # the first run of a size may also build what is kept
            with watch.part("kernel"):
                result = kernel.operation(*arguments, **keyword_arguments)
            made = result if isinstance(result, (list, tuple)) else [result]
            results.append(storage_bytes(part for part in made if isinstance(part, torch.Tensor)))
            del result, made, arguments, keyword_arguments
    taken = {
        kernel: max(part.most - part.before - size, 0)
        for kernel, part, size in zip(kernels, watch.peaks, results, strict=True)
    }
    return {kernel: round(share * taken.get(smaller, 0)) for kernel, (smaller, share) in tried.items()}


def _affordable(kernel: Kernel) -> tuple[Kernel, float]:
    """The kernel or one of fewer columns that is quickly run, and how many times as large it is; 0 times if it is not
    to be run."""
    operands = [argument for argument in kernel.arguments if isinstance(argument, _Operand)]
    name = str(kernel.operation)
    first, second = operands[1:3] if name.startswith("aten.addmm.") else operands[:2]
    inner = second.shape[-2] if "_scaled_dot_product" in name else second.shape[-1]
    # What is multiplied, and what a copy of a matrix that is shared would hold.
    work = max(math.prod(first.shape) * inner, 16 * math.prod(second.shape))
    if work <= _MOST_PRODUCTS:
        return kernel, 1.0
    if not name.startswith("aten.bmm."):
        return kernel, 0.0
    columns = max(second.shape[-1] * _MOST_PRODUCTS // work, 1)
    fewer = replace(second, shape=(*second.shape[:-1], columns))
    return replace(kernel, arguments=(first, fewer, *kernel.arguments[2:])), second.shape[-1] / columns


def _described(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        return _Operand(tuple(argument.shape), tuple(argument.stride()), argument.dtype)
    return tuple(argument) if isinstance(argument, list) else argument


def _made(argument: Any, device: torch.device) -> Any:
    if isinstance(argument, _Operand):
        return torch.empty_strided(argument.shape, argument.strides, dtype=argument.dtype, device=device)
    return argument
