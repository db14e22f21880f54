"""Which checkpoint a run goes on from: the newest that is whole, and only if it is of the same specialists."""

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, logging

from ..configuration_poss import PosSConfig


__all__ = [
    "check_output_dir",
    "check_resume",
    "checkpoint_faults",
    "checkpoint_to_resume",
    "last_good_checkpoint",
    "mark_incomplete",
]

logger = logging.get_logger(__name__)

# What a checkpoint must hold, and the files that hold it: as DDP, FSDP (full, sharded) and DeepSpeed write them.
_PARTS = {
    "weights": (
        "*model.safetensors",
        "*model.safetensors.index.json",
        "*/adapter_model.safetensors",
        "pytorch_model_fsdp.bin",
        "pytorch_model_fsdp_*/.metadata",
        "global_step*/*model_states.pt",
    ),
    "optimizer state": (
        "optimizer.pt",
        "optimizer.bin",
        "optimizer_*/.metadata",
        "global_step*/*optim_states.pt",
    ),
    "scheduler state": ("scheduler.pt", "global_step*/*model_states.pt"),
    "random state": ("rng_state.pth", "rng_state_0.pth"),
}

# What a run cannot change on the way, beside the target's geometry. The first two are K and n of the paper.
_IDENTITY = {
    "num_draft_positions": "num_draft_positions (K)",
    "positions_per_specialist": "positions_per_specialist (n)",
    "feature_layers": "feature_layers",
    "draft_vocab_size": "draft_vocab_size",
    "specialist_adapter": "specialist_adapter",
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
}

# Left by trackers, and by whoever redirects the output of a run: none of them makes a folder something else.
_BYSTANDERS = ("runs", "logs", "wandb", "mlruns", "trackio", "*.log", "events.out.tfevents.*")
# Written by a run into its folder, and by nothing else.
_OWN_RECORDS = ("training_record.json",)


def last_good_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint of a run that is whole and readable; None if there is none.

    A run that dies while it writes leaves a broken one behind; each that is passed over is warned about.

    Args:
        output_dir: folder of `checkpoint-<step>` folders. It need not exist.
    """
    for checkpoint in reversed(_checkpoints(Path(output_dir))):
        faults = checkpoint_faults(checkpoint)
        if not faults:
            return str(checkpoint)
        logger.warning(f"{checkpoint} is broken and left out: {'; '.join(faults)}. Looking at the one before.")
    return None


def checkpoint_faults(checkpoint: str | Path) -> list[str]:
    """What is wrong with a checkpoint, in words; empty if a run can go on from it.

    Files are read as far as their formats allow to tell: JSON is parsed, the sizes in a safetensors header are
    compared with the file's, and the checksums in a file of torch's are computed.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        return ["there is no such folder"]
    faults = []
    if not (checkpoint / TRAINER_STATE_NAME).is_file():
        faults.append(f"no {TRAINER_STATE_NAME}, which is written last: the writing was cut off")
    for part, patterns in _PARTS.items():
        if not any(any(checkpoint.glob(pattern)) for pattern in patterns):
            left_out = "" if part == "weights" else "; `save_only_model` leaves it out"
            faults.append(f"no {part} (files like {patterns[0]}{left_out})")
    faults.extend(f"no {name}" for name in _missing_files(checkpoint))
    for file in sorted(checkpoint.rglob("*")):
        if file.is_file() and (fault := _unreadable(file)):
            faults.append(f"{file.relative_to(checkpoint)} cannot be read ({fault})")
    return faults


def check_resume(checkpoint: str | Path, config: PosSConfig) -> None:
    """Refuses to go on with specialists of another make.

    Args:
        checkpoint: a whole checkpoint. One that holds an adapter only is left to PEFT.
        config: of the run that wants to go on.

    Raises:
        ValueError: if K, n, the feature layers, the draft vocabulary, the adapter of the specialists or the geometry
            differ, with both values; or if the checkpoint is not of position specialists.
    """
    file = Path(checkpoint) / CONFIG_NAME
    if not file.is_file():
        return
    kind = json.loads(file.read_text()).get("model_type")
    if kind != PosSConfig.model_type:
        raise ValueError(
            f"{checkpoint} holds a model of type {kind!r}; expected {PosSConfig.model_type!r}. Train into another "
            "folder."
        )
    before = PosSConfig.from_pretrained(str(checkpoint))
    differences = [
        f"{label} was {_plain(before, name)!r} and is now {_plain(config, name)!r}"
        for name, label in _IDENTITY.items()
        if _plain(before, name) != _plain(config, name)
    ]
    if differences:
        raise ValueError(
            f"{checkpoint} cannot be resumed: {'; '.join(differences)}. Give what the run began with, or train into "
            "another folder."
        )
    names = before.target_name_or_path, config.target_name_or_path
    if all(names) and names[0] != names[1]:
        logger.warning(
            f"{checkpoint} was trained for the target {names[0]}, this run has {names[1]}. Are they the same?"
        )


