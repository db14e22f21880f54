"""What a call needs of a device's memory, part by part: watched while it runs."""

import json
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import PreTrainedModel

from ..compatibility import operations_through
from ..modeling_poss import PosSModel
from .rehearsal import PlainRehearsal, RoundRehearsal, rehearse


__all__ = [
    "CallMemory",
    "MemoryWatch",
    "PartPeak",
    "StorageWatch",
    "WatchedCall",
    "call_memory",
    "measured_memory",
    "memory_watch",
    "peak_bytes",
    "storage_bytes",
    "watched_call",
    "weight_bytes",
]

_MARK = "hf_poss: "


@dataclass(frozen=True)
class PartPeak:
    """Bytes beyond what was taken when a watch began.

    Args:
        name: of a part.
        before: when it began.
        most: the most while it ran.
    """

    name: str
    before: int
    most: int


@dataclass(frozen=True)
class CallMemory:
    """Bytes of a device's memory at the point of a call that needs most.

    Args:
        target_weights: of the target: parameters and buffers, the embedding and the head among them.
        drafter_weights: of the specialists and what they share; the embedding and the head are the target's.
        copies: weights that drafting holds once more while a call runs: the key and value projections of all
            specialists as one matrix, and the head's rows of a draft vocabulary.
        target_cache: the buffers of the target's keys and values at the end of the call, room for drafts included.
        specialist_caches: likewise of the specialists.
        activations: by part of a call what it needs at its peak beside all of these: inputs, hidden states, logits,
            and the old buffers while caches grow.
        peak: all in all, at the part that needs most. Weights, copies and caches as they are then, so no more than
            the sum of the fields above, and less where the peak comes before the caches have grown.
    """

    target_weights: int
    drafter_weights: int
    copies: int
    target_cache: int
    specialist_caches: int
    activations: dict[str, int]
    peak: int

    @property
    def weights(self) -> int:
        return self.target_weights + self.drafter_weights

    @property
    def caches(self) -> int:
        return self.target_cache + self.specialist_caches

    def to_dict(self) -> dict[str, Any]:
        """Fields and sums, as JSON takes them."""
        return {
            "target_weights": self.target_weights,
            "drafter_weights": self.drafter_weights,
            "weights": self.weights,
            "copies": self.copies,
            "target_cache": self.target_cache,
            "specialist_caches": self.specialist_caches,
            "caches": self.caches,
            "activations": dict(self.activations),
            "peak": self.peak,
        }


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the memory behind tensors; what several of them share counts once."""
    storages = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storage.nbytes() for storage in storages.values())


def weight_bytes(target: PreTrainedModel, poss: PosSModel | None = None) -> tuple[int, int]:
    """Bytes of the target's and of the specialists' parameters and buffers, those of adapters and the draft vocabulary
    included. A head that is tied to the embedding counts once."""
    models = (target, *(() if poss is None else (poss,)))
    sizes = [storage_bytes([*model.parameters(), *model.buffers()]) for model in models]
    return sizes[0], sum(sizes[1:])


class MemoryWatch(ABC):
    """Memory that is taken beyond what was taken when the watch began.

    Attributes:
        peaks: of every part, in the order in which they ran; known when the watch has ended.
    """

    def __init__(self):
        self.peaks: list[PartPeak] = []

    @abstractmethod
    def __enter__(self) -> "MemoryWatch": ...

    @abstractmethod
    def __exit__(self, *raised: Any) -> None: ...

    @abstractmethod
    def part(self, name: str) -> AbstractContextManager:
        """A part of what runs. Parts follow each other, and do not hold each other."""


def memory_watch(device: torch.device) -> MemoryWatch:
    """What watches memory on a device: the allocator itself."""
    return HostWatch() if device.type == "cpu" else AcceleratorWatch(device)


class AcceleratorWatch(MemoryWatch):
    """Reads the peaks that an accelerator's allocator keeps. They count whole blocks (CUDA: multiples of 512 bytes),
    not what the allocator holds in reserve, the context of the driver, or workspaces that libraries take past it."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device

    def __enter__(self) -> "AcceleratorWatch":
        torch.accelerator.synchronize(self.device)
        self._start = torch.accelerator.memory_allocated(self.device)
        return self

    def __exit__(self, *raised: Any) -> None: ...

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        torch.accelerator.synchronize(self.device)
        torch.accelerator.reset_peak_memory_stats(self.device)
        before = torch.accelerator.memory_allocated(self.device) - self._start
        yield
        torch.accelerator.synchronize(self.device)
        most = torch.accelerator.max_memory_allocated(self.device) - self._start
        self.peaks.append(PartPeak(name, before, most))


class HostWatch(MemoryWatch):
    """Reads every event of torch's allocator on a CPU out of a profiler's trace, buffers inside of kernels included;
    not what libraries take from the system themselves. Makes what runs slower."""

    def __enter__(self) -> "HostWatch":
        self._profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profiler.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._profiler.__exit__(*raised)
        if raised and raised[0] is not None:
            return
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            self._profiler.export_chrome_trace(str(trace))
            self.peaks = _trace_peaks(json.loads(trace.read_text(errors="replace"))["traceEvents"])

    def part(self, name: str) -> AbstractContextManager:
        return record_function(f"{_MARK}{name}")


