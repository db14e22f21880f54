"""What is learned about acceptance, against the probabilities that it was drawn with."""

import itertools
import math
import random

import pytest

from hf_poss.calibration import BINS_PER_UNIT, Acceptance, Calibration, Mood


def teach(calibration: Calibration, rounds: int, truth, told=lambda source: source.uniform(0.02, 1.0), seed=0) -> None:
    """Rounds with two nodes at each depth, whose probabilities are told and whose fate is drawn from `truth(p, depth,
    leads)`."""
    source = random.Random(seed)
    for _ in range(rounds):
        scores, depths, fates = [], [], []
        for depth in range(1, calibration.max_depth + 1):
            for leads, probability in zip((True, False), sorted((told(source), told(source)))[::-1], strict=True):
                scores.append(math.log(probability))
                depths.append(depth)
                fates.append(source.random() < truth(probability, depth, leads))
        calibration.observe([scores], [depths], [fates])


def test_without_data_the_drafter_is_believed():
    calibration, width = Calibration(4), 1 / BINS_PER_UNIT

    for probability in (1.0, 0.9, 0.5, 0.1, 0.001):
        for depth in (1, 4, 9):
            believed = calibration.calibrated(probability, depth)
            assert believed == pytest.approx(probability, rel=width)


@pytest.mark.parametrize("power", [3.0, 1.0, 0.4])
def test_over_and_underconfidence(power):
    """Of 600 rounds, some 60 nodes lie near each of these: three standard errors are 0.2 at worst, less what the law
    smooths."""
    calibration = Calibration(2)

    teach(calibration, 600, lambda probability, depth, leads: probability**power)

    for probability, leads in ((0.5, True), (0.8, True), (0.2, False), (0.5, False)):
        assert calibration.calibrated(probability, 1, leads) == pytest.approx(probability**power, abs=0.12)


def test_a_few_rounds_tell_much():
    """Two numbers are learned before bins are."""
    calibration = Calibration(2)

    teach(calibration, 25, lambda probability, depth, leads: probability**4)

    assert calibration.calibrated(0.7, 1, leads=True) < 0.45


def test_meaningless_probabilities_leave_the_rates_of_depths():
    calibration, rates = Calibration(4), {1: 0.8, 2: 0.6, 3: 0.3, 4: 0.2}

    teach(
        calibration,
        600,
        lambda probability, depth, leads: rates[depth] * (1 if leads else 0.1),
        told=lambda source: 0.01 * source.uniform(0.9, 1.1),
    )

    for depth, rate in rates.items():
        assert calibration.calibrated(0.01, depth, leads=True) == pytest.approx(rate, abs=0.08)
        assert calibration.calibrated(0.01, depth) == pytest.approx(0.1 * rate, abs=0.05)


def test_reaches_to_depths_that_were_not_seen():
    """Each step is taken to be like those before: 0.8 of a path goes on, whatever is told of it."""
    calibration, source = Calibration(4), random.Random(0)
    for _ in range(400):
        alive = [source.random() < 0.8, source.random() < 0.8]
        scores = [math.log(0.03), 2 * math.log(0.03)]
        calibration.observe([scores], [[1, 2]], [[alive[0], all(alive)]])

    assert calibration.calibrated(0.03**3, 3, leads=True) == pytest.approx(0.8**3, abs=0.1)


@pytest.mark.parametrize("seed", range(5))
def test_monotone_and_within_bounds(seed):
    source = random.Random(seed)
    rates = {key: source.random() for key in itertools.product(range(1, 4), (True, False))}
    calibration = Calibration(3)

    teach(calibration, 100, lambda probability, depth, leads: rates[depth, leads] * source.random(), seed=seed)

    for depth, leads in rates:
        values = [calibration.calibrated(number / 1000, depth, leads) for number in range(1001)]
        assert values == sorted(values)
        assert 0 <= values[0] and values[-1] <= 1


def test_old_rounds_are_forgotten():
    calibration = Calibration(1, window=100)

    teach(calibration, 1000, lambda probability, depth, leads: 0.9)
    teach(calibration, 500, lambda probability, depth, leads: 0.1)

    assert calibration.calibrated(0.5, 1, leads=True) == pytest.approx(0.1, abs=0.1)


def test_weights_stay_finite():
    calibration = Calibration(1, window=2)

    teach(calibration, 2000, lambda probability, depth, leads: 0.5)

    assert 0 < calibration.calibrated(0.5, 1, leads=True) < 1


def test_nodes_that_were_not_verified_do_not_count():
    taught, other = Calibration(2), Calibration(2)
    for _ in range(50):
        taught.observe([[-0.1, -0.2, -3.0]], [[1, 2, 1]], [[True, False, None]])
        other.observe([[-0.1, -0.2]], [[1, 2]], [[True, False]])

    assert taught.leaders == other.leaders and taught.others == other.others


def test_scores_that_say_nothing():
    calibration = Calibration(1)
    calibration.observe([[-math.inf, math.nan]], [[1, 1]], [[False, False]])

    assert calibration.calibrated(0.0, 1) < 0.001


def test_expected_acceptance_of_a_tree():
    """The leader of each depth by its own table; and of the nodes of one depth, one is accepted at most."""
    acceptance = Acceptance(
        leaders=[[0.9] * 65, [0.8] * 65, [0.3] * 65], others=[[0.0] * 65, [0.15] * 65, [0.05] * 65], scales=[1, 1, 2]
    )

    expected = acceptance.expected([-0.1, -0.3, -0.5, -0.6, -9.0], [1, 2, 1, 1, 2])

    assert expected == pytest.approx([0.8, 0.6, 0.15, 0.05, 0.1])


# ---- Moods ----


def steps(mood: Mood, rounds: int, rate: float, source: random.Random) -> None:
    """Rounds whose steps were expected to be taken with probability 0.6, four at most."""
    for _ in range(rounds):
        hits = next((hits for hits in range(4) if source.random() >= rate), 4)
        mood.observe(hits, 0.6 * min(hits + 1, 4))


def test_moods_follow_passages():
    mood, source = Mood(), random.Random(0)
    for _ in range(20):
        steps(mood, 40, 0.9, source)
        easy = mood.factor
        steps(mood, 40, 0.2, source)
        hard = mood.factor

    assert easy > 1.2 and hard < 0.7


def test_no_mood_where_rounds_tell_nothing_of_the_next():
    mood, source = Mood(), random.Random(0)

    steps(mood, 2000, 0.6, source)

    assert mood.factor == pytest.approx(1.0, abs=0.1)
