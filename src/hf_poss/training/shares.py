"""Work that is divided among processes which need not talk to each other."""

import os
from dataclasses import dataclass

import torch


__all__ = ["Share"]


@dataclass(frozen=True)
class Share:
    """The part of one of several processes: of items 0, 1, 2, ... those whose number leaves `index` when divided by
    `count`.

    Args:
        index: this process, 0 to `count - 1`.
        count: processes, 1 or more.

    Raises:
        ValueError: if there is no such process.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self):
        if not 0 <= self.index < self.count:
            raise ValueError(
                f"Shard {self.index} of {self.count}; expected 0 to the number of shards less 1 (`--shard`, "
                "`--num_shards`)."
            )

    @classmethod
    def of_process(cls, shard: int | None = None, num_shards: int | None = None) -> "Share":
        """This process's share: of the processes that `torchrun` or `accelerate launch` started (`RANK` and
        `WORLD_SIZE`); if `shard` of `num_shards` is given, of as many such launches.

        Raises:
            ValueError: if one of the two is given without the other, or there is no such shard.
        """
        if (shard is None) != (num_shards is None):
            raise ValueError("Give `--shard` and `--num_shards` together: the number of a shard, from 0, and of all.")
        launch = cls() if shard is None else cls(shard, num_shards)
        process = cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
        return cls(launch.index * process.count + process.index, launch.count * process.count)

    def owns(self, item: int) -> bool:
        return item % self.count == self.index

    @property
    def shows_progress(self) -> bool:
        """Whether this process is the one of its machine that draws a bar."""
        return int(os.environ.get("LOCAL_RANK", 0)) == 0

    @staticmethod
    def take_device() -> None:
        """Makes an accelerator of its own the default of each process of a machine."""
        if torch.accelerator.is_available():
            local = int(os.environ.get("LOCAL_RANK", 0))
            torch.accelerator.set_device_index(local % torch.accelerator.device_count())
