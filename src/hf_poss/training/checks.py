"""Whether tokenizer, samples, target and specialists fit together."""

from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..configuration_poss import eos_token_ids
from .lengths import sample_lengths


__all__ = ["check_samples", "check_tokenizer"]

logger = logging.get_logger(__name__)

_OF_A_STREAM = 64


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, target_config: PreTrainedConfig) -> None:
    """Whether a tokenizer can be the target's; needs no weights.

    Vocabularies are often padded, and tokens added that a target does not know: a tokenizer that is smaller, and added
    tokens beyond the vocabulary, are warned about. So is another end-of-sequence token, unless the tokenizer is of
    another name too and less than half as large as the vocabulary: then it is another model's.

    Args:
        tokenizer: to train with.
        target_config: configuration of the target.

    Raises:
        ValueError: if the tokenizer has tokens of its own beyond the target's vocabulary, or is another model's.
    """
    config = target_config.get_text_config()
    vocabulary = tokenizer.get_vocab()
    beyond = {token: index for token, index in vocabulary.items() if index >= config.vocab_size}
    added = tokenizer.added_tokens_decoder
    told = (
        f"The tokenizer{_named(tokenizer)} has {len(vocabulary)} tokens, the target{_named(target_config)} a "
        f"vocabulary of {config.vocab_size}"
    )
    advice = "Use the target's own tokenizer."
    needed = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    if any(index not in added or index in needed for index in beyond.values()):
        raise ValueError(f"{told}, and ids up to {max(beyond.values())} lie beyond it. {advice}")
    if beyond:
        logger.warning(
            f"The target does not know these tokens of the tokenizer: {', '.join(sorted(beyond)[:10])}. Data must not "
            "contain them."
        )
    ends = eos_token_ids(config)
    same_end = tokenizer.eos_token_id is None or not ends or tokenizer.eos_token_id in ends
    small = 2 * len(vocabulary) < config.vocab_size
    if small and not same_end and _other_name(tokenizer, target_config):
        raise ValueError(
            f"{told}; its end-of-sequence token is {tokenizer.eos_token_id}, the target's {ends}. {advice}"
        )
    if small:
        logger.warning(f"{told}. Is it the target's?")
    elif not same_end:
        logger.warning(
            f"The tokenizer's end-of-sequence token is {tokenizer.eos_token_id}, the target's configuration says "
            f"{ends}. Is it the target's tokenizer?"
        )


def _named(part: Any) -> str:
    name = getattr(part, "name_or_path", None)
    return f" {str(name)!r}" if name else ""


def _other_name(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> bool:
    names = [str(part.name_or_path or "").rstrip("/").split("/")[-1] for part in (tokenizer, config)]
    return all(names) and names[0] != names[1]


def check_samples(dataset: Any, num_draft_positions: int, positions: int | None = None) -> None:
    """Whether samples are long enough for K = `num_draft_positions`: drafts start from a feature and the token behind
    it, so the last position has something to learn only in texts of K + 2 tokens or more. If some texts are shorter,
    that is logged once.

    Args:
        dataset: samples, see [`~hf_poss.training.data.prepare_dataset`]; of a stream the first 64 are looked at.
        num_draft_positions: K.
        positions: that the target can read, see `learned_positions`.

    Raises:
        ValueError: if no text is longer than K + 1 tokens, there is none, or one has more tokens than `positions`.
    """
    is_stream = not has_length(dataset)
    lengths = _document_lengths(islice(dataset, _OF_A_STREAM) if is_stream else dataset)
    where = f"the first {_OF_A_STREAM} samples" if is_stream else "the dataset"
    if not lengths:
        raise ValueError("The dataset is empty; there is nothing to learn.")
    if max(lengths) <= num_draft_positions + 1:
        raise ValueError(
            f"The longest text of {where} has {max(lengths)} tokens; {num_draft_positions} draft positions (K) need "
            f"texts of more than {num_draft_positions + 1}. Use longer texts or a larger `max_length`, or a smaller "
            "`num_draft_positions`."
        )
    if positions is not None and max(lengths) > positions:
        raise ValueError(
            f"The longest text of {where} has {max(lengths)} tokens; the target learned {positions} positions and can "
            f"read no more. Set `max_length={positions}` (`--max_length {positions}`)."
        )
    short = sum(length <= num_draft_positions + 1 for length in lengths)
    if short:
        logger.warning_once(
            f"{short} of {len(lengths)} texts of {where} have at most {num_draft_positions + 1} tokens: the last of "
            f"{num_draft_positions} draft positions learns nothing from them."
        )


def _document_lengths(samples: Any) -> list[int]:
    """Tokens of every text in the samples."""
    if not hasattr(samples, "select_columns"):
        return [length for sample in samples for length in _segment_lengths(sample)]
    if "segment_ids" not in samples.column_names:
        return sample_lengths(samples)
    packed = samples.select_columns(["input_ids", "segment_ids"]).with_format("numpy")
    return [length for sample in packed for length in _segment_lengths(sample)]


def _segment_lengths(sample: dict[str, Any]) -> list[int]:
    if "segment_ids" not in sample:
        return [len(sample["input_ids"])]
    return torch.unique_consecutive(torch.as_tensor(sample["segment_ids"]), return_counts=True)[1].tolist()
