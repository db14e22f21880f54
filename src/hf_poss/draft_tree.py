"""Dynamic draft trees: grown level by level, reranked as a whole (EAGLE-2). Pure tensors."""

from dataclasses import dataclass

import torch


__all__ = ["DraftTree", "DraftTreeBuilder", "Frontier"]


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
    """

    tokens: torch.LongTensor
    parents: torch.LongTensor
    depths: torch.LongTensor
    max_depth: int

    def ancestor_mask(self) -> torch.BoolTensor:
        """bool [batch, nodes, nodes]: row i is True at i and at every ancestor of i."""
        nodes = self.tokens.shape[1]
        own = torch.eye(nodes, dtype=torch.bool, device=self.tokens.device).expand(self.tokens.shape[0], -1, -1)
        parents = self.parents[:, :, None].expand(-1, -1, nodes)
        mask = own
        for _ in range(self.max_depth):
            mask = own | mask.gather(1, parents)
        return mask


@dataclass
class Frontier:
    """Nodes that are expanded next.

    Args:
        tokens: int64 [batch, nodes].
        parents: int64 [batch, nodes], index into the frontier before (into the root, 0, for level 1).
    """

    tokens: torch.LongTensor
    parents: torch.LongTensor


class DraftTreeBuilder:
    """Collects every node that was looked at, then keeps the best.

    Candidates are numbered in the order in which they come up: the root 0, its children 1..k, then the children of
    each frontier node in turn. A child's score, the sum of log-probabilities along its path, is never above its
    parent's; ties go to the lower number. So the best nodes are closed under parents.

    Args:
        root_tokens: int64 [batch].
        top_k: children a node, and nodes expanded a level; 1 makes a chain.
        vocabulary: int64 [draft vocab], the token of each logit; None if logits are of all tokens.
    """

    def __init__(self, root_tokens: torch.LongTensor, top_k: int, vocabulary: torch.LongTensor | None = None):
        self.top_k = top_k
        self.vocabulary = vocabulary
        batch, device = root_tokens.shape[0], root_tokens.device
        self.root_tokens = root_tokens
        self.frontier_ids = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.frontier_scores = torch.zeros(batch, 1, device=device)
        self.levels: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # tokens, parents, scores
        self.candidates = 1

    def grow(self, logits: torch.Tensor) -> Frontier:
        """Adds the best children of every frontier node and picks the next frontier among them.

        Args:
            logits: float32 [batch, frontier, draft vocab] of the frontier's nodes.
        """
        top_k = min(self.top_k, logits.shape[-1])
        log_probabilities, tokens = logits.log_softmax(-1).topk(top_k, dim=-1)  # [batch, frontier, top_k]
        scores = (self.frontier_scores[:, :, None] + log_probabilities).flatten(1)
        tokens = tokens.flatten(1)  # [batch, frontier * top_k]
        if self.vocabulary is not None:
            tokens = self.vocabulary[tokens]
        parents = self.frontier_ids.repeat_interleave(top_k, dim=1)
        self.levels.append((tokens, parents, scores))

        if scores.shape[1] == top_k:  # the only parent's children are sorted already
            chosen = torch.arange(top_k, device=scores.device).expand_as(scores)
        else:
            chosen = scores.topk(top_k, dim=-1).indices
        self.frontier_scores = scores.gather(1, chosen)
        self.frontier_ids = chosen + self.candidates
        self.candidates += scores.shape[1]
        return Frontier(tokens=tokens.gather(1, chosen), parents=chosen // top_k)

    def build(self, total_tokens: int) -> DraftTree:
        """The root and the best `total_tokens` - 1 candidates, fewer if there are fewer."""
        tokens, parents, scores = (torch.cat(parts, dim=1) for parts in zip(*self.levels, strict=True))
        depths = torch.cat(
            [torch.full_like(level[0], depth) for depth, level in enumerate(self.levels, start=1)], dim=1
        )
        kept = scores.sort(dim=-1, descending=True, stable=True).indices[:, : total_tokens - 1]
        kept = kept.sort(dim=-1).values  # [batch, nodes - 1], candidate number - 1
        tokens, parents, depths = (rows.gather(1, kept) for rows in (tokens, parents, depths))
        # Candidate numbers become node numbers: with candidates 2, 3 and 7 kept, candidate 7 is node 3.
        parents = torch.searchsorted(kept + 1, parents) + (parents > 0)
        root = torch.zeros_like(tokens[:, :1])
        return DraftTree(
            tokens=torch.cat((self.root_tokens[:, None], tokens), dim=1),
            parents=torch.cat((root, parents), dim=1),
            depths=torch.cat((root, depths), dim=1),
            max_depth=len(self.levels),
        )
