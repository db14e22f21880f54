"""Where drafting, another draft position and another specialist begin to pay for themselves.

With a_k the share of the rounds that accepted positions 1..k-1 in which k is accepted, too (see
[`~hf_poss.measures.continuation`]), a round of depth K emits tau = 1 + sum over k of a_1 * ... * a_k tokens, and its
cost in plain steps is rho; the speed-up is tau / rho (Leviathan et al., arXiv 2211.17192, theorem 3.8, with a rate and
a price of each position; see [`hf_poss.measures`]).
"""

from collections.abc import Callable, Sequence

from ..measures import expected_tau, round_cost, speed_up
from ..round_costs import RoundCosts


__all__ = ["best_depth", "break_even_batch", "paying_gain", "rates_to", "speed_up_by_depth"]

_STEPS = 60  # halvings of an interval of at most 1


def rates_to(acceptance: Sequence[float], depth: int) -> list[float]:
    """Acceptance of draft positions 1 to `depth`; the last rate goes on below the last position that has one.

    Raises:
        ValueError: if there is no rate, or one is not from 0 to 1.
    """
    if not acceptance or not all(0 <= rate <= 1 for rate in acceptance):
        raise ValueError(f"The acceptance by position is {list(acceptance)}; expected one rate or more from 0 to 1.")
    return [*acceptance[:depth], *[acceptance[-1]] * (depth - len(acceptance))]


def speed_up_by_depth(
    costs: RoundCosts, acceptance: Sequence[float], depth: int, nodes: Callable[[int], int]
) -> list[float]:
    """tau(K) / rho(K) of drafts of 0 to `depth` positions; 1 at 0, which is plain decoding.

    rho(K) = (context + d_1 + ... + d_K + verification(nodes(K)) + overhead) / plain. With trees, acceptance is that of
    trees of the same size.

    Args:
        costs: of a round.
        acceptance: acceptance by draft position - 1, see [`rates_to`].
        depth: the deepest.
        nodes: that are verified at a depth, the root included: K + 1 of a chain.
    """
    rates = rates_to(acceptance, depth)
    return [
        expected_tau(rates[:deep]) / round_cost(costs.of_round(deep, nodes(deep)), 1, costs.plain, 1)
        for deep in range(depth + 1)
    ]


def best_depth(speed_ups: Sequence[float]) -> int:
    """The depth with the highest speed-up, the lowest of those that are equal; one more position does not pay.

    Position K + 1 pays if a_1 * ... * a_(K+1) / (d_(K+1) + what its nodes add to the verification) > tau(K) / time of
    the round: its tokens a second against those of the round without it.

    Args:
        speed_ups: by depth from 0 on, see [`speed_up_by_depth`].
    """
    return max(range(len(speed_ups)), key=lambda depth: speed_ups[depth])


def paying_gain(
    acceptance: Sequence[float], depth: int, first: int, round_seconds: float, extra_seconds: float
) -> float | None:
    """The acceptance gain at which another specialist pays for itself.

    It serves positions `first` to `depth`, and lengthens a round of R seconds by E: its keys and values of every
    committed token and of the nodes, and its weights, which no pass before has brought near. The gain is the least
    g >= 0 with

        tau(a_1, ..., a_(first-1), min(a_first + g, 1), ..., min(a_depth + g, 1)) / tau(a) = (R + E) / R.

    Args:
        acceptance: acceptance by draft position - 1 without it, see [`rates_to`].
        depth: draft positions a round.
        first: the first position that it serves.
        round_seconds: R, of a round without it.
        extra_seconds: E.

    Returns:
        g, where 0.01 is one point of acceptance; 0 if the round gets no longer; None if even certain acceptance from
        `first` on would not pay.

    Raises:
        ValueError: if `first` is not one of the positions, or R is no time.
    """
    if not 1 <= first <= depth or round_seconds <= 0:
        raise ValueError(
            f"A specialist from position {first} of {depth} on, and rounds of {round_seconds} s; expected one of the "
            "positions and a time above 0."
        )
    rates = rates_to(acceptance, depth)
    wanted = expected_tau(rates) * (round_seconds + extra_seconds) / round_seconds

    def tau(gain: float) -> float:
        return expected_tau([*rates[: first - 1], *(min(rate + gain, 1.0) for rate in rates[first - 1 :])])

    if tau(0.0) >= wanted:
        return 0.0
    if tau(1.0) < wanted:
        return None
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if tau(middle) >= wanted else (middle, high)
    return high


def break_even_batch(
    rows: Sequence[int], plain_seconds: Sequence[float], round_seconds: Sequence[float], tau: float
) -> int | None:
    """The smallest batch at which drafting does not pay: tau * plain(B) / round(B) <= 1 for all rows together, with
    times between measured batches on a line.

    A step of B rows emits B tokens, a round of B rows B * tau: rows cancel, and what decides is how much faster the
    round's price grows, as its verification is bound by arithmetic first.

    Args:
        rows: batches that were measured, increasing.
        plain_seconds, round_seconds: of a step and of a round, by batch.
        tau: tokens a round and row.

    Returns:
        the batch; None if drafting pays up to the largest one.

    Raises:
        ValueError: if batches do not increase, or times are missing.
    """
    if not rows or list(rows) != sorted(set(rows)) or not len(rows) == len(plain_seconds) == len(round_seconds):
        raise ValueError(
            f"Batches {list(rows)} with {len(plain_seconds)} and {len(round_seconds)} times; expected increasing ones "
            "with a time of each."
        )
    for batch in range(rows[0], rows[-1] + 1):
        plain, round_ = (_between(rows, seconds, batch) for seconds in (plain_seconds, round_seconds))
        if speed_up(batch * tau, round_, batch, plain) <= 1:
            return batch
    return None


def _between(sizes: Sequence[int], values: Sequence[float], size: int) -> float:
    """The value at a size, on a line between its neighbours."""
    above = next(index for index, other in enumerate(sizes) if other >= size)
    if sizes[above] == size:
        return values[above]
    share = (size - sizes[above - 1]) / (sizes[above] - sizes[above - 1])
    return values[above - 1] + share * (values[above] - values[above - 1])
