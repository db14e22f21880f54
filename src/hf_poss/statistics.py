"""What generate calls accepted, position by position."""

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from .configuration_poss import specialist_index
from .measures import (
    added,
    by_specialist,
    mean_acceptance_length,
    mean_acceptance_length_macro,
    position_acceptance,
)


__all__ = [
    "CallRecord",
    "CallStatistics",
    "GenerationStatistics",
    "collect_statistics",
    "recorded_call",
]

TARGET = 0  # author of a token that the target itself picked; drafted tokens carry their draft position

DRAFTING = ("context", "passes", "tree")
VERIFYING = ("prompt", "verification")
PARTS = (*DRAFTING, *VERIFYING, "walk", "cache", "other")


@dataclass
class CallStatistics:
    """Counts of one row of a `generate` call. Lists are indexed by draft position - 1.

    Args:
        positions_per_specialist, num_specialists: of the drafter, to deal positions to specialists.
        rounds: draft and verification passes that the row took part in.
        tokens: tokens that the rounds emitted; a text's first token comes with the prompt's pass, before any round.
        authors: for each new token the draft position that proposed it, 0 where the target picked it.
        drafted: tokens proposed and verified.
        reached: rounds in which every position before was accepted and this one was drafted.
        accepted: of these, the rounds in which it was accepted.
    """

    positions_per_specialist: int
    num_specialists: int
    rounds: int = 0
    tokens: int = 0
    authors: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    reached: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def add_prompt_pass(self) -> None:
        """The token that the target picked before any draft."""
        self.authors.append(TARGET)

    def add_round(self, drafted: Sequence[int], accepted: int, emitted: int) -> None:
        """Adds one round.

        Args:
            drafted: tokens proposed, by draft position - 1.
            accepted: drafted tokens among the emitted ones.
            emitted: tokens that the round added to the text; at most `accepted` + 1.
        """
        self.rounds += 1
        self.tokens += emitted
        self.authors.extend(range(1, accepted + 1))
        self.authors.extend([TARGET] * (emitted - accepted))
        judged = min(emitted, len(drafted))
        _add(self.drafted, drafted)
        _add(self.reached, [1] * judged)
        _add(self.accepted, [1] * accepted)

    def specialist_of(self, author: int) -> int | None:
        """Specialist (0-based) that serves a draft position, None for the target."""
        if author == TARGET:
            return None
        return specialist_index(author, self.positions_per_specialist, self.num_specialists)


@dataclass
class CallRecord:
    """One `generate` call.

    Args:
        rows: counts by row of the batch.
        device: of the target.
        seconds: time by part. "prompt", the target's passes over it; "context", extending that of the specialists;
            "passes" of the draft; "tree", the choice of nodes to verify; "verification", the target's pass over them;
            "walk"; "cache", keeping what was accepted; and what is between these, "other".
        pass_seconds: time of the draft passes, by draft position - 1.
        rounds: of the call; one of a batch counts once.
        timed: whether parts are timed; else `seconds` stay 0, and nothing waits for the device.
    """

    rows: list[CallStatistics]
    device: torch.device
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    pass_seconds: list[float] = field(default_factory=list)
    rounds: int = 0
    timed: bool = True
    _part: str = "other"
    _position: int = 0
    _since: float = field(default_factory=time.perf_counter)

    def enter(self, part: str, position: int = 0) -> None:
        """Books the time since the last call on the part that was entered then, with the device's queue emptied.

        Args:
            part: that begins.
            position: draft position of a pass.
        """
        if not self.timed:
            return
        if self.device.type not in ("cpu", "meta"):
            torch.accelerator.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[self._part] += now - self._since
        if self._position:
            _add(self.pass_seconds, [0.0] * (self._position - 1) + [now - self._since])
        self._part, self._position, self._since = part, position, now


def _add(counts: list, more: Sequence[float]) -> None:
    counts[:] = added(counts, more)


