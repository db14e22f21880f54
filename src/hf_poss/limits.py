"""What a call may ask for: positions that the target has, memory that the machine has."""

import os

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .compatibility import input_device
from .configuration_poss import PosSConfig


__all__ = [
    "check_memory",
    "check_positions",
    "check_size",
    "device_memory",
    "last_position",
    "learned_positions",
    "rope_obstacle",
]


def check_positions(target: PreTrainedModel, tokens: int) -> None:
    """Refuses prompts that are longer than what the target was made for.

    Args:
        tokens: of the longest prompt, without padding.

    Raises:
        ValueError: naming both numbers.
    """
    text = target.config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if limit is not None and tokens > limit and "dynamic" not in _rope_types(text):
        raise ValueError(
            f"The prompt has {tokens} tokens; {target.__class__.__name__} has {limit} positions "
            "(`max_position_embeddings`). Shorten the prompt."
        )


def learned_positions(config: PreTrainedConfig) -> int | None:
    """How many positions a target learned an embedding of each; None where any will do."""
    text = config.get_text_config()
    rotary = getattr(text, "rope_parameters", None)
    return None if rotary else getattr(text, "max_position_embeddings", None)


def last_position(target: PreTrainedModel) -> int | None:
    """The last position id that the target can take, where it learned an embedding of each; None where any will do."""
    limit = learned_positions(target.config)
    return None if limit is None else limit - 1


def rope_obstacle(target: PreTrainedModel, first: int, last: int) -> str | None:
    """Why no pass may hold several tokens: the rotary frequencies of a target change with the length of a text, and
    plain decoding would give them to some of the tokens only.

    Args:
        first: tokens of the shortest text that the target reads.
        last: tokens of the longest text.

    Returns:
        None if they do not change between the two.
    """
    text, change = target.config.get_text_config(), None
    for rope in _ropes(text):
        kind = rope.get("rope_type")
        if kind == "dynamic" and last > text.max_position_embeddings:
            change = text.max_position_embeddings
        if kind == "longrope":
            original = rope.get("original_max_position_embeddings") or text.max_position_embeddings
            change = original if first <= original < last else change
    if change is None:
        return None
    return (
        f"the rotary frequencies of {target.__class__.__name__} change once a text is longer than {change} tokens, "
        "and this one may get there"
    )


def _ropes(config: PreTrainedConfig) -> list[dict]:
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]  # one a layer type
    return nested or [rope]


def _rope_types(config: PreTrainedConfig) -> set[str | None]:
    return {rope.get("rope_type") for rope in _ropes(config)}


def check_memory(target: PreTrainedModel, depth: int, top_k: int, total_tokens: int, rows: int, length: int) -> None:
    """Refuses a draft that the machine cannot hold, before it is begun.

    Counts what grows with the draft: candidates, logits, masks, keys and values of the nodes.

    Args:
        depth, top_k, total_tokens: shape of the draft, as far as the call has room for it.
        rows: rows of the batch.
        length: tokens of the prompt.

    Raises:
        ValueError: saying what a round needs, what there is, and what to lower.
    """
    text = target.config.get_text_config()
    size = target.dtype.itemsize
    top_k = min(top_k, text.vocab_size)
    candidates = top_k + (depth - 1) * top_k**2
    nodes = 1 + min(total_tokens - 1, candidates)
    needed = rows * (
        20 * candidates  # token, parent, score
        + nodes * text.vocab_size * (size + 4)
        + top_k * text.vocab_size * 8
        + nodes * (length + nodes) * (size + 1)
        + nodes * 2 * text.num_hidden_layers * text.hidden_size * size
    )
    device = input_device(target)
    available = device_memory(device)
    if available is not None and needed > available:
        raise ValueError(
            f"A round of {depth} draft positions, {top_k} branches and {nodes} nodes needs about {needed:.1e} bytes "
            f"for {rows} row(s); {device} has {available:.1e}. Lower `num_assistant_tokens`, `draft_top_k` or "
            "`draft_total_tokens` of `poss.generation_config`, or the batch."
        )


def check_size(config: PosSConfig, device: torch.device | str = "cpu") -> None:
    """Refuses specialists that a device cannot hold, before they are made.

    Raises:
        ValueError: saying what they need, what there is, and what to change.
    """
    width = config.head_dim * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    weights = config.hidden_size * (width + 3 * config.intermediate_size + 1)
    layers = config.num_specialists
    if config.specialist_adapter is not None:  # r rows for the input and r columns for the output of each projection
        rank = config.specialist_adapter["r"]
        weights += layers * rank * (7 * config.hidden_size + width + 3 * config.intermediate_size)
        layers = 1
    needed = 4 * (layers * weights + 2 * config.hidden_size**2)
    available = device_memory(torch.device(device))
    if available is not None and needed > available:
        raise ValueError(
            f"{config.num_specialists} specialists ({config.num_draft_positions} draft positions, "
            f"{config.positions_per_specialist} for each) need about {needed:.1e} bytes in float32; {device} has "
            f"{available:.1e}. Lower `num_draft_positions` or raise `positions_per_specialist`."
        )


def device_memory(device: torch.device) -> int | None:
    """Bytes that a device has in all; None if that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu" and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None
