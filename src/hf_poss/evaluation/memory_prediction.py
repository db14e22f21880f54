"""The memory of a call, told from configs before anything is loaded."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..candidate_generator import DraftSettings
from ..compatibility import without_memory
from ..configuration_poss import PosSConfig
from .kernel_buffers import Kernel, kernel_buffers, takes_buffers
from .memory import CallMemory, PartPeak, StorageWatch, call_memory, watched_call, weight_bytes
from .rehearsal import PlainRehearsal, RoundRehearsal


__all__ = ["predicted_memory"]

# Bytes of which an accelerator's allocator gives out multiples.
_GRANULARITY = {"cuda": 512}


def predicted_memory(
    target_config: PreTrainedConfig,
    poss_config: PosSConfig | None,
    settings: DraftSettings | None,
    calls: Sequence[tuple[int, int]],
    new_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    poss_dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    accepted: int | None = None,
) -> list[CallMemory]:
    """What calls will need, without a byte of it: target and specialists are made of tensors that have no memory, the
    passes of a call run on them, and the storages that they would hold are added up.

    Buffers inside of kernels depend on the machine: batched products and attentions are run once each, on operands of
    the sizes that they will have. Not told: workspaces that libraries take past torch, what an allocator holds in
    reserve, the context of a driver. On an accelerator, sizes are rounded up as its allocator does.

    Args:
        target_config, poss_config: of the two; without specialists, calls decode plainly.
        settings: shape of the drafts.
        calls: rows and tokens of the prompt of each call.
        new_tokens: that a call has room for.
        device: that will run them, and of whose kind torch has kernels here: which ones run depends on it.
        dtype: of the target's weights.
        poss_dtype: of the specialists', the target's if not given.
        attn_implementation: of the target.
        accepted: drafted tokens that a round accepts, see [`RoundRehearsal`].

    Raises:
        ValueError: if weights will be packed, or a pass cannot run without values, as where experts are chosen: then
            nothing can be told before it runs.
    """
    if getattr(target_config, "quantization_config", None) is not None:
        raise ValueError(
            "The target's weights are packed (`quantization_config`), and what they unpack to is not told by their "
            "config. Its memory is not predicted; measure it."
        )
    imagined = without_memory()
    with imagined, device:
        target = AutoModelForCausalLM.from_config(target_config, dtype=dtype, attn_implementation=attn_implementation)
        target.requires_grad_(False).eval()
        poss = None
        if poss_config is not None:
            poss = AutoModel.from_config(poss_config, dtype=poss_dtype or dtype).requires_grad_(False).eval()
    weights, watches, held = weight_bytes(target, poss), [], []
    for rows, context in calls:

        def make(rows: int = rows, context: int = context) -> RoundRehearsal | PlainRehearsal:
            if poss is None:
                return PlainRehearsal(target, rows, context, new_tokens)
            return RoundRehearsal(target, poss, settings, rows, context, new_tokens, accepted)

        watch = _ImaginedWatch(_GRANULARITY.get(device.type, 1))
        for model in (target, *(() if poss is None else (poss,))):
            watch.ignore([*model.parameters(), *model.buffers()])
        with imagined, _values_wanted(target):
            held.append(watched_call(make, watch))
        watches.append(watch)
    buffers = kernel_buffers({kernel for watch in watches for part in watch.kernels for kernel in part}, device)
    return [call_memory(watch.peaks_with(buffers), of, weights) for watch, of in zip(watches, held, strict=True)]


@contextmanager
def _values_wanted(target: PreTrainedModel) -> Iterator[None]:
    """Says in our words what tensors without values cannot do."""
    try:
        with warnings.catch_warnings():  # the rows of a head are told from others by their address, here 0
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0] if str(error) else "no message"
        raise ValueError(
            f"A pass of {type(target).__name__} cannot run without values, as the choice of experts may need them "
            f"({type(error).__name__}: {reason}). Its memory is not predicted; measure it."
        ) from error


class _ImaginedWatch(StorageWatch):
    """Follows storages, and notes the kernels that take buffers of their own, with what was taken besides."""

    def __init__(self, granularity: int):
        super().__init__(granularity, _Answers(), self._note)
        self.kernels: list[dict[Kernel, int]] = []  # by part

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.kernels.append({})
        with super().part(name):
            yield

    def _note(self, operation: Callable, arguments: tuple, keyword_arguments: dict[str, Any], taken: int) -> None:
        if self.kernels and takes_buffers(operation):
            kernel = Kernel.of(operation, arguments, keyword_arguments)
            self.kernels[-1][kernel] = max(taken, self.kernels[-1].get(kernel, 0))

    def peaks_with(self, buffers: dict[Kernel, int]) -> list[PartPeak]:
        """The peaks, with what kernels take of their own."""
        return [
            replace(part, most=max([part.most, *(taken + buffers[kernel] for kernel, taken in kernels.items())]))
            for part, kernels in zip(self.peaks, self.kernels, strict=True)
        ]


_READ, _EQUAL = torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default
_VIEW = torch.ops.aten.view.default


class _Answers:
    """Answers in place of operations. What is read of tensors without values: what is asked of all is so, two tensors
    are equal, anything else is not, or 0."""

    def __init__(self):
        self._asked_of_all = False

    def __call__(self, operation: Callable, arguments: tuple) -> Any:
        if operation is _READ:
            dtype = arguments[0].dtype
            return self._asked_of_all if dtype == torch.bool else 0.0 if dtype.is_floating_point else 0
        if operation is _EQUAL:
            return True
        if operation is not torch.ops.aten.logical_not.default:
            self._asked_of_all = operation is torch.ops.aten.all.default
        if operation is _VIEW and arguments[0].is_contiguous():
            # Torch gives a dimension of 1 another stride here than to a tensor with values, and products look at it.
            view = operation(*arguments)
            return view.as_strided(view.shape, torch.empty(view.shape, device="meta").stride(), view.storage_offset())
        return None
