"""Metrics of two processes: those of one with all of the data. torchrun runs this file: `... FOLDER`."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_poss, make_target

from hf_poss import PosSTrainer, PosSTrainingArguments


LENGTHS = (9, 24, 5, 17, 30, 12, 8, 21, 11, 13, 7)


def train_and_evaluate(folder: Path) -> list[dict[str, float]]:
    """Logs of a short training, whose evaluation set no two processes can divide, and of the evaluation behind it."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    target = make_target("llama", scale=3.0)
    generator = torch.Generator().manual_seed(1)
    samples = [{"input_ids": torch.randint(3, 97, (length,), generator=generator).tolist()} for length in LENGTHS]
    poss = make_poss(target, positions_per_specialist=2, num_draft_positions=3, seed=5)
    args = PosSTrainingArguments(
        folder,
        use_cpu=True,
        max_steps=4,
        logging_steps=2,
        save_strategy="no",
        learning_rate=0.3,
        optim="sgd",
        feature_noise=0.0,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=4 // processes,
        per_device_eval_batch_size=2,
        eval_generate_prompts=5,
        eval_generate_tokens=16,
        disable_tqdm=True,
    )
    trainer = PosSTrainer(poss, target, args, train_dataset=samples[:8], eval_dataset=samples)
    trainer.train()
    trainer.evaluate()
    return [log for log in trainer.state.log_history if "train_runtime" not in log]


def test_two_processes_log_what_one_does(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    result = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("tokens per epoch") == 1  # the first process alone fills the console
    two = json.loads((tmp_path / "logs.json").read_text())
    one = train_and_evaluate(tmp_path / "one")
    assert len(one) == len(two) == 3
    for expected, found in zip(one, two, strict=True):
        assert expected.keys() == found.keys()
        for name in expected:
            if not name.endswith(("runtime", "per_second", "preparation_time")):
                assert found[name] == pytest.approx(expected[name], rel=1e-4), name
    assert one[-1]["eval_generate_tau"] > 1 and math.isfinite(one[-1]["eval_loss"])


if __name__ == "__main__":
    logs = train_and_evaluate(Path(sys.argv[1]))
    if os.environ["RANK"] == "0":
        (Path(sys.argv[1]) / "logs.json").write_text(json.dumps(logs))
