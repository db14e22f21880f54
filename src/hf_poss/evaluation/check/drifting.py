"""Whether drafted features stay near the target's."""

import torch
from torch.nn import functional as F

from ...measures import DriftSums
from ...training.features import target_features
from ..drift import feature_drift
from .findings import Finding, Verdict
from .pair import Pair, Texts


__all__ = ["drift"]

_TEXTS = 8  # at a time
_SHARP = 0.2  # fall of the cosine between neighbouring positions
_NORMS = (0.5, 2.0)


@torch.no_grad()
def drift(pair: Pair, texts: Texts) -> Finding:
    """Cosine and ratio of norms of drafted and target features by draft position, against the cosine of the target's
    own features of neighbouring tokens: what is no nearer than that says nothing of the token that it stands for."""
    sums, near, rows = DriftSums(), 0.0, 0
    for part in texts.batches(_TEXTS):
        sums += feature_drift(pair.target, pair.poss, part.input_ids, part.attention_mask, part.written)
        _, wanted = target_features(pair.target, part.input_ids, part.attention_mask)
        cosine = F.cosine_similarity(wanted[:, 1:].float(), wanted[:, :-1].float(), dim=-1)
        cosine = cosine[part.written[:, 1:].to(cosine.device)]
        near, rows = near + float(cosine.double().sum()), rows + cosine.numel()
    cosine, norm_ratio, neighbours = sums.mean_cosine, sums.mean_norm_ratio, near / max(rows, 1)
    numbers = {"rows": sums.rows, "cosine": cosine, "norm_ratio": norm_ratio, "neighbouring_tokens": neighbours}
    listed = " ".join(f"{value:.2f}" for value in cosine)
    told = (
        f"cosine of drafted and target features by position {listed}, neighbouring tokens' {neighbours:.2f}; norms "
        f"{min(norm_ratio):.2f} to {max(norm_ratio):.2f} of the target's"
    )
    problems = []
    if far := [k for k, value in enumerate(cosine, start=1) if not value > neighbours]:
        problems.append(f"from position {far[0]} on drafted features are no nearer than another token's")
    if falls := [k + 1 for k in range(1, len(cosine)) if cosine[k - 1] - cosine[k] > _SHARP]:
        problems.append(f"the cosine falls sharply at position {', '.join(map(str, falls))}")
    if not _NORMS[0] <= min(norm_ratio) <= max(norm_ratio) <= _NORMS[1]:
        problems.append("norms are far from the target's")
    if problems:
        return Finding(
            "drift",
            Verdict.WARNING,
            f"Features drift: {'; '.join(problems)} ({told}).",
            "Acceptance decides whether that matters: specialists trained without the feature loss may drift and "
            "draft well. If acceptance is low too, these are another target's specialists, or training was too short.",
            numbers,
        )
    return Finding("drift", Verdict.OK, f"Features stay near the target's: {told}.", numbers=numbers)
