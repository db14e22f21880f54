"""The estimate before the first step, against bytes that were counted."""

import weakref
from pathlib import Path

import pytest
import torch
from conftest import make_poss, make_target
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_poss import PosSModel, PosSTrainer, PosSTrainingArguments
from hf_poss.training import estimate
from hf_poss.training.estimate import (
    activation_bytes,
    checkpoints_kept,
    loss_bytes,
    optimizer_bytes,
    parameter_bytes,
)


class MemoryMeter(TorchDispatchMode):
    """Counts the bytes of what operations make: alive now, and at most."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, weakref.ref] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in inputs:
                self._add(tensor.untyped_storage())
        return output

    def _add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive:
            return

        def gone(_):
            if self.alive.pop(key, None) is not None:
                self.now -= size

        self.alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def wide_pair(vocab_size: int = 512, **kwargs) -> tuple:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    target = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    return target, PosSModel.from_target(target, **kwargs).train()


@pytest.mark.parametrize("positions", [(1, 3), (2, 4), (4, 4)])
@pytest.mark.parametrize(("autocast", "checkpointed"), [(False, False), (True, False), (False, True), (True, True)])
def test_activations_are_those_counted(positions, autocast, checkpointed):
    span, depth = positions
    target, poss = wide_pair(positions_per_specialist=span, num_draft_positions=depth)
    if checkpointed:
        enable = getattr(poss, "activation_checkpointing_enable", poss.gradient_checkpointing_enable)
        enable()
    ids = torch.randint(0, 512, (2, 257))
    features = torch.randn(2, 257, 128)
    with MemoryMeter() as meter:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = poss(ids, features, attention_mask=torch.ones_like(ids))
        kept = meter.now
        outputs.loss.backward()
    itemsize = 2 if autocast else 4
    rows = 2 * 256
    halves = 2 * sum(p.numel() for p in poss.parameters()) if autocast else 0  # weights that autocast keeps
    activations = activation_bytes(poss.config, rows, itemsize, checkpointed)
    if not checkpointed:
        assert activations + halves == pytest.approx(kept, rel=0.05)
    gradients = parameter_bytes(poss.parameters())
    needed = gradients + activations + halves + loss_bytes(512, rows)
    assert meter.peak <= needed * 1.05
    assert meter.peak >= needed * 0.6


def test_losses_take_the_memory_of_a_chunk():
    target, poss = wide_pair(vocab_size=40_000, positions_per_specialist=2, num_draft_positions=2)
    ids = torch.randint(0, 40_000, (2, 257))
    features = torch.randn(2, 257, 128)
    with MemoryMeter() as meter:
        poss(ids, features, attention_mask=torch.ones_like(ids))
    needed = activation_bytes(poss.config, 512) + loss_bytes(40_000, 512)
    assert meter.peak == pytest.approx(needed, rel=0.1)
    assert loss_bytes(40_000, 512) == loss_bytes(40_000, 100_000) > loss_bytes(40_000, 64)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor"])
def test_a_run_has_the_estimated_bytes(optimizer, tmp_path):
    target, poss = wide_pair(positions_per_specialist=1, num_draft_positions=2)
    args = PosSTrainingArguments(
        tmp_path,
        use_cpu=True,
        max_steps=4,
        save_steps=2,
        optim=optimizer,
        disable_tqdm=True,
        per_device_train_batch_size=2,
    )
    trainer = PosSTrainer(poss, target, args, train_dataset=[{"input_ids": list(range(3, 23))}] * 4)
    trainer.train()
    run = trainer.estimate
    state = trainer.optimizer.optimizer.state
    counted = sum(
        value.numel() * value.element_size()
        for values in state.values()
        for value in values.values()
        if isinstance(value, torch.Tensor)
    )
    assert run.needed.get(f"{optimizer}'s state", 0) == pytest.approx(counted, abs=0)
    weights = sum(p.numel() * 4 for p in poss.parameters())
    assert run.loaded["drafter's weights"] == run.needed["gradients"] == weights
    assert run.loaded["target's weights"] == parameter_bytes([*target.parameters(), *target.buffers()])
    assert run.trained == run.parameters == weights // 4
    assert (run.steps, run.tokens_per_epoch) == (4, 80)

    trainer.save_model()
    folders = sorted(tmp_path.glob("checkpoint-*"))
    assert run.checkpoints == len(folders) == 2
    for folder in folders:
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        assert run.checkpoint == pytest.approx(size, rel=0.05)
    everything = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert run.disk == pytest.approx(everything, rel=0.05)


def test_frozen_parameters_need_neither_gradient_nor_state(tmp_path):
    target, poss = wide_pair(positions_per_specialist=1, num_draft_positions=2)
    poss.layers[0].requires_grad_(False)
    trained = list(poss.layers[1].parameters()) + list(poss.fc.parameters())
    args = PosSTrainingArguments(tmp_path, use_cpu=True, max_length=64)
    run = estimate.TrainingEstimate.of(poss, poss.config, target, args, steps=3)
    assert run.trained == sum(p.numel() for p in trained) < run.parameters
    assert run.needed["gradients"] == parameter_bytes(trained)
    assert run.needed["adamw_torch_fused's state"] == optimizer_bytes(trained, "adamw_torch_fused")


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"save_strategy": "no"}, 0),
        ({"save_steps": 10}, 10),
        ({"save_steps": 30}, 4),  # and one at the end
        ({"save_steps": 0.25}, 4),
        ({"save_steps": 10, "save_total_limit": 2}, 3),  # the new one, before the oldest goes
        ({"save_steps": 100, "save_total_limit": 2}, 1),
        ({"save_strategy": "epoch"}, 5),
    ],
)
def test_checkpoints_that_lie_there_at_once(settings, kept, tmp_path):
    assert checkpoints_kept(PosSTrainingArguments(tmp_path, **settings), max_steps=100, steps_per_epoch=20) == kept


@pytest.fixture
def tiny(tmp_path):
    target = make_target("llama")
    poss = make_poss(target, num_draft_positions=3)
    samples = [{"input_ids": list(range(3, 23))}] * 4

    def trainer(**kwargs) -> PosSTrainer:
        settings = {"use_cpu": True, "max_steps": 1, "save_strategy": "no", "disable_tqdm": True, **kwargs}
        return PosSTrainer(poss, target, PosSTrainingArguments(tmp_path, **settings), train_dataset=samples)

    return trainer


def test_too_little_memory_stops_before_the_first_step(tiny, monkeypatch):
    monkeypatch.setattr(estimate, "available_memory", lambda device: 1000)
    trainer = tiny()
    before = {name: weight.clone() for name, weight in trainer.poss.state_dict().items()}
    told = r"needs .* MiB more on cpu, which has 1000 bytes(.|\n)*gradient_checkpointing"
    with pytest.raises(ValueError, match=told):
        trainer.train()
    assert all(torch.equal(before[name], weight) for name, weight in trainer.poss.state_dict().items())
    trainer = tiny(ignore_estimate=True)
    trainer.train()
    assert trainer.state.global_step == 1


def test_the_largest_part_decides_the_advice(tiny, monkeypatch):
    monkeypatch.setattr(estimate, "available_memory", lambda device: 1000)
    monkeypatch.setattr(estimate, "optimizer_bytes", lambda parameters, optimizer: 10**9)
    with pytest.raises(ValueError, match=r"The largest part is adamw_torch_fused's state(.|\n)*specialist_adapter"):
        tiny().train()


def test_too_small_a_disk_stops_before_the_first_step(tiny, monkeypatch):
    monkeypatch.setattr(estimate, "_disk_free", lambda folder: 2000)
    with pytest.raises(ValueError, match=r"the disk has 2.0 KiB left(.|\n)*save_total_limit"):
        tiny(save_strategy="steps", save_steps=1).train()


def test_memory_and_disk_are_looked_up(tmp_path):
    assert estimate.available_memory(torch.device("cpu")) > 2**20
    assert estimate._disk_free(tmp_path / "not" / "there") > 0
    assert not Path(tmp_path / "not").exists()


def test_the_console_shows_it(tiny, capsys):
    tiny().train()
    output = capsys.readouterr().out
    for told in ("parameters, 1 steps on cpu", "tokens per epoch: 80", "gradients", "activations", "disk: "):
        assert told in output
