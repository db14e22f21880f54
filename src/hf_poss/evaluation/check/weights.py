"""Whether weights are numbers that training made."""

import itertools

import torch
from transformers import PreTrainedModel

from ...modeling_poss import PosSModel
from .findings import Finding, Verdict
from .pair import Pair, Texts, attached
from .roll_outs import first_inputs


__all__ = ["outputs", "weights"]

# Fresh weights are normal with a standard deviation of `initializer_range`; that of 1,000 or more lies this near.
_FRESH = 0.1
# Features of two specialists that differ by less, as a share of what a specialist adds to its input, are the same: one
# step of AdamW at the paper's 3e-5 changes weights of 0.02 by more.
_SAME = 1e-3
_TEXTS = 8  # that features are compared on


def weights(poss: PosSModel, target: PreTrainedModel) -> Finding:
    """Weights that are not finite, matrices of zeros, specialists as they were made."""
    numbers = {"std": _spreads(poss)}
    for owner, model in (("specialists", poss), ("target", target)):
        broken = [name for name, weight in model.state_dict().items() if not _is_finite(weight)]
        if broken:
            return Finding(
                "weights",
                Verdict.FAILURE,
                f"NaN or infinite weights of the {owner}: {_listed(broken)}.",
                "The file is damaged, or training diverged. Download it again, or take an earlier checkpoint and "
                "train on with a lower learning rate.",
                {**numbers, "not_finite": broken},
            )
    # Adapters may be zero: they begin so, and are told by `outputs`.
    empty = [name for name, weight in _matrices(poss) if not bool(weight.any())]
    if empty:
        remedy = "These weights were never loaded or saved. Save the specialists again from the run that trained them."
        return Finding("weights", Verdict.FAILURE, f"All weights are 0 in {_listed(empty)}.", remedy, numbers)
    if _is_fresh(poss):
        return Finding(
            "weights",
            Verdict.FAILURE,
            "The specialists have the random weights that they were made with: all norms are exactly 1, and all "
            f"matrices have the standard deviation of fresh ones, {poss.config.initializer_range:g}.",
            "Train them (`hf-poss train`), or load the checkpoint that training wrote.",
            numbers,
        )
    return Finding("weights", Verdict.OK, "All weights are finite, and none as they are made.", numbers=numbers)


def _is_finite(weight: torch.Tensor) -> bool:
    return not weight.dtype.is_floating_point or weight.is_meta or bool(torch.isfinite(weight).all())


def _matrices(poss: PosSModel) -> list[tuple[str, torch.Tensor]]:
    return [
        (name, weight)
        for name, weight in poss.state_dict().items()
        if name.endswith("weight") and weight.dim() == 2
        if ".lora_" not in name
    ]


def _spreads(poss: PosSModel) -> dict[str, float]:
    """Standard deviation of all matrices of a part: `fc`, each specialist."""
    parts: dict[str, list[torch.Tensor]] = {}
    for name, weight in poss.state_dict().items():
        if weight.dim() == 2:
            part = ".".join(name.split(".")[: 2 if name.startswith("layers.") else 1])
            parts.setdefault(part, []).append(weight.float().flatten())
    return {part: float(torch.cat(of).std()) for part, of in parts.items()}


def _is_fresh(poss: PosSModel) -> bool:
    fresh = poss.config.initializer_range
    norms = [weight for name, weight in poss.state_dict().items() if name.endswith("layernorm.weight")]
    if any(bool((weight != 1).any()) for weight in norms):
        return False
    return all(abs(float(weight.float().std()) - fresh) < _FRESH * fresh for _, weight in _matrices(poss))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + f" and {len(names) - 4} more" * (len(names) > 4)


@torch.no_grad()
def outputs(pair: Pair, texts: Texts) -> Finding:
    """Whether what specialists predict are numbers, and whether two of them predict the same from the same input.

    By what they compute and not by their weights, so that copies are told where specialists are adapters, too.
    """
    poss, part = pair.poss, next(texts.batches(_TEXTS))
    with attached(pair) as reference:
        fused, rotary = first_inputs(pair, reference, part.input_ids, part.attention_mask)
    real = part.attention_mask[:, 1:].bool().to(fused.device)
    if not bool(torch.isfinite(fused[real]).all()):
        return Finding(
            "outputs",
            Verdict.FAILURE,
            "What specialists read of the target holds NaN or infinite values.",
            "Run target and specialists in bfloat16 or float32, and check their weights.",
        )
    # What each specialist adds to its input, [rows, hidden].
    added = [(layer((fused,), (), rotary)[0] - fused)[real].float() for layer in poss.layers]
    if broken := [index for index, of in enumerate(added, start=1) if not bool(torch.isfinite(of).all())]:
        return Finding(
            "outputs",
            Verdict.FAILURE,
            f"NaN or infinite features are predicted by specialist {', '.join(map(str, broken))}.",
            "Run the specialists in bfloat16 or float32; if that does not help, take an earlier checkpoint.",
            {"not_finite": broken},
        )
    if len(added) == 1:
        return Finding("outputs", Verdict.OK, "All predicted features are finite; there is one specialist.")
    distances = {
        (first, second): float((added[first - 1] - added[second - 1]).norm() / added[first - 1].norm())
        for first, second in itertools.combinations(range(1, len(added) + 1), 2)
    }
    numbers = {"distance": {f"{first} and {second}": value for (first, second), value in distances.items()}}
    same = [f"{first} and {second}" for (first, second), distance in distances.items() if distance < _SAME]
    if not same:
        nearest = min(distances, key=distances.__getitem__)
        told = (
            "All predicted features are finite, and specialists differ: the most alike, {} and {}, by {:.0%} of what "
            "they add to their input."
        ).format(*nearest, distances[nearest])
        return Finding("outputs", Verdict.OK, told, numbers=numbers)
    if len(same) == len(distances):
        told = (
            "All specialists are copies of each other: they are where training starts (`from_eagle`), or it never ran."
        )
    else:
        told = f"Copies of each other are specialists {_listed(same)}."
    remedy = "Train them (`hf-poss train`). Copies draft as one EAGLE layer does, and take more memory."
    return Finding("outputs", Verdict.WARNING, told, remedy, numbers)
