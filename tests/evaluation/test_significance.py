"""Tests of differences: against scipy, against hand-worked cases, and by how often they err."""

import math

import numpy as np
import pytest
from scipy import stats

from hf_poss.evaluation.significance import (
    Interval,
    bootstrap_interval,
    bootstrap_ratio_interval,
    bootstrap_sums_interval,
    compare,
    corrected,
    effect_size,
    holm,
    mean_and_deviation,
    student_interval,
)


def by_question(values) -> dict[int, float]:
    return dict(enumerate(values))


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(3)
    first = generator.gamma(4, 0.5, 60)
    return first, first - generator.normal(0.1, 0.3, 60)


def test_the_t_test_is_scipys(pair):
    comparison = compare(*map(by_question, pair))
    assert comparison.p_value == pytest.approx(stats.ttest_rel(*pair).pvalue)
    assert comparison.difference == pytest.approx(np.mean(pair[0] - pair[1]))
    assert (comparison.n, comparison.left_out, comparison.family) == (60, 0, 1)


def test_the_interval_is_near_scipys_bca(pair):
    differences = pair[0] - pair[1]
    wanted = stats.bootstrap((differences,), np.mean, n_resamples=10_000, rng=np.random.default_rng(0))
    spread = differences.std() / math.sqrt(60)
    for found, expected in zip(bootstrap_interval(differences), wanted.confidence_interval, strict=True):
        assert abs(found - expected) < 0.1 * spread