def checkpoint_to_resume(request: bool | str | Path | None, output_dir: str | Path, config: PosSConfig) -> str | None:
    """The checkpoint that `Trainer.train(resume_from_checkpoint=request)` should go on from.

    Args:
        request: None or False for none; True for the last good one of `output_dir`; or a folder.
        output_dir: of the run.
        config: of the specialists to train.

    Raises:
        ValueError: if there is none, the one that was named is broken, or it is of other specialists (see
            [`check_resume`]).
    """
    if not request:
        return None
    if request is True:
        checkpoint = last_good_checkpoint(output_dir)
        if checkpoint is None:
            raise ValueError(f"{output_dir} has no checkpoint that can be resumed. Start without resuming.")
    else:
        checkpoint = str(request)
        if faults := checkpoint_faults(checkpoint):
            raise ValueError(
                f"{checkpoint} cannot be resumed: {'; '.join(faults)}. Name another checkpoint, or pass True for the "
                "last good one."
            )
    check_resume(checkpoint, config)
    return checkpoint


def mark_incomplete(checkpoint: str | Path) -> None:
    """Makes an earlier checkpoint of the same step count as broken until it is written anew, to its end."""
    (Path(checkpoint) / TRAINER_STATE_NAME).unlink(missing_ok=True)


def check_output_dir(folder: str | Path) -> None:
    """Refuses to train into a folder that holds something other than a run of position specialists.

    A folder that does not exist, is empty, or holds only hidden files and those of trackers is fine.

    Raises:
        ValueError: naming what was found.
    """
    folder = Path(folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"The output folder {folder} is a file. Name a folder.")
    checkpoints = _checkpoints(folder)
    own = any((folder / name).is_file() for name in _OWN_RECORDS)
    for config in (owner / CONFIG_NAME for owner in (folder, *checkpoints)):
        kind = _model_type(config)
        if kind not in (None, PosSConfig.model_type):
            raise ValueError(
                f"The output folder {folder} holds another model: {config} is of type {kind!r}. Train into another "
                "folder."
            )
        own = own or kind is not None
    # A checkpoint whose writing was cut off may have no config yet.
    others = [path for path in folder.iterdir() if path not in checkpoints and not _is_bystander(path)]
    if others and not own:
        names = sorted(path.name + "/" * path.is_dir() for path in others)
        listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise ValueError(
            f"The output folder {folder} holds something else than a run of position specialists: {listed}. "
            "Train into an empty folder."
        )


def _checkpoints(folder: Path) -> list[Path]:
    """`checkpoint-<step>` folders, oldest first."""
    steps = {
        path: int(match[1])
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.is_dir() and (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name))
    }
    return sorted(steps, key=steps.__getitem__)


def _missing_files(checkpoint: Path) -> Iterator[str]:
    """Files that others of the checkpoint tell of: shards in an index, random states of processes 0, 1, 2..."""
    for index in checkpoint.glob("*.index.json"):
        if not _unreadable(index):
            for shard in sorted(set(json.loads(index.read_text()).get("weight_map", {}).values())):
                if not (checkpoint / shard).is_file():
                    yield shard
    ranks = {int(match[1]) for path in checkpoint.iterdir() if (match := re.match(r"rng_state_(\d+)\.pth", path.name))}
    for rank in sorted(set(range(max(ranks, default=0))) - ranks):
        yield f"rng_state_{rank}.pth"


def _unreadable(file: Path) -> str | None:
    """Why a file cannot be read, or None if it can or its format tells nothing."""
    try:
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
        elif file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):
                pass
        elif file.suffix in (".pt", ".pth", ".bin"):  # as torch.save writes them: archives with checksums
            with zipfile.ZipFile(file) as archive:
                if (damaged := archive.testzip()) is not None:
                    return f"wrong checksum of {damaged}"
    # RuntimeError and EOFError: what zipfile raises, beside its own, on an archive with damaged headers.
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile, RuntimeError, EOFError) as error:
        return str(error) or type(error).__name__
    return None


def _plain(config: PosSConfig, name: str) -> Any:
    return json.loads(json.dumps(getattr(config, name, None)))


def _model_type(file: Path) -> str | None:
    """The kind of model that a config is of; None if there is no config, or one that was cut off."""
    if not file.is_file() or _unreadable(file):
        return None
    config = json.loads(file.read_text(encoding="utf-8"))
    return str(config.get("model_type", "unknown")) if isinstance(config, dict) else "unknown"


def _is_bystander(path: Path) -> bool:
    return path.name.startswith(".") or any(path.match(pattern) for pattern in _BYSTANDERS)
