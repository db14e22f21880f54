"""How much to draft in a round, so that a text is written in the least time. Sees numbers only, no model."""

import math
import threading
import weakref
from collections.abc import Sequence
from itertools import repeat, zip_longest
from typing import Any

from .calibration import Acceptance, Calibration, Mood
from .draft_pace import Pace, RecentMean, TrialBudget
from .round_costs import RoundCosts
from .tree_profile import TreeProfile


__all__ = ["DraftPlanner", "RoundPlan", "planner_for"]


class _Yields:
    """What another draft pass brings, by the depth and the hopes of the frontier that it starts from.

    A frontier's hope is its nodes that are to be expected to be accepted, of a row: of one path, so 1 at most.
    """

    BINS = 16
    FADE = 1 - 1 / 128  # a round in which a cell was not used; so that what did not pay long ago is tried again

    def __init__(self, max_depth: int):
        self._next = [[RecentMean(64) for _ in range(self.BINS)] for _ in range(max_depth + 1)]
        self._nodes = [[RecentMean(64) for _ in range(self.BINS)] for _ in range(max_depth + 1)]
        self._used = [[0] * self.BINS for _ in range(max_depth + 1)]
        self._rounds = 0

    def of_frontier(self, position: int, hope: float) -> float:
        """Hope of the next frontier, as a ratio to that of this one at `position`."""
        return self._mixed(self._next, position, hope, self._guess(position, hope))

    def of_nodes(self, position: int, hope: float, node: float) -> float:
        """Accepted nodes to be expected at the next position, net of the price of nodes, as a ratio to the frontier's
        hope. `node`: the price of a column of them, as such a ratio too; without data, one is thought to be needed."""
        return self._mixed(self._nodes, position, hope, max(self._guess(position, hope) - node, 0.0))

    def _mixed(self, cells: Sequence[Sequence[RecentMean]], position: int, hope: float, guess: float) -> float:
        index = self._bin(hope)
        mean, fade = cells[position][index], self.FADE ** (self._rounds - self._used[position][index])
        return (mean.total * fade + 4 * guess) / (mean.weight * fade + 4)

    def observe(self, hopes: Sequence[float], nodes: Sequence[float]) -> None:
        """Adds a round: by position - 1, its frontiers' hopes, and what its nodes were expected to bring, net."""
        self._rounds += 1
        for position, (hope, following, brought) in enumerate(zip(hopes, hopes[1:], nodes[1:], strict=False), start=1):
            index, hope = self._bin(hope), max(hope, 1e-9)
            self._used[position][index] = self._rounds
            self._next[position][index].add(min(following / hope, 1.0))
            self._nodes[position][index].add(min(brought / hope, 1.0))

    def _bin(self, hope: float) -> int:
        return min(max(int(-4 * math.log(hope)), 0), self.BINS - 1) if hope > 0 else self.BINS - 1

    @staticmethod
    def _guess(position: int, hope: float) -> float:
        """Without data: as much is left after the next pass as was on average after each so far."""
        return min(max(hope, 1e-6) ** (1 / position), 0.95)


