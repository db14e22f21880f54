"""How far drafted features drift from the target's, by draft position."""

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..measures import DriftSums
from ..modeling_poss import PosSModel, TargetReference
from ..training.features import target_features


__all__ = ["feature_drift"]


@torch.no_grad()
def feature_drift(
    target: PreTrainedModel,
    poss: PosSModel,
    input_ids: torch.LongTensor,
    attention_mask: torch.Tensor | None = None,
    counted: torch.BoolTensor | None = None,
) -> DriftSums:
    """Compares the features that specialists predict on a text with those that the target has there.

    A row is a token at which a round may begin. Position k's feature is predicted from the target's features up to
    the round's beginning and from what positions 1..k-1 predicted, with the text's own tokens in between: a drafting
    round in which every token was accepted. With k = 2, the feature of token 9 comes from a round that began behind
    token 7.

    Args:
        target: that wrote the text.
        poss: its specialists.
        input_ids: int64 [batch, tokens].
        attention_mask: [batch, tokens], 0 for padding.
        counted: bool [batch, tokens], the tokens whose features are compared, as those of an answer; all if None.

    Returns:
        sums by draft position, of all that have rounds behind the text's beginning.
    """
    features, wanted = target_features(target, input_ids, attention_mask, feature_layers=poss.config.feature_layers)
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    before, poss.reference = poss.reference, TargetReference.from_target(target, poss.config)
    try:
        predictions = poss.roll_out(features[:, :-1], input_ids[:, 1:], segment_ids=real[:, :-1].long())
    finally:
        poss.reference = before

    # [batch, rows], row t holds the feature of token t + 1
    compared = (real if counted is None else real & counted)[:, 1:].to(predictions[0].device)
    begins = real[:, :-1].to(compared.device)
    wanted = wanted[:, 1:].to(compared.device).float()
    sums = []
    for predicted in predictions:
        predicted, valid = predicted.float(), compared & begins
        cosine = F.cosine_similarity(predicted, wanted, dim=-1)  # [batch, rows]
        norm_ratio = predicted.norm(dim=-1) / wanted.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
        sums.append(torch.stack([part[valid].double().sum() for part in (valid, cosine, norm_ratio)]))
        begins = F.pad(begins[:, :-1], (1, 0))  # the next position's round began one row earlier
    rows, cosine, norm_ratio = torch.stack(sums, dim=1).tolist()
    return DriftSums([int(count) for count in rows], cosine, norm_ratio)
