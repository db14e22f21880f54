"""What exact resuming needs of a Trainer: the order of data, and checkpoints that are whole or visibly not.

Trainer has no public hook for most of it, so this overrides private methods, which `compatibility.check_trainer` asks
for.
"""

import os
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length

from .lengths import sample_lengths
from .resume import mark_incomplete
from .sampling import EpochSampler


__all__ = ["CheckpointMixin"]


class CheckpointMixin:
    """For a [`~transformers.Trainer`], before it in the list of bases."""

    train_sampler: EpochSampler | None = None

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Order by seed and epoch alone, so that a resumed run and all processes agree (see [`EpochSampler`])."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        strategy = self.args.train_sampling_strategy
        if not has_length(dataset) or strategy not in ("random", "group_by_length"):
            return super()._get_train_sampler(dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        lengths = sample_lengths(dataset) if strategy == "group_by_length" else None
        group_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        self.train_sampler = EpochSampler(len(dataset), seed, lengths, group_size)
        return self.train_sampler

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """`trainer_state.json` is written last: a checkpoint without it is half written."""
        if self.args.should_save:
            folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            mark_incomplete(os.path.join(self._get_output_dir(trial), folder))
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in the base class, in every process: the first writes, the others wait until the files are there."""
        super().save_model(output_dir, _internal_call)
        self.accelerator.wait_for_everyone()

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # Process 0 writes the state next; by then those of all processes must be there.
        self.accelerator.wait_for_everyone()
