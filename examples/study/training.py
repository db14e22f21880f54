"""One training run of the study: a checkpoint, its time, and simulated tau by step on held-out text."""

import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from drafters import METHODS
from leaky_attention import leaky_attention
from plan import Run
from texts import TextSource
from transformers import PreTrainedModel, set_seed

from hf_poss import PosSModel, PosSTrainer, PosSTrainingArguments
from hf_poss.training.features import target_features


SAMPLES = 2048
HELD_OUT = 64
BATCH_SIZE = 8
CURVE_POINTS = 6


def samples(source: TextSource, data: str, count: int, held_out: bool = False) -> list[dict[str, list[int]]]:
    """Training samples of `data`, see [`Run`]; the same for all seeds, which differ in their order."""
    parts = data.split("+")
    seed = 1 if held_out else 0
    texts = []
    for part in parts:
        kind, domain = part.split(":")
        domain = source.home if domain == "home" else domain
        texts += (source.own if kind == "own" else source.fixed)(domain, count // len(parts), seed)
    return [{"input_ids": text} for text in texts]


@torch.no_grad()
def with_features(target: PreTrainedModel, texts: list, feature_layers: Sequence[int] | None) -> list[dict[str, Any]]:
    """Samples of one length with the target's features, so that no step runs the target."""
    samples = []
    for start in range(0, len(texts), 32):
        ids = torch.tensor([sample["input_ids"] for sample in texts[start : start + 32]], device=target.device)
        features, last = (states.cpu() for states in target_features(target, ids, feature_layers=feature_layers))
        for row, sample in enumerate(texts[start : start + 32]):
            samples.append({**sample, "features": features[row]})
            if feature_layers is not None:
                samples[-1]["target_features"] = last[row]
    return samples


def initial_drafter(run: Run, source: TextSource, output: Path) -> PosSModel:
    """The drafter before training."""
    if run.method == "start":
        set_seed(run.seed)
        layers = None if run.feature_layers is None else list(run.feature_layers)
        return PosSModel.from_target(
            source.target, positions_per_specialist=1, num_draft_positions=1, feature_layers=layers
        )
    start = output / run.start_folder / "drafter"
    set_seed(run.seed)
    if run.method == "go on":
        return PosSModel.from_pretrained(start, dtype="float32").to(source.target.device).attach(source.target)
    return METHODS[run.method].build(start, run.positions, source.target)


def train(run: Run, source: TextSource, train_samples: list, held_out: list, output: Path) -> None:
    """Trains and writes `drafter/` and `training.json` into the run's folder."""
    folder = output / run.folder
    poss = initial_drafter(run, source, output)
    train_samples, held_out = (
        with_features(source.target, texts, poss.config.feature_layers) for texts in (train_samples, held_out)
    )
    arguments = PosSTrainingArguments(
        folder / "trainer",
        max_steps=run.steps,
        per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=32,
        learning_rate=run.learning_rate,
        losses=run.losses,
        feature_noise=0.0,
        eval_strategy="steps",
        eval_steps=run.steps // CURVE_POINTS,
        eval_on_start=True,
        eval_generate_prompts=0,
        logging_steps=run.steps,
        save_strategy="no",
        use_cpu=source.target.device.type == "cpu",
        disable_tqdm=True,
        report_to="none",
        seed=run.seed,
    )
    trainer = PosSTrainer(poss, source.target, arguments, train_dataset=train_samples, eval_dataset=held_out)
    started = time.process_time()
    with leaky_attention() if run.leaky else contextlib.nullcontext():
        trainer.train()
    seconds = time.process_time() - started
    curve = {
        str(log["step"]): {"loss": log["eval_loss"], "tau": log["eval_tau"]}
        for log in trainer.state.log_history
        if "eval_loss" in log
    }
    poss.save_pretrained(folder / "drafter")
    record = {
        "processor_seconds": seconds,
        "parameters": sum(parameter.numel() for parameter in poss.parameters()),
        "simulated": curve,
        "torch_threads": torch.get_num_threads(),
    }
    (folder / "training.json").write_text(json.dumps(record))
