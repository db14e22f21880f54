"""How much text the checks of a pair look at."""

from dataclasses import dataclass


__all__ = ["FAST", "THOROUGH", "Effort"]


@dataclass(frozen=True)
class Effort:
    """How much text the checks look at; more finds smaller faults.

    Args:
        prompts: that are used, the first ones.
        new_tokens: of a greedy text, which is compared with and without drafts.
        copies: of a prompt, the rows of a call, in the test of sampled tokens.
        sampled_tokens: of each of these rows.
        texts: that the target writes below a prompt, on which specialists are looked at.
        lead: tokens that are sampled before the greedy part of these, which alone counts.
        text_tokens: of the greedy part.
    """

    prompts: int
    new_tokens: int
    copies: int
    sampled_tokens: int
    texts: int
    lead: int
    text_tokens: int


THOROUGH = Effort(prompts=6, new_tokens=48, copies=8, sampled_tokens=24, texts=8, lead=12, text_tokens=64)
FAST = Effort(prompts=3, new_tokens=32, copies=8, sampled_tokens=16, texts=6, lead=12, text_tokens=48)
