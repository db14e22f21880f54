"""What speculative decoding is measured by, each measure once.

Arguments are counts and sums, which add up over texts, processes and seeds (see [`added`]); ratios are taken last. A
ratio of nothing is 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from .configuration_poss import specialist_index


__all__ = [
    "DriftSums",
    "added",
    "by_specialist",
    "continuation",
    "expected_tau",
    "mean_acceptance_length",
    "mean_acceptance_length_macro",
    "node_acceptance",
    "position_acceptance",
    "round_cost",
    "speed_up",
]


def added(counts: Sequence[float], more: Sequence[float]) -> list[float]:
    """Counts by draft position - 1, of two sources together; the shorter one has 0 where it ends."""
    return [one + other for one, other in zip_longest(counts, more, fillvalue=0)]


def mean_acceptance_length(tokens: int, rounds: int) -> float:
    """tau, micro average: tokens / rounds (Leviathan et al., arXiv 2211.17192, section 3.1; EAGLE).

    Args:
        tokens: emitted by rounds, the target's own token of each round included; a text's first token comes with the
            prompt's pass and belongs to no round, so that tau is K + 1 at most.
        rounds: draft phases with their verification. In a batch, a row's own.
    """
    return _ratio(tokens, rounds)


def mean_acceptance_length_macro(tokens: Sequence[int], rounds: Sequence[int]) -> float:
    """tau, macro average: the mean over texts of tokens / rounds, which PosS, EAGLE and HASS report.

    Texts without a round are left out. A short text weighs as much as a long one, unlike in
    [`mean_acceptance_length`].

    Args:
        tokens, rounds: by text.
    """
    taus = [_ratio(count, of) for count, of in zip(tokens, rounds, strict=True) if of]
    return _ratio(sum(taus), len(taus))


def position_acceptance(accepted: Sequence[int], reached: Sequence[int]) -> list[float]:
    """pos-acc of draft position k: accepted_k / reached_k (PosS, arXiv 2506.03566, section 2).

    Conditional: only rounds count in which positions 1..k-1 were accepted and position k was drafted. With a tree, a
    position is accepted if any of its nodes is.

    Args:
        accepted: rounds in which the position was accepted, by draft position - 1; positions at the end may be
            missing.
        reached: rounds in which every position before was accepted and this one was drafted, likewise.
    """
    filled = [*accepted, *[0] * (len(reached) - len(accepted))]
    return [_ratio(hits, rounds) for hits, rounds in zip(filled, reached, strict=True)]


def continuation(accepted: Sequence[int], rounds: int) -> list[float]:
    """Share of the rounds that accepted draft positions 1..k-1 in which k was accepted, too: accepted_k /
    accepted_(k-1), with accepted_0 = rounds.

    As pos-acc, but rounds whose tree ends before k count as rejected. So [`expected_tau`] of it is the rounds' own
    tau, 1 + sum over k of accepted_k / rounds, where that of pos-acc is tau if every round drafted every position.

    Args:
        accepted: rounds in which the position was accepted, by draft position - 1.
        rounds: all of them.

    Returns:
        by draft position - 1, up to the first one that no round accepted.
    """
    rates, before = [], rounds
    for count in accepted or [0]:
        if not before:
            break
        rates.append(count / before)
        before = count
    return rates


def node_acceptance(accepted: Sequence[int], drafted: Sequence[int]) -> list[float]:
    """Acceptance per node: accepted_k / drafted_k, the share of the verified nodes that entered the text.

    Of a chain, at most pos-acc: nodes behind a rejected one count as drafted. Of a tree, 1 / its width at most.

    Args:
        accepted: drafted tokens that entered the text, by draft position - 1 or by specialist.
        drafted: nodes that the target verified, likewise.
    """
    return position_acceptance(accepted, drafted)


def by_specialist(counts: Sequence[float], positions_per_specialist: int, num_specialists: int) -> list[float]:
    """Counts by draft position - 1 summed over each specialist's span: s(k) = min((k - 1) // n, S - 1) (PosS, section
    3.1)."""
    totals = [0] * num_specialists
    for position, count in enumerate(counts, start=1):
        totals[specialist_index(position, positions_per_specialist, num_specialists)] += count
    return totals


def expected_tau(pos_acc: Sequence[float]) -> float:
    """tau of rounds that draft every position: 1 + sum over k of the product of pos-acc of 1..k.

    Leviathan et al., equation 1, with an acceptance rate of each position: for one rate a and K positions it is
    (1 - a^(K+1)) / (1 - a).
    """
    total, alive = 1.0, 1.0
    for rate in pos_acc:
        alive *= rate
        total += alive
    return total


def speed_up(tokens: int, seconds: float, plain_tokens: int, plain_seconds: float) -> float:
    """Tokens a second over those of plain decoding: (tokens / seconds) / (plain tokens / plain seconds).

    The papers' speed-up ratio if the times are of whole calls, the pass over the prompt included; tau / rho (see
    [`round_cost`]) if they are of what follows it.

    Args:
        tokens, seconds: of the texts that were drafted for.
        plain_tokens, plain_seconds: of the same prompts, without drafts, in the same mode on the same machine.
    """
    return _ratio(_ratio(tokens, seconds), _ratio(plain_tokens, plain_seconds))


def round_cost(seconds: float, rounds: int, plain_seconds: float, plain_steps: int) -> float:
    """rho: the time of a round in plain decoding steps, (seconds / rounds) / (plain seconds / plain steps).

    c * gamma + 1 in Leviathan et al., theorem 3.8, where a draft step costs c of a plain step and verification is
    free.

    Args:
        seconds: of the rounds, without the pass over the prompt.
        rounds: passes of the target over drafts; one of a batch counts once.
        plain_seconds, plain_steps: of plain decoding, without the pass over the prompt.
    """
    return _ratio(_ratio(seconds, rounds), _ratio(plain_seconds, plain_steps))


@dataclass
class DriftSums:
    """Feature drift by draft position: how far the features that specialists predict lie from the target's.

    Errors of feature-level drafters pile up with depth (PosS, section 2; HASS, arXiv 2408.15766, figure 1). Lists are
    indexed by draft position - 1, and hold sums over rows of predicted features.

    Args:
        rows: predicted features that were compared.
        cosine: sum of cos(predicted, target).
        norm_ratio: sum of |predicted| / |target|.
    """

    rows: list[int] = field(default_factory=list)
    cosine: list[float] = field(default_factory=list)
    norm_ratio: list[float] = field(default_factory=list)

    def __add__(self, other: "DriftSums") -> "DriftSums":
        return DriftSums(
            added(self.rows, other.rows), added(self.cosine, other.cosine), added(self.norm_ratio, other.norm_ratio)
        )

    @property
    def mean_cosine(self) -> list[float]:
        """Mean cosine similarity; 1 without drift."""
        return position_acceptance(self.cosine, self.rows)

    @property
    def mean_norm_ratio(self) -> list[float]:
        """Mean ratio of norms; 1 without drift."""
        return position_acceptance(self.norm_ratio, self.rows)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0
