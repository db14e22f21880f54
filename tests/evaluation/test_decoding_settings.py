"""Arguments of `generate`, as a command line names them."""

import pytest
from tiny_chat import word_tokenizer

from hf_poss.evaluation.decoding_settings import DecodingSettings, call_seed, padding_token, parse_knobs


def test_values_are_json_and_other_text_is_text():
    given = ["top_p=0.9", "repetition_penalty=1.1", "stop_strings=END", "bad_words_ids=[[3, 4]]", "eos_token_id=null"]
    assert parse_knobs(given) == {
        "top_p": 0.9,
        "repetition_penalty": 1.1,
        "stop_strings": "END",
        "bad_words_ids": [[3, 4]],
        "eos_token_id": None,
    }


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("top_q=0.9", "knows no `top_q`"),
        ("top_p", "expected NAME=VALUE"),
        ("=3", "expected NAME=VALUE"),
        ("early_stopping=7", "early_stopping"),
        ("max_new_tokens=3", "use `--max_new_tokens`"),
        ("temperature=0.3", "use `--temperature`"),
        ("num_beams=4", "without beams"),
        ("num_return_sequences=2", "one text a prompt"),
        ("prompt_lookup_num_tokens=3", "--prompt_lookup_num_tokens"),
    ],
)
def test_what_generate_would_not_take_is_refused(given, told):
    with pytest.raises(ValueError, match=told):
        parse_knobs([given])


def test_greedy_search_is_given_nothing_of_sampling():
    settings = DecodingSettings(8, [2], 0, {"top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1})
    greedy, sampled = (settings.arguments(temperature, None) for temperature in (0.0, 0.7))
    assert greedy["do_sample"] is False and greedy["repetition_penalty"] == 1.1
    assert greedy["temperature"] is greedy["top_p"] is greedy["min_p"] is None
    assert sampled["do_sample"] is True and (sampled["temperature"], sampled["top_p"]) == (0.7, 0.9)
    assert sampled["top_k"] == 0  # generate's own default would leave 50 tokens


def test_a_seed_is_decided_by_every_name():
    names = [(0, "qa", "1", 0), (1, "qa", "1", 0), (0, "sum", "1", 0), (0, "qa", "2", 0), (0, "qa", "1", 1)]
    assert len({call_seed(*of) for of in names}) == len(names)
    assert call_seed(*names[0]) == call_seed(*names[0])


def test_padding_ends_no_text():
    tokenizer = word_tokenizer()
    assert padding_token(tokenizer, [2], 97) == tokenizer.pad_token_id == 0
    assert padding_token(tokenizer, [0], 97) == tokenizer.bos_token_id == 1
    tokenizer.pad_token = tokenizer.bos_token = None
    assert padding_token(tokenizer, [0, 1], 97) == 2


def test_padding_that_was_added_to_the_tokenizer_is_not_given_to_the_target():
    tokenizer = word_tokenizer()
    vocab_size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<added>"})
    assert tokenizer.pad_token_id == vocab_size
    assert padding_token(tokenizer, [2], vocab_size + 1) == vocab_size
    assert padding_token(tokenizer, [2], vocab_size) == tokenizer.bos_token_id
