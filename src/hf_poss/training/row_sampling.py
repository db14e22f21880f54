"""Sampling in which a row's text does not depend on the rows beside it."""

import hashlib

import torch
from transformers import LogitsProcessor


__all__ = ["RowSampling", "draws"]


def draws(count: int, *names: int) -> torch.Tensor:
    """`count` numbers in [0, 1), float32 [count], that the names alone decide."""
    digest = hashlib.sha256(repr(names).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.rand(count, generator=generator)


class RowSampling(LogitsProcessor):
    """Draws every token by a number that was drawn for its place, and leaves no other token a chance: greedy search
    then writes the sample.

    A draw u takes the first token at which the cumulative probability exceeds u. So a row's text depends on its own
    numbers and probabilities only, is the same with and without an assistant, and two runs differ where rounding moves
    a probability across u.

    Args:
        numbers: float32 [rows, steps] in [0, 1).
        prompt_length: tokens of the (padded) prompts.
    """

    def __init__(self, numbers: torch.Tensor, prompt_length: int):
        self.numbers = numbers
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        number = self.numbers[:, input_ids.shape[1] - self.prompt_length].to(scores.device)  # [rows]
        mass = scores.float().softmax(-1).cumsum(-1)  # [rows, vocab]
        tokens = torch.searchsorted(mass, (number * mass[:, -1]).unsqueeze(-1), right=True)  # [rows, 1]
        tokens = tokens.clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, float("-inf")).scatter(-1, tokens, 0.0)
