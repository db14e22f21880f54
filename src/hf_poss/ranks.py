"""Processes that decode the same rows with a target that is split between them."""

import torch

from .draft_tree import DraftTree


__all__ = ["Ranks"]


class Ranks:
    """Lets the first process decide what all of them draft and pick, so that they emit the same tokens even if their
    clocks, random numbers or roundings differ.

    Args:
        group: the processes; None for a target that is whole.
    """

    def __init__(self, group: torch.distributed.ProcessGroup | None):
        self.group = group
        self.first = None if group is None else torch.distributed.get_global_rank(group, 0)

    def agree(self, values: list[int]) -> list[int]:
        """The first process's values."""
        if self.group is None:
            return values
        tensor = torch.tensor(values, device=_communication_device(self.group))
        torch.distributed.broadcast(tensor, self.first, self.group)
        return tensor.tolist()

    def agree_on_picks(self, picks: torch.LongTensor) -> torch.LongTensor:
        """The first process's picks, on the device that they were on."""
        if self.group is None:
            return picks
        agreed = picks.to(_communication_device(self.group)).contiguous()
        torch.distributed.broadcast(agreed, self.first, self.group)
        return agreed.to(picks.device)

    def agree_on_tree(self, tree: DraftTree) -> DraftTree:
        """The first process's tree."""
        if self.group is None:
            return tree
        packed = torch.stack((tree.tokens, tree.parents, tree.depths)).to(_communication_device(self.group))
        torch.distributed.broadcast(packed, self.first, self.group)
        tokens, parents, depths = packed.to(tree.tokens.device)
        return DraftTree(tokens, parents, depths, tree.max_depth, tree.scores)


def _communication_device(group: torch.distributed.ProcessGroup) -> torch.device:
    return torch.device(
        "cpu" if "gloo" in torch.distributed.get_backend(group) else torch.accelerator.current_accelerator()
    )
