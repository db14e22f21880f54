"""What a `generate` call begins with: its prompts, and what its cache holds of them."""

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache

from .compatibility import CACHE, prompt_mask_length


__all__ = ["Prompt", "columns_of", "takes_positions"]


@dataclass
class Prompt:
    """What a call begins with.

    Args:
        mask: bool [rows, columns], False for padding; columns are the cached tokens and the new ones.
        cached: tokens that the cache held before.
        hidden: cached tokens that `input_ids` does not repeat.
        positions: int64 [rows] or [axes, rows], position ids of the last column; None if the target takes none.
    """

    mask: torch.BoolTensor
    cached: int
    hidden: int
    positions: torch.LongTensor | None

    @classmethod
    def of(
        cls,
        target: PreTrainedModel,
        input_ids: torch.LongTensor,
        config: GenerationConfig,
        model_kwargs: dict[str, Any],
    ) -> "Prompt":
        rows, tokens = input_ids.shape
        if model_kwargs.get("inputs_embeds") is not None or not tokens:
            raise ValueError(
                "`inputs_embeds` were given; specialists read the prompt's tokens. Pass `input_ids`, or leave out "
                "`assistant_model`."
            )
        cache = model_kwargs.get(CACHE)
        if not isinstance(cache, Cache) or getattr(cache, "offloading", False):
            raise ValueError(
                f"The cache of the call is {type(cache).__name__}{' with offloading' * isinstance(cache, Cache)}; "
                f"drafts are verified in a `DynamicCache` that stays on its device. Leave out `{CACHE}`."
            )
        cached = int(cache.get_seq_length())
        covered = prompt_mask_length(config, model_kwargs)
        if covered is None:  # without a mask, only a prompt longer than the cache can repeat what it holds
            covered = tokens if tokens > cached else cached + tokens
        if covered <= cached or covered not in (tokens, cached + tokens):
            raise ValueError(
                f"`{CACHE}` holds {cached} tokens, `input_ids` has {tokens} and `attention_mask` covers "
                f"{covered}. Pass the whole sequence in `input_ids` with its mask, the cached tokens included, and at "
                "least one new token."
            )
        mask = model_kwargs.get("attention_mask")
        if mask is None:
            mask = torch.ones(rows, covered, dtype=torch.bool, device=input_ids.device)
        positions = None
        if takes_positions(target):
            positions = model_kwargs.get("position_ids")
            if positions is None:
                positions = mask.long().cumsum(-1) - 1
            positions = positions[..., -1].expand(*positions.shape[:-2], rows)
        return cls(mask.bool(), cached, covered - tokens, positions)

    @functools.cached_property
    def lengths(self) -> list[int]:
        return self.mask.sum(-1).tolist()

    @property
    def shortest(self) -> int:
        return min(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def first_length(self) -> int:
        """Tokens of the shortest text that the target reads or has read."""
        return min(self.shortest, self.cached or self.shortest)

    @functools.cached_property
    def padding(self) -> torch.LongTensor:
        """int64 [rows]: padding in front."""
        return (self.mask.long().cumsum(-1) == 0).sum(-1)

    @functools.cached_property
    def is_padded(self) -> bool:
        return self.shortest < self.mask.shape[1]


def takes_positions(target: PreTrainedModel) -> bool:
    """Whether a target is told the position of every token."""
    return "position_ids" in inspect.signature(target.forward).parameters


def columns_of(model_kwargs: dict[str, Any], start: int, end: int, total: int) -> dict[str, Any]:
    """The arguments that have an entry a column, for a pass over columns `start` to `end` - 1 of `total`."""
    parts = {}
    for name, value in model_kwargs.items():
        if value is None:
            continue
        if name == "attention_mask":
            parts[name] = value[:, :end]
        elif name == "position_ids" or name.endswith("token_type_ids"):
            before = total - value.shape[-1]  # the caller's own may leave out what is cached
            parts[name] = value[..., max(start - before, 0) : end - before]
    return parts
