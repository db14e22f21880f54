"""The target's passes in a `generate` call of transformers' own, and what each of them added to the text."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..compatibility import CACHE


__all__ = ["emitted_tokens", "target_passes"]


@contextmanager
def target_passes(target: nn.Module) -> Iterator[list[int]]:
    """The tokens that the target has in its cache before each of its passes in the block; the prompt's is the first.

    For dynamic caches: reading the length of a static one waits for the device.
    """
    cached: list[int] = []

    def begins(_: nn.Module, __: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        cache = inputs.get(CACHE)
        cached.append(0 if cache is None else int(cache.get_seq_length()))

    hook = target.register_forward_pre_hook(begins, with_kwargs=True)
    try:
        yield cached
    finally:
        hook.remove()


def emitted_tokens(cached: Sequence[int], prompt_tokens: int, new_tokens: int) -> list[int]:
    """How many tokens each pass added to a text.

    A pass finds all of the text in the cache but its last token, whatever was drafted and rejected: with a prompt of
    5, a second pass that finds 7 says that the first one emitted 3 (tokens 5, 6 and 7).

    Args:
        cached: of [`target_passes`].
        prompt_tokens, new_tokens: of the text.
    """
    written = [max(length - prompt_tokens + 1, 0) for length in cached[1:]] + [new_tokens]
    return [after - before for before, after in zip([0, *written[:-1]], written, strict=True)]
