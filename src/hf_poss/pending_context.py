"""What the target has read and the specialists have not: they need it when they draft next."""

from collections.abc import Sequence

import torch

from .transfers import upload


__all__ = ["PendingContext"]


class PendingContext:
    """Features of accepted tokens, and the tokens that follow them, by slot.

    Args:
        features: of a pass of the target, [slots, columns, feature size].
        entries: columns that each slot accepted.
        following: the token that follows each of these.
        newest: the newest token of each slot, which may have accepted nothing.
    """

    def __init__(
        self,
        features: torch.Tensor,
        entries: Sequence[Sequence[int]],
        following: Sequence[Sequence[int]],
        newest: Sequence[int],
    ):
        self.features = features
        self.entries = [list(own) for own in entries]
        self.following = [list(own) for own in following]
        self.newest = list(newest)

    @property
    def most(self) -> int:
        """Entries of the slot that has most."""
        return max(map(len, self.entries))

    def clear(self) -> None:
        """The specialists have it all."""
        self.features = self.features[:, :0]
        self.entries, self.following = [[] for _ in self.entries], [[] for _ in self.following]

    def add(self, more: "PendingContext") -> None:
        """A further pass of the same slots."""
        columns = self.features.shape[1]
        self.features = torch.cat((self.features, more.features), dim=1)
        for own, entries in zip(self.entries, more.entries, strict=True):
            own.extend(columns + entry for entry in entries)
        for own, following in zip(self.following, more.following, strict=True):
            own.extend(following)
        self.newest = more.newest

    def select(self, slots: Sequence[int]) -> None:
        """Keeps these slots, in this order."""
        if list(slots) == list(range(len(self.entries))):
            return
        self.features = self.features[upload(slots, self.features.device)]
        self.entries = [self.entries[slot] for slot in slots]
        self.following = [self.following[slot] for slot in slots]
        self.newest = [self.newest[slot] for slot in slots]

    def gathered(self, multiple: int = 1) -> tuple[torch.Tensor, torch.LongTensor, list[int]]:
        """What the specialists take.

        Args:
            multiple: of which the number of columns is one, filled up with entries that do not count.

        Returns:
            features [slots, columns, feature size] and tokens int64 [slots, columns], and how many of a slot count.
        """
        counts = [len(own) for own in self.entries]
        columns = -(-self.most // multiple) * multiple
        device = self.features.device
        features = self.features
        if columns != features.shape[1] or any(own != list(range(columns)) for own in self.entries):
            index = upload([own + [0] * (columns - len(own)) for own in self.entries], device)
            features = features[torch.arange(len(counts), device=device)[:, None], index]
        tokens = upload([own + [0] * (columns - len(own)) for own in self.following], device)
        return features, tokens, counts
