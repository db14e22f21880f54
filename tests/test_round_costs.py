"""Prices of passes: curves against brute force, measurements against a clock that is set by hand."""

import gc
import math
import random
import weakref

import pytest

from hf_poss import round_costs
from hf_poss.round_costs import (
    CostCurve,
    CostKey,
    RoundCosts,
    context_bucket,
    convex,
    known_costs,
    measure_curve,
    non_decreasing,
)


# ---- Curves ----


def test_the_convex_curve_is_the_highest_convex_one_below():
    """From two tokens on, against brute force: the lowest chord over every size. One token keeps its time."""
    source = random.Random(1)
    for _ in range(50):
        sizes = sorted(source.sample(range(2, 60), source.randint(1, 8)))
        sizes = [1, *sizes] if source.random() < 0.7 else sizes
        curve = CostCurve(sizes, [source.uniform(1, 2) + size / 10 for size in sizes])
        found = convex(curve)
        rest = [(size, seconds) for size, seconds in zip(curve.sizes, curve.seconds, strict=True) if size > 1]
        for size, seconds in rest:
            chords = [
                left + (right - left) * (size - low) / (high - low)
                for low, left in rest
                for high, right in rest
                if low < size < high
            ]
            assert found(size) == pytest.approx(min([seconds, *chords]))
        if sizes[0] == 1:
            assert found(1) == curve.seconds[0]


def test_a_bump_does_not_keep_rounds_at_the_size_before_it():
    curve = convex(CostCurve([1, 2, 4, 8, 16], [8.0, 10.0, 10.1, 11.5, 11.6]))
    assert curve(8) == pytest.approx(10.1 + (11.6 - 10.1) * 4 / 12)
    assert curve(1) == 8.0


def test_nearest_non_decreasing_sequence():
    """Against the min-max formula: max over starts of min over ends of the mean in between."""
    source = random.Random(0)
    for _ in range(50):
        values = [source.uniform(0, 5) for _ in range(source.randint(1, 12))]
        weights = [source.uniform(0.1, 3) for _ in values]

        def mean(start, end, values=values, weights=weights):
            parts = list(zip(values, weights, strict=True))[start : end + 1]
            return sum(value * weight for value, weight in parts) / sum(weight for _, weight in parts)

        last = len(values) - 1
        expected = [
            max(min(mean(start, end) for end in range(index, last + 1)) for start in range(index + 1))
            for index in range(last + 1)
        ]
        assert non_decreasing(values, weights) == pytest.approx(expected)


def test_curve_is_linear_between_and_beyond_sizes():
    curve = CostCurve([1, 2, 10, 20], [1.0, 1.5, 1.5, 2.5])

    assert [curve(size) for size in (1, 2, 6, 10, 15, 20, 30)] == pytest.approx([1.0, 1.5, 1.5, 1.5, 2.0, 2.5, 3.5])


def test_curve_never_falls():
    curve = CostCurve([2, 4, 8, 16], [1.0, 3.0, 2.0, 4.0])

    assert [curve(size) for size in (1, 2, 4, 8, 16)] == pytest.approx([1.0, 1.0, 2.5, 2.5, 4.0])


@pytest.mark.parametrize("seconds", [[1.0, 2.0, 2.0], [1.0, 2.5, 1.5], [2.0, 2.0, 2.0]])
def test_no_size_is_free_beyond_the_last(seconds):
    curve = CostCurve([1, 10, 20], seconds)

    assert curve(40) > curve(20)


@pytest.mark.parametrize(
    "sizes, seconds",
    [([], []), ([1, 2], [1.0]), ([2, 1], [1.0, 2.0]), ([1, 1], [1.0, 2.0]), ([0, 1], [1.0, 2.0])],
)
def test_curves_without_sizes_and_times_are_refused(sizes, seconds):
    with pytest.raises(ValueError, match="expected increasing sizes"):
        CostCurve(sizes, seconds)


@pytest.mark.parametrize("second", [-1.0, math.nan, math.inf])
def test_impossible_times_are_refused(second):
    with pytest.raises(ValueError, match="finite seconds"):
        CostCurve([1, 2], [1.0, second])
    for price in ("plain", "draft_pass", "context", "overhead"):
        with pytest.raises(ValueError, match=f"`{price}`"):
            RoundCosts(**{"plain": 1.0, "verification": CostCurve([1], [1.0]), "draft_pass": 0.1, price: second})


