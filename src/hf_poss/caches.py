"""Keys and values of rows that grow at their own pace: the specialists', and a target's while it verifies drafts."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from .compatibility import CACHE, is_placeholder, mark_static
from .transfers import upload


__all__ = ["BufferGroup", "Columns", "KeyValueBuffer", "TargetCache", "move_entries"]

_FIRST_CAPACITY = 256
# Layers whose entries move together. More would move faster, and need more memory while they grow.
_GROUP = 8
_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)


class Columns:
    """Which columns of a buffer belong to which row.

    Columns 0..start-1 are for context, of which the row in slot i has the first `lengths[i]`. What a pass adds, its
    nodes, lies from `start` on, at the same columns in every row; those that are kept then move to the end of their
    row.

    Example: rows of 5 and 7 entries and a pass of 3 nodes. The width is 7 and the nodes are columns 7, 8 and 9 in both
    rows. If row 0 keeps its nodes 0 and 2, columns 7 and 9 move to 5 and 6.

    Rows that are finished go behind the others: the first `active` slots take part in passes.

    Args:
        rows: number of rows.
        capacity: columns for context in buffers of one size for the whole call, behind which nodes lie and no row
            gives up its slot; None where buffers grow, and nodes lie behind the longest row.
    """

    def __init__(self, rows: int, capacity: int | None = None):
        self.lengths = [0] * rows
        self.rows = list(range(rows))  # the row in each slot
        self.active = rows
        self.capacity = capacity

    @property
    def width(self) -> int:
        """Columns that context takes in the longest active row."""
        return max(self.lengths[: self.active], default=0)

    @property
    def start(self) -> int:
        """The first column of a pass's nodes."""
        return self.width if self.capacity is None else self.capacity

    @property
    def ragged(self) -> bool:
        """Whether some of the columns in front of the nodes hold nothing in some active row."""
        return any(length != self.start for length in self.lengths[: self.active])

    def in_use(self, device: torch.device) -> torch.BoolTensor:
        """bool [active, start]: context columns that hold an entry of their row."""
        lengths = upload(self.lengths[: self.active], device)
        return torch.arange(self.start, device=device) < lengths[:, None]

    def keep(self, paths: Sequence[Sequence[int]]) -> list[tuple[int, int, int]]:
        """Makes nodes context.

        Args:
            paths: for each active slot the nodes that it keeps, ascending.

        Returns:
            slot, column and new column of every entry that has to move.
        """
        start, moves = self.start, []
        for slot, path in enumerate(paths):
            end = self.lengths[slot]
            moves += [(slot, start + node, end + i) for i, node in enumerate(path) if start + node != end + i]
            self.lengths[slot] += len(path)
        return moves

    def retire(self, slot: int) -> tuple[int, int]:
        """Takes a slot's row out of the passes: it changes places with the last active one.

        Returns:
            the two slots.
        """
        self.active -= 1
        self.swap(slot, self.active)
        return slot, self.active

    def swap(self, slot: int, other: int) -> None:
        """The rows in two slots change places."""
        for values in (self.lengths, self.rows):
            values[slot], values[other] = values[other], values[slot]


