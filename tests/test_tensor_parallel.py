"""Targets that several processes hold together: all of them write the same text, and none waits for another in vain.

The processes are started by torchrun, which runs this file: `test_tensor_parallel.py TASK RESULTS`.
"""

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHAPES, drafter_for, left_padded, make_prompt, small_target
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed
from transformers.distributed import DistributedConfig

from hf_poss import collect_statistics
from hf_poss.compatibility import tensor_parallel_group
from hf_poss.modeling_poss import PosSModel, TargetReference


PROCESSES = 2
ROWS = [1, 2]
PROMPTS = [make_prompt(7, seed=1), make_prompt(3, seed=2)]
NEW_TOKENS = 24
# Processes with batches of their own: other prompts, other numbers of rows, texts of other lengths.
OWN_PROMPTS = [PROMPTS, [make_prompt(5, seed=3)]]
OWN_LENGTHS = [11, 30]
SHARDINGS = ["whole", "layers", "layers_and_head"]

Record = Callable[..., None]


def generate(target: PreTrainedModel, inputs: dict[str, torch.Tensor], **kwargs: Any) -> list[list[int]]:
    return target.generate(**inputs, **{"max_new_tokens": NEW_TOKENS, "do_sample": False, **kwargs}).tolist()


# ---- What the processes do ----


def tensor_parallel(rank: int, folder: Path, record: Record) -> None:
    whole = small_target()
    if rank == 0:
        whole.save_pretrained(folder / "target")
    distributed.barrier()
    config = DistributedConfig(tp_size=PROCESSES, tp_plan="auto")
    target = AutoModelForCausalLM.from_pretrained(folder / "target", distributed_config=config).eval()
    shard = target.lm_head.weight
    record("held", (shard.to_local() if isinstance(shard, DTensor) else shard).numel() / whole.lm_head.weight.numel())
    record("group", distributed.get_process_group_ranks(tensor_parallel_group(target)))
    for shape in SHAPES:
        for rows in ROWS:
            inputs, poss = left_padded(PROMPTS[:rows]), drafter_for(whole, shape)
            with collect_statistics() as stats:
                record("greedy", shape, rows, generate(target, inputs, assistant_model=poss))
            record("accepted", shape, rows, sum(stats.accepted))
            set_seed(rank)  # processes that would draw other tokens
            record("sampled", shape, rows, generate(target, inputs, assistant_model=poss, do_sample=True))

    gradients = []
    for model in (target, whole):
        reference = TargetReference.from_target(model, PosSModel.from_target(whole).config)
        features = torch.linspace(-1, 1, 64).view(1, 2, 32).requires_grad_()
        reference.logits(features).square().sum().backward()
        gradients.append(features.grad)
    record("gradients", torch.allclose(*gradients, rtol=1e-4))


def pipeline_parallel(rank: int, folder: Path, record: Record) -> None:
    whole = small_target()
    if rank == 0:
        whole.save_pretrained(folder / "target")
    distributed.barrier()
    config = DistributedConfig(pp_size=PROCESSES)
    target = AutoModelForCausalLM.from_pretrained(folder / "target", distributed_config=config).eval()
    poss = drafter_for(whole, "tree")
    try:
        generate(target, {"input_ids": PROMPTS[0]}, assistant_model=poss)
    except ValueError as error:
        record("error", str(error))
    record("plain", generate(target, {"input_ids": PROMPTS[0]}))


def synced(rank: int, folder: Path, record: Record) -> None:
    for sharding in SHARDINGS:
        target = small_target()
        if sharding == "whole":  # what a sharded target does in every pass
            target.register_forward_pre_hook(lambda *_: distributed.all_reduce(torch.ones(1)))
        else:
            shard = partial(fully_shard, mesh=init_device_mesh("cpu", (PROCESSES,)))
            for layer in target.model.layers:
                shard(layer)
            if sharding == "layers_and_head":
                shard(target.model.embed_tokens)
                shard(target.lm_head)
            shard(target)
            assert isinstance(target.lm_head.weight, DTensor)
        for shape in SHAPES:
            text = generate(
                target,
                left_padded(OWN_PROMPTS[rank]),
                assistant_model=drafter_for(small_target(), shape),
                synced_gpus=True,
                max_new_tokens=OWN_LENGTHS[rank],
            )
            record(sharding, shape, text)


# ---- What they are held to ----


def run_processes(task: Callable[..., None], folder: Path) -> list[dict[str, Any]]:
    """What each process recorded; each recorded value under its labels, joined by spaces."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    result = subprocess.run(
        [*command, __file__, task.__name__, str(folder)], capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)]


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> list[dict[str, Any]]:
    return run_processes(tensor_parallel, tmp_path_factory.mktemp("tensor_parallel"))


@pytest.fixture(scope="module")
def in_sync(tmp_path_factory) -> list[dict[str, Any]]:
    return run_processes(synced, tmp_path_factory.mktemp("synced"))


def test_the_target_is_split(split):
    for results in split:
        assert results["held"] == 1 / PROCESSES
        assert results["group"] == list(range(PROCESSES))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", ROWS)
def test_every_process_writes_the_text_of_the_whole_target(split, shape, rows):
    text = generate(small_target(), left_padded(PROMPTS[:rows]))
    for results in split:
        assert results[f"greedy {shape} {rows}"] == text
        assert results[f"accepted {shape} {rows}"] > 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", ROWS)
def test_processes_sample_the_same_text(split, shape, rows):
    texts = [results[f"sampled {shape} {rows}"] for results in split]
    assert texts[0] == texts[1]
    assert len(texts[0][0]) == left_padded(PROMPTS[:rows])["input_ids"].shape[1] + NEW_TOKENS


def test_gradients_reach_features_through_a_split_head(split):
    assert all(results["gradients"] for results in split)


def test_a_whole_target_has_no_group():
    assert tensor_parallel_group(small_target()) is None


def test_pipeline_stages_are_refused(tmp_path):
    if not hasattr(DistributedConfig(), "pp_size"):
        pytest.skip("this transformers has no pipeline parallelism")
    for results in run_processes(pipeline_parallel, tmp_path):
        assert "pipeline stages" in results["error"]
        assert results["plain"] == generate(small_target(), {"input_ids": PROMPTS[0]})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_processes_wait_for_each_other(in_sync, sharding, shape):
    for prompts, length, results in zip(OWN_PROMPTS, OWN_LENGTHS, in_sync, strict=True):
        text = generate(small_target(), left_padded(prompts), max_new_tokens=length)
        assert results[f"{sharding} {shape}"] == text


def main(task: str, folder: str) -> None:
    results: dict[str, Any] = {}
    distributed.init_process_group("gloo", timeout=timedelta(seconds=100))
    rank = distributed.get_rank()
    globals()[task](rank, Path(folder), lambda *entry: results.update({" ".join(map(str, entry[:-1])): entry[-1]}))
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    gc.collect()  # a sharded module that outlives its process group can abort the process at its exit
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
