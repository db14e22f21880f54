"""What a target is asked to write: the assistant's turns of a chat, the completion of a prompt, the rest of a text."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from .chat import ChatRenderer, RefusedConversation
from .formats import Conversation, Passage, row_reader


__all__ = ["ChatRequest", "PassageRequest", "Request", "request_maker"]

# What tokens that end within a character are decoded to.
_INCOMPLETE = "\ufffd"


class Request:
    """A record that waits for answers of the target.

    Args:
        index: number of the row in the dataset.
        tokenizer: of the target.

    Attributes:
        prompt: token ids to go on from; None once nothing is left to ask.
        turn: number of the answer that `prompt` asks for, from 0.
        finished: whether every answer ended by itself.
        refusal: why nothing can be asked, if so.
    """

    def __init__(self, index: int, tokenizer: PreTrainedTokenizerBase):
        self.index = index
        self.tokenizer = tokenizer
        self.prompt: list[int] | None = None
        self.turn = 0
        self.finished = True
        self.refusal: str | None = None

    def take(self, token_ids: Sequence[int], finished: bool) -> None:
        """Takes the answer to `prompt`, end of sequence excluded, and goes on to the next turn."""
        assert self.prompt is not None
        self._take(self._continuation(token_ids, finished), token_ids)
        self.finished &= finished
        self.turn += 1
        self._go_on()

    def record(self) -> dict[str, Any]:
        """What is to be saved: a row for the trainer, with `index` and `finished`, or why not (`skipped`)."""
        if self.turn == 0:
            return {"index": self.index, "skipped": self.refusal or "there is no turn to answer"}
        return {"index": self.index, **self._row(), "finished": self.finished}

    def refuse(self, reason: str) -> None:
        """Asks no more; what was answered before counts."""
        self.prompt, self.refusal = None, reason

    def _continuation(self, token_ids: Sequence[int], finished: bool) -> str:
        # A token that begins a word may lose its space when it is decoded alone.
        prompt, whole = self._decode(self.prompt), self._decode([*self.prompt, *token_ids])
        text = whole[len(prompt) :] if whole.startswith(prompt) else self._decode(token_ids)
        return text if finished else text.rstrip(_INCOMPLETE)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _take(self, text: str, token_ids: Sequence[int]) -> None:
        raise NotImplementedError

    def _go_on(self) -> None:
        raise NotImplementedError

    def _row(self) -> dict[str, Any]:
        raise NotImplementedError


class ChatRequest(Request):
    """A conversation whose assistant turns the target writes one after the other, each after its own earlier ones.

    Kept as they are: a turn that opens the conversation, the turns of a prompt, and a turn that a tool answers. If the
    last message is not the assistant's, an answer to it is added.

    Args:
        index, tokenizer: as in the base class.
        conversation: with the turns to replace.
        renderer: of the target's chat template.
    """

    def __init__(
        self, index: int, tokenizer: PreTrainedTokenizerBase, conversation: Conversation, renderer: ChatRenderer
    ):
        super().__init__(index, tokenizer)
        self.conversation = conversation
        self.renderer = renderer
        self._place = 0  # of the message that is asked for
        self._done = 0  # messages up to the last answer
        self._go_on()

    def _go_on(self) -> None:
        messages, self.prompt = self.conversation.messages, None
        start = max(self._done, self.conversation.prompt_length, 1)
        place = next((i for i in range(start, len(messages)) if self._is_replaced(i)), len(messages))
        if place == len(messages) and (not messages or messages[-1]["role"] == "assistant"):
            return
        self._place = place
        try:
            text = self.renderer.render(self._up_to(place), add_generation_prompt=True)
        except RefusedConversation as error:
            return self.refuse(f"the chat template refuses the conversation: {error}")
        self.prompt = self._token_ids(text)

    def _is_replaced(self, place: int) -> bool:
        message, *following = self.conversation.messages[place : place + 2]
        calls_tool = message.get("tool_calls") or any(after["role"] == "tool" for after in following)
        return message["role"] == "assistant" and not calls_tool

    def _up_to(self, place: int) -> Conversation:
        return replace(self.conversation, messages=self.conversation.messages[:place])

    def _take(self, text: str, token_ids: Sequence[int]) -> None:
        answer = {"role": "assistant", "content": self._as_template_takes(text, token_ids)}
        messages = self.conversation.messages
        self.conversation = replace(
            self.conversation, messages=[*messages[: self._place], answer, *messages[self._place + 1 :]]
        )
        self._done = self._place + 1

    def _as_template_takes(self, text: str, token_ids: Sequence[int]) -> str:
        """The text without spaces around it, unless only with them the template writes the tokens of the answer."""
        wanted = [*self.prompt, *token_ids]
        for content in (text.strip(), text):
            asked = self._up_to(self._place)
            answered = replace(asked, messages=[*asked.messages, {"role": "assistant", "content": content}])
            try:
                written = self._token_ids(self.renderer.render(answered))
            except RefusedConversation:
                break
            if written[: len(wanted)] == wanted:
                return content
        return text

    def _token_ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # the template wrote these

    def _row(self) -> dict[str, Any]:
        messages, first = self.conversation.messages, self.conversation.prompt_length
        if self.refusal is not None:  # what follows the last answer was not answered
            messages = messages[: self._done]
        row = {"prompt": messages[:first], "completion": messages[first:]} if first else {"messages": messages}
        # As JSON: schemas differ from row to row, and columns have one.
        return row | ({} if self.conversation.tools is None else {"tools": json.dumps(self.conversation.tools)})


class PassageRequest(Request):
    """The completion of a prompt; of plain text, what follows its first tokens.

    Args:
        index, tokenizer: as in the base class.
        passage: with the completion to replace.
        prompt_tokens: of a text without a prompt, the tokens that are kept.
    """

    def __init__(self, index: int, tokenizer: PreTrainedTokenizerBase, passage: Passage, prompt_tokens: int):
        super().__init__(index, tokenizer)
        self.text, self.completion = passage.prompt, ""
        token_ids = tokenizer(passage.prompt or passage.completion, verbose=False)["input_ids"]
        if token_ids and token_ids[-1] == tokenizer.eos_token_id:
            token_ids = token_ids[:-1]
        if not passage.prompt:
            token_ids = token_ids[:prompt_tokens]
            while self._decode(token_ids).endswith(_INCOMPLETE):
                token_ids = token_ids[:-1]
            self.text = self._decode(token_ids)
        if self.text:
            self.prompt = token_ids
        else:
            self.refuse("there is no text")

    def _go_on(self) -> None:
        self.prompt = None

    def _take(self, text: str, token_ids: Sequence[int]) -> None:
        self.completion = text

    def _row(self) -> dict[str, Any]:
        return {"prompt": self.text, "completion": self.completion}


def request_maker(
    columns: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    text_field: str = "text",
    prompt_tokens: int = 64,
) -> Callable[[int, Mapping[str, Any]], Request]:
    """The function that turns a row, with its number, into a request.

    Args:
        columns: names of the dataset's columns; see [`row_reader`]. A column `prompt` alone will do.
        tokenizer: of the target.
        text_field: column with plain text.
        prompt_tokens: of plain text, the tokens that are kept.

    Raises:
        ValueError: if the columns are not understood; when the function is called, if the dataset holds conversations
            and the tokenizer has no chat template.
    """
    if prompt_tokens < 1:
        raise ValueError(f"`prompt_tokens` is {prompt_tokens}; expected 1 or more.")
    lacks_completion = "prompt" in columns and "completion" not in columns
    read = row_reader([*columns, "completion"] if lacks_completion else columns, text_field, tokenizer.chat_template)
    renderer = functools.cache(lambda: ChatRenderer(tokenizer))

    def make(index: int, row: Mapping[str, Any]) -> Request:
        if lacks_completion:
            row = {**row, "completion": type(row["prompt"])()}
        content = read(row)
        if isinstance(content, Conversation):
            return ChatRequest(index, tokenizer, content, renderer())
        return PassageRequest(index, tokenizer, content, prompt_tokens)

    return make
