"""Drafting from the most frequent tokens alone: the target's head, cut to their rows (FR-Spec, EAGLE-3)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from .compatibility import is_plain_linear
from .configuration_poss import PosSConfig


if TYPE_CHECKING:
    from .modeling_poss import TargetReference


__all__ = ["DraftHead", "check_draft_vocabulary", "rank_tokens"]


def rank_tokens(counts: torch.LongTensor, size: int, always: Sequence[int] = ()) -> torch.LongTensor:
    """The `size` most frequent tokens, most frequent first; ties go to the lower id.

    Args:
        counts: int64 [vocab], how often each token was seen.
        size: tokens to keep.
        always: tokens to keep however rare, in front: the ends of a sequence.
    """
    ranked = counts.sort(descending=True, stable=True).indices
    always = torch.tensor(sorted(set(always)), dtype=torch.long, device=counts.device)
    return torch.cat((always, ranked[~torch.isin(ranked, always)]))[:size]


def check_draft_vocabulary(config: PosSConfig, vocabulary: torch.LongTensor) -> None:
    """Refuses a draft vocabulary that a checkpoint cannot have been trained with.

    Raises:
        ValueError: if tokens are outside of the target's vocabulary or occur twice.
    """
    outside = vocabulary[(vocabulary < 0) | (vocabulary >= config.vocab_size)]
    if len(outside):
        raise ValueError(
            f"The draft vocabulary holds {len(outside)} token(s) outside of the target's {config.vocab_size} "
            f"({outside[0]} and so on). It was never set, or the file is damaged: set it with "
            "`poss.set_draft_vocabulary(counts)` before saving."
        )
    if len(vocabulary.unique()) < len(vocabulary):
        raise ValueError(
            f"The draft vocabulary holds {len(vocabulary) - len(vocabulary.unique())} token(s) twice; the file is "
            "damaged. Get the checkpoint again, or set it with `poss.set_draft_vocabulary(counts)`."
        )


class DraftHead:
    """The target's head over the tokens that specialists draft from.

    Args:
        reference: to the target.
        vocabulary: int64 [draft vocab], the target's token of each row; None if it is all of them.

    Raises:
        ValueError: if the vocabulary was never set.
    """

    def __init__(self, reference: "TargetReference", vocabulary: torch.LongTensor | None):
        self.reference = reference
        self.vocabulary = vocabulary
        self.rows: tuple[torch.Tensor, torch.Tensor | None] | None = None
        if vocabulary is None:
            return
        if vocabulary[0] < 0:
            raise ValueError(
                "The draft vocabulary is not set. Count the tokens of some text and call "
                "`poss.set_draft_vocabulary(counts)`; PosSTrainer does it with its training data."
            )
        head = reference.lm_head
        if is_plain_linear(head):
            chosen = vocabulary.to(head.weight.device)
            self.rows = head.weight.detach()[chosen], None if head.bias is None else head.bias.detach()[chosen]

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Logits [..., draft vocab] in float32 of features [..., hidden], on the features' device.

        A head that is more than a matrix (packed, sharded, offloaded, adapted) computes all of its rows first.
        """
        if self.rows is None:
            return self.on_vocabulary(self.reference.logits(features))
        weight, bias = self.rows
        logits = F.linear(features.to(device=weight.device, dtype=weight.dtype), weight, bias)
        return self.reference.scaled(logits, features.device)

    def on_vocabulary(self, values: torch.Tensor) -> torch.Tensor:
        """[..., vocab] to [..., draft vocab]."""
        return values if self.vocabulary is None else values[..., self.vocabulary.to(values.device)]

    def token_ids(self, index: torch.LongTensor) -> torch.LongTensor:
        """The target's tokens of rows of this head."""
        return index if self.vocabulary is None else self.vocabulary.to(index.device)[index]