@dataclass
class GenerationStatistics:
    """Sums over the `generate` calls inside [`collect_statistics`]. Lists are indexed by draft position - 1.

    Counts add up over rows, ratios are taken last.
    """

    records: list[CallRecord] = field(default_factory=list)
    timed: bool = True

    @property
    def calls(self) -> list[CallStatistics]:
        """Counts of every text that was written: one a row of each call."""
        return [row for record in self.records for row in record.rows]

    @property
    def rounds(self) -> int:
        """Draft phases with their verification; a batch's round counts once for each row that takes part in it."""
        return sum(call.rounds for call in self.calls)

    @property
    def tokens(self) -> int:
        """Tokens that the rounds emitted: the new tokens without the first of each text, which precedes any draft."""
        return sum(call.tokens for call in self.calls)

    @property
    def tau(self) -> float:
        """Mean acceptance length, micro average: tokens / rounds, the target's own tokens included."""
        return mean_acceptance_length(self.tokens, self.rounds)

    @property
    def tau_macro(self) -> float:
        """Mean acceptance length, macro average: mean over texts of tokens / rounds, as the papers report it."""
        calls = self.calls
        return mean_acceptance_length_macro([call.tokens for call in calls], [call.rounds for call in calls])

    @property
    def drafted(self) -> list[int]:
        """Tokens proposed and verified, by draft position."""
        return self._total("drafted")

    @property
    def reached(self) -> list[int]:
        """Rounds in which every position before was accepted and this one was drafted, by draft position."""
        return self._total("reached")

    @property
    def accepted(self) -> list[int]:
        """Rounds in which the position was accepted, by draft position."""
        return self._total("accepted")

    @property
    def pos_acc(self) -> list[float]:
        """accepted / reached by draft position: the conditional acceptance rate (PosS, pos-acc)."""
        return position_acceptance(self.accepted, self.reached)

    @property
    def drafted_by_specialist(self) -> list[int]:
        """Tokens proposed and verified, by specialist."""
        return self._by_specialist("drafted")

    @property
    def accepted_by_specialist(self) -> list[int]:
        """Accepted tokens, by specialist."""
        return self._by_specialist("accepted")

    @property
    def seconds(self) -> dict[str, float]:
        """Time by part, see [`CallRecord`]."""
        return {part: sum(record.seconds[part] for record in self.records) for part in PARTS}

    @property
    def pass_seconds(self) -> list[float]:
        """Time of the draft passes, by draft position."""
        total: list[float] = []
        for record in self.records:
            _add(total, record.pass_seconds)
        return total

    @property
    def passes(self) -> int:
        """Passes of the target over drafts; a batch's counts once, unlike in `rounds`."""
        return sum(record.rounds for record in self.records)

    @property
    def drafting_seconds(self) -> float:
        """Time in the drafter: extending its context, its passes, the tree."""
        return sum(self.seconds[part] for part in DRAFTING)

    @property
    def verifying_seconds(self) -> float:
        """Time in the target's passes, the prompt's included."""
        return sum(self.seconds[part] for part in VERIFYING)

    @property
    def other_seconds(self) -> float:
        """All other time of the decoding loop: picking tokens, caches, streaming."""
        return sum(self.seconds.values()) - self.drafting_seconds - self.verifying_seconds

    def _total(self, name: str) -> list[int]:
        total: list[int] = []
        for call in self.calls:
            _add(total, getattr(call, name))
        return total

    def _by_specialist(self, name: str) -> list[int]:
        total: list[int] = []
        for call in self.calls:
            _add(total, by_specialist(getattr(call, name), call.positions_per_specialist, call.num_specialists))
        return total


class _Collectors(threading.local):
    def __init__(self):
        self.active: list[GenerationStatistics] = []


_collectors = _Collectors()


@contextlib.contextmanager
def collect_statistics(timed: bool = True) -> Iterator[GenerationStatistics]:
    """Gathers what the `generate` calls with a `PosSModel` inside the block did, in this thread.

    Blocks may be nested; each sees the calls inside it. Outside of a block nothing is counted or timed.

    Args:
        timed: whether the parts of a round are timed, too. On an accelerator that empties its queue at every part,
            which makes calls slower; counts alone cost nothing.

    Example:

    ```python
    >>> with collect_statistics() as stats:
    ...     target.generate(**inputs, assistant_model=poss)
    >>> stats.tau, stats.pos_acc
    ```"""
    statistics = GenerationStatistics(timed=timed)
    _collectors.active.append(statistics)
    try:
        yield statistics
    finally:
        _collectors.active.pop()


@contextlib.contextmanager
def recorded_call(
    positions_per_specialist: int, num_specialists: int, device: torch.device, rows: int = 1
) -> Iterator[CallRecord | None]:
    """A `generate` call with its record, shared by the blocks that are open in this thread; None if there are none."""
    if not _collectors.active:
        yield None
        return
    call = CallRecord(
        [CallStatistics(positions_per_specialist, num_specialists) for _ in range(rows)],
        device,
        timed=any(statistics.timed for statistics in _collectors.active),
    )
    for statistics in _collectors.active:
        statistics.records.append(call)
    try:
        yield call
    finally:
        call.enter("other")
