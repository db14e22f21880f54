"""Questions as the prompts of a target, turn by turn; every drafter goes on from its own answers."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from ..training.chat import ChatRenderer
from ..training.formats import Conversation
from ..training.requests import ChatRequest, Request
from .questions import Question


__all__ = ["TextDialogue", "dialogue_maker", "uses_chat_template"]

_BETWEEN = "\n\n"


class TextDialogue(Request):
    """Turns for a target without a chat template: the text so far, a blank line, and the next turn.

    Args:
        index, tokenizer: as in the base class.
        texts: said before each answer, one or more.
    """

    def __init__(self, index: int, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]):
        super().__init__(index, tokenizer)
        self._texts = texts
        self._answer: Sequence[int] = ()
        token_ids = tokenizer(texts[0], verbose=False)["input_ids"]
        self.prompt = token_ids[:-1] if token_ids[-1:] == [tokenizer.eos_token_id] else token_ids

    def _take(self, text: str, token_ids: Sequence[int]) -> None:
        self._answer = token_ids

    def _go_on(self) -> None:
        if self.turn == len(self._texts):
            self.prompt = None
            return
        said = self.tokenizer(_BETWEEN + self._texts[self.turn], add_special_tokens=False, verbose=False)["input_ids"]
        self.prompt = [*self.prompt, *self._answer, *said]


def uses_chat_template(tokenizer: PreTrainedTokenizerBase, chat: str) -> bool:
    """Whether prompts are written with the chat template.

    Args:
        tokenizer: of the target.
        chat: "on", "off", or "auto": where there is one.

    Raises:
        ValueError: for "on" where there is none.
    """
    if chat == "on" and not tokenizer.chat_template:
        raise ValueError(
            "`--chat on`, and the target's tokenizer has no chat template. Leave it out: the target then reads "
            "prompts as they are."
        )
    return chat != "off" and bool(tokenizer.chat_template)


def dialogue_maker(
    tokenizer: PreTrainedTokenizerBase, chat: bool, system: str | None = None
) -> Callable[[Question], Request]:
    """The function that begins a dialogue about a question; its `prompt` is what the target reads next.

    Args:
        tokenizer: of the target.
        chat: whether the chat template writes prompts.
        system: said first where a question has no system message of its own; without a chat template it stands before
            the first turn.
    """
    renderer = ChatRenderer(tokenizer) if chat else None

    def begin(question: Question) -> Request:
        question = question if system is None else _with_system(question, system)
        if renderer is not None:
            return ChatRequest(0, tokenizer, question.conversation, renderer)
        return TextDialogue(0, tokenizer, question.texts)

    return begin


def _with_system(question: Question, system: str) -> Question:
    conversation = question.conversation
    if conversation.messages[0]["role"] == "system":
        return question
    messages = [{"role": "system", "content": system}, *conversation.messages]
    kept = conversation.prompt_length and conversation.prompt_length + 1
    return replace(question, conversation=Conversation(messages, conversation.tools, kept))
