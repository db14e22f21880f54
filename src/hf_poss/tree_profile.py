"""What the newest trees were like, to choose the shape of the next before it is drafted."""

from collections.abc import Sequence

from .round_costs import RoundCosts


__all__ = ["TreeProfile"]


class TreeProfile:
    """Mean of the newest trees, by depth and rank, and the best shape for a tree like that.

    Args:
        max_depth: draft positions at most.
        max_nodes: nodes of a verification at most, the root included.
        depth, nodes: where they are given.
    """

    RATE = 1 / 16  # weight of the newest tree

    def __init__(self, max_depth: int, max_nodes: int, depth: int | None, nodes: int | None):
        self.max_depth, self.max_nodes, self.depth, self.nodes = max_depth, max_nodes, depth, nodes
        # [depth][rank]: accepted nodes to be expected of a row's best nodes, best first, of trees so deep
        self._ranks: list[list[float]] = [[] for _ in range(max_depth + 1)]
        self._seen = [0] * (max_depth + 1)  # trees, by depth
        self._newest = 0  # depth
        self._turn = self._choices = 0

    def observe(self, depth: int, expected: Sequence[float], depths: Sequence[int]) -> None:
        """Adds a row's tree.

        Args:
            depth: passes that it was drafted with.
            expected: probability of each node to be accepted, likeliest path first.
            depths: of the nodes.
        """
        self._newest = depth
        self._update(depth, expected)
        if depth > 1:  # and one of the shallower trees that it holds, in turn
            self._turn = self._turn % (depth - 1) + 1
            nodes = zip(expected, depths, strict=True)
            self._update(self._turn, [value for value, own in nodes if own <= self._turn])

    def _update(self, depth: int, values: Sequence[float]) -> None:
        self._seen[depth] += 1
        before, rate = self._ranks[depth], max(1 / self._seen[depth], self.RATE)
        mean = [old + rate * (new - old) for old, new in zip(before, values, strict=False)]
        self._ranks[depth] = [*mean, *(values[len(before) :] or before[len(values) :])]

    def shape(self, costs: RoundCosts, rows: int, price: float, room: int) -> tuple[int, int]:
        """Depth and nodes of the next tree.

        Args:
            costs: of a round.
            rows: rows of the batch.
            price: tokens that a second is worth.
            room: draft positions at most.
        """
        self._choices += 1
        known = min(self._newest, room) if self.depth is None else room
        if not self._ranks[known]:
            depth = min(2, room) if self.depth is None else room
            return depth, self.nodes or min(self.max_nodes, 1 + 4 * depth)
        depths = range(1, known + 1) if self.depth is None else [known]
        trees = [(*self._best_size(costs, rows, price, self._ranks[depth]), depth) for depth in depths]
        if known < room:
            trees.append(self._one_deeper(costs, rows, price, trees))
        _, size, depth = max((worth - price * costs.passes(depth), size, depth) for worth, size, depth in trees)
        return depth, size

    def _one_deeper(
        self, costs: RoundCosts, rows: int, price: float, trees: Sequence[tuple[float, int, int]]
    ) -> tuple[float, int, int]:
        """Worth, size and depth of a tree that is one deeper than the newest. Such trees may have been seen, but long
        ago: so now and then, its last level is taken to be to the one before as that was to its own."""
        worth, size, depth = trees[-1]
        if self._seen[depth + 1] >= 4 and self._choices % 4:
            return (*self._best_size(costs, rows, price, self._ranks[depth + 1]), depth + 1)
        values = [-rows, 0.0, *(value for value, _, _ in trees)]  # the root is certain
        last, before = values[-1] - values[-2], values[-2] - values[-3]
        ratio = min(max(last / max(before, 1e-9), 0.0), 0.95)
        return worth + last * ratio, self.nodes or min(size + 1, self.max_nodes), depth + 1

    def _best_size(self, costs: RoundCosts, rows: int, price: float, ranks: Sequence[float]) -> tuple[float, int]:
        """What the best choice of nodes is worth, in tokens net of their price, and its size with the root."""
        if self.nodes is not None:
            return rows * sum(ranks[: self.nodes - 1]), self.nodes
        # Somewhat beyond what was seen, as if the next nodes were like the last: so trees can grow.
        columns = [*ranks, *[ranks[-1]] * (1 + len(ranks) // 4)][: self.max_nodes - 1]
        best, most, value, root = 2, -float("inf"), 0.0, costs.verification(1)
        for size, column in enumerate(columns, start=2):
            value += rows * column
            net = value - price * (costs.verification(size) - root)
            if net > most:
                best, most = size, net
        return most, best
