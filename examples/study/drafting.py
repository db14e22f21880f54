"""What a trained drafter of the study gets accepted: counts by prompt of `generate`, in batches."""

from dataclasses import dataclass
from typing import Any

import torch
from texts import Texts
from transformers import PreTrainedModel, set_seed

from hf_poss import PosSModel, collect_statistics


BATCH_SIZE = 32


@dataclass(frozen=True)
class Suite:
    """A way to draft.

    Args:
        domain: of the prompts; "home" is the target's own.
        depth, top_k, total_tokens: of the drafts; top_k 1 is a chain.
        temperature: 0 is greedy.
        prompt_length: tokens of a prompt.
        new_tokens: of each text.
        prompts: how many.
    """

    domain: str = "home"
    depth: int = 8
    top_k: int = 1
    total_tokens: int = 9
    temperature: float = 0.0
    prompt_length: int = 16
    new_tokens: int = 96
    prompts: int = 64


CHAIN = Suite()
TREE = Suite(top_k=6, total_tokens=20)


@torch.no_grad()
def measure(target: PreTrainedModel, poss: PosSModel, prompts: Texts, suite: Suite, seed: int) -> dict[str, Any]:
    """Counts of every prompt and their sums: "tokens" and "rounds" by prompt; "drafted", "reached" and "accepted" by
    draft position, over all prompts."""
    knobs = poss.generation_config
    knobs.num_assistant_tokens, knobs.draft_top_k = suite.depth, suite.top_k
    knobs.draft_total_tokens = suite.total_tokens
    sampling = {"do_sample": True, "temperature": suite.temperature, "top_k": 0} if suite.temperature else {}
    set_seed(seed)
    with collect_statistics(timed=False) as stats:
        for start in range(0, len(prompts), BATCH_SIZE):
            batch = torch.tensor(prompts[start : start + BATCH_SIZE], device=target.device)
            target.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                assistant_model=poss,
                max_new_tokens=suite.new_tokens,
                pad_token_id=target.config.pad_token_id or 0,
                **(sampling or {"do_sample": False}),
            )
    return {
        "tokens": [call.tokens for call in stats.calls],
        "rounds": [call.rounds for call in stats.calls],
        "drafted": stats.drafted,
        "reached": stats.reached,
        "accepted": stats.accepted,
    }
