"""Dynamic draft trees: grown level by level, reranked as a whole (EAGLE-2). Pure tensors."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch


__all__ = ["Candidates", "Children", "DraftTree", "choose_nodes", "rank_candidates"]


@dataclass
class DraftTree:
    """Tokens to verify in one pass of the target.

    Nodes are numbered level by level, a parent before its children; node 0 is the root, the last token that the
    target emitted. Example: root 7 with children 3 and 5, and 9 below 5, is `tokens` [7, 3, 5, 9], `parents`
    [0, 0, 0, 2], `depths` [0, 1, 1, 2].

    Args:
        tokens: int64 [batch, nodes].
        parents: int64 [batch, nodes]; the root is its own parent.
        depths: int64 [batch, nodes], the draft position of each node.
        max_depth: levels that were grown; no depth is above it.
        scores: float32 [batch, nodes], the drafter's log-probability of the path to each; None if it is not known.
        ranked: scores and draft positions of what was drafted, kept or not, the best first: [batch, best] each.
    """

    tokens: torch.LongTensor
    parents: torch.LongTensor
    depths: torch.LongTensor
    max_depth: int
    scores: torch.Tensor | None = None
    ranked: tuple[torch.Tensor, torch.LongTensor] | None = None

    @classmethod
    def of_roots(cls, tokens: torch.LongTensor) -> "DraftTree":
        """Nothing but roots, int64 [batch]: a pass over them is a plain decoding step."""
        zeros = torch.zeros_like(tokens)[:, None]
        return cls(tokens[:, None], zeros, zeros, max_depth=0)

    @classmethod
    def star(cls, tokens: torch.LongTensor, nodes: int) -> "DraftTree":
        """Roots int64 [batch], each with `nodes` - 1 children that carry its own token: something to time."""
        tokens = tokens[:, None].repeat(1, nodes)
        depths = (torch.arange(nodes, device=tokens.device) > 0).long().expand_as(tokens)
        return cls(tokens, torch.zeros_like(depths), depths, max_depth=int(nodes > 1))

    @functools.cached_property
    def ancestors(self) -> torch.BoolTensor:
        """bool [batch, nodes, nodes]: row i is True at i and at every ancestor of i."""
        nodes = self.tokens.shape[1]
        mask = torch.eye(nodes, dtype=torch.bool, device=self.tokens.device).expand(self.tokens.shape[0], -1, -1)
        # After step i a row knows its ancestors up to 2^i levels above, and the ancestor that far above.
        above, known = self.parents, 1
        while known <= self.max_depth:
            mask = mask | mask.gather(1, above[:, :, None].expand(-1, -1, nodes))
            above, known = above.gather(1, above), 2 * known
        return mask


@dataclass
class Children:
    """The nodes below a frontier, the children of each node in turn.

    Args:
        tokens: int64 [batch, frontier * top_k].
        scores: float32 [batch, frontier * top_k], log-probability of the path to each: the sum of those along it,
            never above its parent's. -inf marks a node that is none.
        chosen: int64 [batch, top_k], index of those that make the next frontier; None for the last level.
    """

    tokens: torch.LongTensor
    scores: torch.Tensor
    chosen: torch.LongTensor | None = None


@dataclass
class Candidates:
    """All nodes that were looked at. Numbered in the order in which they came up: the root 0, the first level, and so
    on; index i holds number i + 1.

    Args:
        tokens, parents: int64 [batch, candidates]; parents by number.
        order: int64 [batch, best], indices of the best ones, the best first; ties go to the lower number.
        scores: float32 [batch, best], log-probabilities of their paths.
        depths: int64 [batch, best], their draft positions.
        max_depth: levels that were grown.
    """

    tokens: torch.LongTensor
    parents: torch.LongTensor
    order: torch.LongTensor
    scores: torch.Tensor
    depths: torch.LongTensor
    max_depth: int


def rank_candidates(levels: Sequence[Children], top_k: int, best: int) -> Candidates:
    """The nodes of all levels, of which the `best` most likely are ranked (EAGLE-2).

    Args:
        levels: from the first on. The first may be smaller than the others, which are of one size.
        top_k: children a node.
        best: candidates to rank, fewer if there are fewer.
    """
    tokens = torch.cat([level.tokens for level in levels], dim=1)
    scores = torch.cat([level.scores for level in levels], dim=1)
    parents, number = [torch.zeros_like(levels[0].tokens)], 1
    for level in levels[:-1]:
        parents.append((level.chosen + number).repeat_interleave(top_k, dim=1))
        number += level.tokens.shape[1]
    first, size = levels[0].tokens.shape[1], levels[-1].tokens.shape[1]
    ranked = scores.sort(dim=-1, descending=True, stable=True)
    order = ranked.indices[:, :best]
    return Candidates(
        tokens=tokens,
        parents=torch.cat(parents, dim=1),
        order=order,
        scores=ranked.values[:, :best],
        depths=torch.div(order - first, size, rounding_mode="floor") + 2,
        max_depth=len(levels),
    )


def choose_nodes(root_tokens: torch.LongTensor, candidates: Candidates, total_tokens: int) -> DraftTree:
    """The tree of the root and the best `total_tokens` - 1 candidates, fewer if fewer are ranked (EAGLE-2).

    A child's score is never above its parent's, and ties go to the lower number, so the best are closed under parents.

    Args:
        root_tokens: int64 [batch].
        candidates: ranked.
        total_tokens: nodes, the root included.
    """
    # Node i + 1 is the kept candidate with the i-th lowest number.
    kept, place = candidates.order[:, : total_tokens - 1].sort(dim=-1)
    tokens, parents = (rows.gather(1, kept) for rows in (candidates.tokens, candidates.parents))
    scores, depths = (rows.gather(1, place) for rows in (candidates.scores, candidates.depths))
    # Candidate numbers become node numbers: with candidates 2, 3 and 7 kept, candidate 7 is node 3.
    parents = torch.searchsorted(kept + 1, parents) + (parents > 0)
    root = torch.zeros_like(root_tokens)[:, None]
    return DraftTree(
        tokens=torch.cat((root_tokens[:, None], tokens), dim=1),
        parents=torch.cat((root, parents), dim=1),
        depths=torch.cat((root, depths), dim=1),
        max_depth=candidates.max_depth,
        scores=torch.cat((torch.zeros_like(scores[:, :1]), scores), dim=1),
    )
