"""Which parts of a row a target is asked to write, and what becomes of its answers."""

import json

import pytest
from tiny_chat import word_tokenizer

from hf_poss.training.requests import Request, request_maker


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def request_for(row: dict, tokenizer, **kwargs) -> Request:
    return request_maker(list(row), tokenizer, **kwargs)(7, row)


def answered(request: Request, tokenizer, *answers: str) -> list[str]:
    """Gives the answers one by one; what the target was asked for each, as text."""
    prompts = []
    for answer in answers:
        prompts.append(tokenizer.decode(request.prompt))
        request.take(tokenizer(answer)["input_ids"], finished=True)
    return prompts


@pytest.mark.parametrize("form", ["messages", "conversations"])
def test_turns_are_replaced_after_the_targets_own_answers(tokenizer, form):
    chat = [message("user", "w7"), message("assistant", "w80"), message("user", "w9"), message("assistant", "w81")]
    if form == "conversations":
        chat = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in chat]
    request = request_for({form: chat}, tokenizer)
    prompts = answered(request, tokenizer, "w40 w41", "w50")
    assert prompts == ["user w7 </s> assistant", "user w7 </s> assistant w40 w41 </s> user w9 </s> assistant"]
    assert request.prompt is None
    contents = [("user", "w7"), ("assistant", "w40 w41"), ("user", "w9"), ("assistant", "w50")]
    assert request.record() == {"index": 7, "messages": [message(*pair) for pair in contents], "finished": True}


def test_a_last_question_gets_an_answer(tokenizer):
    request = request_for({"messages": [message("system", "w8"), message("user", "w7")]}, tokenizer)
    assert answered(request, tokenizer, "w9") == ["system w8 </s> user w7 </s> assistant"]
    assert [m["content"] for m in request.record()["messages"]] == ["w8", "w7", "w9"]


def test_what_nobody_asked_for_and_calls_of_tools_stay(tokenizer):
    chat = [
        message("assistant", "w70"),
        message("user", "w7"),
        message("assistant", "w71"),
        message("tool", "w72"),
        message("assistant", "w73"),
    ]
    request = request_for({"messages": chat}, tokenizer)
    assert answered(request, tokenizer, "w9") == [
        "assistant w70 </s> user w7 </s> assistant w71 </s> tool w72 </s> assistant"
    ]
    assert request.record()["messages"] == [*chat[:-1], message("assistant", "w9")]


def test_prompt_and_completion_of_messages(tokenizer):
    row = {
        "prompt": [message("user", "w7"), message("assistant", "w8"), message("user", "w9")],
        "completion": [message("assistant", "w80")],
    }
    request = request_for(row, tokenizer)
    answered(request, tokenizer, "w40")
    expected = {"prompt": row["prompt"], "completion": [message("assistant", "w40")]}
    assert request.record() == {"index": 7, **expected, "finished": True}


@pytest.mark.parametrize("row", [{"prompt": "w7 w8", "completion": "w80"}, {"prompt": "w7 w8"}])
def test_completions_are_replaced_and_join_their_prompt(tokenizer, row):
    request = request_for(row, tokenizer)
    assert answered(request, tokenizer, "w40 w41") == ["w7 w8"]
    record = request.record()
    assert record["prompt"] == "w7 w8"
    assert tokenizer.tokenize(record["prompt"] + record["completion"]) == ["w7", "w8", "w40", "w41"]


def test_text_is_continued_behind_its_first_tokens(tokenizer):
    request = request_for({"text": "w7 w8 w9 w10"}, tokenizer, prompt_tokens=3)
    assert answered(request, tokenizer, "w40") == ["w7 w8 w9"]
    assert request.record() == {"index": 7, "prompt": "w7 w8 w9", "completion": " w40", "finished": True}


def test_an_answer_without_an_end_is_marked(tokenizer):
    chat = [message("user", "w7"), message("assistant", "w80"), message("user", "w9")]
    request = request_for({"messages": chat}, tokenizer)
    request.take([40], finished=False)
    request.take([41], finished=True)
    assert request.record()["finished"] is False


def test_a_refused_turn_ends_the_conversation_at_the_last_answer(tokenizer):
    chat = [message("user", "w7"), message("assistant", "w80"), message("user", "w9"), message("assistant", "w81")]
    request = request_for({"messages": chat}, tokenizer)
    answered(request, tokenizer, "w40")
    request.refuse("too long")
    assert request.prompt is None
    assert request.record()["messages"] == [message("user", "w7"), message("assistant", "w40")]


@pytest.mark.parametrize(
    "row", [{"messages": []}, {"messages": [message("assistant", "w7")]}, {"text": "  "}, {"prompt": ""}]
)
def test_rows_without_a_question_are_skipped_with_a_reason(tokenizer, row):
    request = request_for(row, tokenizer)
    assert request.prompt is None
    record = request.record()
    assert record.keys() == {"index", "skipped"} and record["skipped"]


def test_a_conversation_that_the_template_refuses_is_skipped():
    tokenizer = word_tokenizer("{{ raise_exception('roles must alternate') }}")
    request = request_for({"messages": [message("user", "w7")]}, tokenizer)
    assert "roles must alternate" in request.record()["skipped"]


def test_tools_stay_with_the_conversation():
    tokenizer = word_tokenizer("{{ tools[0].function.name }} {% for m in messages %}{{ m.content }} {% endfor %}")
    tools = [{"type": "function", "function": {"name": "w60", "parameters": {}}}]
    request = request_for({"messages": [message("user", "w7")], "tools": tools}, tokenizer)
    assert answered(request, tokenizer, "w9") == ["w60 w7"]
    assert json.loads(request.record()["tools"]) == tools


def test_spaces_stay_only_where_the_template_needs_them_for_the_same_tokens(stories, monkeypatch):
    """Its tokenizer writes a space before a word: a template that puts none there must get it from the answer."""
    tokenizer = stories[1]
    for separator, content in (("", " the dog"), (" ", "the dog")):
        template = (
            "{% for m in messages %}{{ m.role }}:" + separator + "{{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}"
        )
        monkeypatch.setattr(tokenizer, "chat_template", template)
        request = request_for({"messages": [message("user", "Once")]}, tokenizer)
        written = tokenizer("assistant: the dog", add_special_tokens=False)["input_ids"]
        opening = tokenizer("assistant:", add_special_tokens=False)["input_ids"]
        assert written[: len(opening)] == opening
        request.take(written[len(opening) :], finished=True)
        assert request.record()["messages"][-1]["content"] == content


def test_conversations_need_a_chat_template():
    with pytest.raises(ValueError, match="chat template"):
        request_for({"messages": [message("user", "w7")]}, word_tokenizer(None))


def test_unknown_columns_are_named(tokenizer):
    with pytest.raises(ValueError, match="body"):
        request_maker(["body"], tokenizer)
