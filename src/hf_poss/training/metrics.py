"""What an evaluation of the roll-out says about drafting."""

import numpy as np
from transformers import EvalPrediction


__all__ = ["position_metrics"]


def position_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Per-position top-1 accuracy, simulated pos-acc, and the tau that follows from it.

    Simulated: chains start at every row of fixed text, and a drafted token counts as accepted when it is the target's
    most likely one. tau = 1 + sum over k of the product of pos-acc of 1..k, the tokens of a round with the target's
    own (Leviathan et al., equation 1, with an acceptance rate of each position).

    Args:
        prediction: `predictions` are the counts of `PosSOutput`, int64 [samples, 4, positions].

    Returns:
        `accuracy_1` ... and `pos_acc_1` ... by draft position, and `tau`.
    """
    counts = prediction.predictions
    counts = np.asarray(counts[0] if isinstance(counts, tuple) else counts).sum(axis=0)
    rows, hits, reached, accepted = counts.astype(np.float64)
    accuracy = hits / np.maximum(rows, 1)
    pos_acc = accepted / np.maximum(reached, 1)
    metrics = {f"accuracy_{k}": float(value) for k, value in enumerate(accuracy, start=1)}
    metrics |= {f"pos_acc_{k}": float(value) for k, value in enumerate(pos_acc, start=1)}
    metrics["tau"] = float(1 + np.cumprod(pos_acc).sum())
    return metrics
