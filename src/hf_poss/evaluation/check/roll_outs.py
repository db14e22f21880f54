"""What specialists draft below every token of texts that the target wrote, and what their neighbours would."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ...draft_vocabulary import DraftHead
from ...modeling_poss import PosSModel, RotaryAngles, TargetReference, chain_counts
from ...training.features import target_features
from .pair import Pair, Texts, attached


__all__ = ["RollOuts", "first_drafts", "first_inputs", "roll_outs"]

_TEXTS = 8  # at a time
_ROWS = 256  # that go through the head at a time


@dataclass(frozen=True)
class RollOuts:
    """Counts by text. A chain of drafts begins below every token of it; a drafted token is accepted where the text
    goes on with it, as in greedy decoding with chains.

    Args:
        counts: int64 [texts, 4, positions], see `PosSOutput`.
        continuations: by text, int64 [rows]: the tokens that it goes on with.
        swaps: by draft position k and specialist that is a neighbour of its own (both 1-based), int64 [texts, 3]: rows
            that a chain reaches at k, how many of them its specialist drafts right, and how many the neighbour does if
            it takes its place there.
    """

    counts: torch.LongTensor
    continuations: list[torch.LongTensor]
    swaps: dict[tuple[int, int], torch.LongTensor]


@torch.no_grad()
def roll_outs(pair: Pair, texts: Texts) -> RollOuts:
    """Rolls the specialists out over texts, each position by its own one and, apart from that, by its neighbours.

    A neighbour reads what the position's own specialist reads: the features that the positions before it predicted, by
    keys and values of its own.
    """
    counts, continuations = [], []
    swaps: dict[tuple[int, int], list[torch.LongTensor]] = {}
    with attached(pair) as reference:
        head = pair.poss.draft_head(reference)
        for part in texts.batches(_TEXTS):
            features, _ = target_features(
                pair.target, part.input_ids, part.attention_mask, feature_layers=pair.poss.config.feature_layers
            )
            with _recorded_streams(pair.poss) as streams:
                predictions = pair.poss.roll_out(
                    features[:, :-1], part.input_ids[:, 1:], segment_ids=part.attention_mask[:, :-1]
                )
            # Row t reads tokens up to t + 1 and drafts token t + 2: with 9 tokens there are 7 rows, 0 to 6.
            truth, counted = part.input_ids[:, 2:], part.written[:, 2:]
            own = torch.stack([_drafted(head, of[:, :-1], counted) for of in predictions], dim=1)
            counts.append(chain_counts(own, truth, counted))
            continuations += [row[kept] for row, kept in zip(truth, counted, strict=True)]
            for position, reached in enumerate(_reached(own, truth, counted), start=1):
                index = pair.poss.config.specialist_index(position)
                for neighbour in (index - 1, index + 1):
                    if 0 <= neighbour < pair.poss.config.num_specialists:
                        predicted = streams.predicted(pair.poss.layers[neighbour], position)
                        theirs = _drafted(head, predicted[:, :-1], reached)
                        hits = [(drafted == truth) & reached for drafted in (own[:, position - 1], theirs)]
                        sums = torch.stack([rows.sum(-1) for rows in (reached, *hits)], dim=-1)
                        swaps.setdefault((position, neighbour + 1), []).append(sums)
    return RollOuts(torch.cat(counts), continuations, {key: torch.cat(parts) for key, parts in swaps.items()})


@torch.no_grad()
def first_inputs(
    pair: Pair, reference: TargetReference, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, RotaryAngles]:
    """What draft position 1 reads below every token of texts [texts, tokens], padded on the right if at all.

    Returns:
        fused inputs [texts, tokens - 1, hidden], row t of feature t and token t + 1; and their rotary angles.
    """
    poss = pair.poss
    features, _ = target_features(pair.target, input_ids, attention_mask, feature_layers=poss.config.feature_layers)
    stream = poss.project(features[:, :-1].to(device=poss.fc.weight.device, dtype=poss.dtype))
    fused = poss.fuse(reference.embed(input_ids[:, 1:], like=stream), stream)
    return fused, poss.rotary(fused, torch.arange(fused.shape[1], device=fused.device)[None])


@torch.no_grad()
def first_drafts(pair: Pair, input_ids: torch.LongTensor) -> torch.LongTensor:
    """int64 [texts, tokens]: for each token of texts what a round that begins there would draft first; -1 for the
    first two, before which no round can begin."""
    drafts = torch.full(input_ids.shape, -1)
    with attached(pair) as reference:
        head = pair.poss.draft_head(reference)
        for row in range(0, len(input_ids), _TEXTS):
            rows = slice(row, row + _TEXTS)
            fused, rotary = first_inputs(pair, reference, input_ids[rows])
            predicted = pair.poss.specialist(1)((fused,), (), rotary)[0][:, :-1]
            drafts[rows, 2:] = _drafted(head, predicted, torch.ones(predicted.shape[:2], dtype=torch.bool))
    return drafts


def _drafted(head: DraftHead, predicted: torch.Tensor, wanted: torch.BoolTensor) -> torch.LongTensor:
    """int64 [texts, rows]: the most likely drafts where `wanted` [texts, rows], -1 elsewhere."""
    tokens = torch.full(wanted.shape, -1)
    rows = predicted[wanted.to(predicted.device)]  # [rows that are wanted, hidden]
    if len(rows):
        tokens[wanted] = torch.cat([head.top(part, 1)[1][:, 0].cpu() for part in rows.split(_ROWS)])
    return tokens


def _reached(
    drafted: torch.LongTensor, truth: torch.LongTensor, counted: torch.BoolTensor
) -> Iterator[torch.BoolTensor]:
    """bool [texts, rows] by draft position: rows at which a chain stands whose drafts were right so far.

    A chain that begins at row 4 drafts position 2 at row 5.
    """
    reached = counted
    for position in range(drafted.shape[1]):
        yield reached
        reached = F.pad((reached & (drafted[:, position] == truth))[:, :-1], (1, 0)) & counted


@dataclass
class _Streams:
    """Inputs of a roll-out's specialists.

    Args:
        fused: by draft position - 1, [texts, rows, hidden].
        arguments: rotary angles and segments of all of them.
    """

    fused: list[torch.Tensor]
    arguments: Sequence[Any] = ()

    def predicted(self, specialist: nn.Module, position: int) -> torch.Tensor:
        """Features [texts, rows, hidden] that a specialist predicts at a draft position."""
        return specialist(tuple(self.fused[:position]), (), *self.arguments)[0]


@contextlib.contextmanager
def _recorded_streams(poss: PosSModel) -> Iterator[_Streams]:
    streams = _Streams([])

    def record(module: nn.Module, arguments: tuple) -> None:
        fused_streams, _, *streams.arguments = arguments
        streams.fused.append(fused_streams[-1])  # whose rows are the queries: those of this position

    hooks = [layer.register_forward_pre_hook(record) for layer in poss.layers]
    try:
        yield streams
    finally:
        for hook in hooks:
            hook.remove()
