"""The public PosS and HASS training code's attention, as an experiment: hidden positions keep a weight.

It multiplies the scores by a 0/1 mask and takes the softmax of the products, so that a position that is hidden counts
with exp(0), later tokens among them. At inference hidden positions have no weight.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch.nn import functional as F

from hf_poss import modeling_poss
from hf_poss.roll_out import KeysValues


def dense_attention(
    query: torch.Tensor,
    streams: Sequence[KeysValues],
    segment_ids: torch.LongTensor | None = None,
    leaky: bool = False,
) -> torch.Tensor:
    """Attention of the roll-out with all scores at once, see [`hf_poss.roll_out.roll_out_attention`].

    Args:
        query: [batch, heads, rows, head_dim].
        streams: keys and values of each stream, [batch, key_value_heads, rows, head_dim].
        segment_ids: int64 [batch, rows], or None.
        leaky: hidden positions have the score 0 in place of none.

    Returns:
        [batch, heads, rows, head_dim]
    """
    k, rows = len(streams) - 1, query.shape[-2]
    groups = query.shape[1] // streams[0][0].shape[1]
    hidden_score = 0.0 if leaky else -torch.inf
    query = query * query.shape[-1] ** -0.5
    places = torch.arange(rows, device=query.device)
    # Row t sees the target's rows <= t - k, and stream j at row t - k + j.
    seen = (places[None, :] <= places[:, None] - k)[None, None]
    if segment_ids is not None:
        seen = seen & (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    keys, values = (part.repeat_interleave(groups, dim=1) for part in streams[0])
    scores = (query @ keys.transpose(-1, -2)).masked_fill(~seen, hidden_score)  # [batch, heads, rows, rows]
    own_scores, own_values = [], []
    for j in range(1, k + 1):
        behind = k - j
        key, value = (
            F.pad(part.repeat_interleave(groups, dim=1)[..., : rows - behind, :], (0, 0, behind, 0))
            for part in streams[j]
        )
        there = places >= behind
        if segment_ids is not None:
            there = (there & (segment_ids == F.pad(segment_ids, (behind, 0))[:, :rows]))[:, None]
        own_scores.append((query * key).sum(-1).masked_fill(~there, -torch.inf))
        own_values.append(value)
    weights = torch.cat([scores, *(score[..., None] for score in own_scores)], dim=-1).softmax(-1)
    attended = weights[..., :rows] @ values
    for j, value in enumerate(own_values):
        attended = attended + weights[..., rows + j, None] * value
    return attended


@contextlib.contextmanager
def leaky_attention() -> Iterator[None]:
    """Trains as the public code does while the block runs; drafting is as ever."""
    proper = modeling_poss.roll_out_attention

    def leaky(query, streams, segment_ids=None):
        return dense_attention(query, streams, segment_ids, leaky=True)

    modeling_poss.roll_out_attention = leaky
    try:
        yield
    finally:
        modeling_poss.roll_out_attention = proper
