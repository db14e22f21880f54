"""Rows as the public sets write them."""

import json

import pytest

from hf_poss.training.formats import Conversation, Passage, row_reader


MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
CALL = {"name": "look", "arguments": {"for": ["eggs"]}}
TOOL = {"name": "look", "parameters": {}}


def read(row: dict, template: str | None = None, text_field: str = "text"):
    return row_reader(list(row), text_field, template)(row)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": MESSAGES},
        {"conversations": MESSAGES, "id": 3},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]},
        {"conversations": [{"from": "Human", "value": "hi"}, {"from": "bing", "value": "yes"}]},
        {"conversations": [{"from": "user", "value": "hi"}, {"from": "chatgpt", "value": "yes"}]},
        {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in MESSAGES]},
        {"messages": [{**m, "content": [{"type": "text", "value": m["content"]}]} for m in MESSAGES]},
        {"messages": [{**m, "tool_calls": None, "name": None} for m in MESSAGES]},
        {"messages": MESSAGES, "text": "not this", "prompt": "nor this", "tools": None},
        {"messages": MESSAGES, "tools": "[]"},
    ],
)
def test_chats(row):
    assert read(row) == Conversation(MESSAGES)


def test_system_prompt_in_a_column_of_its_own():
    assert read({"conversations": MESSAGES, "system": "S"}).messages[0] == {"role": "system", "content": "S"}
    assert read({"conversations": MESSAGES, "system": ""}).messages == MESSAGES


def test_what_else_a_message_says_is_kept_without_gaps():
    """Arrow gives every call the arguments of all others, with None."""
    call = {"type": "function", "function": {"name": "look", "arguments": {"for": "x", "in": None}}}
    [message] = read({"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]}).messages
    call = {"type": "function", "function": {"name": "look", "arguments": {"for": "x"}}}
    assert message == {"role": "assistant", "content": "", "tool_calls": [call]}


def test_sharegpt_calls_are_calls_where_the_template_writes_them():
    row = {
        "conversations": [
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "none"},
        ],
        "tools": json.dumps([TOOL]),
    }
    conversation = read(row, "{{ message.tool_calls }}")
    assert conversation.messages == [
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
        {"role": "tool", "content": "none"},
    ]
    assert conversation.tools == [{"type": "function", "function": TOOL}]
    assert read(row, "{{ message.content }}").messages[0] == {"role": "assistant", "content": json.dumps(CALL)}


def test_prompts_and_completions():
    assert read({"prompt": "a", "completion": "b"}, "template") == Passage("b", "a")
    assert read({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}) == Conversation(MESSAGES, prompt_length=1)
    assert read({"prompt": None, "completion": "b"}) == Passage("b")
    assert read({"prompt": MESSAGES[:1], "completion": None}) == Conversation(MESSAGES[:1], prompt_length=1)
    assert read({"instruction": "a", "output": None}, "template") == Conversation([{"role": "user", "content": "a"}])
    with pytest.raises(ValueError, match="`prompt` is str and `completion` is list"):
        read({"prompt": "a", "completion": MESSAGES})


def test_text_goes_before_the_parts_it_was_made_of():
    assert read({"instruction": "a", "output": "b", "text": "ab"}) == Passage("ab")
    assert read({"instruction": "a", "output": "b", "body": None}, text_field="body") == Passage("")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": {"text": "a"}}, r"columns \['prompt'\].*expected `messages`"),
        ({"text": [1, 2]}, "'text' holds list"),
        ({"messages": "hi"}, "'messages' holds str"),
        ({"messages": ["hi"]}, "no `role`"),
        ({"messages": [{"role": 3, "content": "hi"}]}, "no `role`"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "trained on text.*image"),
        ({"messages": MESSAGES, "tools": "{"}, "`tools` is not JSON"),
        ({"question": ["a"], "answer": "b"}, "else than text"),
    ],
)
def test_wrong_rows(row, told):
    with pytest.raises(ValueError, match=told):
        read(row)
