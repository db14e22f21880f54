"""Characters to tokens."""

import pytest
from chat_templates import make_tokenizer

from hf_poss.training.spans import tokenize_spans


@pytest.mark.parametrize(
    ("text", "span", "counted"),
    [
        ("ab", (1, 2), ["b"]),
        ("a yes", (2, 5), [" yes"]),  # the token holds a character of the span
        ("a b", (1, 2), [" "]),
        ("a b", (2, 3), ["b"]),
        ("a  b", (1, 3), [" ", " "]),
        ("aéb", (1, 2), "é"),  # a letter of two bytes
        ("ab", (1, 1), []),
        ("a\n<|im_end|>b", (0, 2), ["a", "\n"]),
        ("a\n<|im_end|>b", (2, 12), ["<|im_end|>"]),
    ],
)
@pytest.mark.parametrize("trims_offsets", [False, True])
def test_tokens_that_hold_a_character_of_the_span(text, span, counted, trims_offsets):
    tokenizer = make_tokenizer(trims_offsets=trims_offsets)
    [(ids, counts)] = tokenize_spans(tokenizer, [text], [[span]], add_special_tokens=False)
    assert ids == tokenizer(text).input_ids
    found = [token for token, is_counted in zip(ids, counts, strict=True) if is_counted]
    if counted == "é":
        assert tokenizer.decode(found) == "é" and len(found) == 2
    else:
        assert [tokenizer.decode([token]) for token in found] == counted


def test_several_texts_and_spans():
    tokenizer = make_tokenizer()
    rows = tokenize_spans(tokenizer, ["abcdef", "x"], [[(0, 1), (3, 5)], []], add_special_tokens=False)
    assert [counts for _, counts in rows] == [[True, False, False, True, True, False], [False]]
    assert tokenize_spans(tokenizer, [], [], add_special_tokens=False) == []