def _trace_peaks(events: list[dict[str, Any]]) -> list[PartPeak]:
    """The memory of each part that is marked in a trace."""
    marks = [event for event in events if str(event.get("name")).startswith(_MARK) and event.get("ph") == "X"]
    marks.sort(key=lambda mark: mark["ts"])
    changes = [event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0]
    changes.sort(key=lambda event: (event["ts"], event["args"].get("Ev Idx", 0)))
    held: dict[int, int] = {}  # by address, of what was taken since the beginning
    total, index, peaks = 0, 0, []

    def advance(end: float) -> int:
        """The most until `end`."""
        nonlocal total, index
        most = total
        while index < len(changes) and changes[index]["ts"] <= end:
            address, size = changes[index]["args"]["Addr"], changes[index]["args"]["Bytes"]
            if size > 0:
                held[address] = size
                total += size
            else:  # what was there before is given back as well, and is none of this watch's
                total -= held.pop(address, 0)
            most = max(most, total)
            index += 1
        return most

    for mark in marks:
        advance(mark["ts"])
        before = total
        peaks.append(PartPeak(mark["name"].removeprefix(_MARK), before, advance(mark["ts"] + mark["dur"])))
    return peaks


class StorageWatch(MemoryWatch):
    """Follows the storages of all tensors that operations return, on tensors with or without memory. Buffers inside of
    kernels are not seen.

    Args:
        granularity: bytes of which the allocator gives out multiples.
        answer: asked before every operation with it and its arguments; what is not None takes the result's place.
        after: told after every operation what was run, its arguments, and how many bytes are taken.
    """

    def __init__(
        self,
        granularity: int = 1,
        answer: Callable[[Callable, tuple], Any] = lambda *_: None,
        after: Callable[[Callable, tuple, dict[str, Any], int], None] = lambda *_: None,
    ):
        super().__init__()
        self.granularity, self.answer, self.after = granularity, answer, after
        self._alive: dict[int, int] = {}  # by storage
        self._total = self._most = 0
        self._operations = operations_through(self._run)

    def __enter__(self) -> "StorageWatch":
        self._operations.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._operations.__exit__(*raised)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        before = self._most = self._total
        yield
        self.peaks.append(PartPeak(name, before, self._most))

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Takes tensors for what was there before."""
        for tensor in tensors:
            self._follow(tensor, counts=False)

    def _run(self, operation: Callable, arguments: tuple, keyword_arguments: dict[str, Any]) -> Any:
        result = self.answer(operation, arguments)
        if result is None:
            result = operation(*arguments, **keyword_arguments)
        for tensor in _tensors_of(result):
            self._follow(tensor)
        self.after(operation, arguments, keyword_arguments, self._total)
        return result

    def _follow(self, tensor: torch.Tensor, counts: bool = True) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._alive:
            return
        size = -(-storage.nbytes() // self.granularity) * self.granularity if counts else 0
        self._alive[key] = size
        self._total += size
        self._most = max(self._most, self._total)
        weakref.finalize(storage, self._release, key).atexit = False

    def _release(self, key: int) -> None:
        self._total -= self._alive.pop(key)


def _tensors_of(result: Any) -> Iterator[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, (list, tuple)):
        for part in result:
            yield from _tensors_of(part)


@dataclass
class _Parts:
    """Parts under a watch, and what copies, the target's cache and the specialists' took when each ended."""

    watch: MemoryWatch
    rehearsal: RoundRehearsal | PlainRehearsal
    held: list[tuple[int, int, int]] = field(default_factory=list)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        with self.watch.part(name):
            yield
        rehearsal = self.rehearsal
        self.held.append(
            tuple(storage_bytes(of) for of in (rehearsal.copies, rehearsal.target_cache, rehearsal.specialist_caches))
        )


@dataclass(frozen=True)
class WatchedCall:
    """What is known of a call beside its peaks.

    Args:
        held: of every part but the first, which sets up, the bytes of copies, the target's cache and the specialists'
            at its end.
        kept: bytes of copies that stay from call to call, and may have been there before.
    """

    held: list[tuple[int, int, int]]
    kept: int


def watched_call(make: Callable[[], RoundRehearsal | PlainRehearsal], watch: MemoryWatch) -> WatchedCall:
    """Runs a call under a watch, from its beginning to its end.

    Args:
        make: the rehearsal of the call; its models are there already.
    """
    with watch:
        kept = storage_bytes(make().head_rows)  # from here on they are there
        with watch.part("set-up"):
            rehearsal = make()
        parts = _Parts(watch, rehearsal)
        rehearse(rehearsal, parts)
    return WatchedCall(parts.held, kept)


def call_memory(peaks: Sequence[PartPeak], call: WatchedCall, weights: tuple[int, int]) -> CallMemory:
    """The memory of a call, part by part.

    Args:
        peaks: of [`MemoryWatch`].
        call: of [`watched_call`].
        weights: bytes of the target and of the specialists, see [`weight_bytes`].
    """
    there = call.kept - peaks[0].before  # taken, and not seen by the watch
    activations: dict[str, int] = {}
    for part, of in zip(peaks[1:], call.held, strict=True):
        activations[part.name] = max(activations.get(part.name, 0), part.most + there - sum(of))
    peak = sum(weights) + there + max(part.most for part in peaks)
    return CallMemory(*weights, *call.held[-1], activations, peak)


def measured_memory(
    make: Callable[[], RoundRehearsal | PlainRehearsal], weights: tuple[int, int], device: torch.device
) -> CallMemory:
    """The memory of a call as the device's allocator sees it.

    Args:
        make: see [`watched_call`].
        weights: see [`call_memory`].
    """
    watch = memory_watch(device)
    call = watched_call(make, watch)
    return call_memory(watch.peaks, call, weights)


def peak_bytes(device: torch.device, run: Callable[[], Any]) -> int:
    """Most bytes that `run` takes at a time, beyond what was taken before."""
    with memory_watch(device) as watch, watch.part("all"):
        run()
    return watch.peaks[0].most
