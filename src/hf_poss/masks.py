"""What the nodes of a draft tree and the tokens of packed samples see, for each kind of layer that a target has."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import PreTrainedConfig

from .draft_tree import DraftTree


__all__ = ["LayerKinds", "chain_mask", "packed_masks", "tree_masks"]


@dataclass(frozen=True)
class LayerKinds:
    """How far back the layers of a target look.

    Args:
        names: kinds of layers, by transformers' names.
        window: tokens that a "sliding_attention" layer sees, itself included.
        chunk: length of the spans that "chunked_attention" layers do not look out of.
    """

    names: tuple[str, ...]
    window: int | None = None
    chunk: int | None = None

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "LayerKinds":
        """Read from a text config, as transformers' `create_masks_for_generate` reads it."""
        window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
        if getattr(config, "layer_types", None) is not None:
            names = tuple(sorted(set(config.layer_types)))
        elif window is not None:
            names = ("sliding_attention",)
        else:
            names = ("full_attention",) if chunk is None else ("chunked_attention",)
        return cls(names, window, chunk)

    @property
    def unknown(self) -> list[str]:
        """Kinds for which no tree mask is known."""
        known = {"full_attention"}
        if self.window is not None:
            known.add("sliding_attention")
        if self.chunk is not None:
            known.add("chunked_attention")
        return sorted(set(self.names) - known)

    @property
    def windowed(self) -> bool:
        return set(self.names) != {"full_attention"}


def tree_masks(
    kinds: LayerKinds,
    tree: DraftTree,
    context: torch.BoolTensor | None,
    start: int,
    lengths: torch.LongTensor,
    padding: torch.LongTensor,
    dtype: torch.dtype,
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Additive masks [rows, 1, nodes, start + nodes]: every node sees its row's context, itself and its ancestors, as
    far as the layer looks back. One mask if all layers are of a kind, else one by kind.

    Additive, because eager attention adds whatever mask it is given to the scores.

    Args:
        tree: the nodes.
        context: bool [rows, start], entries of the row that are no padding; None if all are.
        start: columns in front of the nodes.
        lengths: int64 [rows], entries of context, padding included: the root's place in its sequence.
        padding: int64 [rows], tokens of padding in front.
        dtype: of the mask.
    """
    device, nodes = lengths.device, tree.tokens.shape[1]
    ancestors = tree.ancestors.to(device)
    if not kinds.windowed and context is None:
        return F.pad(_additive(ancestors, dtype), (start, 0))[:, None]
    if context is None:
        context = torch.ones(1, start, dtype=torch.bool, device=device).expand(len(lengths), -1)
    visible = torch.cat((context[:, None].expand(-1, nodes, -1), ancestors), dim=-1)
    if not kinds.windowed:
        return _additive(visible, dtype)[:, None]
    # Places in the sequence; a context column is its own place.
    queries = lengths[:, None] + tree.depths.to(device)  # [rows, nodes]
    columns = torch.arange(start, device=device).expand(len(lengths), -1)
    keys = torch.cat((columns, queries), dim=-1)  # [rows, start + nodes]
    return _additive_masks(kinds, visible, queries - padding[:, None], keys - padding[:, None], dtype)


def packed_masks(
    kinds: LayerKinds, segment_ids: torch.LongTensor, position_ids: torch.LongTensor, dtype: torch.dtype
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Additive masks [rows, 1, tokens, tokens] of packed samples: every token sees those before it of its document and
    itself, as far as the layer looks back. One mask if all layers are of a kind, else one by kind.

    Args:
        segment_ids: int64 [rows, tokens], by document; padding, 0, sees padding.
        position_ids: int64 [rows, tokens], from 0 in every document.
        dtype: of the masks.
    """
    tokens = segment_ids.shape[1]
    before = torch.ones(tokens, tokens, dtype=torch.bool, device=segment_ids.device).tril()
    visible = before & (segment_ids[:, :, None] == segment_ids[:, None])
    return _additive_masks(kinds, visible, position_ids, position_ids, dtype)


def _additive_masks(
    kinds: LayerKinds,
    visible: torch.BoolTensor,
    queries: torch.LongTensor,
    keys: torch.LongTensor,
    dtype: torch.dtype,
) -> torch.Tensor | dict[str, torch.Tensor]:
    """What is visible [rows, queries, keys], as far as each kind of layer looks back from the place of a query [rows,
    queries] to that of a key [rows, keys]."""
    masks = {}
    for name in kinds.names:
        seen = visible
        if name == "sliding_attention":
            seen = visible & (keys[:, None] > queries[:, :, None] - kinds.window)
        elif name == "chunked_attention":
            seen = visible & (keys[:, None] // kinds.chunk == queries[:, :, None] // kinds.chunk)
        masks[name] = _additive(seen, dtype)[:, None]
    return masks if len(masks) > 1 else next(iter(masks.values()))


def _additive(visible: torch.BoolTensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
        ~visible, torch.finfo(dtype).min
    )


def chain_mask(context: torch.BoolTensor, nodes: int) -> torch.LongTensor:
    """int64 [rows, width + nodes]: the mask of a chain for a target that makes its own masks, with 0 where a row has
    padding or ends before the longest one."""
    return F.pad(context.long(), (0, nodes), value=1)
