"""Attention of the training roll-out: what a row of a draft position sees of the positions before it."""

import functools
from collections.abc import Sequence

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


__all__ = ["KeysValues", "roll_out_attention"]

# Keys and values of a run of rows, each [batch, key_value_heads, rows, head_dim].
KeysValues = tuple[torch.Tensor, torch.Tensor]
# Rows of queries at a time, the most and the fewest. Memory is rows times this.
CHUNK_ROWS = 128
_FEWEST_ROWS = 32


def roll_out_attention(
    query: torch.Tensor, streams: Sequence[KeysValues], segment_ids: torch.LongTensor | None = None
) -> torch.Tensor:
    """Attention of draft position k + 1, with k = len(streams) - 1, over all rows at once (HASS).

    Row t sees the target's features of rows <= t - k (`streams[0]`), then for each earlier draft position j = 1..k one
    key: stream j at row t - k + j. With k = 2, row 7 sees target rows 0..5, stream 1 at row 6, stream 2 at row 7:
    what it would see in a round of drafting that began after row 5. Hidden positions have no weight.

    Scaled-dot-product attention, some rows of queries at a time over the context that they can see and the keys of
    their own; made again in backward. So memory grows with rows, not with their square.

    Args:
        query: [batch, heads, rows, head_dim].
        streams: keys and values of each stream, by the specialist that asks.
        segment_ids: int64 [batch, rows]; a row sees rows of its own number only (0 padding, then by document). None if
            all are of one.

    Returns:
        [batch, heads, rows, head_dim]
    """
    k = len(streams) - 1
    if k == 0 and segment_ids is None:
        keys, values = (_for_every_head(part, query) for part in streams[0])
        return F.scaled_dot_product_attention(query, keys, values, is_causal=True)
    attend = functools.partial(checkpoint, _attend, use_reentrant=False) if torch.is_grad_enabled() else _attend
    # A chunk of r rows reads k * r keys of its own, of which each row sees k: no more of them than there is context.
    chunk = min(CHUNK_ROWS, max(_FEWEST_ROWS, query.shape[-2] // max(k, 1)))
    attended = [
        attend(query[..., start : start + chunk, :], streams, start, segment_ids)
        for start in range(0, query.shape[-2], chunk)
    ]
    return torch.cat(attended, dim=-2)


def _attend(
    query: torch.Tensor, streams: Sequence[KeysValues], start: int, segment_ids: torch.LongTensor | None
) -> torch.Tensor:
    """Attention of the queries of rows `start` and up, [batch, heads, chunk, head_dim]."""
    k, end, device = len(streams) - 1, start + query.shape[-2], query.device
    rows = torch.arange(start, end, device=device)[:, None]
    # Of a stream the rows that the chunk can see: of the target's those up to end - 1 - k, of stream j those from
    # start - k + j on.
    spans = [(0, end - k), *((start - k + j, end - k + j) for j in range(1, k + 1))]
    spans = [(max(first, 0), max(last, 0)) for first, last in spans]
    sources = [torch.arange(*span, device=device) for span in spans]
    seen = [sources[0] <= rows - k, *(source == rows - k + j for j, source in enumerate(sources[1:], start=1))]
    mask = torch.cat(seen, dim=-1)[None]  # [1, chunk, keys]
    if segment_ids is not None:
        mask = mask & (segment_ids[:, start:end, None] == segment_ids[:, None, torch.cat(sources)])
    keys, values = (
        torch.cat([stream[part][:, :, slice(*span)] for stream, span in zip(streams, spans, strict=True)], dim=-2)
        for part in (0, 1)
    )  # [batch, key_value_heads, keys, head_dim]
    return F.scaled_dot_product_attention(
        query, _for_every_head(keys, query), _for_every_head(values, query), attn_mask=mask[:, None]
    )


def _for_every_head(heads: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    return heads.repeat_interleave(query.shape[1] // heads.shape[1], dim=1)
