"""Rows of a target's head, copied out of it once for as long as head and choice stay the same."""

from collections.abc import MutableMapping
from dataclasses import dataclass
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary


__all__ = ["HeadRows", "rows_of"]

# Writes through `.data` (peft's merges) leave no trace but what they write. These columns of every row are compared.
PROBED_COLUMNS = 64


@dataclass(frozen=True, eq=False)
class HeadRows:
    """Some rows of a head.

    Args:
        weight: [rows, hidden].
        bias: [rows], or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class _Copy:
    rows: HeadRows
    chosen: torch.LongTensor  # a copy, on the head's device
    weight: "ReferenceType[torch.Tensor]"
    state: tuple

    def is_current(self, head: nn.Linear, chosen: torch.LongTensor) -> bool:
        if self.weight() is not head.weight or self.state != _state(head, chosen):
            return False
        weight, bias = head.weight.detach(), head.bias
        probed = self.rows.weight[:, :PROBED_COLUMNS]
        return (
            torch.equal(self.chosen, chosen.to(self.chosen.device))
            and torch.equal(weight[:, :PROBED_COLUMNS].index_select(0, self.chosen), probed)
            and (bias is None or torch.equal(bias.detach()[self.chosen], self.rows.bias))
        )


# By head, then by the tensor that names the rows. A copy goes when either goes.
_copies: MutableMapping[nn.Module, MutableMapping[torch.Tensor, _Copy]] = WeakKeyDictionary()


@torch.compiler.disable
@torch.no_grad()
def rows_of(head: nn.Linear, chosen: torch.LongTensor) -> HeadRows:
    """The rows `chosen` (int64 [rows]) of `head`, the same tensors for as long as neither changes.

    A change is told by the tensors' identity, address and version, and, since writes through `.data` change none of
    them, by comparing the first columns of every row. They are not to be written to.
    """
    with torch.inference_mode(False):  # what is kept may be asked for outside of it next, with gradients
        copies = _copies.setdefault(head, WeakTensorKeyDictionary())
        copy = copies.get(chosen)
        if copy is None or not copy.is_current(head, chosen):
            index = chosen.to(head.weight.device, copy=True)
            bias = None if head.bias is None else head.bias.detach()[index]
            rows = HeadRows(head.weight.detach()[index], bias)
            copy = _Copy(rows, index, ref(head.weight), _state(head, chosen))
            copies[chosen] = copy
        return copy.rows


def _state(head: nn.Linear, chosen: torch.LongTensor) -> tuple:
    tensors = (head.weight, head.bias, chosen)
    return tuple(None if tensor is None else (tensor.data_ptr(), tensor.dtype, _version(tensor)) for tensor in tensors)


def _version(tensor: torch.Tensor) -> object:
    """Changes of `tensor` so far. Those of an inference tensor are not counted: never equal to another answer."""
    return object() if tensor.is_inference() else tensor._version
