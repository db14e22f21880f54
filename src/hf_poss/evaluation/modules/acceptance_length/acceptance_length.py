"""Mean acceptance length, tau, as a module of Hugging Face `evaluate`."""

from typing import Any

import datasets
import evaluate

from hf_poss.evaluation.citations import LEVIATHAN
from hf_poss.evaluation.named_inputs import NamedInputs, check_counts
from hf_poss.measures import mean_acceptance_length, mean_acceptance_length_macro


__all__ = ["AcceptanceLength"]

_DESCRIPTION = """
Mean acceptance length, tau: the tokens that speculative decoding emits a round, the target's own token of each round
included. A round is a draft phase with its verification. The micro average is the tokens of all texts over their
rounds; the macro average, which papers report, is the mean over texts of tokens / rounds.
"""

_KWARGS_DESCRIPTION = """
Args:
    tokens (`list[int]`): by text the tokens that its rounds emitted. A text's first token comes with the pass over the
        prompt and belongs to no round.
    rounds (`list[int]`): by text its rounds; 0 where nothing was drafted.

Returns:
    texts (`int`), tokens (`int`), rounds (`int`): counts.
    tau (`float`): micro average, tokens / rounds; 0 without rounds.
    tau_macro (`float`): macro average, over texts with rounds.

Examples:

    >>> import evaluate
    >>> from hf_poss.evaluation.modules import metric_path
    >>> acceptance_length = evaluate.load(metric_path("acceptance_length"))
    >>> results = acceptance_length.compute(tokens=[30, 8], rounds=[10, 4])
    >>> round(results["tau"], 3), results["tau_macro"]
    (2.714, 2.5)
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class AcceptanceLength(NamedInputs, evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=LEVIATHAN,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"tokens": datasets.Value("int64"), "rounds": datasets.Value("int64")}),
            reference_urls=["https://arxiv.org/abs/2211.17192", "https://arxiv.org/abs/2506.03566"],
        )

    def _compute(self, tokens: list[int], rounds: list[int], **of_others: Any) -> dict[str, int | float]:
        check_counts(tokens=tokens, rounds=rounds)
        for text, (emitted, count) in enumerate(zip(tokens, rounds, strict=True)):
            if emitted < count or (emitted and not count):
                raise ValueError(
                    f"Text {text} has {emitted} tokens in {count} rounds; expected at least one a round, and none "
                    "without rounds. Leave a text's first token out, and texts that were not drafted for."
                )
        return {
            "texts": len(tokens),
            "tokens": sum(tokens),
            "rounds": sum(rounds),
            "tau": mean_acceptance_length(sum(tokens), sum(rounds)),
            "tau_macro": mean_acceptance_length_macro(tokens, rounds),
        }
