"""The target's features of what a caller's cache holds, so that a conversation can go on from it."""

import weakref
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache


__all__ = ["CachedFeatures", "FeatureHistory", "recall"]


@dataclass
class CachedFeatures:
    """Features of the tokens in a cache.

    Args:
        tokens: int64 [rows, columns].
        features: [rows, columns, feature size]; zero where a row holds nothing.
        layers: the hidden states that they are, as `PosSConfig.feature_layers` names them.
    """

    tokens: torch.LongTensor
    features: torch.Tensor
    layers: list[int] | None = None


# With the model that computed them.
_Known = tuple["weakref.ref[PreTrainedModel]", CachedFeatures]
_memory: "weakref.WeakKeyDictionary[Cache, _Known]" = weakref.WeakKeyDictionary()


class FeatureHistory:
    """Gathers the features of all that a cache comes to hold in a call.

    Args:
        features: [rows, columns, feature size] of the prompt.
        layers: see [`CachedFeatures`].
    """

    def __init__(self, features: torch.Tensor, layers: list[int] | None = None):
        self._layers = layers
        self._parts = [[prompt] for prompt in features]

    def add(self, row: int, features: torch.Tensor) -> None:
        """Adds what a round accepted, [entries, feature size]."""
        self._parts[row].append(features)

    def remember(self, cache: Cache, target: PreTrainedModel, tokens: torch.LongTensor, lengths: list[int]) -> None:
        """Keeps the features for as long as the cache lives, in place of earlier ones.

        Args:
            tokens: int64 [rows, columns], what the cache holds.
            lengths: columns of each row; behind them it has padding.
        """
        features = self._parts[0][0].new_zeros(*tokens.shape, self._parts[0][0].shape[-1])
        for row, (parts, length) in enumerate(zip(self._parts, lengths, strict=True)):
            features[row, :length] = torch.cat(parts)[:length]
        _memory[cache] = weakref.ref(target), CachedFeatures(tokens.clone(), features, self._layers)


def recall(
    cache: Cache,
    target: PreTrainedModel,
    mask: torch.BoolTensor,
    tokens: torch.LongTensor | None,
    layers: list[int] | None = None,
) -> CachedFeatures | None:
    """What is known of a cache that a call goes on from; None if that is not all of it.

    Args:
        mask: bool [rows, columns] of what the cache holds, False for padding.
        tokens: int64 [rows, columns], what the caller says that it holds; None if it is not said.
        layers: the hidden states that are asked for, see [`CachedFeatures`].
    """
    computed_by, known = _memory.get(cache, (None, None))
    rows, columns = mask.shape
    if known is None or computed_by() is not target or known.tokens.shape[0] != rows or known.layers != layers:
        return None
    if known.tokens.shape[1] < columns or (tokens is None and known.tokens.shape[1] != columns):
        return None
    held = known.tokens[:, :columns]
    if tokens is not None and bool(((tokens.to(held.device) != held) & mask.to(held.device)).any()):
        return None
    return CachedFeatures(held, known.features[:, :columns], layers)
