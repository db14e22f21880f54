"""Turns as prompts: what the chat template writes behind the drafter's own answers."""

import pytest
from tiny_chat import word_tokenizer

from hf_poss.evaluation.dialogues import dialogue_maker, uses_chat_template
from hf_poss.evaluation.questions import Question


TURNS = {"turns": ["w7 w8", "w9", "w10"]}
ANSWERS = [[20, 21], [22]]


def question(record: dict) -> Question:
    return Question.of(record, 1, "here")


def prompts(tokenizer, record: dict, chat: bool, system: str | None = None) -> list[list[int]]:
    dialogue = dialogue_maker(tokenizer, chat, system)(question(record))
    seen = []
    for answer in [*ANSWERS, [23]]:
        seen.append(dialogue.prompt)
        dialogue.take(answer, True)
    assert dialogue.prompt is None
    return seen


@pytest.mark.parametrize("system", [None, "w50 w51"])
def test_each_turn_is_what_the_template_renders_after_the_drafters_answers(system):
    tokenizer = word_tokenizer()
    messages = [] if system is None else [{"role": "system", "content": system}]
    expected = []
    for turn, answer in zip(TURNS["turns"], [*ANSWERS, None], strict=True):
        messages.append({"role": "user", "content": turn})
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        expected.append(rendered["input_ids"])
        messages.append({"role": "assistant", "content": tokenizer.decode(answer or [])})
    assert prompts(tokenizer, TURNS, chat=True, system=system) == expected


def test_references_are_replaced_and_examples_are_kept():
    tokenizer = word_tokenizer()
    messages = [
        {"role": "user", "content": "w7"},
        {"role": "assistant", "content": "w8"},
        {"role": "user", "content": "w9"},
    ]
    begin = dialogue_maker(tokenizer, True)
    replaced, kept = begin(question({"messages": messages})), begin(question({"prompt": messages}))
    first = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert replaced.prompt == first and kept.prompt == whole
    kept.take([20], True)
    assert kept.prompt is None


def test_a_system_message_of_the_questions_own_stays():
    begin = dialogue_maker(word_tokenizer(), True, "w50")
    own = question({"messages": [{"role": "system", "content": "w60"}, {"role": "user", "content": "w7"}]})
    prompt = begin(own).prompt
    assert 60 in prompt and 50 not in prompt


def test_without_a_template_turns_follow_the_text_so_far():
    first, second, third = prompts(word_tokenizer(), TURNS, chat=False, system="w50")
    assert first == [50, 7, 8]
    assert second == [50, 7, 8, 20, 21, 9]
    assert third == [50, 7, 8, 20, 21, 9, 22, 10]


def test_the_template_is_used_where_there_is_one():
    with_one, without = word_tokenizer(), word_tokenizer(chat_template=None)
    assert [uses_chat_template(with_one, chat) for chat in ("auto", "on", "off")] == [True, True, False]
    assert not uses_chat_template(without, "auto") and not uses_chat_template(without, "off")
    with pytest.raises(ValueError, match="no chat template"):
        uses_chat_template(without, "on")


def test_a_template_that_refuses_says_why():
    tokenizer = word_tokenizer("{{ raise_exception('no system messages here') }}")
    dialogue = dialogue_maker(tokenizer, True)(question(TURNS))
    assert dialogue.prompt is None and "no system messages here" in dialogue.refusal
