"""Training in two processes: what one process with all of the data would have come to.

The processes are started by torchrun, which runs this file: `test_distributed.py FOLDER`.
"""

import gc
import io
import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL_VOCAB, make_poss, make_target, small_target
from safetensors.torch import load_file, save_file
from torch import distributed
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback
from transformers.distributed import DistributedConfig

from hf_poss import PosSModel, PosSTrainer, PosSTrainingArguments
from hf_poss.compatibility import tensor_parallel_group
from hf_poss.training.collator import PosSDataCollator
from hf_poss.training.features import target_features
from hf_poss.training.tensor_parallel import shared_features, whole_reference


PROCESSES = 2
LENGTHS = (9, 24, 5, 17, 30, 12, 8, 21)
# Per process; one process takes the batches of all. Steps are of 4 samples in any case.
KINDS = {
    "plain": {"per_device_train_batch_size": 2},
    "accumulated": {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "train_sampling_strategy": "group_by_length",
    },
    "streamed": {"per_device_train_batch_size": 2},
}
STEPS = 5

OWN_ROWS = [slice(0, 2), slice(2, 4)]


def fully_sharded(folder: Path, parts: tuple[str, ...]) -> PreTrainedModel:
    target = AutoModelForCausalLM.from_pretrained(folder)
    shard = partial(fully_shard, mesh=init_device_mesh("cpu", (PROCESSES,)))
    for layer in target.model.layers:
        shard(layer)
    for part in parts:
        shard(target.get_submodule(part))
    return shard(target)


def loaded_in_shards(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=PROCESSES))


SHARDED_TARGETS = {
    "layers": partial(fully_sharded, parts=()),
    "embedding and head": partial(fully_sharded, parts=("model.embed_tokens", "lm_head")),
    "as loaded": loaded_in_shards,
}

Record = Callable[..., None]


def samples() -> list[dict[str, list[int]]]:
    """Of different lengths, and in every other one the first half does not count: processes differ in rows that do."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for index, length in enumerate(LENGTHS):
        tokens = torch.randint(3, 97, (length,), generator=generator).tolist()
        skipped = length // 2 if index % 2 else 0
        rows.append({"input_ids": tokens, "labels": [-100] * skipped + tokens[skipped:]})
    return rows


def models() -> tuple[Any, PosSModel]:
    target = make_target("llama", scale=3.0)
    return target, make_poss(target, positions_per_specialist=2, num_draft_positions=3)


@contextmanager
def counting(collectives: list[dict[str, int]]) -> Iterator[None]:
    """Appends what processes sent each other meanwhile, by name."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        yield
    names = (event.name for event in profiler.events())
    collectives.append(dict(Counter(name for name in names if name.startswith("gloo:"))))


class Spy(TrainerCallback):
    """Counts what goes between processes in forward and backward, and keeps the losses."""

    def __init__(self, trainer: PosSTrainer):
        self.trainer = trainer
        self.collectives: list[dict[str, int]] = []  # of each micro-step of the last step
        self.buckets: list[int] = []
        self.losses: list[float] = []
        self.step = trainer.training_step
        trainer.training_step = self.training_step
        trainer.add_callback(self)

    def on_train_begin(self, args, state, control, **kwargs):
        model = self.trainer.model_wrapped
        if hasattr(model, "register_comm_hook"):
            model.register_comm_hook(None, self.reduce)

    def reduce(self, state, bucket):
        self.buckets[-1] += 1
        return allreduce_hook(state, bucket)

    def training_step(self, *args, **kwargs):
        self.buckets.append(0)
        if self.trainer.state.global_step < STEPS - 1:  # in its first steps DDP agrees on the order of its buckets
            return self.step(*args, **kwargs)
        with counting(self.collectives):
            return self.step(*args, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])


