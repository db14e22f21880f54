"""Rows of a dataset to rows of samples, a batch of columns at a time."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from .chat import ChatRenderer, RefusedConversation, UnclearTurns
from .formats import Conversation, Passage, row_reader
from .packing import best_fit_decreasing, pieces
from .spans import Span, tokenize_spans


__all__ = ["cut_rows", "encode_rows", "pack_rows"]

Columns = dict[str, list]
Tokens = tuple[list[int], list[bool]]  # token ids, and whether each counts


def encode_rows(
    batch: Mapping[str, list], tokenizer: PreTrainedTokenizerBase, max_length: int, packing: bool, text_field: str
) -> Columns:
    """`input_ids`, `labels`, `length`, and in `left_out` the reason why a row is no sample, None if it is one.

    Args:
        batch: columns of the dataset.
        tokenizer, max_length, packing, text_field: as in [`~hf_poss.training.data.prepare_dataset`].
    """
    read = row_reader(list(batch), text_field, tokenizer.chat_template)
    contents = [read(row) for row in _rows(batch)]
    samples = []
    for content, tokens in zip(contents, _encode(contents, tokenizer), strict=True):
        if isinstance(tokens, str):
            samples.append({"input_ids": [], "labels": [], "length": 0, "left_out": tokens})
            continue
        ids, counts = tokens
        goes_on = packing and isinstance(content, Passage) and not content.prompt
        for part in pieces(len(ids), max_length) if goes_on else [slice(max_length)]:
            labels = [token if counted else -100 for token, counted in zip(ids[part], counts[part], strict=True)]
            samples.append(_sample(input_ids=ids[part], labels=labels))
    return _columns(samples)


def cut_rows(batch: Mapping[str, list], max_length: int) -> Columns:
    """Ready samples cut to `max_length` tokens; labels are added where missing, `length` and `left_out` as above."""
    samples = []
    for row in _rows(batch):
        parts = {name: row[name] for name in ("input_ids", "labels", "segment_ids") if row.get(name) is not None}
        parts.setdefault("labels", parts.setdefault("input_ids", []))
        lengths = {name: len(part) for name, part in parts.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"The parts of a sample differ in length: {lengths}; expected an entry for every token.")
        samples.append(_sample(**{name: part[:max_length] for name, part in parts.items()}))
    return _columns(samples)


def pack_rows(batch: Mapping[str, list], max_length: int) -> Columns:
    """Samples of several documents, with `segment_ids` and `length`."""
    documents = list(_rows(batch))
    lengths = [len(document["input_ids"]) for document in documents]
    packed = []
    for group in best_fit_decreasing(lengths, max_length):
        names = ("input_ids", "labels")
        sample = {name: [token for index in group for token in documents[index][name]] for name in names}
        sample["segment_ids"] = [number for number, index in enumerate(group, 1) for _ in range(lengths[index])]
        packed.append({**sample, "length": len(sample["segment_ids"])})
    return _columns(packed)


def _encode(contents: Sequence[Conversation | Passage], tokenizer: PreTrainedTokenizerBase) -> Iterator[Tokens | str]:
    """Tokens of each, or why there are none. Rows without a prompt and a completion are passages, even among chats."""
    chats = [content for content in contents if isinstance(content, Conversation)]
    passages = [content for content in contents if isinstance(content, Passage)]
    of_chats = iter(_encode_conversations(chats, tokenizer) if chats else [])
    of_passages = iter(_encode_passages(passages, tokenizer))
    return (next(of_chats if isinstance(content, Conversation) else of_passages) for content in contents)


def _encode_conversations(
    conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase
) -> list[Tokens | str]:
    """Tokens of each, or why there are none."""
    renderer = ChatRenderer(tokenizer)
    encoded: list[Any] = [_marked(conversation, renderer) for conversation in conversations]
    kept = [index for index, marked in enumerate(encoded) if not isinstance(marked, str)]
    texts, spans = [encoded[index][0] for index in kept], [encoded[index][1] for index in kept]
    # Templates write the special tokens themselves.
    for index, tokens in zip(kept, tokenize_spans(tokenizer, texts, spans, add_special_tokens=False), strict=True):
        encoded[index] = tokens
    return encoded


def _marked(conversation: Conversation, renderer: ChatRenderer) -> tuple[str, list[Span]] | str:
    """Text and the spans of it that count, or why there are none."""
    messages = conversation.messages[conversation.prompt_length :]
    if not any(message["role"] == "assistant" for message in messages):
        return "without a message of the assistant"
    try:
        text, spans = renderer.spans(conversation)
    except RefusedConversation as error:
        return f"that the chat template refuses ({error})"
    except UnclearTurns as error:
        return f"whose turns are unclear ({error})"
    return (text, spans) if spans else "in which the chat template marks nothing as written by the assistant"


def _encode_passages(passages: Sequence[Passage], tokenizer: PreTrainedTokenizerBase) -> list[Tokens | str]:
    """Tokens of each with the end-of-sequence token, where the tokenizer has one, or why there are none."""
    texts = [passage.prompt + passage.completion for passage in passages]
    spans = [[(len(passage.prompt), len(text))] for passage, text in zip(passages, texts, strict=True)]
    encoded: list[Any] = tokenize_spans(tokenizer, texts, spans, add_special_tokens=True)
    for index, (passage, (ids, counts)) in enumerate(zip(passages, encoded, strict=True)):
        if not (passage.prompt + passage.completion).strip():
            encoded[index] = "without text"
            continue
        if not passage.completion:
            encoded[index] = "without a completion"
            continue
        end = tokenizer.eos_token_id
        if end is not None and ids[-1:] != [end]:
            ids, counts = [*ids, end], [*counts, True]
        counts = [*counts[:-1], True] if passage.prompt else [True] * len(ids)
        encoded[index] = (ids, counts)
    return encoded


def _sample(**parts: list[int]) -> dict[str, Any]:
    """A row of a sample, with the reason if it is none."""
    if len(parts["input_ids"]) < 2:
        reason = "of fewer than two tokens"
    elif all(label == -100 for label in parts["labels"][1:]):  # the first token is not predicted
        reason = "without a token that counts within `max_length`"
    else:
        reason = None
    return {**parts, "length": len(parts["input_ids"]), "left_out": reason}


def _rows(batch: Mapping[str, list]) -> Iterator[dict[str, Any]]:
    return (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


def _columns(rows: Sequence[dict[str, Any]]) -> Columns:
    return {name: [row[name] for row in rows] for name in rows[0]}
