"""Whether a difference is more than chance: paired tests, effect sizes, intervals, Holm's correction.

A question, not a token or a round, is the unit that is drawn: rounds of one text depend on each other. Intervals are
BCa bootstrap intervals (Efron, "Better bootstrap confidence intervals", 1987), made from resamples of whole questions;
those of a difference over few pairs, such as training seeds, are Student's.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np


__all__ = [
    "Comparison",
    "Interval",
    "bootstrap_interval",
    "bootstrap_ratio_interval",
    "bootstrap_sums_interval",
    "compare",
    "corrected",
    "effect_size",
    "holm",
    "mean_and_deviation",
    "student_interval",
]

_NORMAL = NormalDist()
_FEW_PAIRS = 10  # resamples of fewer vary too little, and intervals made of them miss too often
# Cohen, "Statistical Power Analysis for the Behavioral Sciences", 1988
_EFFECTS = ((0.2, "negligible"), (0.5, "small"), (0.8, "medium"), (math.inf, "large"))


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """A paired comparison of two drafters. As text, a sentence with interval, effect size, p-value and n.

    Args:
        a, b: what is compared.
        measure: of which the values are, such as "tau".
        unit: what a pair is of.
        n: pairs.
        left_out: units that only one of the two has.
        mean_a, mean_b: over the pairs.
        level: of the interval; `1 - level` is the share of false alarms that is allowed.
        interval: of the mean difference a - b, by bootstrap, of fewer than 10 pairs Student's; None of one pair or
            none.
        effect_size: Cohen's d_z, see [`effect_size`].
        p_value: of the paired t-test, two-sided; None of one pair or none.
        p_bootstrap: of the paired bootstrap, two-sided, likewise.
        p_adjusted, p_bootstrap_adjusted: these after Holm's correction over `family` comparisons.
        family: tests among which this one was made, see [`corrected`].
    """

    a: str
    b: str
    measure: str
    unit: str
    n: int
    left_out: int
    mean_a: float
    mean_b: float
    level: float
    interval: Interval | None
    effect_size: float | None
    p_value: float | None
    p_bootstrap: float | None
    p_adjusted: float | None
    p_bootstrap_adjusted: float | None
    family: int = 1

    @property
    def difference(self) -> float:
        """Mean of a - b."""
        return self.mean_a - self.mean_b

    @property
    def significant(self) -> bool:
        """Whether both corrected p-values, the t-test's and the bootstrap's, are below `1 - level`."""
        values = (self.p_adjusted, self.p_bootstrap_adjusted)
        return all(value is not None and value < 1 - self.level for value in values)

    @property
    def effect_name(self) -> str:
        """The effect size in a word: below 0.2 negligible, 0.5 small, 0.8 medium, else large (Cohen, 1988)."""
        if self.effect_size is None:
            return "undefined"
        return next(name for limit, name in _EFFECTS if abs(self.effect_size) < limit)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, with what follows from them and the sentence."""
        return {
            **asdict(self),
            "interval": None if self.interval is None else list(self.interval),
            "difference": self.difference,
            "significant": self.significant,
            "effect_name": self.effect_name,
            "sentence": str(self),
        }

    def __str__(self) -> str:
        if not self.n:
            return f"{self.a} and {self.b} have no {self.unit} in common: their {self.measure} is not compared."
        if self.difference:
            side = f"{abs(self.difference):.3g} {'above' if self.difference > 0 else 'below'}"
        else:
            side = "equal to"
        if self.p_adjusted is None:
            return (
                f"{self.a}'s {self.measure} is {side} {self.b}'s, with n = {self.n} {self.unit}; a test needs two or "
                f"more{self._left_out()}."
            )
        # How far above or below, so that the interval has the sign of the words.
        low, high = self.interval if self.difference >= 0 else (-self.interval.high, -self.interval.low)
        correction = f" after Holm over {self.family} comparisons" if self.family > 1 else ""
        facts = [
            f"{self.level:.0%} interval {low:.3g} to {high:.3g}",
            "every difference is the same" if self.effect_size is None else f"d_z {self.effect_size:.2f}",
            f"p {_p(self.p_adjusted)}{correction}, bootstrap p {_p(self.p_bootstrap_adjusted)}",
            f"n = {self.n} {self.unit}",
        ]
        if self.significant:
            lead = f"{self.a}'s {self.measure} is {side} {self.b}'s"
        else:
            lead = (
                f"{self.a}'s {self.measure} is not significantly different from {self.b}'s: {side.removesuffix(' to')}"
            )
        return f"{lead} ({', '.join(facts)}{self._left_out()})."

    def _left_out(self) -> str:
        return f"; {self.left_out} that only one of them has left out" if self.left_out else ""


