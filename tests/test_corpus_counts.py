"""How often tokens occur in a corpus, of whatever it is made."""

from collections import Counter

import numpy as np
import pytest
import torch
from conftest import VOCAB_SIZE
from tiny_chat import TEMPLATE, word_tokenizer
from tokenizers import AddedToken

from hf_poss.corpus_counts import corpus_counts, structural_tokens


TEXTS = ["w9 w8 w9", "", "w20", None, "w9"]
IDS = [[9, 8, 9], [], [20], [9]]
COUNTED = {9: 3, 8: 1, 20: 1}


def as_counter(counts: torch.LongTensor) -> dict[int, int]:
    assert counts.shape == (VOCAB_SIZE,) and counts.dtype == torch.int64
    return {token: int(counts[token]) for token in counts.nonzero().flatten().tolist()}


def column(name: str, values: list, streamed: bool = False):
    dataset = pytest.importorskip("datasets").Dataset.from_list([{name: value, "other": 1} for value in values])
    return (dataset.to_iterable_dataset() if streamed else dataset)[name]


CORPORA = {
    "texts": lambda: TEXTS,
    "generator of texts": lambda: iter(TEXTS),
    "column of texts": lambda: column("text", TEXTS),
    "streamed column of texts": lambda: column("text", TEXTS, streamed=True),
    "ids": lambda: IDS,
    "generator of ids": lambda: (tuple(ids) for ids in IDS),
    "column of ids": lambda: column("input_ids", IDS),
    "tensors": lambda: [torch.tensor(ids, dtype=torch.int32) for ids in IDS if ids],
    "arrays": lambda: [np.array(ids, dtype=np.uint16) for ids in IDS if ids],
    "tensor of rows": lambda: torch.tensor([[9, 8], [20, 9], [9, 9]]),
    "both": lambda: [TEXTS[0], IDS[2], IDS[3]],
}


@pytest.mark.parametrize("kind", CORPORA)
def test_every_token_counts(kind):
    expected = {9: 4, 8: 1, 20: 1} if kind == "tensor of rows" else COUNTED
    assert as_counter(corpus_counts(CORPORA[kind](), VOCAB_SIZE, word_tokenizer())) == expected


def test_chats_are_written_with_the_template():
    chat = [{"role": "user", "content": "w7 w8"}, {"role": "assistant", "content": "w8"}]
    tokenizer = word_tokenizer()
    expected = Counter(tokenizer("user w7 w8 </s> assistant w8 </s>", add_special_tokens=False)["input_ids"])
    assert as_counter(corpus_counts([chat], VOCAB_SIZE, tokenizer)) == expected
    assert as_counter(corpus_counts(column("messages", [chat, chat]), VOCAB_SIZE, tokenizer)) == {
        token: 2 * count for token, count in expected.items()
    }


def test_what_a_tokenizer_puts_around_a_text_does_not_count():
    tokenizer = word_tokenizer()
    tokenizer.add_bos_token = True
    assert as_counter(corpus_counts(["w9"], VOCAB_SIZE, tokenizer)) == {9: 1}


def test_a_corpus_is_read_as_it_is_counted():
    """Little is held at once, so that a stream of any length can be counted."""
    alive, most = [0], [0]

    class Text(list):
        def __init__(self):
            super().__init__([5])
            alive[0] += 1
            most[0] = max(most[0], alive[0])

        def __del__(self):
            alive[0] -= 1

    assert as_counter(corpus_counts((Text() for _ in range(2500)), VOCAB_SIZE)) == {5: 2500}
    assert most[0] < 500


@pytest.mark.parametrize(
    ("corpus", "error", "told"),
    [
        ("w9 w8", TypeError, "one str"),
        ({"text": TEXTS}, TypeError, "one dict"),
        (5, TypeError, "one int"),
        ([5, 6], TypeError, "shape .*counts"),
        ([[0.5, 1.0]], TypeError, "float32"),
        ([[[1, 2], [3, 4]]], TypeError, r"shape \(2, 2\)"),
        ([object()], TypeError, "is object"),
        ([{"text": "w9"}], TypeError, r"\['text'\].*column"),
        ([[0, VOCAB_SIZE]], ValueError, f"tokens 0 to {VOCAB_SIZE}; expected 0 to {VOCAB_SIZE - 1}"),
        ([[-100, 5]], ValueError, "tokens -100 to 5"),
    ],
)
def test_other_corpora_are_refused(corpus, error, told):
    with pytest.raises(error, match=told):
        corpus_counts(corpus, VOCAB_SIZE, word_tokenizer())


@pytest.mark.parametrize(
    ("corpus", "tokenizer", "told"),
    [
        (TEXTS, None, "pass the target's `tokenizer`"),
        ([[{"role": "user", "content": "w9"}]], None, "no tokenizer was given"),
        ([[{"role": "user", "content": "w9"}]], word_tokenizer(None), "no chat template"),
    ],
)
def test_text_needs_a_tokenizer(corpus, tokenizer, told):
    with pytest.raises(ValueError, match=told):
        corpus_counts(corpus, VOCAB_SIZE, tokenizer)


def test_the_tokens_that_hold_chats_together():
    tokenizer = word_tokenizer(None)
    assert structural_tokens(tokenizer) == {tokenizer.eos_token_id}
    tokenizer.add_tokens([AddedToken("<|turn|>", special=True), AddedToken("<think>"), AddedToken("<|unused|>")])
    turn, think = tokenizer.convert_tokens_to_ids(["<|turn|>", "<think>"])
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE.replace("</s>", "<|turn|><think>")
    expected = {tokenizer.eos_token_id, tokenizer.bos_token_id, turn, think}
    assert structural_tokens(tokenizer) == expected
    tokenizer.chat_template = {"default": "{{ bos_token }}", "tool_use": "<|turn|> <think>"}
    assert structural_tokens(tokenizer) == expected
    tokenizer.eos_token = None
    assert structural_tokens(tokenizer) == expected - {2}
