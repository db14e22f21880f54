"""The text of each token."""

import pytest
from tiny_chat import word_tokenizer
from transformers import AutoTokenizer

from hf_poss.demo import demo_folder
from hf_poss.evaluation.token_pieces import token_pieces


@pytest.fixture(scope="module")
def byte_level():
    return AutoTokenizer.from_pretrained(demo_folder() / "target")


@pytest.mark.parametrize("text", ["def f(x):\n    return x + 1\n", "naïve – 漢字 🙂🙂 end", "   spaces  ", "🙂"])
def test_joined_they_are_the_text(byte_level, text):
    prompt = byte_level("some prompt é")["input_ids"]
    token_ids = byte_level(text, add_special_tokens=False)["input_ids"]
    pieces = token_pieces(byte_level, prompt, token_ids)
    assert len(pieces) == len(token_ids)
    assert "".join(pieces) == text


def test_a_character_of_several_tokens_is_the_last_ones(byte_level):
    token_ids = byte_level("a🙂b", add_special_tokens=False)["input_ids"]
    assert len(token_ids) > 3
    pieces = token_pieces(byte_level, byte_level("x")["input_ids"], token_ids)
    assert [piece for piece in pieces if piece] == ["a", "🙂", "b"]


def test_words_keep_their_spaces_behind_a_prompt(stories):
    tokenizer = stories[1]
    prompt, whole = tokenizer("Once upon a time")["input_ids"], tokenizer("Once upon a time, there was a dog.")
    pieces = token_pieces(tokenizer, prompt, whole["input_ids"][len(prompt) :])
    assert "".join(pieces) == ", there was a dog."


def test_special_tokens_have_no_text(byte_level):
    end = byte_level.eos_token_id
    assert token_pieces(byte_level, byte_level("x")["input_ids"], [end]) == [""]


def test_a_special_token_within_takes_no_space_away():
    tokenizer = word_tokenizer()
    assert token_pieces(tokenizer, [7], [8, tokenizer.pad_token_id, 9]) == [" w8", "", " w9"]