class RoundPlan:
    """The decisions of one round. Made by [`DraftPlanner.begin_round`]; used by one thread.

    Attributes:
        depth: draft positions to draft at most; 0: none, the round is a plain step.
        size: nodes to verify, the root included, where that was decided ahead; else None.
        passes: draft passes so far.
        price: tokens that a second is worth: what decoding brings in the long run, of all rows.
    """

    def __init__(
        self, planner: "DraftPlanner", pace: Pace, acceptance: Acceptance, rows: int, depth: int, price: float
    ):
        self.planner, self.pace, self.acceptance, self.rows = planner, pace, acceptance, rows
        self.costs = pace.costs
        self.depth, self.price = depth, price
        self.size: int | None = None
        self.passes = 0
        self.hopes: list[float] = []  # of the frontiers so far
        self.node = 0.0  # tokens that a column of nodes has to bring
        self._columns: list[float] = []  # accepted nodes to be expected in those that pay so far, best first
        self._gain = 0.0  # of these, net

    def deepen(self, frontier: Sequence[Sequence[float]]) -> bool:
        """Whether another draft pass pays; to be asked after each pass.

        Args:
            frontier: path log-probabilities of the nodes that the next pass would expand, by row.
        """
        self.passes += 1
        position, planner, price = self.passes, self.planner, self.price
        rows = [self.acceptance.expected(sorted(row, reverse=True), repeat(position)) for row in frontier]
        columns = _summed(rows)
        hope = sum(columns) / self.rows
        self.hopes.append(hope)
        if position >= self.depth:
            return False
        if planner.depth is not None:
            return True

        node, first = self._node_prices(len(columns))
        worth = [column - node for column in columns if column > node]
        self._columns = sorted(self._columns + [value + node for value in worth], reverse=True)
        self._gain += sum(worth)
        self.node = node
        stopped = max(self._gain - first, 0.0)
        gain = self._gain - first
        # One more pass may not pay while two do, where leaving the width of a plain step is what costs.
        for ahead in range(position, self.depth):
            share = self.rows * max(hope, 1e-9)
            gain += share * planner.yields.of_nodes(ahead, hope, node / share) - price * self.costs.pass_at(ahead + 1)
            if gain > stopped:
                return True
            hope *= planner.yields.of_frontier(ahead, hope)
        return False

    def _node_prices(self, width: int) -> tuple[float, float]:
        """Tokens that another column of nodes has to bring: for the time that it adds or, where the tree is full, for
        the one that it drives out; and what the first has to bring on top, for leaving the width of a plain step."""
        widest, verification = self.planner.max_nodes - 1, self.costs.verification
        node = first = 0.0
        if self.planner.nodes is None:
            size, width = len(self._columns) + 1, max(width, 8)
            node = self.price * (verification(size + width) - verification(size)) / width
            first = max(self.price * (verification(2) - verification(1)) - node, 0.0)
        if len(self._columns) >= widest:
            node = max(node, self._columns[widest - 1])
        return node, first

    def nodes(self, scores: Sequence[Sequence[float]], depths: Sequence[Sequence[int]]) -> int:
        """Nodes of the pass that verifies, the root included; 1: none of what was drafted pays.

        Every row takes its best nodes, as many as the others: a column costs what it costs for all rows, and brings
        the sum of what the rows expect of it.

        Args:
            scores: path log-probabilities of the candidates by row, best first. Those beyond the planner's `max_nodes`
                are not needed.
            depths: draft position of each.
        """
        widest = self.planner.max_nodes - 1
        if self.planner.nodes is not None:
            return min(self.planner.nodes, len(scores[0]) + 1)
        expected = self.acceptance.expected
        columns = _summed([expected(row[:widest], own) for row, own in zip(scores, depths, strict=True)])
        verification, price = self.costs.verification, self.price
        best, most, gain = 1, -price * verification(1), 0.0
        for size, column in enumerate(columns, start=2):
            gain += column
            value = gain - price * verification(size)
            if value > most:
                best, most = size, value
        if not self.pace.on_trial:
            return best
        # A trial has to try something, and whatever is free.
        free = verification(max(best, 2)) + 0.02 * self.pace.plain
        return max(size for size in range(2, len(columns) + 2) if size <= max(best, 2) or verification(size) <= free)


def _summed(rows: Sequence[list[float]]) -> list[float]:
    """Sum of each column."""
    return rows[0] if len(rows) == 1 else [sum(column) for column in zip(*rows, strict=True)]


