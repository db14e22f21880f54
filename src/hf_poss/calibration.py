"""How often drafted paths are accepted, learned online from what the target accepts."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .round_costs import non_decreasing


__all__ = ["Acceptance", "Calibration", "Mood"]

# Bins of a path's probability p, by x = -log p, down to exp(-8); the last holds all below.
BINS_PER_UNIT = 8
LAST_BIN = 64
CENTERS = [(index + 0.5) / BINS_PER_UNIT for index in range(LAST_BIN + 1)]
LOWEST = -LAST_BIN / BINS_PER_UNIT
ANYWHERE = [(0.2, 1.0), (1.0, 1.0), (4.0, 1.0)]  # x, nodes


@dataclass(frozen=True)
class Acceptance:
    """What was known about acceptance when a round began.

    Args:
        leaders, others: calibrated probability by depth and bin, of a depth's likeliest node and of the others.
        scales: by depth, what it is multiplied by these days.
    """

    leaders: Sequence[Sequence[float]]
    others: Sequence[Sequence[float]]
    scales: Sequence[float]

    def expected(self, scores: Iterable[float], depths: Iterable[int]) -> list[float]:
        """Probability of each node of a row to be accepted. Of the nodes of one depth, one is at most: what is left by
        likelier ones is a bound for the others.

        Args:
            scores: log-probabilities of the paths, best first.
            depths: of their last nodes. As no node is likelier than its parent, depths first come up in their order.
        """
        leaders, others, scales, deepest, expected = self.leaders, self.others, self.scales, 0, []
        left = [1.0] * len(scales)
        for score, depth in zip(scores, depths, strict=False):
            table = others[depth]
            if depth > deepest:
                deepest, table = depth, leaders[depth]
            value = table[int(-BINS_PER_UNIT * score) if score > LOWEST else LAST_BIN] * scales[depth]
            if value > left[depth]:
                value = left[depth]
            left[depth] -= value
            expected.append(value)
        return expected


class Calibration:
    """How often a drafted path is accepted, by the probability p that the drafter gave it and by its depth.

    The likeliest node of a depth, its leader, is counted apart from the others: that it leads tells something even
    where p does not, as with a drafter that is unsure of everything.

    Without data the drafter is believed. With some, acceptance is exp(-a - b * x) with x = -log p and an a and b for
    each depth, leaders apart: two numbers tell an overconfident drafter, an underconfident one, and one whose
    probabilities mean nothing (then b is near 0, and the rate of the depth is left), and reach to probabilities and
    depths that were not seen. With more, each bin of probabilities goes by what was counted in it, made monotone in p.

    Old rounds are forgotten, as texts change.

    Args:
        max_depth: draft positions at most.
        window: observed rounds after which an observation has lost two thirds of its weight.
    """

    def __init__(self, max_depth: int, window: float = 512.0):
        self.max_depth = max_depth
        self._growth = math.exp(1 / window)
        self._unit = 1.0  # weight of what is observed now; growing it is forgetting
        # [class][depth][bin]: class 0 leaders, 1 others
        self._seen = [[[0.0] * (LAST_BIN + 1) for _ in range(max_depth + 1)] for _ in range(2)]
        self._taken = [[[0.0] * (LAST_BIN + 1) for _ in range(max_depth + 1)] for _ in range(2)]
        self._laws = [[(0.0, 1.0)] * (max_depth + 1) for _ in range(2)]  # a and b
        believed = [math.exp(-x) for x in CENTERS]
        self.leaders = [believed] * (max_depth + 1)  # [depth][bin]: calibrated probability
        self.others = [believed] * (max_depth + 1)
        self._rounds, self._due = 0, 1

    def calibrated(self, probability: float, depth: int, leads: bool = False) -> float:
        """The share of such paths that is accepted; never falls with `probability`.

        Args:
            probability: of the path, as the drafter has it. It counts to within 13%, the width of a bin.
            depth: of its last node, 1-based; beyond the deepest, as the deepest.
            leads: whether no path of this depth is likelier.
        """
        score = math.log(probability) if probability > 0 else -math.inf
        table = (self.leaders if leads else self.others)[min(depth, self.max_depth)]
        return table[int(-BINS_PER_UNIT * score) if score > LOWEST else LAST_BIN]

    def observe(
        self,
        scores: Sequence[Sequence[float]],
        depths: Sequence[Sequence[int]],
        accepted: Sequence[Sequence[bool | None]],
    ) -> None:
        """Counts a round.

        Args:
            scores: log-probabilities of the paths, by row, best first.
            depths: of their last nodes.
            accepted: whether they were; None for those that were not verified.
        """
        unit = self._unit
        (leaders_seen, seen), (leaders_taken, taken) = self._seen, self._taken
        for row in zip(scores, depths, accepted, strict=True):
            deepest = 0
            for score, depth, hit in zip(*row, strict=True):
                if hit is None:
                    continue
                index = int(-BINS_PER_UNIT * score) if score > LOWEST else LAST_BIN
                if depth > deepest:
                    deepest = depth
                    leaders_seen[depth][index] += unit
                    leaders_taken[depth][index] += unit * hit
                else:
                    seen[depth][index] += unit
                    if hit:
                        taken[depth][index] += unit
        self._unit *= self._growth
        self._rounds += 1
        if self._rounds < 32:
            if self._rounds >= self._due:
                self._due = self._rounds + 1 + self._rounds // 4
                self._fit(range(1, self.max_depth + 1))
        elif self._rounds % 8 == 0:  # a depth at a time, so that no round waits for all
            self._fit([self._rounds // 8 % self.max_depth + 1])

    def _fit(self, depths: Iterable[int]) -> None:
        scale = 1 / self._unit
        if self._unit > 1e9:
            for counts in (*self._seen[0], *self._seen[1], *self._taken[0], *self._taken[1]):
                counts[:] = [count * scale for count in counts]
            scale = self._unit = 1.0
        tables = []
        for before, *counted in zip((self.leaders, self.others), self._seen, self._taken, self._laws, strict=True):
            fitted, (seen, taken, laws) = list(before), counted
            for depth in depths:
                counts = [
                    (x, nodes * scale, hits * scale)
                    for x, nodes, hits in zip(CENTERS, seen[depth], taken[depth], strict=True)
                ]
                if depth > 1:
                    a, b = laws[depth - 1]
                    prior = (a * depth / (depth - 1), b)  # the same for each step of the path
                else:  # a drafter that is wrong about the likeliest node is wrong about the others too
                    prior = laws[0] if laws is self._laws[0] else self._laws[0][1]
                laws[depth] = _law([count for count in counts if count[1]], prior, laws[depth])
                fitted[depth] = _table(counts, laws[depth])
            tables.append(fitted)
        self.leaders, self.others = tables  # new lists: a round that has begun keeps the ones it began with


class Mood:
    """Whether the newest rounds went better than calibrated, as easy and hard passages alternate.

    How far they tell the next is learned too: not at all where the drafter's probabilities say it already.
    """

    def __init__(self):
        self._hits, self._expected = 0.0, 0.0  # steps down the tree in the newest rounds: taken, and expected
        self._covariance, self._variance = 0.0, 4.0
        self.factor = 1.0  # of a step's acceptance

    def observe(self, hits: float, expected: float) -> None:
        """Adds a round: steps that were accepted, and how many were to be expected of those that were tried."""
        recent = math.log((self._hits + 1) / (self._expected + 1))
        self._covariance = 0.995 * self._covariance + recent * (hits - expected)
        self._variance = 0.995 * self._variance + recent * recent * expected
        self._hits, self._expected = 0.875 * self._hits + hits, 0.875 * self._expected + expected
        weight = min(max(self._covariance / self._variance, 0.0), 1.0)
        self.factor = ((self._hits + 1) / (self._expected + 1)) ** weight


def _law(
    counts: list[tuple[float, float, float]], prior: tuple[float, float], start: tuple[float, float]
) -> tuple[float, float]:
    """a and b of the acceptance exp(-a - b * x) that is likeliest, both 0 or more: Poisson regression.

    Args:
        counts: x = -log p, nodes seen, nodes accepted.
        prior: a and b believed without data, worth nine nodes.
        start: a and b to begin at.
    """
    if not counts:
        return prior
    # Pseudo-nodes around those that were seen, and a few elsewhere: nodes that were all alike tell no slope.
    typical = sum(x * nodes for x, nodes, _ in counts) / sum(nodes for _, nodes, _ in counts)
    around = [(typical * factor, 2.0) for factor in (0.5, 1.0, 1.5)]
    believed = [(x, nodes, nodes * math.exp(-prior[0] - prior[1] * x)) for x, nodes in (*around, *ANYWHERE)]
    counts = counts + believed
    hits = sum(count[2] for count in counts)
    hits_x = sum(x * taken for x, _, taken in counts)
    b = start[1]
    for _ in range(4):  # Newton's method in b, with the best a for each
        means = [(x, nodes * math.exp(-b * x)) for x, nodes, _ in counts]
        total = sum(mean for _, mean in means)
        total_x = sum(x * mean for x, mean in means)
        total_xx = sum(x * x * mean for x, mean in means)
        factor = min(hits / total, 1.0)  # exp(-a)
        slope = total_xx - (total_x * total_x / total if factor < 1 else 0.0)
        step = (factor * total_x - hits_x) / max(factor * slope, 1e-9)
        b = min(max(b + min(max(step, -1.0), 1.0), 0.0), 8.0)
    total = sum(nodes * math.exp(-b * x) for x, nodes, _ in counts)
    return math.log(max(total / hits, 1.0)), b


def _table(counts: list[tuple[float, float, float]], law: tuple[float, float]) -> list[float]:
    """Calibrated probability by bin. The law is worth eight nodes to a bin that was seen, and has next to no say in
    the order of what was and what was not."""
    a, b = law
    rates = [(hits + 8.0 * math.exp(-a - b * x)) / (nodes + 8.0) for x, nodes, hits in counts]
    weights = [nodes + 0.1 for _, nodes, _ in counts]
    return non_decreasing(rates[::-1], weights[::-1])[::-1]
