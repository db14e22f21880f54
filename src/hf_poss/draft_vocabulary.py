"""Drafting from the most frequent tokens alone: the target's head, cut to their rows (FR-Spec, EAGLE-3)."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .compatibility import is_plain_linear
from .configuration_poss import PosSConfig, eos_token_ids
from .corpus_counts import corpus_counts, structural_tokens
from .head_rows import HeadRows, rows_of


if TYPE_CHECKING:
    from .modeling_poss import TargetReference


__all__ = ["DraftHead", "check_draft_vocabulary", "choose_vocabulary", "rank_tokens", "size_of_coverage"]

logger = logging.get_logger(__name__)


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


def size_of_coverage(counts: torch.LongTensor, coverage: float, always: Sequence[int] = ()) -> int:
    """The fewest tokens that make up a share of a text, `always` among them.

    Args:
        counts: int64 [vocab], how often each token was seen.
        coverage: above 0 and up to 1; 1 takes every token that was seen.
        always: see [`rank_tokens`].
    """
    covered = counts[rank_tokens(counts, len(counts), always)].double().cumsum(0)
    return max(len(set(always)), int((covered < coverage * covered[-1]).sum()) + 1)


def choose_vocabulary(
    config: PosSConfig,
    counts: torch.LongTensor | Iterable[Any],
    size: int | None = None,
    coverage: float | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> torch.LongTensor:
    """The tokens to draft from, int64 [draft vocab] by frequency, see [`PosSModel.set_draft_vocabulary`].

    Args:
        config: of the specialists.
        counts: int64 [vocab], or a corpus to count, see [`corpus_counts`].
        size: tokens to choose; `config.draft_vocab_size` if neither it nor `coverage` is given.
        coverage: share of the text that they are to make up.
        tokenizer: of the target.

    Raises:
        TypeError: if the corpus is of something else than texts, chats or token ids.
        ValueError: if what was counted, the size or the share is out of range.
    """
    vocab_size = config.vocab_size
    size = config.draft_vocab_size if size is None and coverage is None else size
    always = {*eos_token_ids(config), *(() if tokenizer is None else structural_tokens(tokenizer))}
    always = [token for token in always if 0 <= token < vocab_size]
    _check_extent(vocab_size, size, coverage, len(always))  # before a corpus is read
    if not isinstance(counts, torch.Tensor) or counts.ndim > 1:
        counts = corpus_counts(counts, vocab_size, tokenizer)
    _check_counts(counts, vocab_size)
    counts = counts.cpu()
    vocabulary = rank_tokens(counts, size or size_of_coverage(counts, coverage, always), always)
    covered = counts[vocabulary].sum() / counts.sum()
    logger.info(f"Drafting from {len(vocabulary):,} of {vocab_size:,} tokens, {covered:.1%} of the text.")
    return vocabulary


def _check_extent(vocab_size: int, size: int | None, coverage: float | None, always: int) -> None:
    if size is not None and coverage is not None:
        raise ValueError(f"`size` is {size} and `coverage` is {coverage}; expected one of the two.")
    if coverage is not None:
        if not 0 < coverage <= 1:
            raise ValueError(f"`coverage` is {coverage}; expected a share of the text, above 0 and up to 1.")
    elif not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= vocab_size:
        raise ValueError(f"The size of the draft vocabulary is {size!r}; expected 1 to {vocab_size}, or a `coverage`.")
    elif size < always:
        raise ValueError(
            f"The size of the draft vocabulary is {size}, and {always} tokens are kept in any case: ends of a "
            f"sequence and what the chat template writes. Expected {always} to {vocab_size}."
        )


def _check_counts(counts: torch.Tensor, vocab_size: int) -> None:
    if tuple(counts.shape) != (vocab_size,):
        raise ValueError(f"`counts` has shape {tuple(counts.shape)}; expected ({vocab_size},), one a token.")
    if not (counts >= 0).all():
        raise ValueError("Some counts are below 0 or no numbers; expected how often each token occurs, 0 or more.")
    if not counts.any():
        raise ValueError("No token was counted, so none is frequent. Count the tokens of some text like the target's.")


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
        self.rows: HeadRows | None = None
        if vocabulary is None:
            return
        if vocabulary[0] < 0:
            raise ValueError(
                "The draft vocabulary is not set. Count the tokens of some text and call "
                "`poss.set_draft_vocabulary(counts)`; PosSTrainer does it with its training data."
            )
        head = reference.lm_head
        if is_plain_linear(head):
            self.rows = rows_of(head, vocabulary)
        else:
            logger.warning_once(
                f"The target's head ({type(head).__name__}) is packed, sharded, offloaded, adapted or hooked, so "
                f"every draft pass computes its {reference.vocab_size} rows, and the draft vocabulary of "
                f"{len(vocabulary)} saves no time. The text is right in any case."
            )

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Logits [..., draft vocab] in float32 of features [..., hidden], on the features' device.

        A head that is more than a matrix (packed, sharded, offloaded, adapted) computes all of its rows first.
        """
        if self.rows is None:
            return self.on_vocabulary(self.reference.logits(features))
        weight = self.rows.weight
        logits = F.linear(features.to(device=weight.device, dtype=weight.dtype), weight, self.rows.bias)
        return self.reference.scaled(logits, features.device)

    def top(self, features: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.LongTensor]:
        """The k most likely drafts of features [..., hidden], the best first; fewer where the vocabulary is smaller.

        Returns:
            float32 [..., k] log-probabilities among the tokens that are drafted from, and int64 [..., k] the target's
            tokens.
        """
        logits = self.logits(features)
        # One kernel normalises; `logsumexp` on its own takes eight, and longer than this on a CPU.
        log_probabilities, index = logits.log_softmax(-1).topk(min(k, logits.shape[-1]), dim=-1)
        return log_probabilities, self.token_ids(index)

    def on_vocabulary(self, values: torch.Tensor) -> torch.Tensor:
        """[..., vocab] to [..., draft vocab]."""
        return values if self.vocabulary is None else values[..., self.vocabulary.to(values.device)]

    def token_ids(self, index: torch.LongTensor) -> torch.LongTensor:
        """The target's tokens of rows of this head."""
        return index if self.vocabulary is None else self.vocabulary.to(index.device)[index]
