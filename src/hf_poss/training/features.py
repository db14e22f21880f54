"""Features of a frozen target."""

import inspect
from collections.abc import Sequence

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import logging

from ..compatibility import input_device
from ..features import hidden_states_wanted, select_features
from ..masks import LayerKinds, packed_masks
from ..verifier import mask_obstacle


__all__ = ["target_features"]

logger = logging.get_logger(__name__)


@torch.no_grad()
def target_features(
    target: PreTrainedModel,
    input_ids: torch.LongTensor,
    attention_mask: torch.Tensor | None = None,
    segment_ids: torch.LongTensor | None = None,
    position_ids: torch.LongTensor | None = None,
    feature_layers: Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What specialists read of a target, and what they predict, in the target's dtype.

    Args:
        input_ids: int64 [batch, tokens].
        attention_mask: [batch, tokens], 0 for padding.
        segment_ids: int64 [batch, tokens] of packed samples, 0 for padding, then by document; tokens see their own.
        position_ids: int64 [batch, tokens] of packed samples, from 0 in every document.
        feature_layers: as in `PosSConfig`.

    Returns:
        [batch, tokens, layers * hidden], the hidden states of `feature_layers`; and [batch, tokens, hidden], the last
        ones, which the head reads. One tensor twice if `feature_layers` is None.
    """
    if segment_ids is None:
        return _run(target, feature_layers, input_ids, attention_mask)
    obstacle = mask_obstacle(target)
    if obstacle is None:
        device, kinds = input_device(target), LayerKinds.of(target.config.get_text_config())
        masks = packed_masks(kinds, segment_ids.to(device), position_ids.to(device), target.dtype)
        return _run(target, feature_layers, input_ids, masks, position_ids=position_ids.to(device))
    logger.warning_once(f"The target reads packed samples as a row a document: {obstacle}.")
    real = segment_ids > 0
    starts = real & (segment_ids != F.pad(segment_ids[:, :-1], (1, 0)))
    rows, columns = (starts.flatten().cumsum(0) - 1)[real.flatten()], position_ids[real]  # of every token that is real
    documents = input_ids.new_zeros(int(rows[-1]) + 1, int(columns.max()) + 1)
    mask = torch.zeros_like(documents)
    documents[rows, columns], mask[rows, columns] = input_ids[real], 1
    return tuple(
        states.new_zeros(*input_ids.shape, states.shape[-1]).index_put(
            real.to(states.device).nonzero(as_tuple=True), states[rows.to(states.device), columns.to(states.device)]
        )
        for states in _run(target, feature_layers, documents, mask)
    )


def _run(
    target: PreTrainedModel,
    feature_layers: Sequence[int] | None,
    input_ids: torch.LongTensor,
    attention_mask: torch.Tensor | dict[str, torch.Tensor] | None,
    **inputs: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    # The logits are not needed; most families can leave them out but for one row.
    less = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(target.forward).parameters else {}
    device = input_device(target)
    outputs = target(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device) if isinstance(attention_mask, torch.Tensor) else attention_mask,
        output_hidden_states=hidden_states_wanted(feature_layers),
        use_cache=False,
        return_dict=True,
        **less,
        **inputs,
    )
    last = outputs.hidden_states[-1]
    return (last if feature_layers is None else select_features(outputs.hidden_states, feature_layers)), last
