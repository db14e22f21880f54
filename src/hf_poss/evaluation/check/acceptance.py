"""Whether drafts are accepted at all, and whether acceptance breaks where one specialist hands over to the next."""

from collections.abc import Sequence

import numpy as np
import torch

from ...measures import expected_tau, position_acceptance
from ...statistics import GenerationStatistics
from ...training.metrics import boundary_drops
from ..significance import bootstrap_ratio_interval
from .findings import Finding, Verdict
from .roll_outs import RollOuts


__all__ = ["acceptance", "boundaries"]

# Rounds of published drafters cost 1.4 plain steps or more (EAGLE-3, HASS, GTO): with fewer tokens a round than this,
# drafting takes longer than it saves.
_POOR_TAU = 1.4
_LEVEL = 0.999
_FEWEST = 100  # rows
_SURELY = 0.5  # of texts that repeat one token, a guess is as good as the best drafter


def acceptance(roll_outs: RollOuts, greedy: GenerationStatistics | None) -> Finding:
    """Position 1 against the best constant guess, the most frequent token of the texts: specialists that read another
    target's features, or random ones, do not beat it.

    Args:
        greedy: of greedy `generate` with trees; None if there was none.
    """
    rows, hits, reached, accepted = roll_outs.counts.sum(0).tolist()
    pos_acc = position_acceptance(accepted, reached)
    every = torch.cat(roll_outs.continuations)
    guess = int(every.bincount().argmax())
    guessed = [int((tokens == guess).sum()) for tokens in roll_outs.continuations]
    own = roll_outs.counts[:, 1, 0].tolist()
    counted = [len(tokens) for tokens in roll_outs.continuations]
    interval = bootstrap_ratio_interval(np.subtract(own, guessed), counted, level=_LEVEL)
    numbers = {
        "rows": rows[0],
        "chain_pos_acc": pos_acc,
        "chain_tau": expected_tau(pos_acc),
        "constant_guess": sum(guessed) / max(len(every), 1),
        "above_guess": None if interval is None else list(interval),
        "greedy_tau": None if greedy is None else greedy.tau,
        "greedy_pos_acc": None if greedy is None else greedy.pos_acc,
    }
    told = (
        f"position 1 drafts {pos_acc[0]:.0%} of {rows[0]} tokens of the target's own text; always guessing its most "
        f"frequent token would draft {numbers['constant_guess']:.0%}"
    )
    if greedy is not None and greedy.rounds:
        told += f". Greedy trees: tau {greedy.tau:.2f}, pos-acc {_rates(greedy.pos_acc)}"
    if rows[0] < _FEWEST or interval is None:
        return Finding("acceptance", Verdict.SKIPPED, f"Too little text to tell: {told}.", numbers=numbers)
    if interval.low <= 0 and pos_acc[0] < _SURELY:
        return Finding(
            "acceptance",
            Verdict.FAILURE,
            f"Drafts are at the level of chance: {told}.",
            "These specialists do not read this target's features: use those that were trained for it, or train them.",
            numbers,
        )
    tau = numbers["chain_tau"] if greedy is None or not greedy.rounds else greedy.tau
    if tau < _POOR_TAU:
        return Finding(
            "acceptance",
            Verdict.WARNING,
            f"Few drafts are accepted: {told}.",
            f"With tau below {_POOR_TAU:g} drafting hardly pays. Train on, on text of the kind that you decode, best "
            "answers of the target itself (`hf-poss regenerate`).",
            numbers,
        )
    return Finding("acceptance", Verdict.OK, f"Drafts are accepted: {told}.", numbers=numbers)


def boundaries(roll_outs: RollOuts, positions_per_specialist: int) -> Finding:
    """Sharp drops of pos-acc at a specialist's first position, see [`boundary_drops`]."""
    counts = roll_outs.counts.sum(0).numpy()
    rates = position_acceptance(counts[3].tolist(), counts[2].tolist())
    numbers = {"chain_pos_acc": rates, "reached": counts[2].tolist()}
    if len(rates) <= positions_per_specialist:
        return Finding("boundaries", Verdict.OK, "One specialist drafts every position.", numbers=numbers)
    drops = boundary_drops(counts, positions_per_specialist)
    if drops:
        numbers["drops"] = [drop.position for drop in drops]
        told = " ".join(str(drop) for drop in drops)
        return Finding("boundaries", Verdict.WARNING, told, "Train on, or start all from one layer.", numbers)
    told = f"pos-acc does not break where specialists change: {_rates(rates)} along greedy text."
    return Finding("boundaries", Verdict.OK, told, numbers=numbers)


def _rates(values: Sequence[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values)
