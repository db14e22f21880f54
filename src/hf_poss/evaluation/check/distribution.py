"""Whether tokens that are sampled with drafts have the target's own distribution."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from ...statistics import collect_statistics
from ..timing import new_token_counts
from .findings import Finding, Verdict
from .losslessness import shapes
from .pair import Pair, text_logits
from .roll_outs import first_drafts


__all__ = ["ERROR_RATE", "RankCounts", "Sampling", "distribution"]

# Chance that a sound pair fails.
ERROR_RATE = 1e-3
_RANKS = 3  # of the most likely tokens that are not drafted, told one by one; the rest are one class
_CLASSES = 1 + _RANKS + 1
_FEWEST = 5.0  # expected tokens of a class; rarer ones are merged with the class before
_POWER = 0.8


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Args:
        temperature: that logits are divided by.
        top_p: share of the probability that is drawn from.
    """

    temperature: float = 1.0
    top_p: float = 1.0

    def arguments(self) -> dict[str, Any]:
        """Of `generate`."""
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}

    def probabilities(self, logits: torch.Tensor, slack: float = 0.0) -> torch.Tensor:
        """[rows, vocab], of logits [rows, vocab]; 0 where tokens are ruled out. `slack` is added to `top_p`."""
        processors = LogitsProcessorList()
        if self.temperature != 1.0:
            processors.append(TemperatureLogitsWarper(self.temperature))
        if self.top_p + slack < 1.0:
            processors.append(TopPLogitsWarper(self.top_p + slack))
        return processors(None, logits.clone()).double().softmax(-1)

    def __str__(self) -> str:
        return f"temperature {self.temperature:g}" + f", top_p {self.top_p:g}" * (self.top_p < 1)


SAMPLINGS = (Sampling(), Sampling(temperature=0.8, top_p=0.9))


