"""Conversations as the target's chat template writes them, and which of their characters the assistant wrote."""

import re
from collections.abc import Sequence
from os.path import commonprefix
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from .formats import Conversation
from .spans import Span


__all__ = ["ChatRenderer", "RefusedConversation", "UnclearTurns"]

_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_PRIVATE_USE = range(0xE000, 0xF900)

Messages = Sequence[dict[str, Any]]
Tools = list[dict[str, Any]] | None


class RefusedConversation(ValueError):
    """The chat template raised an error for a conversation."""


class UnclearTurns(ValueError):
    """What the assistant wrote cannot be told from the rest of a text."""

    def __init__(self):
        super().__init__(
            "The assistant's turns cannot be found by rendering parts of the conversation with this chat template. "
            "Mark them in `tokenizer.chat_template` with {% generation %} ... {% endgeneration %}."
        )


class ChatRenderer:
    """Renders conversations and finds what the assistant wrote in them, each turn with the token that ends it.

    The template's `{% generation %}` tags say what the assistant wrote; where they leave out the special token that
    ends a turn, it is added. Without tags, turns are found by rendering prefixes of the conversation: a turn begins
    where the messages before it end, generation prompt included, and ends where the messages up to it end. Some
    templates write an earlier turn otherwise than the last one (they drop its thoughts, move the system prompt...), so
    that a prefix is not one of the whole text. There the conversation is rendered once more with another content in
    the turn: what stays the same lies outside of it.

    Args:
        tokenizer: of the target.

    Raises:
        ValueError: if the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if not tokenizer.chat_template:
            raise ValueError(
                "The dataset holds conversations, and the tokenizer has no chat template to write them with. Set "
                "`tokenizer.chat_template` to the one that the target is used with, or give the dataset a column "
                "of plain text."
            )
        self.tokenizer = tokenizer
        specials = {token.content for token in tokenizer.added_tokens_decoder.values()}
        specials.update(tokenizer.all_special_tokens)
        self._specials = tuple(sorted((token for token in specials if token.strip()), key=len, reverse=True))
        self._content_in_parts = self._wants_parts()
        self._behind_turns = self._text_behind_turns()

    def render(self, conversation: Conversation, add_generation_prompt: bool = False) -> str:
        """The text of a conversation, followed by what opens a turn of the assistant if `add_generation_prompt`.

        Raises:
            RefusedConversation: if the template raises an error.
        """
        return self._render(conversation.messages, conversation.tools, add_generation_prompt)

    def spans(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """The text of a conversation and the spans of characters that the assistant wrote, ascending.

        Raises:
            RefusedConversation: if the template raises an error.
            UnclearTurns: if there are no tags and the turns cannot be told apart.
        """
        messages, tools = conversation.messages, conversation.tools
        if _GENERATION_TAG.search(self._template(tools)):
            text, spans = self._tagged_turns(messages, tools)
            if conversation.prompt_length:
                prompt = self._render(messages[: conversation.prompt_length], tools)
                first = len(commonprefix([prompt, text]))
                spans = [span for span in spans if span[0] >= first]
        else:
            text = self._render(messages, tools)
            spans = [
                self._turn(text, messages, tools, index)
                for index in range(conversation.prompt_length, len(messages))
                if messages[index]["role"] == "assistant"
            ]
        return text, [(start, end) for start, end in spans if start < end]

    def _template(self, tools: Tools) -> str:
        return self.tokenizer.get_chat_template(tools=tools)

    def _render(self, messages: Messages, tools: Tools, add_generation_prompt: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                self._with_parts(messages), tools=tools, add_generation_prompt=add_generation_prompt, tokenize=False
            )
        except (TemplateError, TypeError) as error:
            raise RefusedConversation(str(error)) from error

    def _render_tagged(self, messages: Messages, tools: Tools) -> tuple[str, list[Span]]:
        """Text and the spans of its generation tags."""
        try:
            texts, spans = render_jinja_template(
                [self._with_parts(messages)],
                tools=tools,
                chat_template=self._template(tools),
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except (TemplateError, TypeError) as error:
            raise RefusedConversation(str(error)) from error
        return texts[0], spans[0]

    def _with_parts(self, messages: Messages) -> list[dict[str, Any]]:
        if not self._content_in_parts:
            return list(messages)
        return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]

    def _wants_parts(self) -> bool:
        """Templates of vision-language models may write a message's content only if it is a list of parts."""

        def writes_content() -> bool:
            try:
                return mark in self._render([{"role": "user", "content": mark}], None)
            except RefusedConversation:
                return False

        mark = chr(_PRIVATE_USE[0])
        self._content_in_parts = False
        if writes_content():
            return False
        self._content_in_parts = True
        return writes_content()

    def _text_behind_turns(self) -> str:
        """What the template writes at the end of any conversation, behind the token that ends the last turn: a line
        break, the end of sequence, or the opening of an answer that nobody asked for."""
        mark = chr(_PRIVATE_USE[0])
        messages = [{"role": "user", "content": mark}, {"role": "assistant", "content": mark}]
        try:
            asked, answered = (self._render(messages[:count], None).rpartition(mark)[2] for count in (1, 2))
        except RefusedConversation:
            return ""
        ending = commonprefix([asked[::-1], answered[::-1]])[::-1]
        tokens = ((place, self._special_at(ending, place)) for place in range(len(ending)))
        return next((ending[place + len(token) :] for place, token in tokens if token), "")

    def _tagged_turns(self, messages: Messages, tools: Tools) -> tuple[str, list[Span]]:
        """Text and tagged spans, with the special token that ends a turn where the tags leave it out."""
        text, spans = self._render_tagged(messages, tools)
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if not spans or not turns:
            return text, spans
        # Behind the last turn the next message's first token could be taken for the end of the turn.
        ending, ending_spans = self._render_tagged(messages[: turns[-1] + 1], tools)
        if not ending_spans or ending[slice(*ending_spans[-1])].rstrip().endswith(self._specials):
            return text, spans
        token = self._special_at(ending, ending_spans[-1][1])
        return text, [(start, end + len(token) * text.startswith(token, end)) for start, end in spans]

    def _turn(self, text: str, messages: Messages, tools: Tools, index: int) -> Span:
        """Span of the assistant's message `index`."""
        start = self._start_by_prefix(text, messages[:index], tools)
        end = self._end_by_prefix(text, messages[: index + 1], tools)
        if start is None or end is None:
            start, end = self._turn_by_content(text, messages, tools, index, start, end)
        # Nothing is generated behind the token that ends a turn.
        written = text[start:end].removesuffix(self._behind_turns).rstrip()
        return start, start + len(written) if written.endswith(self._specials) else end

    def _start_by_prefix(self, text: str, before: Messages, tools: Tools) -> int | None:
        if not before or "add_generation_prompt" not in self._template(tools):
            return None
        try:
            opening = self._render(before, tools, add_generation_prompt=True)
        except RefusedConversation:
            return None
        return len(opening) if text.startswith(opening) else None

    def _end_by_prefix(self, text: str, upto: Messages, tools: Tools) -> int | None:
        try:
            ending = self._render(upto, tools)
        except RefusedConversation:
            return None
        return len(ending) if text.startswith(ending) else None

    def _turn_by_content(
        self, text: str, messages: Messages, tools: Tools, index: int, start: int | None, end: int | None
    ) -> Span:
        """The turn around a message's content; `start` and `end` where they are known."""
        message = messages[index]
        mark = next(chr(code) for code in _PRIVATE_USE if chr(code) not in text)
        content = self._content_span(text, messages, tools, index, mark)
        if content is None:
            raise UnclearTurns
        content_start, content_end = content
        if start is None:
            start = content_start - len(self._space_before(messages, tools, index, mark))
        if end is None:
            # What ends a turn is what the template writes behind the content if nothing follows.
            last = self._render([*messages[:index], {**message, "content": mark}], tools)
            closing = last.rpartition(mark)[2].removesuffix(self._behind_turns)
            space = len(closing) - len(closing.lstrip())
            if not message.get("tool_calls") and (token := self._special_at(closing, space)):
                closing = closing[: space + len(token)]
            if not text.startswith(closing, content_end) and not message["content"]:
                # Between content and calls templates may write space that they leave out where there is no content.
                content_end += len(text[content_end:]) - len(text[content_end:].lstrip())
                closing = closing.lstrip()
            token = self._special_at(text, content_end)
            if closing.startswith(self._specials) and self._special_at(text, content_end + len(token)):
                closing = token  # another one than behind the last turn, with the next turn's right behind it
            is_closed = text.startswith(closing, content_end)
            if not is_closed and message.get("tool_calls"):
                raise UnclearTurns
            end = content_end + len(closing) * is_closed
        if start > end:
            raise UnclearTurns
        self._check_neighbours(text, messages, tools, index, mark, (start, end))
        return start, end

    def _space_before(self, messages: Messages, tools: Tools, index: int, mark: str) -> str:
        """The space in front of an answer that follows the question's end, as in `[/INST] yes`: the assistant wrote
        it."""
        if not index:
            return ""
        before = [*messages[: index - 1], {**messages[index - 1], "content": mark}]
        try:
            asked = self._render(before, tools)
            answered = self._render([*before, {**messages[index], "content": mark}], tools)
        except RefusedConversation:
            return ""
        question_end, between = asked.rpartition(mark)[2], answered.rpartition(mark)[0].rpartition(mark)[2]
        space = between.removeprefix(question_end)
        return space if between.startswith(question_end) and space.isspace() else ""

    def _content_span(self, text: str, messages: Messages, tools: Tools, index: int, mark: str) -> Span | None:
        """What changes in the text with the content of a message; None if the template does not write it."""
        marked = self._render([*messages[:index], {**messages[index], "content": mark}, *messages[index + 1 :]], tools)
        if mark not in marked:
            return None
        start = len(commonprefix([text, marked]))
        end = len(text) - len(commonprefix([text[::-1], marked[::-1]]))
        return start, max(start, end)

    def _check_neighbours(
        self, text: str, messages: Messages, tools: Tools, index: int, mark: str, turn: Span
    ) -> None:
        """Refuses a turn that reaches into the content of the message before or behind it."""
        for other in (index - 1, index + 1):
            if not 0 <= other < len(messages) or not messages[other]["content"]:
                continue
            content = self._content_span(text, messages, tools, other, mark)
            if content is not None and (content[0] < turn[1] if other > index else content[1] > turn[0]):
                raise UnclearTurns

    def _special_at(self, text: str, place: int) -> str:
        """The special token that begins at a place of the text, or nothing."""
        return next((token for token in self._specials if text.startswith(token, place)), "")