def train(folder: Path, kind: str, batch_factor: int = 1, resume: str | None = None, **kwargs) -> PosSTrainer:
    target, poss = models()
    settings = {"max_steps": STEPS, "save_strategy": "no", "logging_steps": 1, "seed": 3, "learning_rate": 1e-2}
    settings |= {"feature_noise": 0.0, "use_cpu": True, "disable_tqdm": True, **KINDS[kind], **kwargs}
    settings["per_device_train_batch_size"] *= batch_factor
    dataset = samples()
    if kind == "streamed":
        from datasets import Dataset

        dataset = Dataset.from_list(dataset).to_iterable_dataset().shuffle(seed=5, buffer_size=4)
    trainer = PosSTrainer(poss, target, PosSTrainingArguments(folder, **settings), train_dataset=dataset)
    trainer.spy = Spy(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


# ---- What the processes do ----


def data_parallel(rank: int, folder: Path, record: Record) -> None:
    for kind in KINDS:
        # Each process is given a folder of its own, in which only what it writes itself can be.
        trainer = train(folder / f"{kind} of {rank}", kind, save_strategy="steps", save_steps=3)
        record("losses", kind, trainer.spy.losses)
        record("collectives", kind, trainer.spy.collectives)
        record("buckets", kind, trainer.spy.buckets)
        save_file(trainer.model.state_dict(), folder / f"{kind} {rank}.safetensors")

    if rank == 0:  # the one that writes is late
        save = PosSModel.save_pretrained
        PosSModel.save_pretrained = lambda *args, **kwargs: (time.sleep(1), save(*args, **kwargs))
    trainer.save_model(str(folder / ("late" if rank == 0 else "nothing")))
    loaded = PosSModel.from_pretrained(folder / "late").state_dict()
    record("loaded", all(torch.equal(loaded[name], value) for name, value in trainer.model.state_dict().items()))

    # Two steps an epoch: checkpoint 3 is within the second.
    noisy = {"save_strategy": "steps", "save_steps": 3, "feature_noise": 0.2, "per_device_train_batch_size": 2}
    straight = train(folder / "run", "plain", **noisy).model.state_dict()
    try:
        resumed = train(folder / "run", "plain", resume=str(folder / "run" / "checkpoint-3"), **noisy)
    except RuntimeError as error:  # older releases of transformers load an optimizer to "cpu:0", unknown to torch
        if "cpu:0" not in str(error):
            raise
        record("resumed", None)
    else:
        weights = resumed.model.state_dict()
        record("resumed", all(torch.equal(weights[name], value) for name, value in straight.items()))


def evaluate(target: PreTrainedModel, poss: PosSModel, folder: Path, **kwargs) -> list[dict[str, float]]:
    """Logs of a short training, if there are steps, and of the evaluation behind it. Neither the samples that are
    evaluated nor the prompts can be dealt out to two processes evenly."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    settings = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 2, "max_steps": 4}
    settings |= {"optim": "sgd", "learning_rate": 0.3, "feature_noise": 0.0, "train_sampling_strategy": "sequential"}
    settings |= {"per_device_train_batch_size": 4 // processes, "per_device_eval_batch_size": 2}
    settings |= {"eval_generate_prompts": 5, "eval_generate_tokens": 16, **kwargs}
    args = PosSTrainingArguments(folder, **settings)
    trainer = PosSTrainer(poss, target, args, train_dataset=samples(), eval_dataset=samples()[:7])
    if settings["max_steps"]:
        trainer.train()
    trainer.evaluate()
    return [log for log in trainer.state.log_history if "train_runtime" not in log]


def watched(rank: int, folder: Path, record: Record) -> None:
    with redirect_stdout(io.StringIO()) as console:
        record("logs", evaluate(*models(), folder / "watched"))
    record("console", console.getvalue())


def sharded(rank: int, folder: Path, record: Record) -> None:
    target, poss = models()
    target.requires_grad_(False)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for layer in poss.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(poss, mesh=mesh)
    record("whole", [name for name, parameter in poss.named_parameters() if not isinstance(parameter, DTensor)])
    held = sum(parameter.to_local().numel() for parameter in poss.parameters())
    record("held", held / sum(parameter.numel() for parameter in poss.parameters()))

    optimizer = torch.optim.AdamW(poss.parameters(), lr=1e-2)
    losses, collectives = [], []
    for step in range(3):
        losses.append(
            one_step(poss, target, step, slice(rank, None, PROCESSES), scale=PROCESSES, collectives=collectives)
        )
        if step == 0:
            gradients = {name: parameter.grad.full_tensor() for name, parameter in poss.named_parameters()}
            save_file(gradients, folder / f"gradients {rank}.safetensors")
        optimizer.step()
        optimizer.zero_grad()
    record("losses sharded", losses)
    record("collectives sharded", collectives)
    whole = get_model_state_dict(poss, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        poss.save_pretrained(folder / "saved", state_dict=whole)


def sharded_targets(rank: int, folder: Path, record: Record) -> None:
    """Each process takes rows of its own, with a target that none of them holds whole."""
    whole, poss = models()
    whole.requires_grad_(False)
    wanted = one_step(poss, whole, 0, OWN_ROWS[rank])
    if rank == 0:
        whole.save_pretrained(folder / "target")
    distributed.barrier()
    for name, load in SHARDED_TARGETS.items():
        target = load(folder / "target").eval().requires_grad_(False)
        weights = [parameter for parameter in target.parameters() if isinstance(parameter, DTensor)]
        record("held", name, sum(w.to_local().numel() for w in weights) / sum(w.numel() for w in weights))
        found = models()[1].attach(target)
        loss = one_step(found, target, 0, OWN_ROWS[rank])
        record("loss", name, abs(loss / wanted - 1) < 1e-5)
        pairs = zip(found.parameters(), poss.parameters(), strict=True)
        record("gradients", name, all(torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-6) for a, b in pairs))
    record("evaluation", evaluate(target, models()[1], folder, max_steps=0)[-1])


def tensor_parallel_target(rank: int, folder: Path, record: Record) -> None:
    """Each process takes rows of its own, of other lengths, whereas a pass of the target takes the same in both."""
    alone = small_target()
    if rank == 0:
        alone.save_pretrained(folder / "split")
    distributed.barrier()
    config = DistributedConfig(tp_size=PROCESSES, tp_plan="auto")
    target = AutoModelForCausalLM.from_pretrained(folder / "split", distributed_config=config).eval()
    group = tensor_parallel_group(target)
    batch = PosSDataCollator()(samples()[3 * rank :][: 3 - rank])
    ids, mask, real = batch["input_ids"] % SMALL_VOCAB, batch["attention_mask"], batch["attention_mask"].bool()
    for layers in (None, [0, 2]):
        found = shared_features(target, group, ids, mask, feature_layers=layers)
        wanted = target_features(alone, ids, mask, feature_layers=layers)
        same = [torch.allclose(a[real], b[real], rtol=1e-4, atol=1e-5) for a, b in zip(found, wanted, strict=True)]
        record("shared features", layers, all(same))
    reference = make_poss(alone).attach(target).reference
    whole = whole_reference(reference, group, SMALL_VOCAB, alone.config.hidden_size)
    features = torch.linspace(-1, 1, 32 * (2 + rank)).view(1, -1, 32)
    record("whole head", torch.allclose(whole.logits(features), alone.lm_head(features), rtol=1e-4, atol=1e-5))
    record("whole embedding", torch.equal(whole.embed(ids, like=features), alone.model.embed_tokens(ids)))


def one_step(
    poss: PosSModel,
    target: Any,
    step: int,
    rows: slice = slice(None),
    scale: int = 1,
    collectives: list[dict[str, int]] | None = None,
) -> float:
    """Forward and backward over `rows` of a batch of four, whose loss is summed over `scale` processes."""
    batch = PosSDataCollator()(samples()[4 * (step % 2) :][:4])
    items = batch["labels"].ne(-100).sum()
    batch = {name: value[rows] for name, value in batch.items()}
    features, last = target_features(target, batch["input_ids"], batch["attention_mask"])
    with nullcontext() if collectives is None else counting(collectives):
        loss = poss.train()(**batch, features=features, target_features=last, num_items_in_batch=items).loss
        (loss * scale).backward()
    loss = loss.detach()
    if scale > 1:
        distributed.all_reduce(loss)
    return loss.item()


# ---- What they are held to ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def two(folder) -> list[dict[str, Any]]:
    """What each process recorded; each recorded value under its labels, joined by spaces."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    command += [__file__, str(folder)]
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}  # conftest is a folder above
    result = subprocess.run(command, capture_output=True, text=True, timeout=400, env={**os.environ, **paths})
    assert result.returncode == 0, result.stderr[-6000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_reach_the_losses_and_weights_of_one(two, folder, kind, tmp_path):
    one = train(tmp_path, kind, batch_factor=PROCESSES)
    assert len(one.spy.losses) == STEPS
    start = models()[1].state_dict()
    weights = one.model.state_dict()
    assert max((weights[name] - start[name]).abs().max() for name in start) > 1e-2
    for rank, results in enumerate(two):
        if rank == 0:  # only the first logs
            torch.testing.assert_close(results[f"losses {kind}"], one.spy.losses, rtol=1e-4, atol=1e-5)
        reached = load_file(folder / f"{kind} {rank}.safetensors")
        for name, weight in weights.items():
            torch.testing.assert_close(reached[name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_reduces_gradients_once(two, kind):
    """The specialists here fit into one of DDP's buckets; nothing else goes between the processes in a step."""
    accumulated = KINDS[kind].get("gradient_accumulation_steps", 1)
    for results in two:
        wanted = [0] * (accumulated - 1) + [1]
        assert results[f"buckets {kind}"] == wanted * STEPS
        assert results[f"collectives {kind}"] == [{"gloo:all_reduce": count} if count else {} for count in wanted]


def assert_same_metrics(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        if not name.endswith(("runtime", "per_second", "preparation_time")):
            assert found[name] == pytest.approx(expected[name], rel=1e-4), name


def test_two_processes_log_what_one_does(two, tmp_path):
    logs = evaluate(*models(), tmp_path)
    assert len(logs) == len(two[0]["logs"]) == 3
    for found, expected in zip(two[0]["logs"], logs, strict=True):
        assert_same_metrics(found, expected)
    assert logs[-1]["eval_generate_tau"] > 1
    assert math.isfinite(logs[-1]["eval_loss"])


def test_the_first_process_alone_fills_the_console(two):
    assert [results["console"].count("tokens per epoch") for results in two] == [1, 0]
    assert "eval_tau" in two[0]["console"]
    assert "tau" not in two[1]["console"]


def test_one_process_writes(two, folder):
    written = [
        {str(path.relative_to(folder / f"plain of {rank}")) for path in (folder / f"plain of {rank}").rglob("*.*")}
        for rank in range(PROCESSES)
    ]
    for step in (3, STEPS):
        assert f"checkpoint-{step}/model.safetensors" in written[0]
        assert f"checkpoint-{step}/trainer_state.json" in written[0]
    # Each process has random numbers of its own.
    assert {Path(path).name for path in written[1]} == {"rng_state_1.pth"}
    assert not (folder / "nothing").exists()


def test_the_others_wait(two):
    assert all(results["loaded"] for results in two)


def test_two_processes_resume_exactly(two):
    if two[0]["resumed"] is None:
        pytest.skip("this transformers cannot resume several processes on CPUs")
    assert all(results["resumed"] for results in two)


def test_parameters_are_sharded(two):
    for results in two:
        assert results["whole"] == []
        assert 0.45 < results["held"] < 0.55


def test_a_step_reduces_the_gradients_of_each_shard_once(two):
    groups = models()[1].config.num_specialists + 1
    for results in two:
        assert [count["gloo:all_reduce"] for count in results["collectives sharded"]] == [groups] * 3


def test_shards_reach_the_losses_and_gradients_of_one_process(two, folder):
    target, poss = models()
    target.requires_grad_(False)
    optimizer = torch.optim.AdamW(poss.parameters(), lr=1e-2)
    losses = []
    for step in range(3):
        losses.append(one_step(poss, target, step))
        if step == 0:
            for rank in range(PROCESSES):
                gradients = load_file(folder / f"gradients {rank}.safetensors")
                for name, parameter in poss.named_parameters():
                    torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)
        optimizer.step()
        optimizer.zero_grad()
    for results in two:
        assert results["losses sharded"] == pytest.approx(losses, rel=1e-4)
    saved = PosSModel.from_pretrained(folder / "saved").state_dict()
    for name, weight in poss.state_dict().items():
        torch.testing.assert_close(saved[name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", SHARDED_TARGETS)
def test_targets_in_shards_train_like_whole_ones(two, name):
    for results in two:
        assert results[f"held {name}"] < 0.6
        assert results[f"loss {name}"]
        assert results[f"gradients {name}"]


def test_targets_in_shards_draft_in_evaluations(two, tmp_path):
    """Each process must run such a target as often as the other."""
    expected = evaluate(*models(), tmp_path, max_steps=0)[-1]
    for name in ("eval_loss", "eval_tau", "eval_generate_tau"):
        assert two[0]["evaluation"][name] == pytest.approx(expected[name], rel=1e-4)


def test_tensor_parallel_targets_serve_processes_with_rows_of_their_own(two):
    for results in two:
        assert results["shared features None"]
        assert results["shared features [0, 2]"]
        assert results["whole head"]
        assert results["whole embedding"]


def test_what_shards_save_is_an_ordinary_checkpoint(two, folder, tmp_path):
    models()[1].save_pretrained(tmp_path)
    assert {path.name for path in (folder / "saved").iterdir()} == {path.name for path in tmp_path.iterdir()}
    assert json.loads((folder / "saved" / "config.json").read_text()) == json.loads(
        (tmp_path / "config.json").read_text()
    )


def main(folder: str) -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    distributed.init_process_group("gloo", timeout=timedelta(seconds=100))
    rank = distributed.get_rank()
    for task in (data_parallel, watched, sharded, sharded_targets, tensor_parallel_target):
        task(rank, Path(folder), lambda *entry: results.update({" ".join(map(str, entry[:-1])): entry[-1]}))
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    gc.collect()  # a sharded module that outlives its process group can abort the process at its exit
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