def compare(
    a: Mapping[Hashable, float],
    b: Mapping[Hashable, float],
    *,
    names: tuple[str, str] = ("A", "B"),
    measure: str = "tau",
    unit: str = "questions",
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Compares the values that two drafters have on the same questions: paired t-test and paired bootstrap.

    The t-test asks whether the mean difference could be 0 if differences were normal; the bootstrap resamples the
    differences, shifted to a mean of 0, and counts how often they lie as far off. Where all differences are the same
    and not 0, neither is defined: the p-value is then that of the exact sign-flip test, 2^(1 - n).

    Args:
        a, b: finite values by question. Several seeds are averaged before, or are the units themselves: then the
            comparison says what to expect of another seed.
        names, measure, unit: how the result calls them.
        level, resamples, seed: of the bootstrap.

    Raises:
        ValueError: if a value is not finite.
    """
    keys = [key for key in a if key in b]
    pairs = np.array([(a[key], b[key]) for key in keys], dtype=float).reshape(-1, 2)
    if not np.isfinite(pairs).all():
        raise ValueError(f"A {measure} is not a finite number; leave out questions that have none.")
    differences = pairs[:, 0] - pairs[:, 1]
    if len(keys) < _FEW_PAIRS:
        interval = student_interval(differences, level=level)
    else:
        interval = bootstrap_interval(differences, level=level, resamples=resamples, seed=seed)
    p_value, p_bootstrap = _p_values(differences, resamples, seed)
    return Comparison(
        *names,
        measure,
        unit,
        n=len(keys),
        left_out=len(a) + len(b) - 2 * len(keys),
        mean_a=float(pairs[:, 0].mean()) if keys else 0.0,
        mean_b=float(pairs[:, 1].mean()) if keys else 0.0,
        level=level,
        interval=interval,
        effect_size=effect_size(differences),
        p_value=p_value,
        p_bootstrap=p_bootstrap,
        p_adjusted=p_value,
        p_bootstrap_adjusted=p_bootstrap,
    )


def corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons as one family: their p-values after [`holm`]."""
    tested = sum(comparison.p_value is not None for comparison in comparisons)
    by_t = holm([comparison.p_value for comparison in comparisons])
    by_bootstrap = holm([comparison.p_bootstrap for comparison in comparisons])
    return [
        replace(comparison, p_adjusted=p, p_bootstrap_adjusted=q, family=max(tested, 1))
        for comparison, p, q in zip(comparisons, by_t, by_bootstrap, strict=True)
    ]


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values adjusted for several comparisons (Holm, 1979): whoever calls those below alpha significant errs, in
    any of them, with a probability of alpha at most.

    Args:
        p_values: None stands for a comparison that could not be tested; it stays None and does not count.
    """
    order = sorted((value, index) for index, value in enumerate(p_values) if value is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (value, index) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * value))
        adjusted[index] = highest
    return adjusted


def effect_size(differences: Sequence[float]) -> float | None:
    """Cohen's d_z: the mean of paired differences over their standard deviation (n - 1).

    By how many standard deviations of the difference the typical pair differs; 0 if all differences are, None if
    they do not vary otherwise, or are fewer than two.
    """
    differences = np.asarray(differences, dtype=float)
    if differences.size < 2 or _constant(differences):
        return 0.0 if differences.size > 1 and not differences.any() else None
    return float(differences.mean() / differences.std(ddof=1))


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and standard deviation of the sample (n - 1); None of one value."""
    values = np.asarray(values, dtype=float)
    return float(values.mean()), float(values.std(ddof=1)) if values.size > 1 else None


def student_interval(values: Sequence[float], *, level: float = 0.95) -> Interval | None:
    """Student's interval of the mean (n - 1 degrees of freedom), for values too few to resample; None of fewer than
    two.

    Args:
        values: independent, from something like a normal distribution.
        level: probability that intervals made so hold the true mean.
    """
    from scipy import stats

    if len(values) < 2:
        return None
    mean, deviation = mean_and_deviation(values)
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * deviation / math.sqrt(len(values))
    return Interval(mean - half, mean + half)


def bootstrap_interval(
    values: Sequence[float], *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval | None:
    """Interval of the mean over questions; None of fewer than two.

    Args:
        values: by question.
        level: probability that intervals made so hold the true mean.
        resamples: draws of as many questions as there are, with replacement.
        seed: of these.
    """
    return bootstrap_ratio_interval(values, np.ones(len(values)), level=level, resamples=resamples, seed=seed)


def bootstrap_ratio_interval(
    numerators: Sequence[float],
    denominators: Sequence[float],
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval | None:
    """Interval of sum(numerators) / sum(denominators), as tau of tokens and rounds, or pos-acc of accepted and
    reached rounds by question. See [`bootstrap_interval`]."""
    columns = np.stack([np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)], axis=-1)
    return bootstrap_sums_interval(
        columns, lambda sums: sums[..., 0] / sums[..., 1], level=level, resamples=resamples, seed=seed
    )


def bootstrap_sums_interval(
    columns: Sequence[Sequence[float]],
    of: Callable[[np.ndarray], np.ndarray],
    *,
    strata: Sequence[Hashable] | None = None,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval | None:
    """BCa interval of a function of sums over questions. See [`bootstrap_interval`].

    Resamples in which the function has no value, as a ratio of nothing, are left out.

    Args:
        columns: [questions, columns], what is summed.
        of: sums [..., columns] to values [...].
        strata: by question the set that it is of: each set is resampled apart, to its own size.

    Returns:
        None of fewer than two questions, or where the function has no value.
    """
    columns = np.asarray(columns, dtype=float)  # [questions, columns]
    if columns.shape[0] < 2:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        estimate = of(columns.sum(axis=0))
        values = of(_resampled_sums(columns, resamples, seed, strata))  # [resamples]
        without_one = of(columns.sum(axis=0) - columns)  # [questions]
    values, without_one = values[np.isfinite(values)], without_one[np.isfinite(without_one)]
    if not np.isfinite(estimate) or not values.size:
        return None
    tails = [_bca_tail(share, estimate, values, without_one) for share in ((1 - level) / 2, (1 + level) / 2)]
    low, high = np.quantile(values, tails)
    return Interval(float(low), float(high))


def _resampled_sums(
    columns: np.ndarray, resamples: int, seed: int, strata: Sequence[Hashable] | None = None
) -> np.ndarray:
    """[resamples, columns]: sums over questions [questions, columns] drawn with replacement, within each stratum."""
    rows: dict[Hashable, list[int]] = {}
    for row, stratum in enumerate(strata if strata is not None else [0] * len(columns)):
        rows.setdefault(stratum, []).append(row)
    return sum(_draws(len(of), resamples, seed + index) @ columns[of] for index, of in enumerate(rows.values()))


@lru_cache(maxsize=8)
def _draws(questions: int, resamples: int, seed: int) -> np.ndarray:
    """[resamples, questions]: how often each question is drawn. Comparisons of the same questions share them."""
    draws = np.random.default_rng(seed).multinomial(questions, np.full(questions, 1 / questions), resamples)
    return draws.astype(np.float32)


def _bca_tail(share: float, estimate: float, values: np.ndarray, without_one: np.ndarray) -> float:
    """The quantile of the resampled `values` that stands for `share`: corrected for bias and skewness; `share` itself
    where the correction is undefined, because nothing varies."""
    below = (np.mean(values < estimate) + np.mean(values <= estimate)) / 2
    deviations = without_one.mean() - without_one if without_one.size else without_one
    spread = float((deviations**2).sum())
    if not 0 < below < 1 or not spread:
        return share
    acceleration = float((deviations**3).sum()) / (6 * spread**1.5)
    bias = _NORMAL.inv_cdf(float(below))
    shifted = bias + _NORMAL.inv_cdf(share)
    if acceleration * shifted >= 1:
        return share
    return _NORMAL.cdf(bias + shifted / (1 - acceleration * shifted))


def _p_values(differences: np.ndarray, resamples: int, seed: int) -> tuple[float | None, float | None]:
    """Of the paired t-test and the paired bootstrap, two-sided."""
    from scipy import stats

    n = differences.size
    if n < 2:
        return None, None
    if _constant(differences):
        p = 2.0 ** (1 - n) if differences.any() else 1.0
        return p, p
    mean = differences.mean()
    null = _resampled_sums((differences - mean)[:, None], resamples, seed)[:, 0] / n
    as_far = int((np.abs(null) >= abs(mean)).sum())
    return float(stats.ttest_1samp(differences, 0.0).pvalue), (as_far + 1) / (resamples + 1)


def _constant(differences: np.ndarray) -> bool:
    """Whether differences are the same but for rounding."""
    return bool(np.ptp(differences) <= 1e-12 * np.abs(differences).max())


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.2g}"