class DraftPlanner:
    """Chooses depth and nodes of every round so that tokens a second, in the long run, are as many as possible.

    The long run is a ratio of sums, E[tokens] / E[seconds]. So a second is priced at the rate reached so far (renewal
    reward; Dinkelbach, "On nonlinear fractional programming", 1967), and what brings more tokens than its time is
    worth is done: a node is kept, a pass is made, drafting is done at all. What is to be expected comes from the
    drafter's probabilities, calibrated online.

    Where drafting does not pay, rounds are plain steps. Drafting is tried again ever more rarely, and trials together
    take no more than about 1% of the time. Likewise, where drafting pays and times are told, plain steps are timed now
    and then.

    May be shared between threads; costs may differ from round to round, as rows end and contexts grow.

    Args:
        max_depth: draft positions at most.
        max_nodes: nodes of a verification at most, the root included.
        depth: draft positions, where they are not the planner's to choose.
        nodes: nodes, where they are not the planner's to choose.

    Example:

    ```python
    >>> plan = planner.begin_round(costs, rows=1)
    >>> while plan.passes < plan.depth:
    ...     frontier = draft_pass()
    ...     if not plan.deepen(frontier):
    ...         break
    >>> size = plan.nodes(scores, depths) if plan.passes else 1
    >>> planner.observe(plan, depths, scores, accepted, seconds)
    ```"""

    def __init__(self, max_depth: int, max_nodes: int, depth: int | None = None, nodes: int | None = None):
        self.depth, self.nodes = depth, nodes
        self.max_depth = max_depth if depth is None else depth
        self.max_nodes = max_nodes if nodes is None else nodes
        if self.max_depth < 1 or self.max_nodes < 2:
            raise ValueError(
                f"A draft of at most {self.max_depth} positions and {self.max_nodes} nodes; expected 1 position and 2 "
                "nodes (the root and one drafted token) or more."
            )
        self.calibration = Calibration(self.max_depth)
        self.yields = _Yields(self.max_depth)
        self._mood = Mood()
        self._acceptance = self._refreshed()
        self._profile = TreeProfile(self.max_depth, self.max_nodes, depth, nodes)
        self._paces: weakref.WeakKeyDictionary[RoundCosts, Pace] = weakref.WeakKeyDictionary()
        self._typical = (RecentMean(24), RecentMean(24), RecentMean(24))  # tokens of a row, passes, nodes
        self._rounds = 0  # that drafted
        self._budget = TrialBudget()
        self._lock = threading.Lock()

    def begin_round(self, costs: RoundCosts, rows: int, room: int | None = None, ahead: bool = False) -> RoundPlan:
        """Begins a round.

        Args:
            costs: of a round with these rows, at this length; the same object as long as they hold.
            rows: rows of the batch that are still written.
            room: draft positions that are possible, if not all are.
            ahead: decides all now, from what the newest rounds were like: the round is then `plan.depth` passes and
                `plan.size` nodes, and nobody waits for the device to see what it drafts. Otherwise `plan.deepen` and
                `plan.nodes` decide, from what is drafted.
        """
        with self._lock:
            pace = self._pace(costs)
            depth = self.max_depth if room is None else min(self.max_depth, room)
            if self.depth is None:
                depth = min(depth, 2 + 2 * self._rounds)  # a drafter of unknown quality is tried carefully
            if depth < 1 or not pace.drafts(self._budget):
                depth = 0
            price = rows * max(1 / pace.plain, pace.speed)
            plan = RoundPlan(self, pace, self._acceptance, rows, depth, price)
            if ahead and depth:
                plan.depth, plan.size = self._profile.shape(costs, rows, price, depth)
                plan.passes = plan.depth
            return plan

    def observe(
        self,
        plan: RoundPlan,
        depths: Sequence[Sequence[int]],
        log_probabilities: Sequence[Sequence[float]],
        accepted: Sequence[Sequence[bool]],
        seconds: float | None = None,
    ) -> None:
        """Ends a round: what was verified, and what of it was accepted.

        Args:
            plan: of the round.
            depths: draft positions of the nodes below the root, by row, in any order; empty rows if there were none.
            log_probabilities: of their paths, as the drafter has them.
            accepted: of each node that was verified, whether its path was accepted. Nodes behind these were drafted
                only; for rounds that are decided ahead, they tell what a larger tree would hold.
            seconds: that the round took, if known.
        """
        with self._lock:
            if not plan.passes:
                plan.pace.observe_plain(seconds, self._budget)
                return
            trees = [
                _best_first(*row) for row in zip(log_probabilities, depths, accepted, strict=True)
            ]  # [row]: scores, depths, hits
            brought = [0.0] * plan.passes  # by position - 1, accepted nodes to be expected of all rows
            net = [0.0] * plan.passes  # of a row, without what their places are worth
            for scores, its_depths, hits in trees:
                expected = plan.acceptance.expected(scores, its_depths)
                own = [0.0] * plan.passes
                for value, depth, hit in zip(expected, its_depths, hits, strict=True):
                    if hit is not None:
                        own[depth - 1] += value
                        net[depth - 1] -= plan.node / plan.rows
                brought = [total + value for total, value in zip(brought, own, strict=True)]
                self._observe_mood(plan, own, sum(map(bool, hits)))
                if plan.size is not None:
                    self._profile.observe(plan.passes, expected, its_depths)
            rows = plan.rows
            net = [max(total + price, 0.0) / rows for total, price in zip(brought, net, strict=True)]
            self.yields.observe(plan.hopes, net)
            self.calibration.observe(*zip(*trees, strict=True))
            self._acceptance = self._refreshed()
            self._rounds += 1
            tokens, nodes = 1 + sum(map(sum, accepted)) / rows, 1 + max(map(len, accepted))
            for mean, value in zip(self._typical, (tokens, plan.passes, nodes), strict=True):
                mean.add(value)
            plan.pace.observe_draft(plan.passes, nodes, tokens, 1 + sum(brought) / rows, seconds, self._budget)

    def _observe_mood(self, plan: RoundPlan, own: Sequence[float], hits: int) -> None:
        """Tells the mood how far down a row's tree the walk got, and how far was to be expected without a mood."""
        tried, before = 0.0, 1.0
        for value, scale in zip(own[: hits + 1], plan.acceptance.scales[1:], strict=False):
            if value:
                tried += min(value / scale / before, 1.0)
                before = value / scale
        self._mood.observe(hits, tried)

    def _refreshed(self) -> Acceptance:
        leaders, others, factor = self.calibration.leaders, self.calibration.others, self._mood.factor
        scales = [min(factor**depth, 1 / max(table[0], 1e-9)) for depth, table in enumerate(leaders)]
        return Acceptance(leaders, others, scales)

    def _pace(self, costs: RoundCosts) -> Pace:
        """What is known at these costs; with new ones, what rounds like the last would bring at them."""
        pace = self._paces.get(costs)
        if pace is None:
            tokens, passes, nodes = (mean.value for mean in self._typical)
            pace = Pace(costs, tokens, costs.of_round(round(passes), round(nodes)))
            self._paces[costs] = pace
        return pace


