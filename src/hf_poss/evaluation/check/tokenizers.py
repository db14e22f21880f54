"""Whether the tokenizer is the one that target and specialists know."""

import math
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from ...checkpoints import repository_name
from ...compatibility import input_device
from ...configuration_poss import eos_token_ids
from ...training.checks import check_tokenizer
from .findings import Finding, Verdict
from .pair import Pair
from .recorded import Recorded


__all__ = ["surprise", "tokenizer_fits"]

logger = logging.get_logger(__name__)

_MARKS = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "chat_template")


def tokenizer_fits(
    tokenizer: PreTrainedTokenizerBase,
    target_config: PreTrainedConfig,
    generation_config: Any,
    recorded: Recorded,
    drafters: PreTrainedTokenizerBase | None = None,
) -> Finding:
    """Vocabulary, special tokens and chat template: the tokenizer's, the target's, and those of the tokenizer that the
    specialists were trained with.

    Args:
        tokenizer: that encodes the prompts.
        target_config, generation_config: of the target.
        recorded: by the drafter.
        drafters: the tokenizer that is recorded; loaded here if it is None and has another name.
    """
    config = target_config.get_text_config()
    ends = sorted({*eos_token_ids(config), *eos_token_ids(generation_config)})
    numbers = {
        "tokens": len(tokenizer),
        "vocab_size": config.vocab_size,
        "eos_token_id": tokenizer.eos_token_id,
        "target_eos_token_ids": ends,
        "has_chat_template": bool(tokenizer.chat_template),
        "recorded": recorded.tokenizer,
    }
    try:
        check_tokenizer(tokenizer, target_config)
    except ValueError as error:
        return Finding("tokenizer", Verdict.FAILURE, str(error), "Load the target's own tokenizer.", numbers)
    problems = []
    if tokenizer.eos_token_id is not None and ends and tokenizer.eos_token_id not in ends:
        problems.append(f"its end of sequence is {tokenizer.eos_token_id}, the target's {ends}")
    if 2 * len(tokenizer) < config.vocab_size:
        problems.append(f"it has {len(tokenizer)} tokens, less than half of the target's {config.vocab_size}")
    if recorded.vocab_size not in (None, config.vocab_size):
        problems.append(
            f"the specialists were trained with a vocabulary of {recorded.vocab_size}, the target has "
            f"{config.vocab_size}"
        )
    compared = ""
    if recorded.tokenizer:
        if drafters is None and not _same_name(recorded.tokenizer, tokenizer):
            drafters = _load(recorded)
            if drafters is None:
                problems.append(
                    f"the specialists were trained with that of {recorded.tokenizer}, which is not at hand"
                )
        if drafters is not None:
            differences = _differences(tokenizer, drafters)
            numbers["differs_from_recorded"] = differences
            problems += [f"of {recorded.tokenizer}, which the specialists were trained with: {differences}"] * bool(
                differences
            )
        compared = f", that of {repository_name(recorded.tokenizer)}, which the specialists were trained with"
    if problems:
        told = "; ".join(problems)
        remedy = "Use the tokenizer that the target and its specialists were trained with."
        return Finding("tokenizer", Verdict.WARNING, f"The tokenizer may be another one's: {told}.", remedy, numbers)
    told = f"{len(tokenizer)} tokens for a vocabulary of {config.vocab_size}"
    return Finding("tokenizer", Verdict.OK, f"The tokenizer is the target's{compared}: {told}.", numbers=numbers)


def _same_name(recorded: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    return repository_name(recorded) == repository_name(tokenizer.name_or_path or "?")


def _load(recorded: Recorded) -> PreTrainedTokenizerBase | None:
    try:
        return AutoTokenizer.from_pretrained(recorded.tokenizer, revision=recorded.tokenizer_revision)
    except (OSError, ValueError) as error:
        logger.info(f"The tokenizer {recorded.tokenizer} is not at hand: {error}")
        return None


def _differences(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str:
    """What differs between two tokenizers; empty if nothing does."""
    own, others = tokenizer.get_vocab(), other.get_vocab()
    moved = [token for token in own.keys() | others.keys() if own.get(token) != others.get(token)]
    found = [f"{len(moved)} tokens differ, such as {', '.join(map(repr, sorted(moved)[:3]))}"] if moved else []
    return "; ".join([*found, *(f"{name} differs" for name in _MARKS if _mark(tokenizer, name) != _mark(other, name))])


def _mark(tokenizer: PreTrainedTokenizerBase, name: str) -> Any:
    return getattr(tokenizer, name, None)


@torch.no_grad()
def surprise(pair: Pair) -> Finding:
    """Whether the target knows the tokens that the tokenizer makes of text: its mean surprise by the prompts, in nats
    a token, against guessing blindly, ln(vocabulary). Sizes may agree where the ids are another's.
    """
    total, count = 0.0, 0
    for prompt in pair.prompts:
        if len(prompt) < 2:
            continue
        ids = torch.tensor([prompt], device=input_device(pair.target))
        logits = pair.target(input_ids=ids, use_cache=False, return_dict=True).logits[0, :-1].float()
        total += float(F.cross_entropy(logits, ids[0, 1:].to(logits.device), reduction="sum"))
        count += len(prompt) - 1
    name = "prompts"
    if not count:
        return Finding.skipped(name, "All prompts have one token, which the target cannot be surprised by.")
    blind, mean = math.log(pair.poss.config.vocab_size), total / count
    numbers = {"nats_per_token": mean, "blind_guess": blind, "tokens": count}
    told = f"The target's surprise by {count} tokens of the prompts is {mean:.2f} nats a token"
    if not mean < blind:
        return Finding(
            name,
            Verdict.WARNING,
            f"{told}, no less than guessing blindly ({blind:.2f}): it does not know this text.",
            "Check that the tokenizer is the target's, and the chat template; or pass prompts of the target's kind.",
            numbers,
        )
    return Finding(name, Verdict.OK, f"{told}; guessing blindly is {blind:.2f}.", numbers=numbers)
