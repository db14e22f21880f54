"""What a roll-out says about drafting: losses, accuracy and simulated acceptance by draft position."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction

from ..measures import expected_tau, position_acceptance


__all__ = [
    "BoundaryDrop",
    "PositionSums",
    "boundary_drops",
    "evaluation_metrics",
    "fold_positions",
    "metric_names",
    "metrics_of_sums",
    "position_metrics",
    "summed_predictions",
]

# What counts as a sharp drop, see `boundary_drops`.
_DROP = 0.1
_TIMES_TYPICAL = 2.0
_FEWEST_ROUNDS = 100
_FEWEST_ARRIVING = 0.05


def position_metrics(counts: np.ndarray) -> dict[str, float]:
    """Per-position top-1 accuracy, simulated pos-acc, and the tau that follows from it.

    Simulated: chains start at every row of fixed text, and a drafted token counts as accepted when it is the target's
    most likely one. tau is what follows from pos-acc, see [`expected_tau`].

    Args:
        counts: [4, positions], sums of the counts of `PosSOutput`.

    Returns:
        `accuracy_1` ... and `pos_acc_1` ... by draft position, and `tau`.
    """
    rows, hits, reached, accepted = np.asarray(counts, dtype=np.float64)
    accuracy, pos_acc = position_acceptance(hits, rows), position_acceptance(accepted, reached)
    metrics = {f"accuracy_{k}": float(value) for k, value in enumerate(accuracy, start=1)}
    metrics |= {f"pos_acc_{k}": float(value) for k, value in enumerate(pos_acc, start=1)}
    metrics["tau"] = float(expected_tau(pos_acc))
    return metrics


def metrics_of_sums(loss_sums: np.ndarray, counts: np.ndarray, losses: Sequence[str]) -> dict[str, float]:
    """[`position_metrics`], with the mean of each loss at each draft position: `loss_token_1` ...

    Args:
        loss_sums: [losses, positions], unweighted sums over the rows that count.
        counts: [4, positions].
        losses: names, in the order of `loss_sums`.
    """
    means = np.asarray(loss_sums, dtype=np.float64) / np.maximum(np.asarray(counts)[0], 1)
    metrics = {
        f"loss_{name}_{k}": float(value)
        for name, by_position in zip(losses, means, strict=True)
        for k, value in enumerate(by_position, start=1)
    }
    return metrics | position_metrics(counts)


def metric_names(losses: Sequence[str], num_draft_positions: int) -> list[str]:
    """Names in [`metrics_of_sums`]."""
    sums, counts = np.zeros((len(losses), num_draft_positions)), np.zeros((4, num_draft_positions))
    return list(metrics_of_sums(sums, counts, losses))


def evaluation_metrics(
    losses: dict[str, float], position_weights: Sequence[float] | None = None
) -> Callable[[EvalPrediction], dict[str, float]]:
    """A `compute_metrics` for [`~transformers.Trainer`]: [`metrics_of_sums`] and `loss`, which is their weighted sum.

    All are means over the rows that count, whatever the batches and processes that they came in.

    Args:
        losses: names and weights, as in training.
        position_weights: of each draft position; all 1 if None.
    """

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        loss_sums, counts = summed_predictions(prediction.predictions)
        by_name = np.array(list(losses.values())) @ loss_sums  # [positions]
        by_position = by_name if position_weights is None else by_name * np.array(position_weights)
        loss = by_position.sum() / max(counts[0].max(), 1)
        return {"loss": float(loss), **metrics_of_sums(loss_sums, counts, list(losses))}

    return compute


def summed_predictions(predictions: Any) -> tuple[np.ndarray, np.ndarray]:
    """Loss sums [losses, positions] and counts [4, positions] over all samples.

    Args:
        predictions: arrays [samples, losses, positions] and [samples, 4, positions], or a list of such pairs, one a
            batch (`eval_do_concat_batches=False`).
    """
    batches = predictions if isinstance(predictions, list) else [predictions]
    return tuple(
        sum(np.asarray(part, dtype=np.float64).sum(axis=0) for part in parts) for parts in zip(*batches, strict=True)
    )


class PositionSums:
    """Loss sums and counts of the steps since the last log, kept on their device: adding waits for nothing."""

    def __init__(self):
        self._sums: tuple[torch.Tensor, torch.Tensor] | None = None

    def add(self, loss_sums: torch.Tensor, counts: torch.Tensor) -> None:
        """Adds a batch.

        Args:
            loss_sums: float32 [batch, losses, positions].
            counts: int64 [batch, 4, positions].
        """
        batch = loss_sums.detach().sum(0), counts.detach().sum(0)
        self._sums = batch if self._sums is None else tuple(a + b for a, b in zip(self._sums, batch, strict=True))

    def take(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> tuple[np.ndarray, np.ndarray] | None:
        """Sums [losses, positions] and counts [4, positions] over all processes; begins anew. None if there are none.

        Args:
            reduce: adds a tensor up over processes.
        """
        if self._sums is None:
            return None
        loss_sums, counts = (reduce(part).cpu().numpy() for part in self._sums)
        self._sums = None
        return loss_sums, counts


@dataclass(frozen=True)
class BoundaryDrop:
    """pos-acc that falls where one specialist hands over to the next.

    Args:
        position: the first draft position (1-based) of a specialist.
        before, after: pos-acc of the position before, and of this one.
        typical: median change between neighbouring positions elsewhere.
    """

    position: int
    before: float
    after: float
    typical: float

    def __str__(self) -> str:
        return (
            f"pos-acc falls from {self.before:.2f} at draft position {self.position - 1} to {self.after:.2f} at "
            f"{self.position}, where the next specialist begins (other neighbours differ by {self.typical:.2f}). It "
            f"does not read well what the one before writes. Train on while the losses of position {self.position} "
            "fall; start all specialists from one trained layer (`from_eagle`); or give each of them more positions."
        )


def boundary_drops(counts: np.ndarray, positions_per_specialist: int) -> list[BoundaryDrop]:
    """Sharp drops of pos-acc at a specialist's first position: it does not read what its predecessor writes (PosS).

    A drop is sharp if it is above 0.1, and above twice the median absolute change between the other neighbouring
    positions, at which no other specialist takes over (with n = 1 every position is a first one: then those at the
    other boundaries). Positions that fewer than 100 simulated rounds reached are left out: their rates are noise. So
    are those that fewer than 5 in 100 rounds reached, as when training begins: each learns at a time of its own.
    In the paper's figure the largest drop at a boundary is 0.08, from position 1 to 2 of PosS-1.

    Args:
        counts: [4, positions], see [`position_metrics`].
        positions_per_specialist: n.
    """
    _, _, reached, accepted = np.asarray(counts, dtype=np.float64)
    fewest = max(_FEWEST_ROUNDS, _FEWEST_ARRIVING * reached[0])
    rates = [hit / total if total >= fewest else None for hit, total in zip(accepted, reached, strict=True)]
    changes = {  # by the later position of a pair
        k: rates[k - 2] - rates[k - 1]
        for k in range(2, len(rates) + 1)
        if rates[k - 2] is not None and rates[k - 1] is not None
    }
    boundaries = {k for k in changes if (k - 1) % positions_per_specialist == 0}
    drops = []
    for k in sorted(boundaries):
        others = [abs(change) for other, change in changes.items() if other not in boundaries]
        others = others or [abs(changes[other]) for other in boundaries - {k}]
        typical = statistics.median(others) if others else 0.0
        if changes[k] > max(_DROP, _TIMES_TYPICAL * typical):
            drops.append(BoundaryDrop(k, rates[k - 2], rates[k - 1], typical))
    return drops


def fold_positions(logs: dict[str, float]) -> dict[str, float | str]:
    """Logs for people: `pos_acc_1`, `pos_acc_2`... become one entry `pos_acc` with the values side by side."""
    folded: dict[str, float | str] = {}
    for name, value in logs.items():
        stem, _, position = name.rpartition("_")
        if stem and position.isdecimal() and isinstance(value, float):
            folded[stem] = f"{folded[stem]} {value:.3g}" if stem in folded else f"{value:.3g}"
        else:
            folded[name] = value
    return folded
