"""Keys and values of rows that grow at their own pace: the specialists', and a target's while it verifies drafts."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from .compatibility import is_placeholder


__all__ = ["Columns", "KeyValueBuffer", "SpecialistCache", "TargetCache"]

_FIRST_CAPACITY = 256


class Columns:
    """Which columns of a buffer belong to which row.

    Columns 0..width-1 hold context, of which the row in slot i has the first `lengths[i]`. What a pass adds, its
    nodes, lies behind the width, at the same columns in every row; those that are kept then move to the end of their
    row.

    Example: rows of 5 and 7 entries and a pass of 3 nodes. The width is 7 and the nodes are columns 7, 8 and 9 in both
    rows. If row 0 keeps its nodes 0 and 2, columns 7 and 9 move to 5 and 6.

    Rows that are finished go behind the others: the first `active` slots take part in passes.

    Args:
        rows: number of rows.
    """

    def __init__(self, rows: int):
        self.lengths = [0] * rows
        self.rows = list(range(rows))  # the row in each slot
        self.active = rows

    @property
    def width(self) -> int:
        """Columns that context takes in the longest active row."""
        return max(self.lengths[: self.active], default=0)

    @property
    def ragged(self) -> bool:
        """Whether active rows differ in length."""
        return len(set(self.lengths[: self.active])) > 1

    def in_use(self, device: torch.device) -> torch.BoolTensor:
        """bool [active, width]: context columns that hold an entry of their row."""
        lengths = torch.tensor(self.lengths[: self.active], device=device)
        return torch.arange(self.width, device=device) < lengths[:, None]

    def keep(self, paths: Sequence[Sequence[int]]) -> torch.LongTensor | None:
        """Makes nodes context.

        Args:
            paths: for each active slot the nodes that it keeps, ascending.

        Returns:
            int64 [3, moves]: slot, column and new column of every entry that has to move; None if there are none.
        """
        width, moves = self.width, []
        for slot, path in enumerate(paths):
            end = self.lengths[slot]
            if width != end or not isinstance(path, range):
                moves += [(slot, width + node, end + i) for i, node in enumerate(path) if width + node != end + i]
            self.lengths[slot] += len(path)
        return torch.tensor(moves).T if moves else None

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
    """Keys and values in one pair of tensors [rows, heads, capacity, head_dim] that grows geometrically.

    A pass writes its own entries and reads a view: nothing else is copied.

    Args:
        limit: columns that are never exceeded; growth stops there.
    """

    def __init__(self, limit: int | None = None):
        self.limit = limit
        self.states: tuple[torch.Tensor, torch.Tensor] | None = None

    def write(self, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Writes [active, heads, columns, head_dim] each into the first rows, from column `start` on."""
        rows, end = keys.shape[0], start + keys.shape[-2]
        if self.states is None or end > self.states[0].shape[-2]:
            self._grow(end, keys, values)
        for states, new in zip(self.states, (keys, values), strict=True):
            states[:rows, :, start:end] = new

    def view(self, rows: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first `end` columns of the first rows, [rows, heads, end, head_dim] each."""
        keys, values = self.states
        return keys[:rows, :, :end], values[:rows, :, :end]

    def move(self, moves: torch.LongTensor) -> None:
        """Moves entries inside their row, as [`Columns.keep`] says."""
        slots, sources, destinations = moves.to(self.states[0].device)
        for states in self.states:
            states[slots, :, destinations] = states[slots, :, sources]

    def swap(self, slot: int, other: int, width: int) -> None:
        """Two rows change places, as far as they hold context."""
        if slot == other or self.states is None:
            return
        for states in self.states:
            held = states[slot, :, :width].clone()
            states[slot, :, :width] = states[other, :, :width]
            states[other, :, :width] = held

    def _grow(self, needed: int, *like: torch.Tensor) -> None:
        capacity = max(_FIRST_CAPACITY, needed + needed // 2)
        if self.limit is not None:
            capacity = max(min(capacity, self.limit), needed)
        old = self.states
        rows = like[0].shape[0] if old is None else old[0].shape[0]
        self.states = tuple(new.new_zeros(rows, new.shape[1], capacity, new.shape[-1]) for new in like)
        if old is not None:
            for states, before in zip(self.states, old, strict=True):
                states[:, :, : before.shape[-2]] = before


class SpecialistCache:
    """Keys and values of one specialist: the committed context, and behind it the nodes of the current round.

    Args:
        columns: shared by all specialists of a drafter.
    """

    def __init__(self, columns: Columns):
        self.columns = columns
        self.num_nodes = 0
        self.buffer = KeyValueBuffer()

    def append_nodes(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Adds rows of this round, [active, key_value_heads, nodes, head_dim] each."""
        self.buffer.write(self.columns.width + self.num_nodes, keys, values)
        self.num_nodes += keys.shape[-2]

    def keys_values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of context and nodes, [active, key_value_heads, width + nodes, head_dim] each."""
        return self.buffer.view(self.columns.active, self.columns.width + self.num_nodes)

    def drop_nodes(self) -> None:
        self.num_nodes = 0


class _VerifyingLayer(DynamicLayer):
    """A layer of a target's cache that keeps every entry, writes behind the width of its rows and hands out views."""

    def __init__(self, columns: Columns, limit: int | None, original: CacheLayerMixin | None = None):
        super().__init__()
        self.columns = columns
        self.buffer = KeyValueBuffer(limit)
        if original is not None and original.is_initialized and original.get_seq_length():
            # A window layer has let its oldest entries go; their columns stay empty, hidden by the window.
            start = original.get_seq_length() - original.keys.shape[-2]
            self.buffer.write(start, original.keys, original.values)
            self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        width = self.columns.width
        self.buffer.write(width, key_states, value_states)
        self.is_initialized = True
        return self.buffer.view(key_states.shape[0], width + key_states.shape[-2])

    def get_seq_length(self) -> int:
        return self.columns.width


class TargetCache:
    """A target's cache while its rows grow at their own pace, and take trees of which one path stays.

    The cache that `generate` was given keeps its identity: inside [`TargetCache.lend`] its layers are ours, afterwards
    they are its own again, filled as plain decoding would have filled them. If the block raises, they are as before.
    Windows are kept whole meanwhile: a layer with a window holds every entry until the call ends.

    Args:
        cache: dynamic, empty or filled with the same number of entries in every row.
        rows: rows of the batch.
        limit: columns that are never exceeded.

    Attributes:
        windows: by layer the tokens that it keeps outside of the block, None for all.

    Raises:
        ValueError: if a layer of the cache cannot be rolled back, or its rows are not the batch's.
    """

    def __init__(self, cache: Cache, rows: int, limit: int | None = None):
        self.cache = cache
        self.columns = Columns(rows)
        filled = cache.get_seq_length()
        self.columns.lengths = [filled] * rows
        self._make = functools.partial(_VerifyingLayer, self.columns, limit)
        self._check(rows)
        self.windows = [getattr(layer, "sliding_window", None) for layer in cache.layers]

    def _check(self, rows: int) -> None:
        for layer in self.cache.layers:
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) and not is_placeholder(layer):
                raise ValueError(
                    f"The cache has a {type(layer).__name__}, which rejected drafts cannot be taken out of. Pass a "
                    "`DynamicCache`, or leave out `past_key_values` and `cache_implementation`; if the target makes "
                    "such layers by itself, call `generate` without this assistant."
                )
            held = getattr(layer, "keys", None)
            if held is not None and held.numel() and held.shape[0] != rows:
                raise ValueError(
                    f"`past_key_values` holds {held.shape[0]} row(s) and the batch has {rows} (prompts times "
                    "`num_return_sequences`). Repeat it with `past_key_values.batch_repeat_interleave(n)`."
                )

    @contextmanager
    def lend(self) -> Iterator["TargetCache"]:
        cache = self.cache
        originals, made_by = list(cache.layers), cache.layer_class_to_replicate
        cache.layers = [
            self._make(layer) if isinstance(layer, DynamicLayer) else layer for layer in originals
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
            if finished is not None:
                self._fill(originals, finished)

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
            original.keys = original.values = None
            original.is_initialized = False
            if isinstance(original, DynamicSlidingWindowLayer):
                original.cumulative_length = 0
            original.update(keys, values)
            layer.buffer.states = None

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

    def keep_paths(self, paths: Sequence[Sequence[int]]) -> None:
        """Keeps of the last pass the nodes on one path a slot; nothing but these entries is copied."""
        moves = self.columns.keep(paths)
        if moves is not None:
            for layer in self._layers():
                layer.buffer.move(moves)

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
