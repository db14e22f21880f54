"""Measures against sums by hand and against simulated rounds."""

import random

import pytest

from hf_poss.configuration_poss import specialist_index
from hf_poss.measures import (
    DriftSums,
    added,
    by_specialist,
    continuation,
    expected_tau,
    mean_acceptance_length,
    mean_acceptance_length_macro,
    node_acceptance,
    position_acceptance,
    round_cost,
    speed_up,
)


def test_micro_weighs_by_rounds_and_macro_by_text():
    tokens, rounds = [30, 4], [10, 4]
    assert mean_acceptance_length(sum(tokens), sum(rounds)) == pytest.approx(34 / 14)
    assert mean_acceptance_length_macro(tokens, rounds) == pytest.approx((3.0 + 1.0) / 2)


def test_texts_without_a_round_are_left_out_of_the_macro_average():
    assert mean_acceptance_length_macro([30, 0], [10, 0]) == pytest.approx(3.0)


def test_pos_acc_is_of_what_was_reached_and_node_acceptance_of_what_was_drafted():
    # Ten chains of three: seven pass position 1, three of these position 2, none position 3.
    drafted, reached, accepted = [10, 10, 10], [10, 7, 3], [7, 3]
    assert position_acceptance(accepted, reached) == pytest.approx([0.7, 3 / 7, 0.0])
    assert node_acceptance(accepted, drafted) == pytest.approx([0.7, 0.3, 0.0])


def test_continuation_makes_the_rounds_own_tau_whatever_the_tree():
    """Twenty rounds whose trees have position 2 behind the likelier tokens only: pos-acc leaves the others out."""
    rounds, reached, accepted = 20, [20, 8, 6], [16, 6, 3]
    assert continuation(accepted, rounds) == pytest.approx([16 / 20, 6 / 16, 3 / 6])
    assert expected_tau(continuation(accepted, rounds)) == pytest.approx(1 + (16 + 6 + 3) / 20)
    assert expected_tau(position_acceptance(accepted, reached)) > 1 + (16 + 6 + 3) / 20
    assert continuation([4, 0, 0], 10) == [0.4, 0.0]  # nothing is known of what follows
    assert continuation([], 10) == [0.0] and continuation([], 0) == []


def test_more_accepted_positions_than_were_reached_are_refused():
    with pytest.raises(ValueError):
        position_acceptance([1, 1], [1])


@pytest.mark.parametrize(("n", "specialists"), [(1, 6), (2, 3), (3, 2), (4, 2)])
def test_counts_go_to_the_specialist_that_serves_the_position(n, specialists):
    counts = [2**position for position in range(8)]  # sums tell who took part
    expected = [
        sum(count for k, count in enumerate(counts, start=1) if specialist_index(k, n, specialists) == index)
        for index in range(specialists)
    ]
    assert by_specialist(counts, n, specialists) == expected
    assert sum(expected) == sum(counts)


def test_expected_tau_is_that_of_leviathan_at_one_rate():
    rate, depth = 0.8, 5
    assert expected_tau([rate] * depth) == pytest.approx((1 - rate ** (depth + 1)) / (1 - rate))
    assert expected_tau([]) == 1.0
    assert expected_tau([0.0, 1.0]) == 1.0


def test_expected_tau_is_the_mean_of_simulated_rounds():
    rates, rounds = [0.9, 0.6, 0.8], 40_000
    draw = random.Random(0)
    tokens = 0
    for _ in range(rounds):
        tokens += 1
        for rate in rates:
            if draw.random() >= rate:
                break
            tokens += 1
    # The standard error of the mean is below 0.0064: a true mean differs by more than 5 of them once in a million.
    assert mean_acceptance_length(tokens, rounds) == pytest.approx(expected_tau(rates), abs=0.032)


def test_speed_up_is_tau_over_rho_where_times_are_of_decoding():
    tokens, rounds, seconds = 300, 100, 2.0
    plain_tokens, plain_seconds = 150, 1.5
    tau, rho = mean_acceptance_length(tokens, rounds), round_cost(seconds, rounds, plain_seconds, plain_tokens)
    assert (tau, rho) == (3.0, pytest.approx(2.0))
    assert speed_up(tokens, seconds, plain_tokens, plain_seconds) == pytest.approx(tau / rho)


def test_nothing_measured_is_zero():
    assert mean_acceptance_length(0, 0) == mean_acceptance_length_macro([], []) == 0.0
    assert position_acceptance([], [0, 0]) == [0.0, 0.0]
    assert speed_up(0, 0.0, 10, 1.0) == speed_up(10, 1.0, 0, 0.0) == round_cost(0.0, 0, 1.0, 5) == 0.0


def test_counts_of_unlike_length_add_up():
    assert added([1, 2, 3], [10]) == added([10], [1, 2, 3]) == [11, 2, 3]


def test_sums_of_drift_add_before_they_are_divided():
    one = DriftSums([1, 1], [1.0, 0.5], [1.0, 2.0])
    other = DriftSums([3], [1.5], [6.0])
    both = one + other
    assert both.mean_cosine == pytest.approx([2.5 / 4, 0.5])
    assert both.mean_norm_ratio == pytest.approx([7.0 / 4, 2.0])
    assert one == DriftSums([1, 1], [1.0, 0.5], [1.0, 2.0])  # adding changes neither
