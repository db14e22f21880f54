"""Keys and values: of the specialists while they draft, and of a target whose cache holds a tree."""

from collections.abc import Sequence

import torch
from transformers.cache_utils import Cache, DynamicLayer


__all__ = ["SpecialistCache", "holds_every_token", "keep_path"]

_FIRST_CAPACITY = 256


class SpecialistCache:
    """Keys and values of one specialist: the committed context, and behind it the nodes of the current round.

    Both lie in one buffer that grows by doubling, so a draft pass reads a view and copies nothing. Nodes are
    overwritten by the context that replaces them.
    """

    def __init__(self):
        self.context_length = 0
        self.num_nodes = 0
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def append_context(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Drops the nodes and adds committed rows, [batch, key_value_heads, rows, head_dim] each."""
        self.num_nodes = 0
        self._write(self.context_length, keys, values)
        self.context_length += keys.shape[-2]

    def append_nodes(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Adds rows of this round, [batch, key_value_heads, rows, head_dim] each."""
        self._write(self.context_length + self.num_nodes, keys, values)
        self.num_nodes += keys.shape[-2]

    def keys_values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of context and nodes, [batch, key_value_heads, context + nodes, head_dim] each."""
        keys, values = self._buffers
        length = self.context_length + self.num_nodes
        return keys[..., :length, :], values[..., :length, :]

    def _write(self, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        end = start + keys.shape[-2]
        if self._buffers is None or end > self._buffers[0].shape[-2]:
            self._grow(start, end, keys, values)
        for buffer, rows in zip(self._buffers, (keys, values), strict=True):
            buffer[..., start:end, :] = rows

    def _grow(self, used: int, needed: int, *like: torch.Tensor) -> None:
        capacity = _FIRST_CAPACITY
        while capacity < needed:
            capacity *= 2
        old = self._buffers
        self._buffers = tuple(rows.new_zeros(*rows.shape[:-2], capacity, rows.shape[-1]) for rows in like)
        if old is not None:
            for buffer, before in zip(self._buffers, old, strict=True):
                buffer[..., :used, :] = before[..., :used, :]


def holds_every_token(cache: Cache) -> bool:
    """Whether all layers keep the whole sequence as plain tensors, which [`keep_path`] needs."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def keep_path(cache: Cache, start: int, path: Sequence[int]) -> None:
    """Keeps a target's first `start` entries and, of the tree behind them, the nodes on one path.

    The accepted entries move inside the buffer that the forward pass just made; nothing else is copied. Example:
    start 5 and path (0, 2, 6) leave 8 entries, of which the last three are the tree's nodes 0, 2 and 6.

    Args:
        cache: dynamic cache whose last entries are the tree's nodes.
        start: entries before the tree.
        path: node numbers, ascending.
    """
    length = start + len(path)
    moves = list(path) != list(range(len(path)))
    nodes = torch.tensor(path) + start
    for layer in cache.layers:
        nodes = nodes.to(layer.keys.device)
        for name in ("keys", "values"):
            states = getattr(layer, name)  # [batch, heads, start + nodes, head_dim]
            if moves:
                states[..., start:length, :] = states.index_select(-2, nodes)
            setattr(layer, name, states[..., :length, :])