def test_the_interval_of_a_ratio_is_near_scipys(pair):
    rounds = np.random.default_rng(1).integers(5, 40, 60)
    tokens = rounds * pair[0]
    wanted = stats.bootstrap(
        (tokens, rounds),
        lambda tokens, rounds, axis: tokens.sum(axis) / rounds.sum(axis),
        paired=True,
        n_resamples=10_000,
        rng=np.random.default_rng(0),
    )
    for found, expected in zip(bootstrap_ratio_interval(tokens, rounds), wanted.confidence_interval, strict=True):
        assert abs(found - expected) < 0.1 * wanted.standard_error


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Of skewed values, 95% intervals miss in 5% of 400 samples: 2% to 9% allows for chance and for n = 40."""
    generator = np.random.default_rng(0)
    misses = 0
    for _ in range(400):
        interval = bootstrap_interval(generator.gamma(2, 1, 40), resamples=1000)
        misses += not interval.low <= 2 <= interval.high
    assert 0.02 <= misses / 400 <= 0.09


def test_differences_of_few_seeds_hold_the_truth_as_often_as_they_say():
    """95% intervals over 5 seeds miss in 5% of 1,000 samples, give or take 2.1 points (three standard errors), where
    resampling would miss in more than 10%."""
    generator = np.random.default_rng(0)
    none = by_question([0.0] * 5)
    misses, resampled = 0, 0
    for _ in range(1000):
        differences = generator.normal(0.3, 1, 5)
        interval = compare(by_question(differences), none, resamples=500, unit="seeds").interval
        misses += not interval.low <= 0.3 <= interval.high
        interval = bootstrap_interval(differences, resamples=500)
        resampled += not interval.low <= 0.3 <= interval.high
    assert abs(misses / 1000 - 0.05) < 0.021
    assert resampled / 1000 > 0.1


@pytest.mark.parametrize(("n", "resampled"), [(2, False), (9, False), (10, True), (60, True)])
def test_few_pairs_are_not_resampled(pair, n, resampled):
    first, second = (values[:n] for values in pair)
    wanted = bootstrap_interval(first - second) if resampled else stats.ttest_rel(first, second).confidence_interval()
    assert compare(by_question(first), by_question(second)).interval == pytest.approx(tuple(wanted))


def test_students_interval_is_scipys(pair):
    wanted = stats.ttest_1samp(pair[0], 0.0).confidence_interval(0.9)
    assert student_interval(pair[0], level=0.9) == pytest.approx(tuple(wanted))
    assert student_interval([1.0]) is None


def test_false_alarms_are_as_rare_as_they_should_be():
    """Drafters that do not differ are called different in 5% at the most, here of 400 pairs with 3.3 points of chance
    (three standard errors)."""
    generator = np.random.default_rng(0)
    alarms = [
        compare(*(by_question(generator.gamma(2, 1, 25)) for _ in range(2)), resamples=1000).significant
        for _ in range(400)
    ]
    assert 0.01 <= np.mean(alarms) <= 0.05 + 0.033


def test_strata_keep_their_sizes():
    """Two sets without any spread within: resampled apart, their mean does not vary; together, it does."""
    columns = np.array([[1.0, 1.0]] * 10 + [[5.0, 1.0]] * 10)

    def mean(sums):
        return sums[..., 0] / sums[..., 1]

    assert bootstrap_sums_interval(columns, mean, strata=["a"] * 10 + ["b"] * 10) == (3.0, 3.0)
    low, high = bootstrap_sums_interval(columns, mean)
    assert low < 2.5 and high > 3.5


def test_resamples_without_a_value_are_left_out():
    numerators, denominators = [3.0, 0.0, 0.0], [1.0, 0.0, 0.0]  # only the first question has a round
    assert bootstrap_ratio_interval(numerators, denominators) == (3.0, 3.0)
    assert bootstrap_ratio_interval([0.0, 0.0], [0.0, 0.0]) is None


def test_the_same_seed_gives_the_same_interval(pair):
    assert bootstrap_interval(pair[0], seed=5) == bootstrap_interval(pair[0], seed=5)
    assert bootstrap_interval(pair[0], seed=5) != bootstrap_interval(pair[0], seed=6)


def test_a_higher_level_gives_a_wider_interval(pair):
    narrow, wide = bootstrap_interval(pair[0], level=0.8), bootstrap_interval(pair[0], level=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_effect_size_is_the_mean_in_standard_deviations():
    assert effect_size([1.0, 3.0]) == pytest.approx(2 / math.sqrt(2))
    assert effect_size([-1.0, 1.0]) == 0.0
    assert effect_size([0.0, 0.0, 0.0]) == 0.0
    assert effect_size([2.0, 2.0]) is None  # by infinitely many
    assert effect_size([2.0]) is None


@pytest.mark.parametrize(
    ("differences", "name"),
    [((0.9, 1.1), "large"), ((-0.4, 0.6), "negligible"), ((-1.0, 1.9), "small"), ((-1.2, 3.0), "small")],
)
def test_effects_have_cohens_names(differences, name):
    comparison = compare(by_question(differences), by_question([0.0] * 2))
    size = np.mean(differences) / np.std(differences, ddof=1)
    assert comparison.effect_size == pytest.approx(size)
    limits = {"negligible": (0, 0.2), "small": (0.2, 0.5), "large": (0.8, math.inf)}
    assert limits[name][0] <= size < limits[name][1] and comparison.effect_name == name


def test_holm_by_hand():
    """0.01 * 4, 0.02 * 3, 0.03 * 2 and 0.04 * 1: the last may not be below the one before."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_what_could_not_be_tested_does_not_count_for_holm():
    assert holm([None, 0.02, 0.5, None]) == [None, pytest.approx(0.04), 0.5, None]


def test_a_family_is_corrected_together(pair):
    sure = compare(by_question(pair[0] + 1), by_question(pair[1]))
    none = compare({0: 1.0}, {0: 2.0})
    alone = compare(*map(by_question, pair))
    found = corrected([sure, none, alone])
    assert [comparison.family for comparison in found] == [2, 2, 2]  # one of the three was no test
    assert found[0].p_adjusted == pytest.approx(2 * sure.p_value)
    assert found[2].p_adjusted == pytest.approx(alone.p_value)
    assert found[1].p_adjusted is None and not found[1].significant


