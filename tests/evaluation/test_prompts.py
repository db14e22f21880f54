"""Prompts from files, in batches."""

import json

import pytest
import torch
from tiny_chat import word_tokenizer

from hf_poss.evaluation.prompts import batches, read_prompts


CPU = torch.device("cpu")


def test_lines_have_a_prompt_or_turns(tmp_path):
    path = tmp_path / "some.jsonl"
    records = [{"prompt": "w7 w8"}, {"question_id": 3, "turns": ["w9", "w10"]}]
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    assert read_prompts(path) == [("some.jsonl:1", "w7 w8"), ("some.jsonl:2", "w9")]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        ('{"prompt": "w7"}\n{', "Line 2 of .* is no JSON"),
        ('{"question": "w7"}', "Line 1 of .* has neither"),
        ('{"turns": []}', "Line 1 of .* has neither"),
        ('{"prompt": 5}', "Line 1 of .* has neither"),
        ("[1]", "Line 1 of .* has neither"),
    ],
)
def test_a_line_without_a_text_is_named(tmp_path, text, told):
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(ValueError, match=told):
        read_prompts(tmp_path / "bad.jsonl")


def test_batches_are_padded_on_the_left():
    texts = [("a", "w7 w8 w9"), ("b", "w10"), ("c", "w11 w12")]
    first, second = batches(texts, word_tokenizer(), 2, CPU)
    assert first.title == "a, b" and first.tokens == 3
    assert first.inputs["input_ids"].tolist() == [[7, 8, 9], [0, 0, 10]]
    assert first.inputs["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert second.title == "c" and second.inputs["input_ids"].tolist() == [[11, 12]]


def test_a_chat_template_is_wrapped_around_each():
    (batch,) = batches([("a", "w7")], word_tokenizer(), 1, CPU, chat=True)
    user, assistant, end = 4, 5, 2
    assert batch.inputs["input_ids"].tolist() == [[user, 7, end, assistant]]


def test_a_tokenizer_without_padding_pads_with_its_end():
    tokenizer = word_tokenizer()
    tokenizer.pad_token = None
    (batch,) = batches([("a", "w7 w8"), ("b", "w9")], tokenizer, 2, CPU)
    assert batch.inputs["attention_mask"].tolist() == [[1, 1], [0, 1]]
