"""What a row of a dataset means, told by its columns."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


__all__ = ["Conversation", "Passage", "row_reader"]

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function": "tool",
    "function_response": "tool",
    "ipython": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
_CALLS = ("function_call", "tool_call")
_PAIRS = (
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
)
_UNDERSTOOD = (
    "`messages` or `conversations` (chats), `prompt` and `completion`, `text` or another column named by "
    "`dataset_text_field`, `instruction` (`input`) and `output` or `response`, `question` and `answer`, or `input_ids`"
)


@dataclass
class Conversation:
    """A chat as templates take it.

    Args:
        messages: dicts with `role` and `content`, a string, and whatever else the row says of them.
        tools: JSON schemas of the tools, if any.
        prompt_length: messages at the start whose turns do not count.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    prompt_length: int = 0


@dataclass
class Passage:
    """Plain text: all of `completion` counts, nothing of `prompt`."""

    completion: str
    prompt: str = ""


def row_reader(
    columns: Sequence[str], text_field: str = "text", chat_template: str | None = None
) -> Callable[[Mapping[str, Any]], Conversation | Passage]:
    """The function that turns a row with these columns into a [`Conversation`] or a [`Passage`].

    The first that fits: `text_field`, if it is not `"text"`; `messages`; `conversations` (ShareGPT); `prompt` and
    `completion`, strings or messages; `text`; `instruction`, `input` and `output` (Alpaca), or another pair of
    question and answer: a chat of two messages where there is a chat template, else the two joined by a line break.

    Args:
        columns: names of the dataset's columns.
        text_field: column with plain text.
        chat_template: of the target's tokenizer; None if it has none.

    Raises:
        ValueError: if nothing fits; lists the columns and what would.
    """
    if text_field in columns and text_field != "text":
        return lambda row: _read_text(row, text_field)
    if text_field != "text":
        raise ValueError(
            f"The dataset has no column {text_field!r}; it has {list(columns)}. Name the column that holds the text "
            f"with `dataset_text_field`."
        )
    knows_tool_calls = chat_template is not None and "tool_calls" in chat_template
    for name in ("messages", "conversations"):
        if name in columns:
            return lambda row, name=name: _read_chat(row, name, knows_tool_calls)
    if {"prompt", "completion"}.issubset(columns):
        return lambda row: _read_prompt_completion(row, knows_tool_calls)
    if "text" in columns:
        return lambda row: _read_text(row, "text")
    for question, answer in _PAIRS:
        if question in columns and answer in columns:
            return lambda row, pair=(question, answer): _read_pair(row, *pair, chat_template is not None)
    raise ValueError(f"The dataset has the columns {list(columns)}; expected {_UNDERSTOOD}.")


def _read_text(row: Mapping[str, Any], name: str) -> Passage:
    text = row[name]
    if text is not None and not isinstance(text, str):
        raise ValueError(f"Column {name!r} holds {type(text).__name__}, expected text: {_shortened(text)}")
    return Passage(text or "")


def _read_pair(row: Mapping[str, Any], question: str, answer: str, as_chat: bool) -> Conversation | Passage:
    prompt, completion = row[question] or "", row[answer] or ""
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise ValueError(f"Columns {question!r} and {answer!r} hold something else than text: {_shortened(row)}")
    if row.get("input"):
        prompt = f"{prompt}\n\n{row['input']}"
    if not as_chat:
        return Passage(completion, f"{prompt}\n")
    messages = [{"role": "user", "content": prompt}]
    messages += [{"role": "assistant", "content": completion}] if completion else []
    return Conversation(_with_system(messages, row))


def _read_prompt_completion(row: Mapping[str, Any], knows_tool_calls: bool) -> Conversation | Passage:
    prompt, completion = row["prompt"], row["completion"]
    given = next((part for part in (prompt, completion) if part is not None), "")
    prompt, completion = (type(given)() if part is None else part for part in (prompt, completion))
    if isinstance(prompt, str) and isinstance(completion, str):
        return Passage(completion, prompt)
    if isinstance(prompt, list) and isinstance(completion, list):
        prompt = [_message(message, knows_tool_calls) for message in prompt]
        completion = [_message(message, knows_tool_calls) for message in completion]
        return Conversation(prompt + completion, _tools(row), len(prompt))
    raise ValueError(
        f"`prompt` is {type(prompt).__name__} and `completion` is {type(completion).__name__}; expected two strings "
        f"or two lists of messages: {_shortened(row)}"
    )


def _read_chat(row: Mapping[str, Any], name: str, knows_tool_calls: bool) -> Conversation:
    messages = row[name] or []
    if not isinstance(messages, list):
        raise ValueError(f"Column {name!r} holds {type(messages).__name__}, expected messages: {_shortened(messages)}")
    messages = [_message(message, knows_tool_calls) for message in messages]
    return Conversation(_with_system(messages, row), _tools(row))


def _with_system(messages: list[dict[str, Any]], row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Some sets keep the system prompt in a column of its own."""
    system = row.get("system") or row.get("system_prompt")
    if isinstance(system, str) and messages and messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    return messages


def _message(message: Mapping[str, Any], knows_tool_calls: bool) -> dict[str, Any]:
    role = (message.get("role") or message.get("from")) if isinstance(message, Mapping) else None
    if not isinstance(role, str):
        raise ValueError(f"A message has no `role` (or `from`) that is text: {_shortened(message)}")
    content = message.get("content") if message.get("content") is not None else message.get("value")
    if role in _CALLS:
        calls = _tool_calls(content) if knows_tool_calls else None
        return {"role": "assistant", "content": _text(content) if calls is None else ""} | (
            {} if calls is None else {"tool_calls": calls}
        )
    # Arrow fills what a message does not say with None, which templates would print.
    rest = {key: _without_none(value) for key, value in message.items() if value is not None}
    rest = {key: value for key, value in rest.items() if key not in ("role", "from", "content", "value")}
    return {"role": _ROLES.get(role.lower(), role.lower()), "content": _text(content), **rest}


def _text(content: Any) -> str:
    """A message's text, of one string or of parts."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [content]
    texts = []
    for part in parts:
        if isinstance(part, Mapping) and part.get("type", "text") == "text":
            part = part.get("text") if part.get("text") is not None else part.get("value")
        if not isinstance(part, str):
            raise ValueError(f"Specialists are trained on text; a message holds {_shortened(part)}")
        texts.append(part)
    return "".join(texts)


def _tool_calls(content: Any) -> list[dict[str, Any]] | None:
    """The calls that a ShareGPT message writes as JSON; None if it is something else."""
    try:
        calls = json.loads(content) if isinstance(content, str) else content
    except json.JSONDecodeError:
        return None
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, Mapping) and "name" in call for call in calls):
        return None
    return [{"type": "function", "function": _without_none(call)} for call in calls]


def _tools(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Column `tools`, a list or its JSON, in the form that templates know."""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools or "[]")
        except json.JSONDecodeError as error:
            raise ValueError(f"Column `tools` is not JSON ({error}): {_shortened(tools)}") from error
    return [
        tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool}
        for tool in _without_none(tools or [])
    ] or None


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value


def _shortened(value: Any, limit: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
