"""What pays, against brute force over all that could be done."""

import pytest

from hf_poss.evaluation.break_even import best_depth, break_even_batch, paying_gain, rates_to, speed_up_by_depth
from hf_poss.round_costs import CostCurve, RoundCosts


RATES = [0.9, 0.8, 0.7, 0.6]
# Two nodes cost what one costs, then each node 0.05 more.
COSTS = RoundCosts(
    plain=1.0,
    verification=CostCurve([1, 2, 10], [1.0, 1.0, 1.4]),
    draft_pass=[0.2, 0.1, 0.1, 0.1],
    context=0.05,
    overhead=0.05,
)


def tau_of(rates: list[float]) -> float:
    """Tokens a round, over every number of accepted tokens and its probability."""
    total, alive = 0.0, 1.0
    for accepted, rate in enumerate(rates):
        total += (accepted + 1) * alive * (1 - rate)
        alive *= rate
    return total + (len(rates) + 1) * alive


def test_rates_go_on_below_the_last_position_that_has_one():
    assert rates_to([0.5, 0.4], 4) == [0.5, 0.4, 0.4, 0.4]
    assert rates_to([0.5, 0.4, 0.3], 2) == [0.5, 0.4]


@pytest.mark.parametrize("rates", [[], [0.5, 1.1], [-0.1]])
def test_impossible_rates_are_refused(rates):
    with pytest.raises(ValueError, match="from 0 to 1"):
        rates_to(rates, 3)


def test_speed_up_by_depth_is_tokens_over_time():
    by_depth = speed_up_by_depth(COSTS, RATES, 4, nodes=lambda depth: depth + 1)
    assert by_depth[0] == 1.0  # plain decoding
    times = [
        0.05 + 0.05 + 0.2 + 0.1 * (depth - 1) + (1.0 if depth == 1 else 1.0 + 0.05 * (depth - 1))
        for depth in range(1, 5)
    ]
    expected = [tau_of(RATES[:depth]) / seconds for depth, seconds in enumerate(times, start=1)]
    assert by_depth[1:] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("rates", "deepest"),
    [
        ([0.95, 0.95, 0.95, 0.95], 4),
        ([0.9, 0.8, 0.01, 0.9], 2),  # behind a position that is next to never accepted none can pay
        ([0.2, 0.2, 0.2, 0.2], 0),
    ],
)
def test_the_best_depth_is_where_one_more_position_does_not_pay(rates, deepest):
    by_depth = speed_up_by_depth(COSTS, rates, 4, nodes=lambda depth: depth + 1)
    assert best_depth(by_depth) == deepest
    # The criterion of the margin: what the position adds to tokens, over what it adds to the time.
    for depth in range(1, 4):
        alive = 1.0
        for rate in rates[: depth + 1]:
            alive *= rate
        seconds = [COSTS.of_round(deep, deep + 1) for deep in (depth, depth + 1)]
        pays = alive / (seconds[1] - seconds[0]) > tau_of(rates[:depth]) / seconds[0]
        assert pays == (by_depth[depth + 1] > by_depth[depth])


@pytest.mark.parametrize("first", [1, 3, 4])
@pytest.mark.parametrize("extra", [0.005, 0.03])
def test_the_paying_gain_is_the_least_of_a_fine_grid_that_makes_up_for_the_time(first, extra):
    gain = paying_gain(RATES, 4, first, round_seconds=2.0, extra_seconds=extra)
    grid = (step / 20_000 for step in range(20_001))
    rate = tau_of(RATES) / 2.0
    least = next(
        g
        for g in grid
        if tau_of([*RATES[: first - 1], *(min(a + g, 1.0) for a in RATES[first - 1 :])]) / (2 + extra) >= rate
    )
    assert gain == pytest.approx(least, abs=1e-4) and gain > 0


def test_a_specialist_that_costs_nothing_pays_at_once_and_one_that_costs_too_much_never():
    assert paying_gain(RATES, 4, 3, 1.0, 0.0) == 0.0
    assert paying_gain(RATES, 4, 3, 1.0, -0.1) == 0.0
    assert paying_gain(RATES, 4, 4, 1.0, 1.0) is None


@pytest.mark.parametrize(("first", "seconds"), [(0, 1.0), (5, 1.0), (3, 0.0)])
def test_a_specialist_of_no_position_is_refused(first, seconds):
    with pytest.raises(ValueError, match="expected one of the positions"):
        paying_gain(RATES, 4, first, seconds, 0.1)


def test_drafting_stops_paying_where_rounds_outgrow_steps():
    rows, plain, rounds, tau = [1, 4, 8], [1.0, 1.3, 1.7], [1.5, 3.0, 6.0], 2.0

    def line(values, batch):
        low, high = ((0, 1), (1, 2))[batch > 4]
        share = (batch - rows[low]) / (rows[high] - rows[low])
        return values[low] + share * (values[high] - values[low])

    expected = next(batch for batch in range(1, 9) if tau * line(plain, batch) <= line(rounds, batch))
    assert break_even_batch(rows, plain, rounds, tau) == expected
    assert 1 < expected < 8
    assert break_even_batch(rows, plain, rounds, tau=4.0) is None
    assert break_even_batch(rows, plain, rounds, tau=1.2) == 1


def test_batches_without_times_are_refused():
    with pytest.raises(ValueError, match="increasing"):
        break_even_batch([4, 1], [1.0, 1.0], [1.0, 1.0], 2.0)
    with pytest.raises(ValueError, match="a time of each"):
        break_even_batch([1, 4], [1.0], [1.0, 1.0], 2.0)
