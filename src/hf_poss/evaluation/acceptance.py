"""A target that accepts drafts by a script, where weights are random and nothing would be accepted."""

import math
from collections.abc import Sequence
from fractions import Fraction

import torch

from ..draft_tree import DraftTree
from ..modeling_poss import PosSModel


__all__ = ["Acceptance", "AcceptanceScript", "match_confidence"]

_SHORTEST_PERIOD = 50
_GOLDEN = (5**0.5 - 1) / 2


class Acceptance:
    """How many drafted tokens the rounds of a text accept: a pattern that repeats.

    Lengths are those of a drafter whose position k is accepted with rate a_k if all before were: a round accepts l or
    more with probability a_1 * ... * a_l. Their counts in a period are rounded to that, and the order is fixed, spread
    so that every stretch of rounds has nearly the mean of all.

    Args:
        rates: by draft position, 0 to 1; the last one goes on below the last position that has one.
        depth: draft positions.
        tau: mean acceptance length that the pattern has exactly; as near to the rates' as a period allows if None.

    Raises:
        ValueError: if a rate is not between 0 and 1, there are none, or tau is not between 1 and `depth` + 1.
    """

    def __init__(self, rates: Sequence[float], depth: int, tau: Fraction | None = None):
        if not rates or not all(0 <= rate <= 1 for rate in rates):
            raise ValueError(f"The acceptance rates are {list(rates)}; expected one or more from 0 to 1.")
        self.rates = [*rates[:depth], *[rates[-1]] * (depth - len(rates))]
        survival = [1.0]  # probability that a round accepts l or more
        for rate in self.rates:
            survival.append(survival[-1] * rate)
        tau = Fraction(sum(survival)).limit_denominator(100) if tau is None else tau
        if not 1 <= tau <= depth + 1:
            raise ValueError(
                f"A mean acceptance length of {float(tau):g} is impossible: {depth} draft positions allow 1 to "
                f"{depth + 1}."
            )
        period = tau.denominator * -(-_SHORTEST_PERIOD // tau.denominator)
        counts = _rounded([(a - b) * period for a, b in zip(survival, [*survival[1:], 0.0], strict=True)], period)
        _shift_to(counts, int((tau - 1) * period))
        in_order = [length for length, count in enumerate(counts) for _ in range(count)]
        places = sorted(range(period), key=lambda index: (index + 1) * _GOLDEN % 1)
        self.lengths = [length for _, length in sorted(zip(places, in_order, strict=True))]

    @classmethod
    def of(cls, text: str, depth: int) -> "Acceptance":
        """Reads "4.83", a mean acceptance length (tau), or "0.92,0.83,0.77", rates by draft position.

        Raises:
            ValueError: if it is neither, or impossible.
        """
        try:
            values = [Fraction(part.strip()) for part in text.split(",")]
        except (ValueError, ZeroDivisionError) as error:
            raise ValueError(
                f"The acceptance is {text!r}; expected a mean acceptance length like 4.83, or rates by draft position "
                "like 0.92,0.83,0.77."
            ) from error
        if len(values) > 1:
            return cls([float(value) for value in values], depth)
        tau = values[0].limit_denominator(100_000)
        return cls([_constant_rate(float(tau), depth)], depth, tau)

    @property
    def tau(self) -> float:
        """Mean over the pattern, the target's own token included."""
        return 1 + sum(self.lengths) / len(self.lengths)

    @property
    def mean_rate(self) -> float:
        """Mean over draft positions."""
        return sum(self.rates) / len(self.rates)


def _constant_rate(tau: float, depth: int) -> float:
    """The rate a of all positions with 1 + a + a^2 + ... + a^depth = tau, as near as 0 to 1 allows."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**k for k in range(depth + 1)) < tau else (low, middle)
    return high


def _rounded(shares: Sequence[float], total: int) -> list[int]:
    """Integers near `shares` with the sum `total`: the largest remainders are rounded up."""
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda index: counts[index] - shares[index])
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def _shift_to(counts: list[int], accepted: int) -> None:
    """Moves rounds between neighbouring lengths, from where most are, until the rounds accept `accepted` in all."""
    while surplus := sum(length * count for length, count in enumerate(counts)) - accepted:
        step = -1 if surplus > 0 else 1
        givers = range(1, len(counts)) if step < 0 else range(len(counts) - 1)
        giver = max(givers, key=lambda length: counts[length])
        counts[giver] -= 1
        counts[giver + step] += 1


class AcceptanceScript:
    """The picks of a target that accepts by a pattern, for `scripted_picks`; of one `generate` call.

    In round i a row accepts as many tokens as the pattern says at i: at a node above that depth the target picks the
    token of the node's first child, its best; elsewhere a token that no node carries. Rows start at different places
    of the pattern. Tensors only, and no wait for the device.

    Args:
        acceptance: the pattern.
        device: of the trees.
    """

    def __init__(self, acceptance: Acceptance, device: torch.device):
        self.lengths = torch.tensor(acceptance.lengths, device=device)
        self.rounds = torch.zeros((), dtype=torch.long, device=device)

    def __call__(self, tree: DraftTree, picks: torch.LongTensor) -> torch.LongTensor:
        """Picks int64 [rows, nodes] of the next round."""
        tokens, parents, depths = (part.to(self.lengths.device) for part in (tree.tokens, tree.parents, tree.depths))
        rows, nodes = tokens.shape
        period = self.lengths.shape[0]
        places = torch.arange(rows, device=tokens.device) * int(period * _GOLDEN) + self.rounds
        accepted = self.lengths[places % period]  # [rows]
        self.rounds += 1

        order = torch.arange(nodes, device=tokens.device).expand(rows, -1)
        children = torch.full_like(order, nodes).scatter_reduce(1, parents[:, 1:], order[:, 1:], "amin")
        follows = (children < nodes) & (depths < accepted[:, None])
        # Of the ids 0..nodes, one more than there are nodes, some id is free.
        taken = torch.zeros(rows, nodes + 2, dtype=torch.uint8, device=tokens.device)
        taken.scatter_(1, tokens.clamp(max=nodes + 1), 1)
        free = taken[:, : nodes + 1].argmin(-1, keepdim=True)  # [rows, 1]
        scripted = torch.where(follows, tokens.gather(1, children.clamp(max=nodes - 1)), free)
        return scripted.to(picks.device)


@torch.no_grad()
def match_confidence(poss: PosSModel, features: torch.Tensor, next_tokens: torch.LongTensor, rate: float) -> float:
    """Scales the head of the target that `poss` is attached to, in place, until drafts are as sure as they are right.

    Trees follow the drafter's probabilities, which random weights spread evenly over the vocabulary.

    Args:
        poss: attached to a target of random weights.
        features: [batch, rows, feature size] of the target.
        next_tokens: int64 [batch, rows].
        rate: the mean probability of the drafter's first choice that is wanted, over rows and draft positions.

    Returns:
        the mean that was reached.
    """
    reference = poss.reference

    def logits() -> torch.Tensor:  # [batch, rows * positions, draft vocab]
        head = poss.draft_head(reference)
        return torch.cat([head.logits(predicted) for predicted in poss.roll_out(features, next_tokens)], dim=1)

    unscaled = logits()
    low, high = -7.0, 7.0  # of the scale's natural logarithm
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if _mean_confidence(unscaled * math.exp(middle)) > rate else (middle, high)
    reference.lm_head.weight.mul_(math.exp(high))
    if reference.lm_head.weight is reference.embed_tokens.weight:  # drafts are to stay what they were
        poss.fc.weight[:, : poss.config.hidden_size].div_(math.exp(high))
    return _mean_confidence(logits())


def _mean_confidence(logits: torch.Tensor) -> float:
    """Mean over rows of the largest probability of logits [batch, rows, vocab]."""
    return logits.softmax(-1).amax(-1).mean().item()
