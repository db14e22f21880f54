"""What a drafted position is trained on: losses by name, summed over a vocabulary in chunks."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F


if TYPE_CHECKING:
    from .draft_vocabulary import DraftHead


__all__ = ["DEFAULT_LOSSES", "LOSSES", "RollOutLosses", "TargetRows", "parse_losses", "roll_out_losses", "row_losses"]

LOSSES = ("feature", "token", "topk", "kl", "acceptance")
# As EAGLE-3. The public PosS code has feature 1.0 and token 0.1 (`v_w`, `p_w`), which docs/study.md, section 4, finds
# to accept less.
DEFAULT_LOSSES = {"token": 1.0}
# float32 entries of the largest tensor over the vocabulary: 64 MiB, of which a handful are alive at a time.
CHUNK_ENTRIES = 2**24


def parse_losses(losses: str | Mapping[str, float] | None) -> dict[str, float]:
    """Losses by name with their weights; those of weight 0 are left out.

    - `feature`: smooth L1 between predicted and target feature, mean over hidden (EAGLE, PosS);
    - `token`: soft cross-entropy against the target's distribution (EAGLE, PosS; alone: EAGLE-3);
    - `topk`: the part of it that the target's k most likely tokens contribute (HASS);
    - `kl`: `token` less the target's entropy: the same gradient, 0 when the drafter is right;
    - `acceptance`: 1 - sum min(p, q), the chance that a sampled draft is rejected (Leviathan et al., corollary
      3.6), which is the total variation distance of the two.

    Args:
        losses: a mapping, or text: `"feature=1.0,token=0.1"`, or the JSON of a mapping; [`DEFAULT_LOSSES`] if None.

    Raises:
        ValueError: for an unknown name, a weight that is no number or below 0, or no weight above 0.
    """
    if losses is None:
        return dict(DEFAULT_LOSSES)
    parsed: dict[str, Any] = dict(losses) if isinstance(losses, Mapping) else _parse_text(losses)
    weights = {}
    for name, value in parsed.items():
        if name not in LOSSES:
            raise ValueError(f"There is no loss {name!r}; expected some of {', '.join(LOSSES)}.")
        try:
            weights[name] = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"The weight of loss {name!r} is {value!r}; expected a number.") from None
        if not 0 <= weights[name] < float("inf"):
            raise ValueError(f"The weight of loss {name!r} is {weights[name]}; expected 0 or more.")
    weights = {name: weight for name, weight in weights.items() if weight}
    if not weights:
        raise ValueError(f"No loss has a weight ({losses!r}); give one or more of {', '.join(LOSSES)} one above 0.")
    return weights


def _parse_text(text: str) -> dict[str, Any]:
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"The losses {text!r} are no JSON ({error}). Write name=weight,name=weight.") from error
    parts = [part.strip() for part in text.split(",") if part.strip()]
    pairs = [(name.strip(), weight.strip()) for name, _, weight in (part.partition("=") for part in parts)]
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"The losses {text!r} name one twice; expected every name once.")
    return {name: weight or 1.0 for name, weight in pairs}


@dataclass
class TargetRows:
    """What losses ask of the target for some rows, computed once for all draft positions.

    Args:
        features: [rows, hidden].
        probabilities: float32 [rows, draft vocab], of the full distribution: they sum to less than 1 where the
            drafter has a vocabulary of its own.
        tokens: int64 [rows], the most likely ones, of the full vocabulary.
    """

    features: torch.Tensor
    probabilities: torch.Tensor
    tokens: torch.LongTensor

    @classmethod
    @torch.no_grad()
    def of(cls, head: "DraftHead", features: torch.Tensor) -> "TargetRows":
        logits = head.reference.logits(features)
        return cls(features, head.on_vocabulary(logits.softmax(-1)), logits.argmax(-1))


def row_losses(
    names: Sequence[str], predicted: torch.Tensor, logits: torch.Tensor, target: TargetRows, top_k: int = 10
) -> torch.Tensor:
    """Losses of one draft position, see [`parse_losses`].

    Args:
        names: which.
        predicted: [rows, hidden], features.
        logits: float32 [rows, draft vocab] of these.
        target: of the same rows.
        top_k: tokens that `topk` looks at.

    Returns:
        float32 [losses, rows]
    """
    p, log_q = target.probabilities, logits.log_softmax(-1)
    losses = []
    for name in names:
        if name == "feature":
            loss = F.smooth_l1_loss(predicted.float(), target.features.float(), reduction="none").mean(-1)
        elif name == "token":
            loss = -(p * log_q).sum(-1)
        elif name == "topk":
            best, best_tokens = p.topk(min(top_k, p.shape[-1]), dim=-1)
            loss = -(best * log_q.gather(-1, best_tokens)).sum(-1)
        elif name == "kl":
            loss = (torch.xlogy(p, p) - p * log_q).sum(-1)
        else:
            loss = 1 - torch.minimum(p, log_q.exp()).sum(-1)
        losses.append(loss)
    return torch.stack(losses)


@dataclass
class RollOutLosses:
    """Losses of all draft positions, summed over the rows that count.

    Args:
        total: float32 scalar with a gradient, weighted.
        sums: float32 [batch, losses, positions], unweighted.
        tokens: int64 [batch, positions, rows], the most likely drafted tokens; -1 where a row does not count.
        target_tokens: int64 [batch, rows], the target's; -1 likewise.
    """

    total: torch.Tensor
    sums: torch.Tensor
    tokens: torch.LongTensor
    target_tokens: torch.LongTensor


@torch.compiler.disable
def roll_out_losses(
    predictions: Sequence[torch.Tensor],
    target_features: torch.Tensor,
    counted: torch.BoolTensor,
    head: "DraftHead",
    losses: Mapping[str, float],
    position_weights: Sequence[float],
    top_k: int = 10,
) -> RollOutLosses:
    """Losses of every draft position over the rows that count, some rows of vocabulary at a time.

    No tensor [batch, rows, vocab] exists: a chunk's logits live until its gradient with respect to the predicted
    features is known, which is what backward needs (the idea of Liger Kernel's fused linear cross-entropy; the head is
    frozen here). The target's logits are computed once for all positions.

    Args:
        predictions: by position [batch, rows, hidden].
        target_features: [batch, rows, hidden].
        counted: bool [batch, rows].
        head: the target's.
        losses: names and weights.
        position_weights: of each position.
        top_k: see [`row_losses`].
    """
    total, sums, tokens, target_tokens = _ChunkedLosses.apply(
        target_features, counted, head, dict(losses), tuple(position_weights), top_k, *predictions
    )
    return RollOutLosses(total, sums, tokens, target_tokens)


class _ChunkedLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, target_features, counted, head, losses, position_weights, top_k, *predictions):
        batch, rows, hidden = target_features.shape
        device, positions = target_features.device, len(predictions)
        index = counted.flatten().nonzero().squeeze(-1)  # [counted]
        sums = torch.zeros(batch, len(losses), positions, device=device)
        tokens = torch.full((positions, batch * rows), -1, device=device)
        target_tokens = torch.full((batch * rows,), -1, device=device)
        weights = torch.tensor(list(losses.values()), device=device)
        wanted = ctx.needs_input_grad[6:]
        gradients = [
            torch.zeros_like(prediction).flatten(0, 1) if want else None
            for want, prediction in zip(wanted, predictions, strict=True)
        ]

        target_features = target_features.flatten(0, 1)
        for chunk in index.split(max(1, CHUNK_ENTRIES // head.reference.vocab_size)):
            target = TargetRows.of(head, target_features[chunk])
            target_tokens[chunk] = target.tokens
            sample = chunk // rows
            for position, prediction in enumerate(predictions):
                with torch.set_grad_enabled(wanted[position]):
                    predicted = prediction.detach().flatten(0, 1)[chunk].requires_grad_(wanted[position])
                    logits = head.logits(predicted)
                    by_row = row_losses(list(losses), predicted, logits, target, top_k)  # [losses, chunk]
                    if wanted[position]:
                        weighted = (by_row * weights[:, None]).sum() * position_weights[position]
                        (gradients[position][chunk],) = torch.autograd.grad(weighted, predicted)
                sums[:, :, position].index_add_(0, sample, by_row.detach().T)
                tokens[position, chunk] = head.token_ids(logits.detach().argmax(-1))

        ctx.save_for_backward(*(gradient for gradient in gradients if gradient is not None))
        ctx.wanted, ctx.shape = wanted, (batch, rows, hidden)
        tokens = tokens.view(positions, batch, rows).transpose(0, 1)
        target_tokens = target_tokens.view(batch, rows)
        ctx.mark_non_differentiable(sums, tokens, target_tokens)
        total = (sums.sum(0) * weights[:, None] * weights.new_tensor(position_weights)).sum()
        return total, sums, tokens, target_tokens

    @staticmethod
    def backward(ctx, grad_total, *_):
        saved = iter(ctx.saved_tensors)
        gradients = [(next(saved) * grad_total).view(ctx.shape) if want else None for want in ctx.wanted]
        return (None,) * 6 + tuple(gradients)