def test_price_of_a_round():
    curve = CostCurve([1, 11], [1.0, 2.0])

    assert RoundCosts(0.9, curve, 0.1, context=0.02, overhead=0.03).of_round(4, 6) == pytest.approx(1.5 + 0.4 + 0.05)
    assert RoundCosts(0.9, curve, [0.1, 0.2]).of_round(4, 6) == pytest.approx(1.5 + 0.1 + 3 * 0.2)
    assert RoundCosts(0.9, curve, 0.1, context=0.02, overhead=0.03).of_round(0, 1) == 0.9


# ---- Measuring ----


class Device:
    """Passes that take a given time, which the clock shows only once they were waited for."""

    def __init__(self, monkeypatch, seconds):
        self.seconds, self.now, self.queued, self.sizes = seconds, 0.0, 0.0, []
        monkeypatch.setattr(round_costs.time, "perf_counter", lambda: self.now)

    def run(self, size: int) -> None:
        self.queued += self.seconds(size, self.sizes.count(size))
        self.sizes.append(size)

    def synchronize(self) -> None:
        self.now, self.queued = self.now + self.queued, 0.0


def test_measures_the_usual_time(monkeypatch):
    """Neither a first run, which compiles, nor a disturbed one counts."""

    def seconds(size, run):
        return 0.001 * size * (1000 if run == 0 else 20 if run == 2 else 1)

    device = Device(monkeypatch, seconds)

    curve = measure_curve(device.run, [8, 1, 4], device.synchronize, repeats=5)

    assert curve.sizes == [1, 4, 8]
    assert curve.seconds == pytest.approx([0.001, 0.004, 0.008])
    assert all(device.sizes.count(size) == 6 for size in (1, 4, 8))


def test_sizes_are_measured_in_turn(monkeypatch):
    """A machine that gets slower all the time does so for all sizes: those that take the same seem to."""
    device = Device(monkeypatch, None)
    device.seconds = lambda size, run: 0.001 * (1 + device.now)

    curve = measure_curve(device.run, [1, 2, 4], device.synchronize, repeats=9)

    assert max(curve.seconds) < 1.01 * min(curve.seconds)
    turns = [device.sizes[start : start + 3] for start in range(6, len(device.sizes), 3)]
    assert all(sorted(turn) == [1, 2, 4] for turn in turns) and turns[0] != turns[1]


@pytest.mark.parametrize("second, passes", [(1.0, 4), (0.2, 10), (0.001, 45)])
def test_slow_machines_measure_less(monkeypatch, second, passes):
    device = Device(monkeypatch, lambda size, run: second * (1 + 0.05 * size))

    curve = measure_curve(device.run, [1, 2, 4, 8, 16, 32, 64, 128], device.synchronize, repeats=5)

    assert 4 <= len(device.sizes) <= passes + 3
    assert max(device.sizes) <= 16 or second < 1
    for size in curve.sizes:
        assert curve(size) == pytest.approx(second * (1 + 0.05 * size))
    assert device.now < 6.5


@pytest.mark.parametrize("sizes, repeats", [([], 3), ([0, 2], 3), ([1, 2], 0)])
def test_nothing_to_measure_is_refused(sizes, repeats):
    with pytest.raises(ValueError, match="sizes and repeats of 1 or more"):
        measure_curve(lambda size: None, sizes, lambda: None, repeats=repeats)


# ---- What is known ----


class Target:
    pass


def test_known_costs_live_as_long_as_the_target():
    target, other = Target(), Target()
    key = CostKey("cpu", "float32", rows=1, context=1024, mode="eager")
    costs = RoundCosts(1.0, CostCurve([1], [1.0]), 0.1)
    known_costs(target)[key] = costs

    assert known_costs(target)[CostKey("cpu", "float32", 1, 1024, "eager")] is costs
    assert not known_costs(other)
    kept = weakref.ref(costs)
    del costs, target
    gc.collect()
    assert kept() is None


def test_context_buckets():
    buckets = {tokens: context_bucket(tokens) for tokens in (0, 1, 256, 257, 1000, 1024, 1025, 32768)}

    assert buckets == {0: 256, 1: 256, 256: 256, 257: 512, 1000: 1024, 1024: 1024, 1025: 2048, 32768: 32768}
