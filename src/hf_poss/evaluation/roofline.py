"""How fast memory lets a round be: bytes that must move, over the speed at which this machine copies."""

import statistics
import time
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from ..modeling_poss import PosSModel
from .timing import synchronize


__all__ = ["copy_bandwidth", "plain_step_bytes", "round_bytes"]

# More than the caches of processors and accelerators hold.
_COPIED_BYTES = 2**29


def copy_bandwidth(device: torch.device, size: int = _COPIED_BYTES, repeats: int = 9) -> float:
    """Bytes a second that `device` moves when it copies a tensor, what is read and what is written both counted.

    Args:
        size: bytes of the tensor; more than the caches hold.
        repeats: copies, of which the median counts; one more warms up.
    """
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    seconds = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        copy.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size / statistics.median(seconds[1:])


def plain_step_bytes(target: PreTrainedModel, cache_bytes: float) -> dict[str, float]:
    """Bytes that a step of plain decoding must move.

    Args:
        cache_bytes: of the target's keys and values, all rows.
    """
    return {"target weights": _target_bytes(target, rows=1), "target cache": cache_bytes}


def round_bytes(
    target: PreTrainedModel, poss: PosSModel, depth: int, nodes: int, cache_bytes: float, entries: float
) -> dict[str, float]:
    """Bytes that a round must move: the target's weights and cache once; for every draft pass its specialist, `fc`,
    the head's rows and the specialist's cache. Activations are left out.

    Args:
        depth: draft passes.
        nodes: tokens that the target verifies, of all rows.
        cache_bytes: of the target's keys and values, all rows.
        entries: of the context, all rows.
    """
    config = poss.config
    head = sum(_bytes([parameter]) for parameter in target.get_output_embeddings().parameters())
    if config.draft_vocab_size is not None:
        head *= config.draft_vocab_size / config.vocab_size
    entry = 2 * config.num_key_value_heads * config.head_dim * poss.fc.weight.element_size()
    return {
        "target weights": _target_bytes(target, nodes),
        "target cache": cache_bytes,
        "specialists": sum(_bytes(poss.specialist(k).parameters()) for k in range(1, depth + 1)),
        "fc": depth * _bytes(poss.fc.parameters()),
        "draft head": depth * head,
        "specialist caches": depth * entry * entries,
    }


def _target_bytes(target: PreTrainedModel, rows: int) -> float:
    """Weights that a pass over `rows` tokens reads: all, but of the embedding only the tokens' rows."""
    embedding, head = target.get_input_embeddings(), target.get_output_embeddings()
    every = _bytes(target.parameters())  # a tied matrix counts once
    if head is not None and head.weight is embedding.weight:
        return every
    read = rows * embedding.weight.shape[-1] * embedding.weight.element_size()
    return every - _bytes(embedding.parameters()) + read


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
