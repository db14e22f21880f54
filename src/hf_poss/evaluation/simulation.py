"""A pair of random weights whose drafts are accepted by a script, and what to tell of that."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..modeling_poss import PosSModel
from .acceptance import Acceptance, match_confidence
from .benchmark import Prompt
from .shapes import random_poss, random_prompt, random_target


__all__ = ["SimulatedPair", "simulated_pair"]

_SAMPLE = 32  # tokens on which the drafter's confidence is measured


@dataclass(frozen=True)
class SimulatedPair:
    """A target and its specialists of random weights.

    Args:
        acceptance: which drafts are accepted.
        labels: what is simulated, a line each, for whoever reads the figures.
    """

    target: PreTrainedModel
    poss: PosSModel
    acceptance: Acceptance
    labels: list[str]

    def prompts(self, count: int, rows: int, tokens: int, seed: int = 0) -> list[Prompt]:
        """`count` batches of random tokens."""
        vocab_size, device = self.poss.config.vocab_size, self.target.device
        return [
            Prompt(f"random {index + 1}", random_prompt(vocab_size, rows, tokens, seed + index, device))
            for index in range(count)
        ]


@torch.no_grad()
def simulated_pair(
    config: PreTrainedConfig,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    acceptance: Acceptance,
    attn_implementation: str | None = None,
    seed: int = 0,
    **config_kwargs: Any,
) -> SimulatedPair:
    """Random weights on `device` in `dtype`, the drafter as sure of its drafts as they are right.

    Args:
        config: of the target, see [`shape_config`].
        name: of its shape.
        seed: of weights and prompts.
        config_kwargs: fields of [`PosSConfig`].
    """
    torch.manual_seed(seed)
    target = random_target(config, device, dtype, attn_implementation)
    poss = random_poss(target, **config_kwargs)
    sample = random_prompt(poss.config.vocab_size, 1, _SAMPLE + 1, seed, device)["input_ids"]
    features = target(sample[:, :-1], output_hidden_states=True).hidden_states[-1]
    confidence = match_confidence(poss, features, sample[:, 1:], acceptance.mean_rate)
    labels = [
        f"weights of target and specialists: random, at the sizes of {name}",
        "prompts: random tokens; a text does not end before its length",
        f"acceptance: by a script, tau {acceptance.tau:.4g} over a pattern of {len(acceptance.lengths)} rounds, "
        f"whatever the target would pick",
        f"confidence of the drafter: the head is scaled until the mean probability of its first choice is "
        f"{confidence:.3f}; drafts are accepted at a mean rate of {acceptance.mean_rate:.3f}",
    ]
    if poss.config.draft_vocab_size is not None:
        labels.append(f"draft vocabulary: the {poss.config.draft_vocab_size} lowest ids")
    return SimulatedPair(target, poss, acceptance, labels)
