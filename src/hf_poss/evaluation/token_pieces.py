"""The text of each token of a continuation."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


__all__ = ["token_pieces"]

_INCOMPLETE = "\ufffd"  # what tokens that end within a character are decoded to
_CONTEXT = 6  # tokens of the prompt that say whether the first piece begins with a space


def token_pieces(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> list[str]:
    """What each token adds to the text: joined, the text behind the prompt, without special tokens.

    Where several tokens make one character, the last of them has it. Each step decodes a few tokens only.

    Args:
        tokenizer: of the target.
        prompt_ids: what comes before.
        token_ids: of the continuation.
    """
    context = list(prompt_ids[-_CONTEXT:])
    every = [*context, *token_ids]
    pieces: list[str] = []
    start, read = 0, len(context)  # the text of every[:read] is told; every[start:read] is decoded again
    for end in range(len(context) + 1, len(every) + 1):
        before, text = (_decode(tokenizer, every[start:stop]) for stop in (read, end))
        if text.endswith(_INCOMPLETE) and end < len(every):
            pieces.append("")
            continue
        pieces.append(text[len(before) :])
        # A special token has no text, and what follows it would lose its space if nothing else stood before it.
        start, read = read if pieces[-1] else start, end
    return pieces


def _decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    return tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
