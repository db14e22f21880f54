"""The study's results by condition, seed and prompt, and what two conditions differ by."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_poss.evaluation.significance import Comparison, compare, corrected
from hf_poss.measures import mean_acceptance_length, position_acceptance


@dataclass
class Results:
    """What `collect.py` wrote.

    Args:
        conditions: by name "settings" and "seeds".
        hardware, versions: of the machine that trained and measured.
    """

    conditions: dict[str, Any]
    hardware: str
    versions: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> "Results":
        return cls(**json.loads(path.read_text()))

    def seeds(self, name: str) -> dict[str, Any]:
        return self.conditions[name]["seeds"] if name in self.conditions else {}

    def has(self, name: str, suite: str) -> bool:
        return any(suite in run["measured"] for run in self.seeds(name).values())

    def measured(self, name: str, suite: str) -> dict[str, dict[str, Any]]:
        """Counts by seed."""
        return {seed: run["measured"][suite] for seed, run in self.seeds(name).items() if suite in run["measured"]}

    def tau_by_seed(self, name: str, suite: str) -> dict[str, float]:
        """Micro average over prompts."""
        return {
            seed: mean_acceptance_length(sum(counts["tokens"]), sum(counts["rounds"]))
            for seed, counts in self.measured(name, suite).items()
        }

    def tau_by_prompt(self, name: str, suite: str, seeds: Sequence[str]) -> dict[int, float]:
        """Tokens over rounds of each prompt, in the mean over the seeds."""
        by_seed = [self.measured(name, suite)[seed] for seed in seeds]
        taus = [
            [mean_acceptance_length(*of) for of in zip(counts["tokens"], counts["rounds"], strict=True)]
            for counts in by_seed
        ]
        return {prompt: sum(of) / len(of) for prompt, of in enumerate(zip(*taus, strict=True))}

    def pos_acc_by_seed(self, name: str, suite: str) -> dict[str, list[float]]:
        return {
            seed: position_acceptance(counts["accepted"], counts["reached"])
            for seed, counts in self.measured(name, suite).items()
        }

    def parameters(self, name: str) -> int:
        return next(iter(self.seeds(name).values()))["training"]["parameters"]


@dataclass
class Difference:
    """One condition against another, in two units of observation.

    Args:
        by_seed: would another training run agree? n is the number of seeds.
        by_prompt: would other prompts agree, with these drafters? n is the number of prompts.
    """

    by_seed: Comparison
    by_prompt: Comparison


def differences(
    results: Results, pairs: Sequence[tuple[str, str]], suite: str, other_suite: str | None = None
) -> list[Difference]:
    """tau of the first of each pair less that of the second, paired; one family for the correction.

    Args:
        pairs: names of conditions; those that have no common seed are left out.
        suite: what they are tested by.
        other_suite: what the second one is tested by, if something else.
    """
    by_seed, by_prompt = [], []
    for a, b in pairs:
        ours, theirs = results.tau_by_seed(a, suite), results.tau_by_seed(b, other_suite or suite)
        common = sorted(set(ours) & set(theirs))
        if not common:
            continue
        ours, theirs = ({seed: of[seed] for seed in common} for of in (ours, theirs))
        prompts = results.tau_by_prompt(a, suite, common), results.tau_by_prompt(b, other_suite or suite, common)
        by_seed.append(compare(ours, theirs, names=(a, b), unit="seeds"))
        by_prompt.append(compare(*prompts, names=(a, b), unit="prompts"))
    return [Difference(*of) for of in zip(corrected(by_seed), corrected(by_prompt), strict=True)]
