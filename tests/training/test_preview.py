"""Samples as text."""

import chat_templates as templates
import pytest
from chat_templates import make_tokenizer

from hf_poss.training import prepare_dataset
from hf_poss.training.preview import describe_samples


TOKENIZER = make_tokenizer(templates.CHATML)
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes no"}]


def test_brackets_around_what_counts():
    samples = prepare_dataset([{"messages": CHAT}] * 3, TOKENIZER, max_length=100)
    shown = describe_samples(samples, TOKENIZER, 2, color=False)
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦yes no<|im_end|>⟧\n"
    # Header of 21 tokens; y, e, s, " no", the end; the line break.
    assert shown == "\n\n".join(
        f"--- sample {number}: 27 tokens, 5 count, 1 document ---\n{text}" for number in (1, 2)
    )


def test_colours_take_their_place():
    samples = prepare_dataset([{"messages": CHAT}], TOKENIZER, max_length=100)
    shown = describe_samples(samples, TOKENIZER, 1, color=True)
    assert "\033[32myes no<|im_end|>\033[0m" in shown
    assert "\033[2mhi<|im_end|>\033[0m\n\033[2m<|im_start|>assistant\033[0m\n" in shown
    assert "⟦" not in shown


def test_a_count_of_nothing_is_refused():
    with pytest.raises(ValueError, match="0 samples to show"):
        describe_samples([], make_tokenizer(), 0, color=False)


def test_documents_of_packed_samples():
    samples = prepare_dataset(["one", "two"], TOKENIZER, max_length=20, packing=True)
    # As in a batch, the first token of a document does not count.
    assert describe_samples(samples, TOKENIZER, 5, color=False) == (
        "--- sample 1: 8 tokens, 6 count, 2 documents ---\n[document 1]\no⟦ne</s>⟧\n[document 2]\nt⟦wo</s>⟧"
    )


def test_letters_of_several_tokens_stay_whole():
    samples = [{"input_ids": TOKENIZER("aé").input_ids}]
    assert describe_samples(samples, TOKENIZER, 1, color=False).endswith("\na⟦é⟧")