def _best_first(
    scores: Sequence[float], depths: Sequence[int], accepted: Sequence[bool]
) -> tuple[list[float], list[int], list[bool | None]]:
    """A row's nodes, likeliest first, parents before their children; those that were not verified are neither accepted
    nor rejected."""
    hits = [hit for hit, _ in zip_longest(accepted, scores)]
    order = sorted(range(len(scores)), key=lambda node: (-scores[node], depths[node]))
    return [scores[node] for node in order], [depths[node] for node in order], [hits[node] for node in order]


_planners: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def planner_for(
    target: Any,
    drafter: Any,
    max_depth: int,
    max_nodes: int,
    depth: int | None = None,
    nodes: int | None = None,
    top_k: int = 1,
) -> DraftPlanner:
    """The planner of a target with a drafter and these knobs, with what it learned in earlier calls. Forgotten
    together with either of the two.

    Args:
        target, drafter: told apart by identity.
        max_depth, max_nodes, depth, nodes: see [`DraftPlanner`].
        top_k: branches a node; what is learned depends on it.
    """
    with _lock:
        by_drafter = _planners.setdefault(target, weakref.WeakKeyDictionary())
        by_knobs = by_drafter.setdefault(drafter, {})
        knobs = (max_depth, max_nodes, depth, nodes, top_k)
        if knobs not in by_knobs:
            by_knobs[knobs] = DraftPlanner(max_depth, max_nodes, depth, nodes)
        return by_knobs[knobs]
