"""Targets that several processes hold together by tensor parallelism, and that each process trains on.

A pass of such a target takes the same rows in every process, whereas each process trains on rows of its own.
"""

import copy
from collections.abc import Sequence

import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..compatibility import bare_copy
from ..modeling_poss import TargetReference
from .features import target_features


__all__ = ["shared_features", "whole_reference"]


def shared_features(
    target: PreTrainedModel,
    group: "distributed.ProcessGroup",
    input_ids: torch.LongTensor,
    attention_mask: torch.Tensor | None = None,
    segment_ids: torch.LongTensor | None = None,
    position_ids: torch.LongTensor | None = None,
    feature_layers: Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[`target_features`] of this process's rows: the target reads those of all processes of `group`, in each of them.

    Every process must call it as often as the others. Shapes may differ, inputs that are None may not.

    Args:
        group: the processes that hold `target`, see `tensor_parallel_group`.
        input_ids, attention_mask, segment_ids, position_ids, feature_layers: as in [`target_features`].
    """
    rows, tokens = input_ids.shape
    size, rank = distributed.get_world_size(group), distributed.get_rank(group)
    shape = input_ids.new_tensor([rows, tokens])
    shapes = [torch.empty_like(shape) for _ in range(size)]
    distributed.all_gather(shapes, shape, group=group)
    most, longest = torch.stack(shapes).amax(0).tolist()

    def of_all(inputs: torch.Tensor | None) -> torch.Tensor | None:
        if inputs is None:
            return None
        padded = F.pad(inputs.long(), (0, longest - tokens, 0, most - rows)).contiguous()
        parts = [torch.empty_like(padded) for _ in range(size)]
        distributed.all_gather(parts, padded, group=group)
        return torch.cat(parts)  # [size * most, longest]

    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    features = target_features(
        target,
        of_all(input_ids),
        of_all(attention_mask),
        of_all(segment_ids),
        of_all(position_ids),
        feature_layers,
    )
    first = rank * most
    return tuple(part[first : first + rows, :tokens] for part in features)


def whole_reference(
    reference: TargetReference, group: "distributed.ProcessGroup", vocab_size: int, hidden_size: int
) -> TargetReference:
    """The same embedding and head, whole in this process and free of the others. All of `group` must call it at once.

    They take the memory of two matrices [vocab, hidden], one if the target ties them.
    """
    gathered: dict[int, nn.Parameter] = {}

    def whole(module: nn.Module) -> nn.Module:
        own = dict(module.named_parameters(recurse=False))
        for parameter in own.values():
            if id(parameter) not in gathered:
                tensor = _gathered(parameter.detach(), group, (vocab_size, hidden_size))
                gathered[id(parameter)] = nn.Parameter(tensor, requires_grad=False)
        return bare_copy(module, {name: gathered[id(parameter)] for name, parameter in own.items()})

    twin = copy.copy(reference)
    twin.embed_tokens, twin.lm_head = whole(reference.embed_tokens), whole(reference.lm_head)
    return twin


def _gathered(part: torch.Tensor, group: "distributed.ProcessGroup", shape: tuple[int, int]) -> torch.Tensor:
    """All of a weight [vocab, hidden] or bias [vocab]. Older releases of transformers keep plain tensors as shards."""
    if isinstance(part, DTensor):
        return part.full_tensor()
    split = [dim for dim, size in enumerate(part.shape) if size < shape[dim]]
    if not split:
        return part
    parts = [torch.empty_like(part) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, dim=split[0])
