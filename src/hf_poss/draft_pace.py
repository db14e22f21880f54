"""Whether drafting pays at the prices of a call: what it brings, and plain decoding too, by the newest rounds."""

import statistics
from collections import deque

from .round_costs import RoundCosts


__all__ = ["Pace", "RecentMean", "TrialBudget"]


class RecentMean:
    """A mean that forgets: of about the last `window` values.

    Args:
        window: in values.
        value, weight: to begin with: as if so many values had been seen.
    """

    def __init__(self, window: float, value: float = 0.0, weight: float = 0.0):
        self._keep = 1 - 1 / window
        self.total, self.weight = value * weight, weight

    def add(self, value: float) -> None:
        self.total = self.total * self._keep + value
        self.weight = self.weight * self._keep + 1

    @property
    def value(self) -> float:
        return self.total / self.weight if self.weight else 0.0


class TrialBudget:
    """Time that may go into finding out, by trying, whether the other way of decoding is faster.

    Args:
        share: of all time.
    """

    def __init__(self, share: float = 0.01):
        self.share = share
        self.elapsed, self.lost = 0.0, 0.0  # seconds

    def allows(self, step: float) -> bool:
        """Whether another trial may begin, where a plain step takes `step` seconds. The time of two hundred steps is
        lent, as the first trial may have been bad luck."""
        return self.lost <= self.share * (self.elapsed + 200 * step)


class Pace:
    """What drafting and plain decoding bring at one set of costs; which of them is in use, and when the other is
    tried again: ever more rarely, as long as it does not turn out better.

    Args:
        costs: of a round.
        tokens: that a drafting round can be expected to bring a row, if known.
        seconds: that it then takes.
    """

    FIRST_GAP, LAST_GAP = 8, 256  # plain rounds between two trials of drafting; fewer where trials cost little
    TRIAL_SHARE = 0.0035  # of the time, for trials at the last gap
    FIRST_CHECK, LAST_CHECK = 16, 1024  # drafting rounds between two plain ones
    TRIAL, PATIENCE = 4, 1.0  # rounds that a trial takes to succeed; plain steps by which it may fall behind
    BETTER = 0.98  # of the plain speed: so little is no reason to stop, as it may be chance

    def __init__(self, costs: RoundCosts, tokens: float = 0.0, seconds: float = 0.0):
        known = 4.0 if tokens else 0.0
        # Tokens of a row in a drafting round. Expected ones vary less than accepted ones; what they are wrong by
        # changes slowly, and is taken from more rounds.
        self._expected, self._error = RecentMean(24, tokens, known), RecentMean(96, 0.0, 8.0)
        self._seconds = RecentMean(24, seconds, known)
        self._late: deque[float] = deque(maxlen=15)  # seconds of drafting rounds beyond their price
        self._steps: deque[float] = deque(maxlen=15)  # seconds of plain rounds
        self.costs, self.surcharge, self.plain = costs, 0.0, costs.plain
        self._drafting, self.on_trial = True, not tokens
        self._gap, self._idle = self.FIRST_GAP // 2, 0
        # In plain steps: by how much this trial is behind plain decoding, and what a round of trials costs.
        self._behind, self._loss = 0.0, RecentMean(8)
        self._check_gap, self._unchecked = self.FIRST_CHECK, 0

    @property
    def speed(self) -> float:
        """Tokens of a row a second while drafting; 0 if nothing is known."""
        if not self._seconds.weight:
            return 0.0
        return max(self._expected.value + self._error.value, 1.0) / self._seconds.value

    def drafts(self, budget: TrialBudget) -> bool:
        """Whether the round that begins is to draft."""
        if not self._drafting:
            self._idle += 1
            if self._idle <= self._gap or not budget.allows(self.plain):
                return False
            self._drafting, self.on_trial, self._idle, self._behind = True, True, 0, 0.0
            self._expected, self._seconds = RecentMean(24), RecentMean(24)
            return True
        rounds = self._seconds.weight
        if self._behind > self.PATIENCE if self.on_trial else rounds > 3 and self.speed < self.BETTER / self.plain:
            last = min(max(int(self._loss.value / self.TRIAL_SHARE), 2 * self.FIRST_GAP), self.LAST_GAP)
            self._gap = min(2 * self._gap, last) if self.on_trial else self.FIRST_GAP
            self._drafting, self.on_trial = False, False
            return False
        if self.on_trial and rounds > self.TRIAL - 0.5 and self._behind <= 0:  # weights are a little below counts
            self.on_trial, self._gap = False, self.FIRST_GAP
        return not self._checks(budget)

    def _checks(self, budget: TrialBudget) -> bool:
        """Whether a plain step is due, to see how long it takes by now."""
        self._unchecked += bool(self._late)  # where nobody tells times, there is nothing to see
        if self._unchecked <= self._check_gap or not self.speed or not budget.allows(self.plain):
            return False
        self._unchecked, self._check_gap = 0, min(2 * self._check_gap, self.LAST_CHECK)
        budget.lost += max(self.plain - 1 / self.speed, 0.0)
        return True

    def observe_plain(self, seconds: float | None, budget: TrialBudget) -> None:
        """Books a plain round, with the seconds that it took if known."""
        budget.elapsed += self.plain
        if seconds is not None:
            self._steps.append(seconds)
            if len(self._steps) >= 3:
                self.plain = max(statistics.median(self._steps), 1e-9)

    def observe_draft(
        self, depth: int, nodes: int, tokens: float, expected: float, seconds: float | None, budget: TrialBudget
    ) -> None:
        """Books a round that drafted.

        Args:
            depth: draft passes.
            nodes: that were verified, of a row.
            tokens, expected: that it brought and was to be expected to bring, of a row.
            seconds: that it took, if known.
        """
        priced = self.costs.of_round(depth, nodes)
        if seconds is not None:
            self._late.append(seconds - priced)
            if len(self._late) >= 3:
                self.surcharge = statistics.median(self._late)  # the median, as a round may have waited for something
        taken = max(priced + self.surcharge, 1e-9)
        hoped = max(expected, tokens) if self.on_trial else expected
        self._behind += taken / self.plain - hoped
        self._expected.add(hoped)
        self._error.add(tokens - expected)
        self._seconds.add(taken)
        budget.elapsed += taken
        if self.on_trial:
            loss = max(taken - tokens * self.plain, 0.0)
            self._loss.add(loss / self.plain)
            budget.lost += loss
