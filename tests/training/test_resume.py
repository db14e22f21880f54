"""Runs that are killed and go on, and checkpoints that cannot be gone on from.

The runs are processes of their own, forked by one process that has run nothing: `test_resume.py RUNS FOLDER`.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_poss, make_target
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainerState
from transformers import trainer as transformers_trainer

from hf_poss import PosSConfig, PosSTrainer, PosSTrainingArguments
from hf_poss.training.resume import (
    check_output_dir,
    check_resume,
    checkpoint_faults,
    checkpoint_to_resume,
    last_good_checkpoint,
)


LENGTHS = (9, 24, 5, 17, 30, 12, 8, 21)
BATCH = 2
STEPS_AN_EPOCH = len(LENGTHS) // BATCH
SAVE_STEPS, LAST_STEP = 3, 11
# Checkpoint 3 is within the first epoch, checkpoint 6 within the second; a run ends within the third.
SAVED = 6

# Where runs die while they write checkpoint 6, one after the other: behind which method of transformers, and which
# file is cut in half then.
WRITING = {
    "half of the weights": (Trainer, "save_model", "model.safetensors"),
    "weights, no optimizer": (Trainer, "save_model", None),
    "half of the optimizer": (Trainer, "_save_optimizer_and_scheduler", "optimizer.pt"),
    "half of the random state": (Trainer, "_save_rng_state", "rng_state.pth"),
    "random state, no trainer state": (Trainer, "_save_rng_state", None),
    "half of the trainer state": (TrainerState, "save_to_json", "trainer_state.json"),
}
# Ways to run, by what differs from the plain one.
KINDS = {
    "random": {},
    "by length": {"train_sampling_strategy": "group_by_length"},
    "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3},
    "streamed": {},
}


# ---- What the processes do ----


def samples() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(3, 97, (length,), generator=generator).tolist()} for length in LENGTHS]


def streamed() -> Any:
    from datasets import Dataset

    return Dataset.from_list(samples()).to_iterable_dataset().shuffle(seed=5, buffer_size=7)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DieAfter(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            die()


def die_in(owner: type, method: str, file: str | None) -> None:
    """Lets `method` finish for checkpoint 6, cuts what it wrote in half, and dies."""
    original = getattr(owner, method)

    def deadly(self, folder, *args, **kwargs):
        original(self, folder, *args, **kwargs)
        checkpoint = Path(folder).parent if Path(folder).suffix else Path(folder)
        if checkpoint.name == f"checkpoint-{SAVED}":
            if file is not None:
                os.truncate(checkpoint / file, (checkpoint / file).stat().st_size // 2)
            die()

    setattr(owner, method, deadly)


def die_in_rotation() -> None:
    """Older checkpoints go when the new one is there: dies with the first of them half gone."""

    def deadly(output_dir, **kwargs):
        checkpoint = Path(output_dir, f"checkpoint-{SAVE_STEPS}")
        if Path(output_dir, f"checkpoint-{SAVED}").is_dir():
            (checkpoint / "model.safetensors").unlink()
            die()

    transformers_trainer.rotate_checkpoints = deadly


def run(folder: Path, kind: str, before: Callable[[], None] | None = None, step: int | None = None, **kwargs) -> None:
    """Trains from the last good checkpoint of `folder` on, and stores the weights at the end."""
    torch.set_num_threads(1)
    if before is not None:
        before()
    target = make_target("llama", scale=3.0)
    poss = make_poss(target, positions_per_specialist=2, num_draft_positions=3)
    settings = {"per_device_train_batch_size": BATCH, "max_steps": LAST_STEP, "save_steps": SAVE_STEPS, "seed": 3}
    settings |= {"learning_rate": 1e-2, "feature_noise": 0.2, "use_cpu": True, "disable_tqdm": True}
    args = PosSTrainingArguments(folder / "run", **{**settings, **KINDS[kind], **kwargs})
    dataset = streamed() if kind == "streamed" else samples()
    trainer = PosSTrainer(poss, target, args, train_dataset=dataset)
    if step is not None:
        trainer.add_callback(DieAfter(step))
    resume = last_good_checkpoint(args.output_dir)
    with open(folder / "resumed_from", "a") as file:
        print(resume and Path(resume).name, file=file)
    trainer.train(resume_from_checkpoint=resume)
    save_file(poss.state_dict(), folder / "weights.safetensors")


def in_a_process(task: Callable[[], None]) -> int:
    """Runs a task in a fork; its exit status, or the negative number of the signal that killed it."""
    process = os.fork()
    if process == 0:
        try:
            task()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def killed_runs(folder: Path) -> dict[str, list[int]]:
    """Exit statuses of the runs of each scenario: those that are killed, and the one that gets to the end."""
    scenarios: dict[str, list[Callable[..., None]]] = {}
    for kind in KINDS:
        scenarios[f"straight {kind}"] = [partial(run, kind=kind)]
        scenarios[f"between {kind}"] = [partial(run, kind=kind, step=8), partial(run, kind=kind)]
    deadly = [partial(die_in, *place) for place in WRITING.values()]
    scenarios["writing"] = [partial(run, kind="random", before=before) for before in deadly]
    scenarios["writing"] += [
        partial(run, kind="random", save_total_limit=1, before=die_in_rotation),
        partial(run, kind="random", save_total_limit=1),
    ]
    statuses = {}
    for name, runs in scenarios.items():
        (folder / name).mkdir()
        statuses[name] = [in_a_process(partial(one, folder / name)) for one in runs]
    return statuses


# ---- What they are held to ----


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, dict[str, list[int]]]:
    folder = tmp_path_factory.mktemp("runs")
    command = [sys.executable, __file__, killed_runs.__name__, str(folder)]
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}  # conftest is a folder above
    result = subprocess.run(command, capture_output=True, text=True, timeout=400, env={**os.environ, **paths})
    assert result.returncode == 0, result.stderr[-4000:]
    statuses = json.loads((folder / "statuses.json").read_text())
    failed = {name: status for name, status in statuses.items() if status[-1] != 0}
    assert not failed, f"{failed}\n{result.stderr[-4000:]}"
    return folder, statuses


def assert_same_weights(folder: Path, name: str, straight: str) -> None:
    ends = [load_file(folder / run / "weights.safetensors") for run in (name, straight)]
    for weight, value in ends[0].items():
        assert torch.equal(value, ends[1][weight]), weight


def resumed_from(folder: Path, name: str) -> list[str]:
    return (folder / name / "resumed_from").read_text().split()


def test_the_uninterrupted_runs_move_and_differ(runs):
    """Else equal weights would say nothing."""
    folder, _ = runs
    start = make_poss(make_target("llama", scale=3.0), positions_per_specialist=2, num_draft_positions=3).state_dict()
    ends = [load_file(folder / f"straight {kind}" / "weights.safetensors") for kind in KINDS]
    for index, end in enumerate(ends):
        assert not torch.equal(end["fc.weight"], start["fc.weight"])
        assert not any(torch.equal(end["fc.weight"], other["fc.weight"]) for other in ends[:index])


@pytest.mark.parametrize("kind", KINDS)
def test_killed_between_checkpoints(runs, kind):
    folder, statuses = runs
    assert statuses[f"between {kind}"] == [-signal.SIGKILL, 0]
    assert resumed_from(folder, f"between {kind}") == ["None", f"checkpoint-{SAVED}"]
    assert_same_weights(folder, f"between {kind}", f"straight {kind}")


@pytest.mark.parametrize("moment", WRITING)
def test_killed_while_a_checkpoint_is_written(runs, moment):
    folder, statuses = runs
    number = list(WRITING).index(moment)
    assert statuses["writing"][number] == -signal.SIGKILL
    assert resumed_from(folder, "writing")[number + 1] == f"checkpoint-{SAVE_STEPS}"


def test_killed_while_older_checkpoints_are_deleted(runs):
    folder, statuses = runs
    assert statuses["writing"][-2:] == [-signal.SIGKILL, 0]
    assert resumed_from(folder, "writing")[-1] == f"checkpoint-{SAVED}"


def test_killed_again_and_again(runs):
    assert_same_weights(runs[0], "writing", "straight random")


# ---- Checkpoints that cannot be gone on from ----


@pytest.fixture
def output_dir(runs, tmp_path) -> Path:
    """A run with the checkpoints 3 and 6."""
    for step in (SAVE_STEPS, SAVED):
        name = f"checkpoint-{step}"
        shutil.copytree(runs[0] / "straight random" / "run" / name, tmp_path / "run" / name)
    return tmp_path / "run"


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "deleted": Path.unlink,
    "empty": lambda file: file.write_bytes(b""),
    "half": lambda file: os.truncate(file, file.stat().st_size // 2),
    "other bytes": lambda file: file.write_bytes(b"\x9c" * file.stat().st_size),
}
FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_checkpoint_is_passed_over_with_a_warning(output_dir, file, damage, warnings_seen):
    newest = output_dir / f"checkpoint-{SAVED}"
    assert last_good_checkpoint(output_dir) == str(newest)
    assert not warnings_seen()
    DAMAGES[damage](newest / file)
    assert last_good_checkpoint(output_dir) == str(output_dir / f"checkpoint-{SAVE_STEPS}")
    (warning,) = warnings_seen()
    assert str(newest) in warning
    assert file in warning


def test_a_bit_that_flipped_is_found(output_dir):
    flip_a_bit(output_dir / f"checkpoint-{SAVED}" / "optimizer.pt")
    assert last_good_checkpoint(output_dir) == str(output_dir / f"checkpoint-{SAVE_STEPS}")


def test_checkpoints_are_ordered_by_step(output_dir):
    shutil.copytree(output_dir / "checkpoint-3", output_dir / "checkpoint-12")
    assert last_good_checkpoint(output_dir) == str(output_dir / "checkpoint-12")


def test_a_process_whose_random_state_is_missing_breaks_a_checkpoint(output_dir):
    newest = output_dir / f"checkpoint-{SAVED}"
    (newest / "rng_state.pth").rename(newest / "rng_state_1.pth")
    shutil.copy(newest / "rng_state_1.pth", newest / "rng_state_2.pth")
    assert [fault for fault in checkpoint_faults(newest) if "rng_state_0.pth" in fault]
    shutil.copy(newest / "rng_state_1.pth", newest / "rng_state_0.pth")
    assert not checkpoint_faults(newest)


def test_a_shard_that_is_missing_breaks_a_checkpoint(output_dir):
    newest = output_dir / f"checkpoint-{SAVED}"
    (newest / "model.safetensors").rename(newest / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"fc.weight": "model-00001-of-00002.safetensors", "x": "model-00002-of-00002.safetensors"}}
    (newest / "model.safetensors.index.json").write_text(json.dumps(index))
    assert checkpoint_faults(newest) == ["no model-00002-of-00002.safetensors"]


def test_no_checkpoint(tmp_path):
    assert last_good_checkpoint(tmp_path) is None
    assert last_good_checkpoint(tmp_path / "nothing") is None


def small_config(**kwargs: Any) -> PosSConfig:
    poss = make_poss(make_target("llama"), positions_per_specialist=2, num_draft_positions=3)
    return PosSConfig.from_dict({**poss.config.to_dict(), **kwargs})


def test_what_to_resume(output_dir):
    config = small_config()
    newest, older = (str(output_dir / f"checkpoint-{step}") for step in (SAVED, SAVE_STEPS))
    assert checkpoint_to_resume(None, output_dir, config) is None
    assert checkpoint_to_resume(False, output_dir, config) is None
    assert checkpoint_to_resume(True, output_dir, config) == newest
    assert checkpoint_to_resume(older, output_dir, config) == older
    (output_dir / "checkpoint-6" / "optimizer.pt").write_bytes(b"")
    assert checkpoint_to_resume(True, output_dir, config) == older
    with pytest.raises(ValueError, match=r"checkpoint-6 cannot be resumed: optimizer\.pt"):
        checkpoint_to_resume(newest, output_dir, config)
    shutil.rmtree(older)
    with pytest.raises(ValueError, match="no checkpoint that can be resumed"):
        checkpoint_to_resume(True, output_dir, config)
    with pytest.raises(ValueError, match="no such folder"):
        checkpoint_to_resume(older, output_dir, config)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_draft_positions": 4}, r"\(K\) was 3 and is now 4"),
        ({"positions_per_specialist": 3}, r"\(n\) was 2 and is now 3"),
        ({"hidden_size": 64}, "hidden_size was 32 and is now 64"),
        ({"feature_layers": [0, 1, 2]}, r"feature_layers was None and is now \[0, 1, 2\]"),
        ({"draft_vocab_size": 50}, "draft_vocab_size was None and is now 50"),
        ({"specialist_adapter": {"r": 4}}, "specialist_adapter was None and is now .*4"),
    ],
)
def test_specialists_of_another_make_are_refused(output_dir, change, told):
    checkpoint = output_dir / f"checkpoint-{SAVED}"
    check_resume(checkpoint, small_config())
    with pytest.raises(ValueError, match=told):
        check_resume(checkpoint, small_config(**change))


def test_targets_of_another_name_are_warned_about(output_dir, warnings_seen):
    """The folder may have moved, or it may be the instruct model in the place of the base model."""
    checkpoint = output_dir / f"checkpoint-{SAVED}"
    file = checkpoint / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_name_or_path": "me/base"}))
    check_resume(checkpoint, small_config(target_name_or_path="me/base"))
    assert not warnings_seen()
    check_resume(checkpoint, small_config(target_name_or_path="me/instruct"))
    (warning,) = warnings_seen()
    assert "me/base" in warning and "me/instruct" in warning


def test_the_trainer_refuses_too(output_dir, tmp_path):
    target = make_target("llama")
    poss = make_poss(target, positions_per_specialist=2, num_draft_positions=4)
    args = PosSTrainingArguments(output_dir, max_steps=LAST_STEP, use_cpu=True)
    trainer = PosSTrainer(poss, target, args, train_dataset=samples())
    with pytest.raises(ValueError, match=r"\(K\) was 3 and is now 4"):
        trainer.train(resume_from_checkpoint=True)


# ---- Output folders ----


def test_output_folders_of_a_run(output_dir, tmp_path):
    check_output_dir(output_dir)
    check_output_dir(tmp_path / "new")
    (tmp_path / "empty").mkdir()
    check_output_dir(tmp_path / "empty")
    (tmp_path / "empty" / "runs").mkdir()
    (tmp_path / "empty" / ".gitattributes").touch()
    (tmp_path / "empty" / "checkpoint-1").mkdir()  # died before its first file
    check_output_dir(tmp_path / "empty")
    (output_dir / "notes.txt").touch()
    check_output_dir(output_dir)


def test_output_folders_of_something_else_are_refused(output_dir, tmp_path):
    target = tmp_path / "target"
    make_target("llama").save_pretrained(target)
    with pytest.raises(ValueError, match="'llama'"):
        check_output_dir(target)
    with pytest.raises(ValueError, match="'llama'"):
        shutil.copytree(target, output_dir / "checkpoint-9")
        check_output_dir(output_dir)
    (tmp_path / "data").mkdir()
    for number in range(7):
        (tmp_path / "data" / f"{number}.jsonl").touch()
    with pytest.raises(ValueError, match=r"0\.jsonl, .*4\.jsonl and 2 more"):
        check_output_dir(tmp_path / "data")
    with pytest.raises(ValueError, match="is a file"):
        check_output_dir(tmp_path / "data" / "0.jsonl")


def main(task: str, folder: str) -> None:
    statuses = globals()[task](Path(folder))
    Path(folder, "statuses.json").write_text(json.dumps(statuses))


if __name__ == "__main__":
    main(*sys.argv[1:])
