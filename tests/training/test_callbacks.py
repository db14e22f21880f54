"""Clipping, checks of gradients, the console."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_poss.training.callbacks import ClipGradientValues, Opening, PlainConsole, ProgressConsole, gradients_are_finite


def layer_with(gradient: list[float]) -> nn.Module:
    layer = nn.Linear(2, 1)  # its bias has no gradient, as a frozen parameter
    layer.weight.grad = torch.tensor([gradient])
    return layer


@pytest.mark.parametrize(
    ("gradient", "finite"),
    [([1.0, -1e38], True), ([1.0, float("nan")], False), ([float("inf"), 1.0], False), ([-float("inf"), 0.0], False)],
)
def test_gradients_that_are_not_finite_are_seen(gradient, finite):
    assert bool(gradients_are_finite(layer_with(gradient).parameters())) is finite


def test_no_gradients_are_finite():
    assert bool(gradients_are_finite(nn.Linear(2, 1).parameters()))


def test_entries_are_clipped():
    layer = layer_with([0.25, -3.0])
    trainer = SimpleNamespace(model=layer)
    ClipGradientValues(trainer, 0.5).on_pre_optimizer_step(None, None, None)
    assert layer.weight.grad.tolist() == [[0.25, -0.5]]


@pytest.mark.parametrize("console", [ProgressConsole, PlainConsole])
@pytest.mark.parametrize("is_main", [True, False])
def test_console_shows_one_line_a_log(console, is_main, tmp_path, capsys):
    args = TrainingArguments(tmp_path, use_cpu=True)
    state = TrainerState(max_steps=2, is_world_process_zero=is_main, is_local_process_zero=is_main)
    callback = console()
    logs = {"loss": 1.5, "pos_acc_1": 0.75, "pos_acc_2": 0.5}
    callback.on_train_begin(args, state, TrainerControl())
    callback.on_log(args, state, TrainerControl(), logs=logs)
    callback.on_train_end(args, state, TrainerControl())
    assert ("'pos_acc': '0.75 0.5'" in capsys.readouterr().out) is is_main
    assert logs == {"loss": 1.5, "pos_acc_1": 0.75, "pos_acc_2": 0.5}  # trackers get every number


@pytest.mark.parametrize("is_main", [True, False])
def test_the_first_process_opens(is_main, tmp_path, capsys):
    state = TrainerState(is_world_process_zero=is_main)
    Opening(lambda: "The estimate").on_train_begin(None, state, TrainerControl())
    assert ("The estimate" in capsys.readouterr().out) is is_main
