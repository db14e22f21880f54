"""Features of a frozen target."""

import inspect

import torch
from transformers import PreTrainedModel

from ..compatibility import LAST_HIDDEN_STATE


__all__ = ["target_features"]


@torch.no_grad()
def target_features(
    target: PreTrainedModel, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The vectors that the target's head reads, [batch, tokens, hidden], in the target's dtype.

    Args:
        input_ids: int64 [batch, tokens].
        attention_mask: [batch, tokens], 0 for padding.
    """
    # The logits are not needed; most families can leave them out but for one row.
    less = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(target.forward).parameters else {}
    device = target.get_input_embeddings().weight.device
    outputs = target(
        input_ids=input_ids.to(device),
        attention_mask=None if attention_mask is None else attention_mask.to(device),
        output_hidden_states=LAST_HIDDEN_STATE,
        use_cache=False,
        return_dict=True,
        **less,
    )
    return outputs.hidden_states[-1]
