"""The passes of a draft: each takes a tree one level deeper. Tensors of fixed shapes, so that all can be compiled."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .compatibility import is_plain_linear
from .draft_tree import Children
from .draft_vocabulary import DraftHead
from .modeling_poss import PosSModel, PosSSpecialist, RotaryAngles, TargetReference, rotate
from .roll_out import KeysValues


__all__ = ["ContextProjection", "DraftPasses", "Frontier"]

# Where entries go: a run of columns, or the columns of each row, int64 [rows, entries].
ColumnIndex = slice | torch.Tensor


class ContextProjection:
    """Keys and values of all specialists in one product, where their projections are plain matrices.

    Args:
        layers: the specialists.
    """

    def __init__(self, layers: Sequence[PosSSpecialist]):
        self.layers = layers
        self.head_dim = layers[0].self_attn.head_dim
        self.weight = self.bias = None
        self.refresh()

    def refresh(self) -> None:
        """Takes the specialists' weights as they are now; where their shape is the same, into the same tensors."""
        projections = [part for layer in self.layers for part in (layer.self_attn.k_proj, layer.self_attn.v_proj)]
        if not all(is_plain_linear(projection) for projection in projections):
            self.weight = self.bias = None
            return
        self.weight = _joined(self.weight, [projection.weight.detach() for projection in projections])
        if projections[0].bias is not None:
            self.bias = _joined(self.bias, [projection.bias.detach() for projection in projections])

    def __call__(
        self, fused: torch.Tensor, rotary: RotaryAngles, first: int = 0, end: int | None = None
    ) -> KeysValues:
        """Keys and values [rows, specialists, key_value_heads, entries, head_dim] each, of the specialists from
        `first` up to `end`, which is not among them.

        Args:
            fused: inputs [rows, entries, hidden].
            rotary: angles of the entries.
        """
        end = len(self.layers) if end is None else end
        if self.weight is None:
            each = (layer.keys_values(fused, rotary) for layer in self.layers[first:end])
            return tuple(torch.stack(states, dim=1) for states in zip(*each, strict=True))
        width = self.weight.shape[0] // len(self.layers)
        rows = slice(first * width, end * width)
        projected = F.linear(fused, self.weight[rows], None if self.bias is None else self.bias[rows])
        # [rows, entries, specialists, 2, key_value_heads, head_dim]
        projected = projected.unflatten(-1, (end - first, 2, -1, self.head_dim))
        keys, values = projected.permute(3, 0, 2, 4, 1, 5)
        return rotate(keys, rotary), values


