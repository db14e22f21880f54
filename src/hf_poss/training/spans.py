"""From the characters that count to the tokens that count."""

from collections.abc import Sequence
from os.path import commonprefix

from transformers import PreTrainedTokenizerBase


__all__ = ["Span", "tokenize_spans"]

Span = tuple[int, int]


def tokenize_spans(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    spans: Sequence[Sequence[Span]],
    add_special_tokens: bool,
) -> list[tuple[list[int], list[bool]]]:
    """Token ids of every text, and for every token whether it holds a character of the text's spans.

    Texts are tokenized whole, as a target reads them: cut at the spans they could give other tokens.

    Args:
        spans: for every text, first and last + 1 of the characters that count, ascending.
        add_special_tokens: whether the tokenizer adds its own, such as the beginning of sequence; these do not count.
    """
    if not texts:
        return []
    if not tokenizer.is_fast:
        encoded = tokenizer(list(texts), add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        rows = zip(texts, encoded, spans, strict=True)
        return [(ids, _counts_by_prefix(tokenizer, text, ids, of, add_special_tokens)) for text, ids, of in rows]
    encoded = tokenizer(list(texts), add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False)
    rows = zip(encoded["input_ids"], encoded["offset_mapping"], spans, strict=True)
    return [(ids, _counts_by_offset(offsets, of)) for ids, offsets, of in rows]


def _counts_by_offset(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    counts, last, at = [], 0, 0
    for start, end in offsets:
        # Tokenizers that trim offsets leave nothing of a token of spaces: it lies between the end of the token before
        # and its own, e.g. (5, 5) after (0, 3) holds the characters 3 and 4.
        first = start if start < end else min(last, start)
        while at < len(spans) and spans[at][1] <= first:
            at += 1
        counts.append(at < len(spans) and spans[at][0] < end and first < end)
        last = end
    return counts


def _counts_by_prefix(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], spans: Sequence[Span], add_special_tokens: bool
) -> list[bool]:
    """Without offsets: the tokens that a text and its part up to a border have in common lie before the border."""

    def tokens_before(border: int) -> int:
        part = tokenizer(text[:border], add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        return len(commonprefix([part, ids]))

    counts = [False] * len(ids)
    for start, end in spans:
        first, last = tokens_before(start), tokens_before(end)
        counts[first:last] = [True] * (last - first)
    return counts