class RankCounts:
    """How often the token that was drafted, the most likely one of the others, the second, the third and any other was
    drawn, and how often that was to be expected.

    Every token is compared with the target's distribution given the tokens before it, so the texts need not be alike.
    Given its prefix, the class of a token is multinomial; over tokens, counts minus expectations are a sum of
    independent or martingale differences, and their quadratic form in the summed covariance is chi-square distributed.

    Attributes:
        tokens: drawn.
        impossible: of these, tokens that the target rules out.
    """

    def __init__(self):
        self.tokens = self.impossible = 0
        self.observed = torch.zeros(_CLASSES, dtype=torch.double)
        self.expected = torch.zeros(_CLASSES, dtype=torch.double)
        self.covariance = torch.zeros(_CLASSES, _CLASSES, dtype=torch.double)

    def add(
        self,
        probabilities: torch.Tensor,
        tokens: torch.LongTensor,
        drafts: torch.LongTensor,
        possible: torch.Tensor | None = None,
    ) -> None:
        """Adds draws.

        Args:
            probabilities: [draws, vocab], the target's.
            tokens: int64 [draws].
            drafts: int64 [draws], what specialists draft there; -1 for nothing. They may depend on all that was drawn
                before.
            possible: [draws, vocab], above 0 where a token may be drawn; `probabilities` if None. For a support that
                rounding cannot narrow.
        """
        probabilities, tokens = probabilities.double().cpu(), tokens.cpu()
        there = (drafts >= 0)[:, None]
        index = drafts.clamp(min=0)[:, None]
        drafted = probabilities.gather(-1, index) * there  # [draws, 1]
        others = torch.where(
            there, probabilities.scatter(-1, index, -1.0), probabilities
        )  # the drafted one comes last
        top = others.topk(min(_RANKS, others.shape[-1] - 1), dim=-1)
        hits = (top.indices == tokens[:, None]).double()
        shares = _with_rest(drafted, top.values)  # [draws, classes]
        classes = _with_rest(((tokens == drafts)[:, None]).double(), hits)
        self.tokens += len(tokens)
        self.observed += classes.sum(0)
        self.expected += shares.sum(0)
        self.covariance += torch.diag(shares.sum(0)) - shares.T @ shares
        possible = probabilities if possible is None else possible.cpu()
        self.impossible += int((possible.gather(-1, tokens[:, None]) <= 0).sum())

    def p_value(self) -> float | None:
        """Chance that tokens of the target's distribution lie as far off; None if they cannot tell."""
        observed, expected, covariance = self._merged()
        if len(expected) < 2:
            return None
        # Classes add up to the number of tokens, so that one of them says nothing new.
        away = (observed - expected)[:-1]
        statistic = float(away @ torch.linalg.pinv(covariance[:-1, :-1], hermitian=True) @ away)
        freedom = torch.linalg.matrix_rank(covariance[:-1, :-1], hermitian=True).double()
        if not freedom:
            return None
        return float(torch.special.gammaincc(freedom / 2, torch.tensor(statistic, dtype=torch.double) / 2))

    def detectable(self, error_rate: float) -> float:
        """Shift of the share of drafted tokens that would be noticed in 4 of 5 runs, approximately."""
        if not self.tokens:
            return 1.0
        normal = NormalDist()
        deviations = normal.inv_cdf(1 - error_rate / 2) + normal.inv_cdf(_POWER)
        return min(1.0, deviations * float(self.covariance[0, 0]) ** 0.5 / self.tokens)

    def _merged(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Counts, expectations and covariance of classes that are not rare."""
        groups: list[list[int]] = []
        for index in range(len(self.expected)):
            if groups and float(self.expected[groups[-1]].sum()) < _FEWEST:
                groups[-1].append(index)
            else:
                groups.append([index])
        if len(groups) > 1 and float(self.expected[groups[-1]].sum()) < _FEWEST:
            last = groups.pop()
            groups[-1] += last
        merge = torch.zeros(len(groups), len(self.expected), dtype=torch.double)
        for row, group in enumerate(groups):
            merge[row, group] = 1
        return merge @ self.observed, merge @ self.expected, merge @ self.covariance @ merge.T


def _with_rest(drafted: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    """[draws, classes]: the drafted token's share, those of the first ranks, 0 for ranks that a small vocabulary
    lacks, and what is left."""
    ranks = torch.nn.functional.pad(ranks, (0, _RANKS - ranks.shape[-1]))
    told = torch.cat((drafted, ranks), dim=-1)
    return torch.cat((told, (1 - told.sum(-1, keepdim=True)).clamp(min=0)), dim=-1)


def distribution(pair: Pair, copies: int, new_tokens: int, seed: int = 0, nucleus: bool = True) -> Finding:
    """Samples every prompt many times with drafts, and tests the tokens against the target's own distribution.

    Chains and trees, at temperature 1 and with a temperature and top_p: one test each, whose error rates add up to
    [`ERROR_RATE`] at most (Bonferroni).

    A token is of the class of what specialists would draft there, or of its rank among the others. So it tells drafts
    that are favoured, wrong tokens that slip in, and settings that are not heeded. It does not tell faults that leave
    the shares of these classes as they are, nor ones that are rarer than `detectable`.

    Args:
        copies: rows of a call, all of one prompt.
        new_tokens: of each row.
        seed: of torch's default generators.
        nucleus: with top_p; its boundary moves where passes round differently, as in half precision.
    """
    samplings = SAMPLINGS if nucleus else SAMPLINGS[:1]
    tests = [(contestant, sampling) for contestant in shapes(pair) for sampling in samplings]
    error_rate = ERROR_RATE / len(tests)
    results, drafted, accepted, generator = [], 0, 0, seed
    for contestant, sampling in tests:
        counts = RankCounts()
        for prompt in pair.prompts:
            torch.manual_seed(generator)
            generator += 1
            with contestant.set_up(), collect_statistics(timed=False) as stats:
                sequences = pair.generate(
                    [prompt] * copies,
                    max_new_tokens=new_tokens,
                    **sampling.arguments(),
                    **contestant.arguments,
                )
            drafted, accepted = drafted + sum(stats.drafted), accepted + sum(stats.accepted)
            _add_texts(counts, pair, sequences, len(prompt), sampling)
        results.append(_Result(contestant.name, str(sampling), counts, counts.p_value(), error_rate))
    return _finding(results, drafted, accepted)


def _add_texts(
    counts: RankCounts, pair: Pair, sequences: torch.LongTensor, prompt_length: int, sampling: Sampling
) -> None:
    lengths = new_token_counts(sequences, prompt_length, pair.eos_token_ids)
    drafts = first_drafts(pair, sequences)
    rows = zip(sequences[:, prompt_length:].cpu(), drafts[:, prompt_length:], lengths, strict=True)
    for logits in text_logits(pair.target, sequences, prompt_length):
        for of_row in logits:  # [new tokens, vocab]
            tokens, drafted, length = next(rows)
            probabilities = sampling.probabilities(of_row[:length])
            possible = sampling.probabilities(of_row[:length], slack=1e-3)
            counts.add(probabilities, tokens[:length], drafted[:length], possible)


@dataclass(frozen=True)
class _Result:
    drafts: str
    sampling: str
    counts: RankCounts
    p_value: float | None
    error_rate: float

    @property
    def failed(self) -> bool:
        return self.counts.impossible > 0 or (self.p_value is not None and self.p_value < self.error_rate)

    def to_dict(self) -> dict[str, Any]:
        return {
            "drafts": self.drafts,
            "sampling": self.sampling,
            "tokens": self.counts.tokens,
            "p_value": self.p_value,
            "observed": self.counts.observed.tolist(),
            "expected": self.counts.expected.tolist(),
            "impossible": self.counts.impossible,
            "detectable_shift": self.counts.detectable(self.error_rate),
        }

    def __str__(self) -> str:
        if self.counts.impossible:
            return f"{self.drafts}, {self.sampling}: {self.counts.impossible} tokens that the target rules out"
        shares = (self.counts.observed[0] / self.counts.tokens, self.counts.expected[0] / self.counts.tokens)
        return (
            f"{self.drafts}, {self.sampling}: p = {self.p_value:.2g}, {shares[0]:.1%} of the tokens are what is "
            f"drafted, expected {shares[1]:.1%}"
        )


def _finding(results: Sequence[_Result], drafted: int, accepted: int) -> Finding:
    numbers = {
        "error_rate": ERROR_RATE,
        "drafted": drafted,
        "accepted": accepted,
        "tests": [result.to_dict() for result in results],
    }
    name, tokens = "distribution", sum(result.counts.tokens for result in results)
    if not drafted:
        return Finding(name, Verdict.SKIPPED, "The target sampled without drafts here; see the log.", numbers=numbers)
    failed = [result for result in results if result.failed]
    if failed:
        return Finding(
            name,
            Verdict.FAILURE,
            f"Sampled tokens do not have the target's distribution ({'; '.join(map(str, failed))}; {tokens} tokens; a "
            f"sound pair fails once in {1 / ERROR_RATE:.0f} runs).",
            "Run again with another `--seed`. If it fails again, do not sample with this pair: look for code that "
            "changes `generate`, and report it with this output.",
            numbers,
        )
    told = [result for result in results if result.p_value is not None]
    if not told:
        reason = "The target's distribution is too concentrated on one token to tell anything; pass other prompts."
        return Finding(name, Verdict.SKIPPED, reason, numbers=numbers)
    least = min(result.p_value for result in told)
    shift = max(result.counts.detectable(result.error_rate) for result in told)
    return Finding(
        name,
        Verdict.OK,
        f"{tokens} tokens sampled with drafts have the target's distribution: lowest p of {len(told)} tests "
        f"{least:.2g}. A sound pair fails once in {1 / ERROR_RATE:.0f} runs; a shift of {100 * shift:.1f} percentage "
        "points in the share of drafted tokens would be noticed in about 4 of 5.",
        numbers=numbers,
    )
