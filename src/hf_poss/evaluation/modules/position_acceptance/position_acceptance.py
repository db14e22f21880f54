"""Acceptance by draft position as a module of Hugging Face `evaluate`."""

from functools import reduce
from typing import Any

import datasets
import evaluate

from hf_poss.evaluation.citations import POSS
from hf_poss.evaluation.named_inputs import NamedInputs, check_counts
from hf_poss.measures import added, by_specialist, expected_tau, node_acceptance, position_acceptance


__all__ = ["PositionAcceptance"]

_DESCRIPTION = """
Acceptance by draft position in speculative decoding. pos-acc of position k is conditional: of the rounds in which
positions 1 to k - 1 were accepted and position k was drafted, the share in which position k was accepted too. Node
acceptance is the share of the verified nodes that entered the text. Counts of all texts are summed before they are
divided.
"""

_KWARGS_DESCRIPTION = """
Args:
    drafted (`list[list[int]]`): by text and draft position the nodes that the target verified; of chains, rounds.
    reached (`list[list[int]]`): by text and draft position the rounds in which every position before was accepted and
        this one was drafted.
    accepted (`list[list[int]]`): by text and draft position the rounds in which the position was accepted.
    positions_per_specialist (`int`, *optional*): n, to sum positions by specialist.
    num_specialists (`int`, *optional*): S; the last specialist also drafts what lies beyond n * S.

Lists of texts may be of unequal length, position 1 comes first, and positions at the end may be missing.

Returns:
    drafted, reached, accepted (`list[int]`): counts by draft position.
    pos_acc (`list[float]`): accepted / reached by draft position.
    node_acceptance (`list[float]`): accepted / drafted by draft position.
    expected_tau (`float`): 1 + the sum over k of the product of pos_acc of positions 1 to k.
    drafted_by_specialist, accepted_by_specialist (`list[int]`), acceptance_by_specialist (`list[float]`): counts and
        accepted / drafted by specialist, if n and S are given.

Examples:

    >>> import evaluate
    >>> from hf_poss.evaluation.modules import metric_path
    >>> position_acceptance = evaluate.load(metric_path("position_acceptance"))
    >>> results = position_acceptance.compute(
    ...     drafted=[[10, 10], [6]], reached=[[10, 8], [6]], accepted=[[8, 4], [4]],
    ...     positions_per_specialist=1, num_specialists=2,
    ... )
    >>> results["pos_acc"], results["expected_tau"]
    ([0.75, 0.5], 2.125)
    >>> results["acceptance_by_specialist"]
    [0.75, 0.4]
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class PositionAcceptance(NamedInputs, evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        counts = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=POSS,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"drafted": counts, "reached": counts, "accepted": counts}),
            reference_urls=["https://arxiv.org/abs/2506.03566"],
        )

    def _compute(
        self,
        drafted: list[list[int]],
        reached: list[list[int]],
        accepted: list[list[int]],
        positions_per_specialist: int | None = None,
        num_specialists: int | None = None,
        **of_others: Any,
    ) -> dict[str, list[int] | list[float] | float]:
        check_counts(drafted=drafted, reached=reached, accepted=accepted)
        _check_order(drafted, reached, accepted)
        if (positions_per_specialist is None) != (num_specialists is None):
            raise ValueError(
                f"positions_per_specialist is {positions_per_specialist} and num_specialists {num_specialists}; "
                "expected both or none."
            )
        drafted, reached, accepted = (reduce(added, column, []) for column in (drafted, reached, accepted))
        pos_acc = position_acceptance(accepted, reached)
        results = {
            "drafted": drafted,
            "reached": reached,
            "accepted": accepted,
            "pos_acc": pos_acc,
            "node_acceptance": node_acceptance(accepted, drafted),
            "expected_tau": expected_tau(pos_acc),
        }
        if num_specialists is not None:
            spans = (positions_per_specialist, num_specialists)
            results["drafted_by_specialist"] = by_specialist(drafted, *spans)
            results["accepted_by_specialist"] = by_specialist(accepted, *spans)
            results["acceptance_by_specialist"] = node_acceptance(
                results["accepted_by_specialist"], results["drafted_by_specialist"]
            )
        return results


def _check_order(*columns: list[list[int]]) -> None:
    """A position is accepted where it was reached, and reached where it was drafted."""
    for text, counts in enumerate(zip(*columns, strict=True)):
        for position in range(1, max(map(len, counts)) + 1):
            drafted, reached, accepted = (row[position - 1] if position <= len(row) else 0 for row in counts)
            if not drafted >= reached >= accepted:
                raise ValueError(
                    f"Text {text}, draft position {position}: {drafted} drafted, {reached} reached, {accepted} "
                    "accepted; expected each to be at most the one before."
                )
