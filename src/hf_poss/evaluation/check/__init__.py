"""Whether a target and its specialists are a sound pair: checks, what they found, and a verdict."""

from .effort import FAST, THOROUGH, Effort
from .findings import Finding, PairReport, Verdict
from .run import check_pair


__all__ = ["FAST", "THOROUGH", "Effort", "Finding", "PairReport", "Verdict", "check_pair"]