def test_only_questions_that_both_have_are_compared(pair):
    first, second = map(by_question, pair)
    first["mine"], second["yours"], second["also yours"] = 1e6, 1e6, 1e6
    comparison = compare(first, second)
    assert (comparison.n, comparison.left_out) == (60, 3)
    assert comparison.p_value == compare(*map(by_question, pair)).p_value
    assert "3 that only one of them has left out" in str(comparison)


def test_values_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="speed-up is not a finite number"):
        compare({0: float("nan"), 1: 1.0}, {0: 1.0, 1: 1.0}, measure="speed-up")


def test_differences_that_are_all_zero_are_no_difference():
    same = by_question([1.5, 2.5, 3.5])
    comparison = compare(same, same)
    assert (comparison.p_value, comparison.p_bootstrap, comparison.effect_size) == (1.0, 1.0, 0.0)
    assert comparison.interval == Interval(0.0, 0.0) and not comparison.significant
    assert "not significantly different from B's: equal (" in str(comparison)


@pytest.mark.parametrize("n", [2, 5, 12])
def test_differences_that_are_all_the_same_are_tested_by_their_signs(n):
    """Of n signs, all alike by chance in 2 of 2^n cases; rounding does not count as spread."""
    comparison = compare(by_question([0.1 + 0.2 * k for k in range(n)]), by_question([0.2 * k for k in range(n)]))
    assert comparison.p_value == comparison.p_bootstrap == 2 / 2**n
    assert comparison.effect_size is None and comparison.effect_name == "undefined"
    assert comparison.significant == (2 / 2**n < 0.05)


def test_one_question_is_no_test():
    comparison = compare({"a": 2.0}, {"a": 1.5})
    assert comparison.interval is None and comparison.p_value is None and not comparison.significant
    assert str(comparison) == "A's tau is 0.5 above B's, with n = 1 questions; a test needs two or more."
    assert compare({}, {"a": 1.0}).n == 0
    assert "no questions in common" in str(compare({}, {"a": 1.0}))


def test_the_sentence_says_what_is_significant():
    generator = np.random.default_rng(0)
    base = generator.gamma(4, 0.5, 80)
    higher = base + 0.3 + generator.normal(0, 0.2, 80)
    names = ("PosS-2", "EAGLE")
    up = str(compare(by_question(higher), by_question(base), names=names))
    assert up.startswith("PosS-2's tau is 0.") and "above EAGLE's (95% interval 0." in up
    assert "p < 0.001" in up and "n = 80 questions" in up and "not significant" not in up
    down = compare(by_question(base), by_question(higher), names=names[::-1])
    assert "below PosS-2's (95% interval 0." in str(down)  # of how far below
    assert down.interval.high < 0
    chance = str(compare(by_question(base), by_question(base + generator.normal(0, 1, 80)), names=names))
    assert chance.startswith("PosS-2's tau is not significantly different from EAGLE's: ")


def test_both_tests_must_agree():
    """One outlier among few questions: the bootstrap, which takes the sample for the world, is too sure."""
    generator = np.random.default_rng(0)
    for _ in range(200):
        comparison = compare(by_question(generator.normal(0.6, 1, 6)), by_question([0.0] * 6), resamples=2000)
        if comparison.p_bootstrap < 0.05 < comparison.p_value:
            assert not comparison.significant
            return
    raise AssertionError("no sample where they disagree")


def test_a_comparison_is_plain_numbers(pair):
    content = compare(*map(by_question, pair)).to_dict()
    assert content["difference"] == content["mean_a"] - content["mean_b"]
    assert content["interval"][0] < content["difference"] < content["interval"][1]
    assert isinstance(content["significant"], bool) and content["sentence"].endswith("questions).")


def test_the_standard_deviation_is_of_a_sample():
    assert mean_and_deviation([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2)))
    assert mean_and_deviation([4.0]) == (4.0, None)
