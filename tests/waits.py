"""Counts how often the host waits for a device, on a machine that has none."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


# What hands a tensor's values to Python, by the name that Python calls.
READS = {
    "item",
    "tolist",
    "numpy",
    "cpu",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "__contains__",
}
# Operations whose result's size, or whose way, depends on values; whoever calls them.
OPERATIONS = {
    "_local_scalar_dense",
    "_unique2",
    "allclose",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}


class Waits:
    """Where the host waited: a list of names for each stretch of time.

    Every tensor counts as one of the device, since on this machine all are alike. What is uploaded counts where torch
    waits for it: tensors that are made of Python values and named a device, and lists as an index.
    """

    def __init__(self):
        self.stretches: list[list[str]] = [[]]
        self.inside = False

    def add(self, name: str) -> None:
        if not self.inside:
            self.stretches[-1].append(name)

    def next_stretch(self, *_: Any) -> None:
        self.stretches.append([])


class _Calls(TorchFunctionMode):
    """Sees what Python calls."""

    def __init__(self, waits: Waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        waits = name in READS and isinstance(args[0], torch.Tensor)
        waits |= name == "to" and "cpu" in (*args[1:], *kwargs.values())
        waits |= name in ("tensor", "as_tensor") and kwargs.get("device") is not None and not _is_tensor(args[0])
        waits |= name in ("__getitem__", "__setitem__") and _has_list(args[1])
        if not waits or self.waits.inside:
            return func(*args, **kwargs)
        self.waits.add(name)
        self.waits.inside = True  # what it is made of is the same wait
        try:
            return func(*args, **kwargs)
        finally:
            self.waits.inside = False


class _Operations(TorchDispatchMode):
    """Sees what torch runs, by whomever it is called."""

    def __init__(self, waits: Waits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name in OPERATIONS:
            self.waits.add(name)
        elif name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.waits.add(name)  # the one with a tensor of repeats; the other one is made of `expand`
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]):
                self.waits.add(f"{name} by a mask")
        return func(*args, **kwargs)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _has_list(index: Any) -> bool:
    return isinstance(index, list) or (isinstance(index, tuple) and any(isinstance(part, list) for part in index))


@contextmanager
def counted_waits() -> Iterator[Waits]:
    """Counts the waits inside of the block, of this thread."""
    waits = Waits()
    with _Operations(waits), _Calls(waits):
        yield waits


def waits_by_round(target: nn.Module, call: Callable[[], Any]) -> list[list[str]]:
    """What a `generate` call waits for, from one pass of the target to the next: first what comes with the prompt's
    pass and behind it, then a list for each round, from its pass over drafts to the next one or the end of the call.
    """
    with ExitStack() as stack:
        waits = stack.enter_context(counted_waits())
        hook = target.register_forward_pre_hook(waits.next_stretch)
        stack.callback(hook.remove)
        call()
    return waits.stretches[1:]