def _joined(held: torch.Tensor | None, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    new = torch.cat(parts)
    if held is not None and (held.shape, held.dtype, held.device) == (new.shape, new.dtype, new.device):
        return held.copy_(new)
    return new


@dataclass
class Frontier:
    """Nodes that are expanded next.

    Args:
        fused: their inputs, [rows, nodes, hidden].
        scores: float32 [rows, nodes], log-probability of the path to each; -inf marks a node that is none.
        hidden: [rows, nodes, node columns], added to the scores of attention: 0 at a node's ancestors, -inf elsewhere.
    """

    fused: torch.Tensor
    scores: torch.Tensor
    hidden: torch.Tensor


class DraftPasses:
    """What drafting computes, and nothing of when: for one drafter and one target.

    Args:
        poss: the drafter.
        reference: to the target.
        head: over the tokens that are drafted from.
    """

    def __init__(self, poss: PosSModel, reference: TargetReference, head: DraftHead):
        self.poss, self.reference, self.head = poss, reference, head
        self.project = ContextProjection(poss.layers)

    def refresh(self, reference: TargetReference, head: DraftHead) -> None:
        """Takes weights as they are now, for another call."""
        self.reference, self.head = reference, head
        self.project.refresh()

    def commit(
        self,
        features: torch.Tensor,
        next_tokens: torch.LongTensor,
        lengths: torch.LongTensor,
        states: KeysValues,
        columns: ColumnIndex,
    ) -> torch.Tensor:
        """Writes the context entries of tokens whose features the target has computed.

        Costs `fc` and the key and value projections of an entry, nothing else.

        Args:
            features: [rows, entries, feature size] of the target.
            next_tokens: int64 [rows, entries], the token that follows each.
            lengths: int64 [rows], entries that a row had before: the first new one's position.
            states: keys and values of all specialists, [rows, specialists, key_value_heads, columns, head_dim].
            columns: where the entries go.

        Returns:
            fused inputs of the entries, [rows, entries, hidden].
        """
        poss = self.poss
        features = poss.project(features.to(device=poss.device, dtype=poss.dtype))
        fused = poss.fuse(self.reference.embed(next_tokens, like=features), features)
        positions = lengths[:, None] + torch.arange(fused.shape[1], device=lengths.device)
        _write(states, self.project(fused, poss.rotary(fused, positions)), columns)
        return fused

    def root(
        self, query: torch.Tensor, lengths: torch.LongTensor, depth: int, width: int, node_columns: int
    ) -> tuple[Frontier, RotaryAngles]:
        """The frontier of draft position 1: the newest entry of each row.

        Args:
            query: its fused input, [rows, 1, hidden].
            lengths: int64 [rows], entries of context.
            depth: draft positions.
            width: nodes of the frontier; those behind the first are none.
            node_columns: columns that the round's nodes take.

        Returns:
            the frontier, and the angles [rows, depth, head_dim] of the draft positions.
        """
        rows, device = query.shape[0], query.device
        rotary = self.poss.rotary(query, lengths[:, None] - 1 + torch.arange(depth, device=device))
        scores = torch.zeros(rows, width, device=device)
        if width > 1:
            scores[:, 1:] = -torch.inf
        hidden = query.new_full((rows, width, node_columns), -torch.inf)
        return Frontier(query.expand(-1, width, -1).contiguous(), scores, hidden), rotary

    def expand(
        self,
        specialist: int,
        frontier: Frontier,
        rotary: RotaryAngles,
        states: KeysValues,
        columns: ColumnIndex | None,
        own: torch.Tensor,
        beyond: torch.Tensor | None,
        top_k: int,
        last: bool = False,
        end: int | None = None,
    ) -> tuple[Children, Frontier | None]:
        """One draft pass: the children of a frontier, and the best of them as the next one.

        Args:
            specialist: index of the one that serves this draft position.
            frontier: nodes whose children are drafted.
            rotary: angles of the draft position, [rows, 1, head_dim].
            states: keys and values of all specialists, context first and then the round's nodes,
                [rows, specialists, key_value_heads, context + node columns, head_dim].
            columns: where the frontier's own entries go; None if they are there, the root's.
            own: [top_k, node columns], as `Frontier.hidden`: 0 where the next frontier's own entries will be.
            beyond: [rows, 1, context], added to the scores of context; None where all of it is seen.
            top_k: children a node, and nodes of the next frontier.
            last: there is no next frontier.
            end: specialists from this index on serve no position of this draft; None if all may.
        """
        layer = self.poss.layers[specialist]
        if columns is not None:
            reading = tuple(part[:, specialist:end] for part in states)
            _write(reading, self.project(frontier.fused, rotary, specialist, end), columns)
        keys, values = (part[:, specialist] for part in states)
        attended = _attend(layer.queries(frontier.fused, rotary), keys, values, beyond, frontier.hidden)
        features = layer.complete(frontier.fused, attended)  # [rows, frontier, hidden]
        log_probabilities, tokens = self.head.top(features, top_k)  # [rows, frontier, top_k]
        top_k = tokens.shape[-1]
        scores = (frontier.scores[:, :, None] + log_probabilities).flatten(1)
        children = Children(tokens.flatten(1), scores)
        if last:
            return children, None
        if scores.shape[1] == top_k:  # the only parent's children are sorted already
            chosen = torch.arange(top_k, device=scores.device).expand_as(scores)
            best = scores
        else:
            best, chosen = scores.topk(top_k, dim=-1)
        children.chosen = chosen
        parents = chosen // top_k  # index into the frontier
        parent = parents[:, :, None]
        features = features.gather(1, parent.expand(-1, -1, features.shape[-1]))
        fused = self.poss.fuse(self.reference.embed(children.tokens.gather(1, chosen), like=features), features)
        hidden = frontier.hidden.gather(1, parent.expand(-1, -1, frontier.hidden.shape[-1]))
        return children, Frontier(fused, best, torch.maximum(hidden, own[:top_k]))


def _write(states: KeysValues, new: KeysValues, columns: ColumnIndex) -> None:
    """Puts entries [rows, ..., entries, head_dim] at their columns, in place."""
    for held, entries in zip(states, new, strict=True):
        if isinstance(columns, torch.Tensor) and columns.dim() == 2:
            rows = torch.arange(columns.shape[0], device=columns.device)[:, None]
            held[rows, :, :, columns] = entries.permute(0, 3, 1, 2, 4)
        else:
            held[..., columns, :] = entries


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    beyond: torch.Tensor | None,
    hidden: torch.Tensor,
) -> torch.Tensor:
    """Attention [rows, heads, frontier, head_dim] of a frontier on its row's context, and on nodes.

    Heads that share keys become rows: the keys are not repeated for them.

    Args:
        query: [rows, heads, frontier, head_dim].
        keys, values: [rows, key_value_heads, context + node columns, head_dim].
        beyond: [rows, 1, context], added to the scores of context; None where all of it is seen.
        hidden: [rows, frontier, node columns], added to the scores of nodes.
    """
    active, heads, frontier = query.shape[:3]
    groups = keys.shape[1]
    if beyond is None:
        mask = F.pad(hidden, (keys.shape[-2] - hidden.shape[-1], 0))
    else:
        mask = torch.cat((beyond.expand(-1, frontier, -1), hidden), dim=-1)
    if heads != groups:
        mask = mask.repeat(1, heads // groups, 1)
    by_group = query.reshape(active, groups, heads // groups * frontier, -1)
    attended = F.scaled_dot_product_attention(by_group, keys, values, attn_mask=mask[:, None])
    return attended.view(active, heads, frontier, -1)
