"""What the passes of a round cost on a device: measured once, kept while the target lives."""

import math
import statistics
import threading
import time
import weakref
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


__all__ = [
    "CostCurve",
    "CostKey",
    "RoundCosts",
    "context_bucket",
    "convex",
    "known_costs",
    "measure_curve",
    "non_decreasing",
]

# Below this context, attention's share of a pass is too small to be worth a measurement of its own.
SMALLEST_BUCKET = 256


def non_decreasing(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The non-decreasing sequence that is nearest to `values` in weighted least squares (pool adjacent violators).

    Args:
        values: in their order.
        weights: of each, positive.
    """
    pools: list[tuple[float, float, int]] = []  # mean, weight, number of values
    for value, weight in zip(values, weights, strict=True):
        count = 1
        while pools and pools[-1][0] > value:
            before, its_weight, its_count = pools.pop()
            value = (before * its_weight + value * weight) / (its_weight + weight)
            weight += its_weight
            count += its_count
        pools.append((value, weight, count))
    return [value for value, _, count in pools for _ in range(count)]


class CostCurve:
    """Seconds of a pass by its tokens a row: linear between measured sizes, and never falling.

    More tokens cannot take less time, so what says otherwise is noise, and is averaged out. Below the first size the
    curve is flat; beyond the last it goes on as steeply as it last rose.

    Args:
        sizes: tokens a row, increasing.
        seconds: of a pass of each size.

    Raises:
        ValueError: if there are no sizes, they do not increase, or a time is missing, negative or not finite.
    """

    def __init__(self, sizes: Sequence[int], seconds: Sequence[float]):
        sizes, seconds = list(sizes), [float(second) for second in seconds]
        if not sizes or len(sizes) != len(seconds) or sizes[0] < 1 or sizes != sorted(set(sizes)):
            raise ValueError(
                f"A cost curve of sizes {sizes} and {len(seconds)} times; expected increasing sizes of 1 or more, "
                "and a time for each."
            )
        if not all(math.isfinite(second) and second >= 0 for second in seconds):
            raise ValueError(
                f"A cost curve of the times {seconds}; expected finite seconds of 0 or more. Measure again."
            )
        self.sizes = sizes
        self.seconds = non_decreasing(seconds, [1.0] * len(seconds))
        self._table = [self._between(size) for size in range(sizes[-1] + 1)]
        # A last stretch without a rise would promise that any size is free.
        rises = [
            (after - before) / (size - smaller)
            for smaller, size, before, after in zip(sizes, sizes[1:], self.seconds, self.seconds[1:], strict=False)
            if after > before
        ]
        self.slope_beyond = rises[-1] if rises else self.seconds[-1] / sizes[-1]

    def __call__(self, size: int) -> float:
        """Seconds of a pass of `size` tokens a row."""
        if size < len(self._table):
            return self._table[size]
        return self._table[-1] + (size - self.sizes[-1]) * self.slope_beyond

    def _between(self, size: int) -> float:
        above = bisect_left(self.sizes, size)
        if above == 0 or self.sizes[above] == size:
            return self.seconds[above]
        share = (size - self.sizes[above - 1]) / (self.sizes[above] - self.sizes[above - 1])
        return self.seconds[above - 1] + share * (self.seconds[above] - self.seconds[above - 1])


@dataclass(frozen=True, eq=False)
class RoundCosts:
    """Prices of what a round is made of, in seconds, for all rows of a batch together. Compared by identity.

    Args:
        plain: a round that drafts nothing: one step of plain decoding.
        verification: the target's pass, by nodes a row (the root included).
        draft_pass: a specialist's pass with its head; one price, or one by draft position, the last of which holds for
            all beyond.
        context: extending the specialists' context by what was accepted.
        overhead: the rest of a round that drafts: choosing nodes, walk, cache, host.
    """

    plain: float
    verification: CostCurve
    draft_pass: float | Sequence[float]
    context: float = 0.0
    overhead: float = 0.0

    def __post_init__(self):
        passes = [self.draft_pass] if isinstance(self.draft_pass, (int, float)) else list(self.draft_pass)
        prices = {"plain": [self.plain], "draft_pass": passes, "context": [self.context], "overhead": [self.overhead]}
        for name, values in prices.items():
            if not values or not all(math.isfinite(value) and value >= 0 for value in values):
                raise ValueError(f"The price `{name}` is {values}; expected finite seconds of 0 or more.")
        if self.plain == 0:
            raise ValueError("The price `plain` is 0 seconds; expected the time of a plain decoding step.")

    def pass_at(self, position: int) -> float:
        """Seconds of the pass for draft position `position` (1-based)."""
        if isinstance(self.draft_pass, (int, float)):
            return self.draft_pass
        return self.draft_pass[min(position, len(self.draft_pass)) - 1]

    def passes(self, depth: int) -> float:
        """Seconds of the passes for draft positions 1 to `depth`."""
        return sum(self.pass_at(position) for position in range(1, depth + 1))

    def of_round(self, depth: int, nodes: int) -> float:
        """Seconds of a round: `depth` draft passes, and a verification of `nodes` nodes a row."""
        if depth == 0:
            return self.plain
        return self.context + self.passes(depth) + self.verification(nodes) + self.overhead


def measure_curve(
    run: Callable[[int], Any],
    sizes: Sequence[int],
    synchronize: Callable[[], Any],
    repeats: int = 5,
    seconds: float = 1.0,
) -> CostCurve:
    """Times passes of several sizes, in turn, and takes the median of each.

    The time spent is bounded: where passes are slow, fewer sizes are measured and less often. Two sizes, each run
    twice, are always: a line needs them.

    Args:
        run: makes a pass of so many tokens a row.
        sizes: tokens a row.
        synchronize: waits until the device has done what was asked of it.
        repeats: runs of a size that count, where there is time for so many.
        seconds: about what may be spent, warm-up apart. A slow pass needs longer: see above.

    Raises:
        ValueError: if there are no sizes or repeats.
    """
    sizes = sorted(set(sizes))
    if not sizes or sizes[0] < 1 or repeats < 1:
        raise ValueError(f"Passes of the sizes {sizes}, {repeats} times; expected sizes and repeats of 1 or more.")

    def timed(size: int) -> float:
        synchronize()
        start = time.perf_counter()
        run(size)
        synchronize()
        return time.perf_counter() - start

    # The first run of a size may compile, or fetch memory: it does not count.
    timed(sizes[0])
    times = {sizes[0]: [timed(sizes[0])]}
    spent = times[sizes[0]][0]
    for size in _affordable(sizes, spent, seconds)[1:]:
        if len(times) > 1 and spent + max(map(max, times.values())) > seconds:
            break
        timed(size)
        times[size] = [timed(size)]
        spent += times[size][0]
    sweep, order = spent, list(times)
    for _ in range(repeats - 1):
        if spent + sweep > seconds:
            break
        order.reverse()  # what drifts, as a clock that heats up, then falls on all sizes alike
        for size in order:
            times[size].append(timed(size))
            spent += times[size][-1]
    # The median, not the minimum: a round pays what a pass usually takes, and what it takes at best depends on how
    # often it was tried.
    return CostCurve(
        list(times), non_decreasing([statistics.median(times[size]) for size in times], [1.0] * len(times))
    )


def convex(curve: CostCurve) -> CostCurve:
    """The curve without what noise makes of it: from two tokens on, its lower convex hull.

    More tokens may at first be free and dear later, so a size between two others costs no more than the line between
    them. A measured bump would otherwise keep all rounds at the size before it. One token stays as it is: its pass may
    be of another kind.
    """
    single = [(size, second) for size, second in zip(curve.sizes, curve.seconds, strict=True) if size == 1]
    hull: list[tuple[int, float]] = []
    for size, second in zip(curve.sizes, curve.seconds, strict=True):
        if size == 1:
            continue
        # The last point goes if it lies on or above the line from the one before it to the new one.
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (size - hull[-2][0]) >= (second - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((size, second))
    sizes, seconds = zip(*single, *hull, strict=True)
    return CostCurve(sizes, seconds)


def _affordable(sizes: list[int], first: float, seconds: float) -> list[int]:
    """The sizes to try: all, or fewer, spread evenly, where the smallest takes long already; with two, the second is
    from the middle, as the largest may take many times as long."""
    count = max(2, int(seconds / max(2 * first, 1e-9)))
    if count >= len(sizes):
        return sizes
    if count == 2:
        return [sizes[0], sizes[len(sizes) // 2]]
    return [sizes[round(place * (len(sizes) - 1) / (count - 1))] for place in range(count)]


class CostKey(NamedTuple):
    """What a measured price holds for.

    Args:
        device, dtype: as strings.
        rows: rows of the batch that are still written.
        context: bucket of the context's length, see [`context_bucket`].
        mode: how passes run, as "eager" or "compiled".
    """

    device: str
    dtype: str
    rows: int
    context: int
    mode: str


_known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def known_costs(owner: Any) -> dict[CostKey, RoundCosts]:
    """What has been measured so far for whatever runs, a target with its drafter; the caller adds to it. Forgotten
    together with the owner."""
    with _lock:
        return _known.setdefault(owner, {})


def context_bucket(tokens: int) -> int:
    """The power of two, 256 or more, that a context of `tokens` tokens fits into."""
    return max(SMALLEST_BUCKET, 1 << max(tokens - 1, 0).bit_length())