class KeyValueBuffer:
    """Keys and values in one pair of tensors [rows, ..., capacity, head_dim] that grows geometrically.

    A pass writes its own entries and reads a view: nothing else is copied.

    Args:
        limit: columns that are never exceeded; growth stops there.
        fixed: the buffer has `limit` columns from the beginning, at one address.
    """

    def __init__(self, limit: int | None = None, fixed: bool = False):
        self.limit = limit
        self.fixed = fixed
        self.states: tuple[torch.Tensor, torch.Tensor] | None = None
        self.group: BufferGroup | None = None

    def write(self, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Writes [active, ..., columns, head_dim] each into the first rows, from column `start` on."""
        rows, end = keys.shape[0], start + keys.shape[-2]
        self.reserve(end, keys, values)
        for states, new in zip(self.states, (keys, values), strict=True):
            states[:rows, ..., start:end, :] = new

    def view(self, rows: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first `end` columns of the first rows, [rows, ..., end, head_dim] each."""
        keys, values = self.states
        return keys[:rows, ..., :end, :], values[:rows, ..., :end, :]

    def reserve(self, end: int, *like: torch.Tensor) -> None:
        """Makes room for `end` columns of keys and values like these, [rows, ..., columns, head_dim]."""
        if self.states is not None and end <= self.states[0].shape[-2]:
            return
        if self.group is not None:
            self.group.grow(end)
        else:
            with torch.inference_mode(torch.is_inference_mode_enabled() and not self.fixed):  # these outlive the call
                self.states = _grown(self.states, _capacity(end, self.limit, self.fixed), like)
            if self.fixed:
                for states in self.states:
                    mark_static(states)

    def swap(self, slot: int, other: int, width: int) -> None:
        """Two rows change places, as far as they hold context."""
        if slot == other or self.states is None:
            return
        for states in self.states:
            held = states[slot, ..., :width, :].clone()
            states[slot, ..., :width, :] = states[other, ..., :width, :]
            states[other, ..., :width, :] = held


def _capacity(needed: int, limit: int | None, fixed: bool = False) -> int:
    if fixed:
        return max(limit, needed)
    capacity = max(_FIRST_CAPACITY, needed + needed // 2)
    return capacity if limit is None else max(min(capacity, limit), needed)


def _grown(
    old: tuple[torch.Tensor, ...] | None, capacity: int, like: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """Tensors of more columns that begin with the old ones, else with zeros."""
    shapes = [states.shape for states in (like if old is None else old)]
    states = tuple(
        tensor.new_zeros(*shape[:-2], capacity, shape[-1]) for tensor, shape in zip(like, shapes, strict=True)
    )
    for new, before in zip(states, old or (), strict=False):
        new[..., : before.shape[-2], :] = before
    return states


class BufferGroup:
    """Buffers of one shape in one pair of tensors [buffers, rows, heads, capacity, head_dim], so that entries of all
    of them move at once, not layer by layer.

    Args:
        buffers: with the same limit, filled.
    """

    def __init__(self, buffers: Sequence[KeyValueBuffer]):
        self.buffers = buffers
        first = buffers[0]
        self.states: tuple[torch.Tensor, ...] | None = None
        self._stack(_capacity(first.states[0].shape[-2], first.limit))
        for buffer in buffers:
            buffer.group = self

    def grow(self, needed: int) -> None:
        self._stack(_capacity(needed, self.buffers[0].limit))

    def _stack(self, capacity: int) -> None:
        old = [buffer.states for buffer in self.buffers]
        stacked = []
        for part in (0, 1):
            like = old[0][part]
            new = like.new_zeros(len(old), *like.shape[:-2], capacity, like.shape[-1])
            for index, states in enumerate(old):
                new[index, ..., : like.shape[-2], :] = states[part]
            stacked.append(new)
        self.states = tuple(stacked)
        for index, buffer in enumerate(self.buffers):
            buffer.states = tuple(states[index] for states in self.states)


def move_entries(
    tensors: Sequence[torch.Tensor],
    slots: torch.LongTensor,
    sources: torch.LongTensor,
    destinations: torch.LongTensor,
) -> None:
    """Moves entries inside their row, in place.

    Args:
        tensors: keys or values [..., rows, heads, columns, head_dim].
        slots, sources, destinations: int64 [moves], as [`Columns.keep`] says.
    """
    for states in tensors:
        if states.shape[-4] == 1:
            states.index_copy_(-2, destinations, states.index_select(-2, sources))
        else:
            states[..., slots, :, destinations, :] = states[..., slots, :, sources, :]


class _VerifyingLayer(DynamicLayer):
    """A layer of a target's cache that keeps every entry, writes at the columns of a pass and hands out views."""

    def __init__(self, columns: Columns, buffer: KeyValueBuffer, original: CacheLayerMixin | None = None):
        super().__init__()
        self.columns = columns
        self.buffer = buffer
        held = int(original.get_seq_length()) if original is not None and original.is_initialized else 0
        if held:
            # A window layer has let its oldest entries go; their columns stay empty, hidden by the window.
            columns_held = min(held, original.keys.shape[-2])
            keys, values = (states[:, :, :columns_held] for states in (original.keys, original.values))
            self.buffer.write(held - columns_held, keys, values)
            self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start = self.columns.start
        self.buffer.write(start, key_states, value_states)
        self.is_initialized = True
        return self.buffer.view(key_states.shape[0], start + key_states.shape[-2])

    def get_seq_length(self) -> int:
        return self.columns.start


class TargetCache:
    """A target's cache while its rows grow at their own pace, and take trees of which one path stays.

    The cache that `generate` was given keeps its identity: inside [`TargetCache.lend`] its layers are ours, afterwards
    they are its own again, filled as plain decoding would have filled them. If the block raises, they are as before.
    Windows are kept whole meanwhile: a layer with a window holds every entry until the call ends.

    Args:
        cache: dynamic or static, empty or filled with the same number of entries in every row.
        rows: rows of the batch.
        limit: columns that are never exceeded.
        buffers: for its layers, if shapes are fixed.
        outlives: somebody sees the cache after the call, so it is to be filled.

    Attributes:
        windows: by layer the tokens that it keeps outside of the block, None for all.

    Raises:
        ValueError: if a layer of the cache cannot be rolled back, or its rows are not the batch's.
    """

    def __init__(
        self,
        cache: Cache,
        rows: int,
        limit: int | None = None,
        buffers: Sequence[KeyValueBuffer] | None = None,
        outlives: bool = True,
    ):
        self.cache = cache
        self.outlives = outlives
        self.columns = Columns(rows)
        self.columns.lengths = [int(cache.get_seq_length())] * rows
        self.limit = limit
        self.buffers = buffers
        self._holders: Sequence[BufferGroup | KeyValueBuffer] | None = None
        self._check(rows)
        self.windows = [getattr(layer, "sliding_window", None) for layer in cache.layers]

    def _check(self, rows: int) -> None:
        for layer in self.cache.layers:
            if type(layer) not in _LAYERS and not is_placeholder(layer):
                raise ValueError(
                    f"The cache has a {type(layer).__name__}, which rejected drafts cannot be taken out of. Pass a "
                    f"`DynamicCache`, or leave out `{CACHE}` and `cache_implementation`; if the target makes "
                    "such layers by itself, call `generate` without this assistant."
                )
            held = getattr(layer, "keys", None)
            if held is not None and held.numel() and held.shape[0] != rows:
                raise ValueError(
                    f"`{CACHE}` holds {held.shape[0]} row(s) and the batch has {rows} (prompts times "
                    f"`num_return_sequences`). Repeat it with `{CACHE}.batch_repeat_interleave(n)`."
                )

    @contextmanager
    def lend(self) -> Iterator["TargetCache"]:
        cache = self.cache
        originals, made_by = list(cache.layers), cache.layer_class_to_replicate
        buffers = iter(() if self.buffers is None else self.buffers)
        cache.layers = [
            self._make(next(buffers, None), layer) if type(layer) in _LAYERS else layer for layer in originals
        ]  # layers that share others' keys stay
        if made_by is not None:
            cache.layer_class_to_replicate = self._make
        try:
            yield self
            finished = cache.layers
        except BaseException:
            finished = None
            raise
        finally:
            cache.layers, cache.layer_class_to_replicate = originals, made_by
            if finished is not None and self.outlives:
                self._fill(originals, finished)

    def _make(self, buffer: KeyValueBuffer | None = None, original: CacheLayerMixin | None = None) -> _VerifyingLayer:
        return _VerifyingLayer(self.columns, KeyValueBuffer(self.limit) if buffer is None else buffer, original)

    def _fill(self, originals: list[CacheLayerMixin], layers: list[CacheLayerMixin]) -> None:
        """Puts what the layers hold, in the batch's order, into those that the cache came with."""
        columns = self.columns
        width = max(columns.lengths)
        order = torch.tensor([columns.rows.index(row) for row in range(len(columns.rows))])
        in_order = columns.rows == sorted(columns.rows)
        for index, layer in enumerate(layers):
            if index == len(originals):
                originals.append(DynamicLayer())
            if not isinstance(layer, _VerifyingLayer) or layer.buffer.states is None:
                continue
            keys, values = layer.buffer.view(len(columns.rows), width)
            for states in (keys, values):
                for slot, length in enumerate(columns.lengths):
                    states[slot, :, length:] = 0
            if not in_order:
                keys, values = (states.index_select(0, order.to(states.device)) for states in (keys, values))
            original = originals[index]
            if isinstance(original, StaticLayer):
                if original.is_initialized:
                    original.reset()
            else:
                original.keys = original.values = None
                original.is_initialized = False
                if isinstance(original, DynamicSlidingWindowLayer):
                    original.cumulative_length = 0
            original.update(keys, values)
            if self.buffers is None:
                layer.buffer.states = None  # layer by layer, so that not all are held twice

    def commit(self, entries: int) -> None:
        """The last pass, the same number of entries in every row, was no draft.

        Raises:
            ValueError: if it left nothing in the cache.
        """
        if not any(self._layers()):
            raise ValueError(
                "The target has not filled the cache that it was given, so drafts cannot be verified against it. Call "
                "`generate` without this assistant."
            )
        self.columns.keep([range(entries)] * self.columns.active)

    def keep_paths(
        self, paths: Sequence[Sequence[int]], move: Callable[..., None] | None = None, count: int | None = None
    ) -> None:
        """Keeps of the last pass the nodes on one path a slot; nothing but these entries is copied.

        Args:
            paths: ascending, for each active slot.
            move: how entries move, [`move_entries`] by default.
            count: as many entries move in any case, those behind a shorter list to where they are.
        """
        start = self.columns.start
        moves = self.columns.keep(paths)
        if count is not None:
            moves += [(0, start, start)] * (count - len(moves))
        if not moves:
            return
        tensors: dict[torch.device, list[torch.Tensor]] = {}
        for holder in self._together():
            for states in holder.states:
                tensors.setdefault(states.device, []).append(states)
        for device, there in tensors.items():
            (move or move_entries)(there, *upload(list(zip(*moves, strict=True)), device).unbind())

    def _together(self) -> Sequence["BufferGroup | KeyValueBuffer"]:
        """What holds the layers' entries. Buffers of one shape are brought together once, when the prompt is read,
        unless they have to stay where they are."""
        if self._holders is None:
            self._holders = [layer.buffer for layer in self._layers()]
            if self.buffers is None:
                by_shape: dict[tuple, list[KeyValueBuffer]] = {}
                for buffer in self._holders:
                    kind = tuple((states.shape, states.dtype, states.device) for states in buffer.states)
                    by_shape.setdefault(kind, []).append(buffer)
                self._holders = [
                    BufferGroup(alike[first : first + _GROUP])
                    for alike in by_shape.values()
                    for first in range(0, len(alike), _GROUP)
                ]
        return self._holders

    def retire(self, slot: int) -> None:
        """Takes a finished row out of the passes; its entries stay."""
        self._swap_entries(*self.columns.retire(slot))

    def swap(self, slot: int, other: int) -> None:
        """The rows in two slots change places."""
        self.columns.swap(slot, other)
        self._swap_entries(slot, other)

    def _swap_entries(self, slot: int, other: int) -> None:
        for layer in self._layers():
            layer.buffer.swap(slot, other, max(self.columns.lengths))

    def _layers(self) -> Iterator[_VerifyingLayer]:
        return (layer for layer in self.cache.layers if isinstance(layer, _VerifyingLayer) and layer.buffer.states)
