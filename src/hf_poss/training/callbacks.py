"""What happens beside the steps of training: checks, clipping, the console."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from .metrics import fold_positions


__all__ = [
    "ClipGradientValues",
    "Opening",
    "PlainConsole",
    "ProgressConsole",
    "TrainingChecks",
    "gradients_are_finite",
    "use_consoles",
]


def _local_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[torch.Tensor]:
    """Gradients as far as this process holds them."""
    for parameter in parameters:
        if (gradient := parameter.grad) is not None:
            yield gradient.to_local() if isinstance(gradient, DTensor) else gradient


def gradients_are_finite(parameters: Iterable[nn.Parameter]) -> torch.BoolTensor:
    """A scalar on the device of the gradients; of the local shards where parameters are sharded."""
    largest = [torch.linalg.vector_norm(gradient, torch.inf) for gradient in _local_gradients(parameters)]
    if not largest:
        return torch.tensor(True)
    return torch.stack([value.to(device=largest[0].device, dtype=torch.float32) for value in largest]).isfinite().all()


class ClipGradientValues(TrainerCallback):
    """Clips every gradient entry at a value before the optimizer steps (EAGLE, PosS).

    Entries are clipped one by one, so each process can do it to the shards that it holds. Trainer takes the norm of
    the gradients before, and with it the scale of float16 off them.

    Args:
        trainer: whose model's gradients to clip.
        limit: above 0.
    """

    def __init__(self, trainer: Trainer, limit: float):
        self.trainer = trainer
        self.limit = limit

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        for gradient in _local_gradients(self.trainer.model.parameters()):
            gradient.clamp_(-self.limit, self.limit)


class TrainingChecks(TrainerCallback):
    """Calls what may stop a run, in every process and at the moments when nothing is lost by it.

    Args:
        before_training: before the first step, with the models in place.
        before_update: once a step, with its gradients there and the weights still those of the step before.
    """

    def __init__(self, before_training: Callable[[], None], before_update: Callable[[], None]):
        self.before_training = before_training
        self.before_update = before_update

    def on_train_begin(self, args, state, control, **kwargs):
        self.before_training()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.before_update()


class Opening(TrainerCallback):
    """Writes a text to the console of the first process before the first step.

    Args:
        text: asked for when training begins.
    """

    def __init__(self, text: Callable[[], str]):
        self.text = text

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            tqdm.write(self.text())


class ProgressConsole(ProgressCallback):
    """Trainer's progress bar and logs; metrics by draft position stand side by side."""

    def __init__(self):
        super().__init__(max_str_len=1000)

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=fold_positions(logs or {}), **kwargs)


class PlainConsole(PrinterCallback):
    """The same without a progress bar (`disable_tqdm`)."""

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs):
        super().on_log(args, state, control, logs=fold_positions(logs or {}), **kwargs)


def use_consoles(trainer: Trainer) -> None:
    """Puts [`ProgressConsole`] or [`PlainConsole`] in the place of Trainer's own; a notebook's table stays."""
    consoles = {ProgressCallback: ProgressConsole, PrinterCallback: PlainConsole}
    for callback in list(trainer.callback_handler.callbacks):
        if (console := consoles.get(type(callback))) is not None:
            trainer.remove_callback(callback)
            trainer.add_callback(console())
