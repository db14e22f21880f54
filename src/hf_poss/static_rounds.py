"""Rounds of fixed shapes: on buffers that stay where they are, compiled as `generate` compiles plain decoding."""

import copy
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, StaticCache

from .caches import KeyValueBuffer, move_entries
from .compatibility import mark_static
from .draft_passes import DraftPasses
from .draft_tree import choose_nodes, rank_candidates
from .draft_vocabulary import DraftHead
from .modeling_poss import PosSModel, TargetReference
from .verification import confirmed_paths


__all__ = ["RoundFunctions", "StaticBuffers", "bucket", "is_static", "outside_inference_mode", "round_functions"]

_FIRST_BUCKET = 256


def is_static(cache: Cache) -> bool:
    """Whether a call's cache has one size from beginning to end (`cache_implementation="static"`)."""
    return isinstance(cache, StaticCache)


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """What outlives a call must not be bound to the inference mode that the call was made in."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def bucket(columns: int) -> int:
    """The size that stands for all sizes up to it, so that calls of other lengths run what was compiled: 256, 320,
    384, 448, 512, 640, 768 and so on, four for each doubling, so that none is more than a quarter too large."""
    step = _FIRST_BUCKET // 4
    while 8 * step < columns:
        step *= 2
    return max(-(-columns // step) * step, _FIRST_BUCKET)


@dataclass
class StaticBuffers:
    """Keys and values of a call whose shapes are fixed.

    Args:
        capacity: columns for context, behind which are those for nodes.
        layers: of the target.
        specialists: of the drafter.
    """

    capacity: int
    layers: list[KeyValueBuffer]
    specialists: KeyValueBuffer

    @classmethod
    def of(cls, layers: int, capacity: int, nodes: int, draft_nodes: int) -> "StaticBuffers":
        """Empty ones.

        Args:
            layers: of the target.
            capacity: columns for context.
            nodes: columns for what a round adds to the target's.
            draft_nodes: columns for what it adds to the specialists'.
        """
        return cls(
            capacity,
            [KeyValueBuffer(capacity + nodes, fixed=True) for _ in range(layers)],
            KeyValueBuffer(capacity + draft_nodes, fixed=True),
        )

    def clear(self) -> None:
        """Forgets the call before: what is masked must at least be finite."""
        for buffer in (*self.layers, self.specialists):
            for states in buffer.states or ():
                states.zero_()


class RoundFunctions:
    """What a round computes on the device, for one target and one drafter, and of one shape where it is compiled.

    Args:
        target: the model.
        poss: its drafter.
        reference: to the target.
        head: over the tokens that are drafted from.
        settings: arguments of `torch.compile`; None to run everything as it is.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        poss: PosSModel,
        reference: TargetReference,
        head: DraftHead,
        settings: dict[str, Any] | None = None,
    ):
        self.settings = settings
        self.passes = DraftPasses(poss, reference, head)
        self._stay()
        self._target = weakref.ref(target)
        self._shapes: dict[tuple, RoundFunctions] = {}
        self._compile()

    def _compile(self) -> None:
        self.commit = self._compiled(self.passes.commit)
        self.root = self._compiled(self.passes.root)
        self.expand = [self._compiled(self.passes.expand) for _ in self.passes.poss.layers]  # by specialist
        self.rank_candidates = self._compiled(rank_candidates)
        self.choose_nodes = self._compiled(choose_nodes)
        self.confirmed_paths = self._compiled(confirmed_paths)
        self.move_entries = self._compiled(move_entries)
        self._verify: dict[int, Callable] = {}  # by nodes
        self._idle: list[StaticBuffers] = []

    @property
    def is_compiled(self) -> bool:
        return self.settings is not None

    def begin(self) -> None:
        """Begins a round: CUDA graphs may use again what they returned in the one before, all of it read or copied."""
        if self.is_compiled:
            torch.compiler.cudagraph_mark_step_begin()

    def refresh(self, reference: TargetReference, head: DraftHead) -> None:
        """Takes weights as they are now, for another call."""
        self.passes.refresh(reference, head)
        self._stay()

    def of_shape(self, *shape: Any) -> "RoundFunctions":
        """Those for calls of one shape: torch.compile gives up on a function that was compiled for eight of them."""
        if not self.is_compiled:
            return self
        if shape not in self._shapes:
            functions = copy.copy(self)
            functions._compile()
            self._shapes[shape] = functions
        return self._shapes[shape]

    def _stay(self) -> None:
        """Copies of weights stay where they are, as parameters do: graphs need not copy them once more."""
        project, rows = self.passes.project, self.passes.head.rows
        copies = [project.weight, project.bias, self.passes.head.vocabulary]
        copies += [] if rows is None else [rows.weight, rows.bias]
        for tensor in copies:
            if tensor is not None and self.is_compiled:
                mark_static(tensor)

    @contextmanager
    def buffers(self, make: Callable[[], StaticBuffers]) -> Iterator[StaticBuffers]:
        """Buffers for a call; the same ones from call to call, unless two run at once: graphs that were recorded on an
        address need not be recorded again."""
        try:
            buffers = self._idle.pop()
        except IndexError:
            buffers = make()
        else:
            buffers.clear()
        yield buffers
        if self.is_compiled:
            self._idle[:] = [buffers]

    def verify(self, nodes: int, inputs: dict[str, Any]) -> Any:
        """The target's pass over as many nodes; each size is a graph of its own."""
        if nodes not in self._verify:
            self._verify[nodes] = self._compiled(self._pass)
        return self._verify[nodes](inputs)

    def _pass(self, inputs: dict[str, Any]) -> Any:
        return self._target()(**inputs)

    def _compiled(self, function: Callable) -> Callable:
        """The function with code of its own: torch.compile counts graphs, and remembers shapes, by code object."""
        if self.settings is None:
            return function
        plain = getattr(function, "__func__", function)
        own = types.FunctionType(
            plain.__code__.replace(), plain.__globals__, plain.__name__, plain.__defaults__, plain.__closure__
        )
        own.__kwdefaults__ = plain.__kwdefaults__
        if plain is not function:
            own = types.MethodType(own, function.__self__)
        return torch.compile(own, **self.settings)


class _Known(list):
    """Compiled functions of a drafter by target, kept with it: they hold on to its weights. Copies begin with none."""

    def __deepcopy__(self, memo: dict) -> "_Known":
        return _Known()

    def __reduce__(self) -> tuple:
        return _Known, ()


def round_functions(
    target: PreTrainedModel,
    poss: PosSModel,
    reference: TargetReference,
    head: DraftHead,
    settings: dict[str, Any] | None,
) -> RoundFunctions:
    """The functions of a call; compiled ones live as long as the drafter and the target."""
    if settings is None:
        return RoundFunctions(target, poss, reference, head)
    known: list[tuple[weakref.ref[PreTrainedModel], RoundFunctions]] = vars(poss).setdefault("_rounds", _Known())
    for owner, functions in known:
        if owner() is target and functions.settings == settings:
            functions.refresh(reference, head)
            return functions
    known[:] = [(owner, functions) for owner, functions in known if owner() is not None]
    functions = RoundFunctions(target, poss, reference, head, settings)
    known.append((weakref.ref(target), functions))
    return functions
