"""How often tokens occur in texts, chats or token ids, and which ones a tokenizer's chats are held together by."""

from collections.abc import Iterable, Mapping
from itertools import chain, islice
from operator import length_hint
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase


__all__ = ["corpus_counts", "count_ids", "structural_tokens"]

_BATCH = 100  # texts tokenized at once
_EXPECTED = (
    "a tensor of counts, or texts, chats (lists of messages) or sequences of token ids, one after the other: a list, "
    "a generator, a column of a dataset (`dataset['text']`)"
)


def corpus_counts(
    corpus: Iterable[Any], vocab_size: int, tokenizer: PreTrainedTokenizerBase | None = None
) -> torch.LongTensor:
    """How often each token occurs, int64 [vocab]. The corpus is read once, as it is counted.

    Args:
        corpus: strings, chats (lists of messages with `role` and `content`) or sequences of token ids; it need not
            have a length, but has to end. None counts as an empty text.
        vocab_size: of the target.
        tokenizer: of the target, for strings and chats.

    Raises:
        TypeError: if an item is something else, or the corpus is one string or one mapping.
        ValueError: if a token lies outside the vocabulary, or text comes without a tokenizer, or chats without a chat
            template.
    """
    if isinstance(corpus, (str, bytes, Mapping)) or not isinstance(corpus, Iterable):
        raise TypeError(f"The corpus is one {type(corpus).__name__}; expected {_EXPECTED}.")
    counts = torch.zeros(vocab_size, dtype=torch.long)
    items = iter(corpus)
    with tqdm(desc="Counting tokens", unit="texts", total=length_hint(corpus) or None) as bar:
        while batch := list(islice(items, _BATCH)):
            counts += count_ids(torch.cat(_token_ids(batch, tokenizer)), vocab_size)
            bar.update(len(batch))
    return counts


def count_ids(ids: torch.LongTensor, vocab_size: int) -> torch.LongTensor:
    """How often each token occurs in int64 [tokens], int64 [vocab].

    Raises:
        ValueError: if a token lies outside the vocabulary.
    """
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ValueError(
            f"The text has tokens {int(ids.min())} to {int(ids.max())}; expected 0 to {vocab_size - 1}, the target's "
            "vocabulary. Is it tokenized with the target's tokenizer?"
        )
    return torch.bincount(ids, minlength=vocab_size)


def structural_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The end of a sequence, and what its chat template writes of special and added tokens: ends of turns, roles,
    marks of thoughts and tool calls. They are rare in text, and every answer needs some."""
    template = tokenizer.chat_template or ""
    template = "".join(template.values()) if isinstance(template, Mapping) else template
    tokens = {tokenizer.eos_token_id}
    for token_id, token in tokenizer.added_tokens_decoder.items():
        if token.content.strip() and token.content in template:
            tokens.add(token_id)
    for name in tokenizer.special_tokens_map:  # a template may name them: {{ bos_token }}
        if name in template:
            tokens.add(getattr(tokenizer, f"{name}_id", None))
    return tokens - {None}


def _token_ids(items: list[Any], tokenizer: PreTrainedTokenizerBase | None) -> list[torch.LongTensor]:
    """Tokens of some items of a corpus, each int64 [tokens]."""
    texts, sequences = [], []
    for item in items:
        if item is None or isinstance(item, str):
            texts.append(item or "")
        elif isinstance(item, (list, tuple)) and item and isinstance(item[0], Mapping):
            texts.append(_chat_text(item, tokenizer))
        else:
            sequences.append(_sequence(item))
    if any(texts):
        if tokenizer is None:
            raise ValueError("The corpus holds texts; pass the target's `tokenizer` with them, or token ids.")
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        sequences.append(torch.tensor(list(chain.from_iterable(encoded["input_ids"])), dtype=torch.long))
    return [torch.zeros(0, dtype=torch.long), *sequences]


def _chat_text(messages: list[Any], tokenizer: PreTrainedTokenizerBase | None) -> str:
    if tokenizer is None or not tokenizer.chat_template:
        missing = "no tokenizer was given" if tokenizer is None else "the tokenizer has no chat template"
        raise ValueError(f"The corpus holds chats, and {missing}. Pass the target's `tokenizer`, or texts.")
    return tokenizer.apply_chat_template(messages, tokenize=False)


def _sequence(item: Any) -> torch.LongTensor:
    if isinstance(item, Mapping):
        raise TypeError(
            f"An item of the corpus is a row with {sorted(map(str, item))}. Pass one column of texts, of chats or of "
            "token ids: `dataset['text']`."
        )
    try:
        ids = torch.as_tensor(item)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"An item of the corpus is {type(item).__name__} ({error}); expected {_EXPECTED}.") from error
    if ids.ndim == 1 and not len(ids):
        return ids.long()
    if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        shape = f"{str(ids.dtype).removeprefix('torch.')} of shape {tuple(ids.shape)}"
        raise TypeError(f"An item of the corpus is {shape}; expected {_EXPECTED}.")
    return ids.long().cpu()
