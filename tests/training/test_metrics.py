"""Metrics of counts and sums."""

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from hf_poss.training.metrics import (
    PositionSums,
    boundary_drops,
    evaluation_metrics,
    fold_positions,
    metric_names,
    metrics_of_sums,
    position_metrics,
    summed_predictions,
)


# rows, hits, reached, accepted of three positions
COUNTS = np.array([[10, 10, 10], [8, 6, 5], [10, 8, 4], [8, 4, 1]])


def counts_of(rates: list[float], rounds: int = 1000) -> np.ndarray:
    """Counts in which every position was reached as often and accepted at the given rate."""
    reached = np.full(len(rates), rounds)
    accepted = np.array([round(rate * rounds) for rate in rates])
    return np.stack([reached, accepted, reached, accepted])


def test_rates_and_tau():
    metrics = position_metrics(COUNTS)
    assert [metrics[f"accuracy_{k}"] for k in (1, 2, 3)] == pytest.approx([0.8, 0.6, 0.5])
    assert [metrics[f"pos_acc_{k}"] for k in (1, 2, 3)] == pytest.approx([0.8, 0.5, 0.25])
    assert metrics["tau"] == pytest.approx(1 + 0.8 + 0.8 * 0.5 + 0.8 * 0.5 * 0.25)


def test_nothing_counted_is_zero():
    metrics = position_metrics(np.zeros((4, 2)))
    assert metrics == {"accuracy_1": 0, "accuracy_2": 0, "pos_acc_1": 0, "pos_acc_2": 0, "tau": 1}


def test_losses_are_means_over_rows():
    metrics = metrics_of_sums(np.array([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]), COUNTS, ["feature", "token"])
    assert [metrics[f"loss_feature_{k}"] for k in (1, 2, 3)] == pytest.approx([0.1, 0.2, 0.3])
    assert [metrics[f"loss_token_{k}"] for k in (1, 2, 3)] == pytest.approx([1.0, 2.0, 3.0])


def test_evaluation_weighs_rows_not_samples():
    """A long sample and a short one: sums of both, over the rows of both."""
    sums = np.array([[[9.0, 18.0]], [[1.0, 4.0]]])  # [samples, losses, positions]
    counts = np.stack([counts_of([1.0, 0.5], 9), counts_of([0.0, 0.0], 1)])
    compute = evaluation_metrics({"token": 2.0}, [1.0, 0.5])
    metrics = compute(EvalPrediction(predictions=(sums, counts), label_ids=None))
    assert metrics["loss_token_1"] == pytest.approx(1.0)
    assert metrics["loss_token_2"] == pytest.approx(2.2)
    assert metrics["loss"] == pytest.approx(2.0 * (1.0 * 1.0 + 0.5 * 2.2))
    assert metrics["pos_acc_1"] == pytest.approx(0.9)


def test_batches_may_stay_apart():
    """`eval_do_concat_batches=False`: batches of 2 samples and of 1."""
    sums, counts = np.random.default_rng(0).random((3, 2, 3)), np.arange(36).reshape(3, 4, 3)
    found = summed_predictions([(sums[:2], counts[:2]), (sums[2:], counts[2:])])
    for part, expected in zip(found, (sums.sum(0), counts.sum(0)), strict=True):
        np.testing.assert_allclose(part, expected)


def test_names_are_those_of_the_metrics():
    metrics = metrics_of_sums(np.ones((2, 3)), COUNTS, ["feature", "kl"])
    assert metric_names(["feature", "kl"], 3) == list(metrics)


def test_sums_are_taken_once_and_over_processes():
    sums = PositionSums()
    assert sums.take(lambda tensor: tensor) is None
    for batch in (1, 3):
        sums.add(torch.ones(batch, 2, 3), torch.full((batch, 4, 3), 5))
    loss_sums, counts = sums.take(lambda tensor: 2 * tensor)  # as two equal processes would add up
    assert loss_sums.shape == (2, 3) and (loss_sums == 2 * 4).all()
    assert counts.shape == (4, 3) and (counts == 2 * 4 * 5).all()
    assert sums.take(lambda tensor: tensor) is None


@pytest.mark.parametrize(
    ("rates", "span", "positions"),
    [
        # The paper's figure, PosS-2 and PosS-1, and HASS, whose one layer has no boundary.
        ([0.921, 0.830, 0.769, 0.724, 0.734, 0.742, 0.736, 0.759], 2, []),
        ([0.918, 0.836, 0.758, 0.730, 0.739, 0.745, 0.739, 0.752], 1, []),
        ([0.916, 0.6, 0.3], 3, []),
        # A specialist that does not read its predecessor, at its first position only.
        ([0.92, 0.83, 0.55, 0.54, 0.53, 0.52], 2, [3]),
        ([0.92, 0.85, 0.80, 0.78, 0.50, 0.30], 2, [5]),
        # The same fall inside of a specialist is another matter, and makes the one at the boundary usual.
        ([0.92, 0.62, 0.42, 0.12], 2, []),
        # With n = 1 the other boundaries are the measure.
        ([0.92, 0.85, 0.55, 0.50], 1, [3]),
        ([0.9, 0.7], 1, [2]),
    ],
)
def test_sharp_drops_at_boundaries(rates, span, positions):
    assert [drop.position for drop in boundary_drops(counts_of(rates), span)] == positions


def test_few_rounds_say_nothing():
    rates = [0.92, 0.83, 0.55, 0.54]
    assert boundary_drops(counts_of(rates, rounds=99), 2) == []
    (drop,) = boundary_drops(counts_of(rates, rounds=100), 2)
    assert (drop.before, drop.after) == pytest.approx((0.83, 0.55))
    assert "position 2" in str(drop) and "0.55" in str(drop)


@pytest.mark.parametrize(("first", "positions"), [(0.1, []), (0.5, [3])])
def test_positions_that_rounds_hardly_reach_say_nothing(first, positions):
    """As when training begins: the second specialist has learned nothing yet, and 4 in 100 rounds come there."""
    reached = [100_000 * share for share in (1, first, 0.4 * first)]
    counts = np.array([reached, reached, reached, [*reached[1:], 0]])
    assert [drop.position for drop in boundary_drops(counts, 2)] == positions


def test_logs_for_people():
    logs = {"eval_loss": 1.0, "eval_pos_acc_1": 0.75, "eval_pos_acc_2": 0.5, "eval_tau": 2.125, "epoch": 1}
    assert fold_positions(logs) == {"eval_loss": 1.0, "eval_pos_acc": "0.75 0.5", "eval_tau": 2.125, "epoch": 1}
