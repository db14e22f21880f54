"""Drafting without models: trees whose acceptance is drawn, and what settings bring on them."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from hf_poss.draft_planner import DraftPlanner
from hf_poss.round_costs import CostCurve, RoundCosts


MAX_DEPTH, MAX_NODES = 8, 64
SIZES = [2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64]


class Tree(NamedTuple):
    """A drafted tree, grown to `MAX_DEPTH`.

    Args:
        frontiers: path log-probabilities of the nodes that each next pass expands, best first.
        nodes: log-probability, depth and fate of every node, best first.
    """

    frontiers: list[list[float]]
    nodes: list[tuple[float, int, bool]]


@dataclass
class Text:
    """Text of one difficulty, as trees drafted somewhere in it.

    Args:
        rate: mean probability that the likeliest child of a node is accepted.
        spread: of that probability, from 0 (always the mean) to 1.
        decay: of the rate from position to position.
        confidence: power that the drafter takes true probabilities to before it tells them: above 1 it is
            overconfident, below underconfident; None if what it tells means nothing.
        siblings: share of what is left that each next child takes.
        branches: children a node, and nodes expanded a level.
    """

    rate: float
    spread: float = 0.4
    decay: float = 1.0
    confidence: float | None = 1.0
    siblings: float = 0.4
    branches: int = 4
    seed: int = 0
    trees: list[Tree] = field(init=False)

    def __post_init__(self):
        source = random.Random(self.seed)
        self.trees = [self._tree(source) for _ in range(400)]

    def _children(self, source: random.Random, depth: int) -> tuple[list[float], list[float]]:
        """True probabilities and told log-probabilities."""
        mean = self.rate * self.decay ** (depth - 1)
        true = [min(source.betavariate(mean / self.spread, (1 - mean) / self.spread), 0.999)]
        for _ in range(self.branches - 1):
            true.append((1 - sum(true)) * self.siblings)
        true.sort(reverse=True)
        if self.confidence is None:
            return true, [math.log(0.03 - 0.001 * child) for child in range(self.branches)]
        told = [probability**self.confidence for probability in true]
        scale = sum(told) + max(1 - sum(true), 1e-6) ** self.confidence
        return true, [math.log(max(probability / scale, 1e-9)) for probability in told]

    def _tree(self, source: random.Random) -> Tree:
        frontier, frontiers, nodes = [(0.0, True)], [], []
        for depth in range(1, MAX_DEPTH + 1):
            level = []
            for score, alive in frontier:
                true, told = self._children(source, depth)
                draw = source.random()
                chosen = next((child for child in range(len(true)) if draw < sum(true[: child + 1])), None)
                level += [(score + its, alive and child == chosen) for child, its in enumerate(told)]
            nodes += [(score, depth, alive) for score, alive in level]
            frontier = sorted(level, key=lambda node: -node[0])[: self.branches]
            frontiers.append([score for score, _ in frontier])
        return Tree(frontiers, sorted(nodes, key=lambda node: (-node[0], node[1])))

    @cached_property
    def tokens(self) -> dict[tuple[int, int], float]:
        """Mean tokens of a round by depth and nodes, over all trees."""
        means = {(0, 1): 1.0}
        for depth in range(1, MAX_DEPTH + 1):
            taken = [0] * MAX_NODES
            for tree in self.trees:
                fates = [alive for _, own, alive in tree.nodes if own <= depth]
                for rank, alive in enumerate(fates[: MAX_NODES - 1]):
                    taken[rank] += alive
            for size in SIZES:
                means[depth, size] = 1 + sum(taken[: size - 1]) / len(self.trees)
        return means


def best_fixed(phases: Sequence[Sequence[Text]], costs: RoundCosts) -> float:
    """Tokens a second of the best depth and nodes that are kept all along; plain decoding is one of them.

    Args:
        phases: texts by row, one after the other, all as long.
    """
    tables = []
    for texts in phases:
        rows = [text.tokens for text in texts]
        tables.append({shape: sum(row[shape] for row in rows) for shape in rows[0]})
    return max(len(tables) / sum(costs.of_round(*shape) / table[shape] for table in tables) for shape in tables[0])


@dataclass
class Run:
    """What a simulated call took.

    Args:
        tokens, seconds: in all.
        depths: of each round, 0 for a plain one.
    """

    tokens: int = 0
    seconds: float = 0.0
    depths: list[int] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def simulate(
    planner: DraftPlanner,
    phases: Sequence[Sequence[Text]],
    costs: RoundCosts,
    tokens: int,
    phase: int = 400,
    real: RoundCosts | None = None,
    ahead: bool = False,
    seed: int = 0,
    noise: Callable[[], float] | None = None,
) -> Run:
    """Decodes with a planner.

    Each text's trees come up in turn, in shuffled order: over whole turns, a fixed shape brings what `best_fixed`
    says, so that the difference between the two is the planner's, not chance.

    Args:
        phases: texts by row; the next phase begins after `phase` tokens of a row.
        costs: told to the planner.
        tokens: of a row.
        real: what rounds take; then the planner is told seconds. As `costs` if None, and nothing is told.
        ahead: whether rounds are decided ahead.
        noise: factor of each round's seconds.
    """
    source = random.Random(seed)
    order = list(range(len(phases[0][0].trees)))
    source.shuffle(order)
    turns = [0] * len(phases)
    rows, run = len(phases[0]), Run()
    while run.tokens < tokens * rows:
        which = int(run.tokens / rows // phase) % len(phases)
        plan = planner.begin_round(costs, rows, ahead=ahead)
        depth, size, accepted, trees = plan.depth if ahead else 0, 1, [[]] * rows, []
        if plan.depth:
            place, turns[which] = order[turns[which] % len(order)], turns[which] + 1
            trees = [text.trees[place] for text in phases[which]]
            deeper = not ahead
            while deeper:
                depth += 1
                deeper = plan.deepen([tree.frontiers[depth - 1] for tree in trees])
            trees = [[node for node in tree.nodes if node[1] <= depth][: MAX_NODES - 1] for tree in trees]
            scores, depths = ([[node[part] for node in tree] for tree in trees] for part in (0, 1))
            size = min(plan.size, 1 + len(trees[0])) if ahead else plan.nodes(scores, depths)
            accepted = [[alive for _, _, alive in tree[: size - 1]] for tree in trees]
        seconds = (real or costs).of_round(depth, size) * (noise() if noise else 1.0)
        run.tokens += rows + sum(map(sum, accepted))
        run.seconds += seconds
        run.depths.append(depth)
        told = seconds if real else None
        if trees:
            planner.observe(plan, depths, scores, accepted, told)
        else:
            planner.observe(plan, accepted, accepted, accepted, told)
    return run


def linear(slope: float) -> CostCurve:
    """A pass of n nodes takes 1 + slope * (n - 1)."""
    return CostCurve([1, 128], [1.0, 1 + 127 * slope])


COSTS = {
    # Nodes are free up to 32, then as dear as the arithmetic.
    "gpu": RoundCosts(1.0, CostCurve([1, 32, 128], [1.0, 1.02, 3.0]), 0.06, context=0.02, overhead=0.05),
    # Every node costs.
    "cpu": RoundCosts(1.0, linear(0.12), 0.12, context=0.03, overhead=0.05),
    # Leaving the width of one token costs, more nodes do not.
    "step": RoundCosts(1.0, CostCurve([1, 2, 64, 128], [1.0, 1.5, 1.6, 2.5]), 0.15, context=0.02, overhead=0.05),
    # Drafts are dear.
    "slow drafter": RoundCosts(1.0, linear(0.3), 0.35, context=0.05, overhead=0.1),
    # A node costs what a plain step does: nothing can pay.
    "compute-bound": RoundCosts(1.0, linear(1.0), 0.1, context=0.02, overhead=0.05),
}
