"""Whether drafting changed the text, as a module of Hugging Face `evaluate`."""

from typing import Any

import datasets
import evaluate

from hf_poss.evaluation.citations import LEVIATHAN
from hf_poss.evaluation.differences import first_difference
from hf_poss.evaluation.named_inputs import NamedInputs


__all__ = ["OutputIdentity"]

_DESCRIPTION = """
How many texts are the same with drafts as without, token for token. Speculative decoding that is lossless and greedy
writes the target's own text, up to near ties that another order of floating-point sums may decide the other way.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[list[int]]` or `list[str]`): by text what was written with drafts, as token ids or as text.
    references (`list[list[int]]` or `list[str]`): by text what was written without, likewise.

Returns:
    compared (`int`), identical (`int`): numbers of texts.
    identity (`float`): identical / compared; 0 if nothing was compared.
    first_difference (`list[int | None]`): by text the 0-based index of the first token (of texts, character) that
        differs; the length of the shorter one, if the other goes on behind it; None where they are the same.

Examples:

    >>> import evaluate
    >>> from hf_poss.evaluation.modules import metric_path
    >>> output_identity = evaluate.load(metric_path("output_identity"))
    >>> output_identity.compute(predictions=[[5, 6, 7], [5, 6]], references=[[5, 6, 7], [5, 9]])
    {'compared': 2, 'identical': 1, 'identity': 0.5, 'first_difference': [None, 1]}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class OutputIdentity(NamedInputs, evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        kinds = (datasets.Sequence(datasets.Value("int64")), datasets.Value("string"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=LEVIATHAN,
            inputs_description=_KWARGS_DESCRIPTION,
            features=[datasets.Features({"predictions": kind, "references": kind}) for kind in kinds],
            reference_urls=["https://arxiv.org/abs/2211.17192"],
        )

    def _compute(
        self, predictions: list[list[int]] | list[str], references: list[list[int]] | list[str], **of_others: Any
    ) -> dict[str, int | float | list[int | None]]:
        differences = [first_difference(*pair) for pair in zip(predictions, references, strict=True)]
        identical = differences.count(None)
        return {
            "compared": len(differences),
            "identical": identical,
            "identity": identical / len(differences) if differences else 0.0,
            "first_difference": differences,
        }
