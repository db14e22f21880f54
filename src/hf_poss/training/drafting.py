"""Drafting for real in the middle of training: `generate` goes on from the beginnings of evaluation samples."""

import contextlib
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from ..compatibility import input_device
from ..modeling_poss import PosSModel
from ..statistics import GenerationStatistics, collect_statistics


__all__ = [
    "draft_from",
    "evaluation_prompts",
    "is_in_pieces",
    "longest_prompt",
    "obstacle_to_drafting",
    "preserved_random_state",
    "whole_weights",
]

# Of a text without a prompt of its own, the share that is given.
_PROMPT_SHARE = 0.5


def evaluation_prompts(dataset: Iterable[dict[str, Any]], count: int, longest: int | None = None) -> list[list[int]]:
    """Beginnings of the first `count` samples: the tokens before the first one that counts, as in a conversation the
    user's turn; half of the tokens where all count.

    Of packed samples the first document is taken. Tokens beyond the beginning are never given.

    Args:
        dataset: samples with `input_ids`, and perhaps `labels` and `segment_ids`.
        count: of prompts.
        longest: tokens of a prompt at most; of a longer one the last are given.
    """
    prompts = []
    for sample in itertools.islice(dataset, count):
        tokens = [int(token) for token in sample["input_ids"]]
        labels = sample.get("labels")
        labels = tokens if labels is None else [int(label) for label in labels]
        segments = sample.get("segment_ids")
        if segments is not None:
            first = int(segments[0])
            tokens = [token for token, segment in zip(tokens, segments, strict=True) if int(segment) == first]
            labels = labels[: len(tokens)]
        begins = next((index for index, label in enumerate(labels) if label != -100), len(tokens))
        if begins <= 1:  # the first token never counts in a batch, so a mask that begins there says nothing
            begins = max(1, int(len(tokens) * _PROMPT_SHARE))
        prompts.append(tokens[:begins][-(longest or begins) :])
    return prompts


def longest_prompt(config: PreTrainedConfig, new_tokens: int) -> int | None:
    """Tokens after which a target has positions left for `new_tokens` more; None if it says no limit."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if positions is None else max(1, positions - new_tokens)


def draft_from(
    target: PreTrainedModel,
    poss: PosSModel,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int = 1,
    pad_token_id: int = 0,
) -> GenerationStatistics:
    """Greedy `generate` with the specialists, in left-padded batches; what was accepted is returned, no text.

    Args:
        prompts: token ids.
    """
    device = input_device(target)
    with collect_statistics() as statistics, torch.no_grad():
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            longest = max(map(len, batch))
            padded = [[pad_token_id] * (longest - len(prompt)) + prompt for prompt in batch]
            mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch]
            target.generate(
                torch.tensor(padded, device=device),
                attention_mask=torch.tensor(mask, device=device),
                assistant_model=poss,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                num_beams=1,
                pad_token_id=pad_token_id,
            )
    return statistics


@contextlib.contextmanager
def preserved_random_state(device: torch.device) -> Iterator[None]:
    """Whatever is drawn inside, the run goes on with the random numbers that it would have had."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def is_in_pieces(target: nn.Module) -> bool:
    """Whether FSDP keeps a target's weights in pieces, so that processes can run it only as often as each other."""
    return any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in target.modules())


def obstacle_to_drafting(model: nn.Module) -> str | None:
    """Why a model that learns cannot draft where it is, or None: drafting calls the specialists' parts one by one."""
    if is_deepspeed_zero3_enabled():
        return "ZeRO-3 keeps the specialists' weights in pieces"
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return "FSDP 1 keeps the specialists' weights in pieces; FSDP 2 can gather them (`fsdp_version: 2`)"
    return None


@contextlib.contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Gathers the parameters that `fully_shard` keeps in pieces, for code that does not call the model as a module."""
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
