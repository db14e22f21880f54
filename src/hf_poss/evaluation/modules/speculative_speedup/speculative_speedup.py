"""Speed-up of speculative decoding as a module of Hugging Face `evaluate`."""

from statistics import median, quantiles

import datasets
import evaluate

from hf_poss.evaluation.citations import LEVIATHAN
from hf_poss.evaluation.named_inputs import NamedInputs, check_counts
from hf_poss.measures import round_cost, speed_up


__all__ = ["SpeculativeSpeedup"]

_DESCRIPTION = """
Speed-up of speculative decoding over plain decoding: tokens a second of all texts with drafts over those without, on
the same prompts, in the same mode, on the same machine. Beside the ratio of totals stand the median and the quartiles
of the ratios of single texts. The configuration "round_cost" also tells what happens behind the prompt: the speed-up
without the pass over it, and rho, the time of a round in plain decoding steps; drafting one text at a time, that
speed-up is tau / rho.
"""

_KWARGS_DESCRIPTION = """
Args:
    new_tokens (`list[int]`): by text all tokens that were written with drafts.
    seconds (`list[float]`): by text the time of the whole call; of a batch, the call's divided by its rows.
    plain_new_tokens (`list[int]`), plain_seconds (`list[float]`): the same of plain decoding.

With the configuration "round_cost", also:

    tokens (`list[int]`): by text the tokens that its rounds emitted: new_tokens without the first.
    prompt_seconds (`list[float]`): by text the part of `seconds` that the pass over the prompt took.
    passes (`list[float]`): by text the target's passes over drafts; of a batch, the call's divided by its rows.
    plain_tokens (`list[int]`), plain_prompt_seconds (`list[float]`), plain_passes (`list[float]`): the same of plain
        decoding, whose passes are its steps.

Returns:
    new_tokens (`int`), seconds (`float`), plain_new_tokens (`int`), plain_seconds (`float`): sums.
    speed_up (`float`): (new_tokens / seconds) / (plain_new_tokens / plain_seconds).
    speed_up_median (`float`), speed_up_quartiles (`list[float]`): of the ratios of single texts, those left out that
        have no tokens without drafts; the quartiles are the lower and the upper one.
    decoding_speed_up (`float`), rho (`float`): with the configuration "round_cost".

Examples:

    >>> import evaluate
    >>> from hf_poss.evaluation.modules import metric_path
    >>> speculative_speedup = evaluate.load(metric_path("speculative_speedup"))
    >>> results = speculative_speedup.compute(
    ...     new_tokens=[100, 40], seconds=[2.0, 1.5], plain_new_tokens=[100, 40], plain_seconds=[5.0, 2.0]
    ... )
    >>> results["speed_up"], round(results["speed_up_median"], 3)
    (2.0, 1.917)
"""

_CALLS = {"new_tokens": "int64", "seconds": "float64"}
_ROUNDS = {"tokens": "int64", "prompt_seconds": "float64", "passes": "float64"}
_RATES = ("new_tokens", "seconds", "plain_new_tokens", "plain_seconds")


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class SpeculativeSpeedup(NamedInputs, evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in ("default", "round_cost"):
            raise ValueError(f"There is no configuration {self.config_name!r}; expected default or round_cost.")
        kinds = _CALLS if self.config_name == "default" else _CALLS | _ROUNDS
        features = {name: datasets.Value(kind) for name, kind in kinds.items()}
        features |= {f"plain_{name}": value for name, value in features.items()}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=LEVIATHAN,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(features),
            reference_urls=["https://arxiv.org/abs/2211.17192", "https://arxiv.org/abs/2506.03566"],
        )

    def _compute(self, **inputs: list[int] | list[float]) -> dict[str, int | float | list[float]]:
        columns = {name: inputs[name] for name in self.features}  # the others are of modules that are combined with it
        check_counts(**columns)
        for name in ("seconds", "plain_seconds"):
            if 0 in columns[name]:
                raise ValueError(f"`{name}` of text {columns[name].index(0)} is 0; expected the time that it took.")
        calls = [columns[name] for name in _RATES]
        ratios = [speed_up(*text) for text in zip(*calls, strict=True) if text[2]]
        totals = {name: sum(values) for name, values in columns.items()}
        results = {name: totals[name] for name in _RATES}
        results["speed_up"] = speed_up(*results.values())
        results["speed_up_median"] = median(ratios) if ratios else 0.0
        results["speed_up_quartiles"] = _quartiles(ratios)
        return results | (_behind_the_prompt(totals) if self.config_name == "round_cost" else {})


def _quartiles(ratios: list[float]) -> list[float]:
    if len(ratios) < 2:
        return ratios * 2 or [0.0, 0.0]
    lower, _, upper = quantiles(ratios, n=4, method="inclusive")
    return [lower, upper]


def _behind_the_prompt(totals: dict[str, float]) -> dict[str, float]:
    seconds = totals["seconds"] - totals["prompt_seconds"]
    plain_seconds = totals["plain_seconds"] - totals["plain_prompt_seconds"]
    if seconds < 0 or plain_seconds < 0:
        raise ValueError(
            "The prompts' passes took longer than the whole calls; expected prompt_seconds within seconds."
        )
    return {
        "decoding_speed_up": speed_up(totals["tokens"], seconds, totals["plain_tokens"], plain_seconds),
        "rho": round_cost(seconds, totals["passes"], plain_seconds, totals["plain_passes"]),
    }
