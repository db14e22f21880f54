"""What a check found, and what all of them together say."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any


__all__ = ["Finding", "PairReport", "Verdict"]


class Verdict(str, Enum):
    """What a finding means for the pair."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Args:
        name: of the check.
        verdict: "skipped" where it could not be made, or had too little to tell.
        summary: what was found, with its numbers; of a skipped check why.
        remedy: what to do; empty if all is well.
        numbers: what the verdict rests on, as JSON can hold it.
    """

    name: str
    verdict: Verdict
    summary: str
    remedy: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def skipped(cls, name: str, reason: str) -> "Finding":
        return cls(name, Verdict.SKIPPED, reason)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict.value, "numbers": _as_json(self.numbers)}


@dataclass(frozen=True)
class PairReport:
    """All findings about a pair.

    Args:
        findings: in the order of the checks.
    """

    findings: Sequence[Finding]

    @property
    def is_sound(self) -> bool:
        """Whether no check failed; warnings do not count, nor do checks that were skipped."""
        return not self.of(Verdict.FAILURE)

    @property
    def verdict(self) -> str:
        """ "not sound", "sound with warnings" or "sound"."""
        if not self.is_sound:
            return "not sound"
        return "sound with warnings" if self.of(Verdict.WARNING) else "sound"

    def of(self, verdict: Verdict) -> list[Finding]:
        """The findings of a verdict."""
        return [finding for finding in self.findings if finding.verdict is verdict]

    def __getitem__(self, name: str) -> Finding:
        """The finding of a check.

        Raises:
            KeyError: if there is none of this name.
        """
        found = next((finding for finding in self.findings if finding.name == name), None)
        if found is None:
            raise KeyError(name)
        return found

    def to_dict(self) -> dict[str, Any]:
        return {"verdict": self.verdict, "findings": [finding.to_dict() for finding in self.findings]}


def _as_json(value: Any) -> Any:
    """Numbers that are not finite as null."""
    if isinstance(value, Mapping):
        return {name: _as_json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
