"""What a folder tells of how its specialists were made and what was measured; a model card is written from it."""

import dataclasses
import itertools
import json
import math
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .provenance import without_secrets


__all__ = [
    "EVALUATION_RECORD",
    "SPEED_RECORD",
    "TRAINING_RECORD",
    "EvaluationRecord",
    "SpeedRecord",
    "TrainingRecord",
    "is_number",
    "read_evaluation_record",
    "read_speed_record",
    "read_training_record",
    "update_training_record",
    "write_evaluation_record",
    "write_speed_record",
    "write_training_record",
]

TRAINING_RECORD = "training_record.json"
SPEED_RECORD = "speed.json"
EVALUATION_RECORD = "evaluation_record.json"
# What tells the rows of an evaluation's tables apart, and by how many questions they are.
_ROWS = {
    "results": {"temperature", "benchmark", "questions"},
    "acceptance": {"temperature", "questions", "tau", "pos_acc"},
    "compared": {"temperature", "drafter"},
    "spread": {"temperature"},
}


@dataclass
class TrainingRecord:
    """How specialists were trained, and what was measured at the end. What is not known is left out.

    Args:
        base_model: the target, a Hub name or the name of its folder.
        base_model_revision: commit of the target's repository.
        tokenizer: where the target's tokenizer lies, if not with the target.
        license: of the specialists, an identifier that the Hub knows.
        language: of the data, ISO 639 codes, or "code".
        datasets: names on the Hub, see [`dataset_fields`].
        files: names of local files and folders of data, see [`dataset_fields`].
        samples: samples of the training set.
        tokens: tokens of the training set, over one epoch.
        losses: weight of each loss by name.
        num_draft_positions: K.
        positions_per_specialist: n.
        feature_layers: layers of the target that specialists read; None for the last.
        draft_vocab_size: tokens that specialists can draft; None for all.
        specialist_adapter: settings of low-rank specialists.
        init_from: the EAGLE layer or the specialists that training started from; None for random weights.
        hyperparameters: by name, as they are to be shown: steps, epochs, batch size, learning rate, max_length...
        metrics: of the last evaluation: `eval_tau`, and `eval_accuracy_k` and `eval_pos_acc_k` by draft position k,
            see [`position_metrics`]; others are kept and not shown.
        eval_samples: samples of the evaluation set.
        generate_tau: tokens a round of real `generate` calls, micro average (see [`GenerationStatistics`]).
        generate_pos_acc: conditional acceptance rate by draft position of these calls.
        generate_prompts: prompts of these calls.
        generate_settings: how they were made: max_new_tokens, draft_top_k...
        hardware: see [`describe_hardware`].
        versions: by package, see [`package_versions`].
        command: see [`command_line`].
        seconds: time of training.

    Raises:
        ValueError: if a value has another type.
    """

    base_model: str | None = None
    base_model_revision: str | None = None
    tokenizer: str | None = None
    license: str | None = None
    language: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    samples: int | None = None
    tokens: int | None = None
    losses: dict[str, float] = field(default_factory=dict)
    num_draft_positions: int | None = None
    positions_per_specialist: int | None = None
    feature_layers: list[int] | None = None
    draft_vocab_size: int | None = None
    specialist_adapter: dict | None = None
    init_from: str | None = None
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    eval_samples: int | None = None
    generate_tau: float | None = None
    generate_pos_acc: list[float] = field(default_factory=list)
    generate_prompts: int | None = None
    generate_settings: dict[str, Any] = field(default_factory=dict)
    hardware: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    command: str | None = None
    seconds: float | None = None

    def __post_init__(self):
        _settle(self)

    def by_position(self, name: str) -> list[float]:
        """The metrics `eval_{name}_1`, `eval_{name}_2`...: up to the first that is missing or not finite."""
        numbered = (self.metrics.get(f"eval_{name}_{position}") for position in itertools.count(1))
        return list(itertools.takewhile(is_number, numbered))


@dataclass
class SpeedRecord:
    """Paired timing of `generate` with and without specialists, see [`compare_speed`]. What is not known is left out.

    Args:
        target: Hub name or folder name of the target that ran.
        plain_rate, poss_rate: new tokens a second without and with specialists, medians over prompts.
        speedup, lowest, highest: of `runs` paired runs the median, lowest and highest of the rate with over without.
        tau: tokens a round, micro average (see [`GenerationStatistics`]): `tokens` in `rounds`.
        pos_acc: conditional acceptance rate by draft position.
        time_shares: of drafting, verifying and other work in the time with specialists.
        prompts: number of prompts.
        identical: prompts on which both wrote the same tokens; None if sampled.
        settings: greedy or sampled, dtype, new tokens, size of the tree...
        hardware, versions, command: as in [`TrainingRecord`].

    Raises:
        ValueError: if a value has another type.
    """

    target: str | None = None
    plain_rate: float | None = None
    poss_rate: float | None = None
    speedup: float | None = None
    lowest: float | None = None
    highest: float | None = None
    runs: int | None = None
    tau: float | None = None
    tokens: int | None = None
    rounds: int | None = None
    pos_acc: list[float] = field(default_factory=list)
    time_shares: dict[str, float] = field(default_factory=dict)
    prompts: int | None = None
    identical: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    hardware: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    command: str | None = None

    def __post_init__(self):
        _settle(self)


@dataclass
class EvaluationRecord:
    """What `hf-poss evaluate` found of specialists, see [`evaluation_record`]. What is not known is left out.

    Args:
        target: Hub name or folder name of the target that ran.
        drafter: what the specialists are called in `comparisons`.
        checkpoints: of that name, training seeds of one method; `comparisons` and `spread` are over all of them,
            `results` of the one that the folder holds.
        results: a dict by temperature and prompt set, their mean last: `temperature`, `benchmark`, `questions`, `tau`,
            `tau_macro`, `tau_macro_interval`, `speed_up`, `speed_up_interval` (over plain decoding, whole calls), and
            of texts that greedy search wrote `identical` of `compared`.
        mean_over: prompt sets of the mean.
        acceptance: a dict by temperature of the questions of these sets: `temperature`, `questions`, `tau`, `pos_acc`.
        compared: a dict by temperature and other drafter with its means: `temperature`, `drafter`, `tau_macro`,
            `speed_up`.
        comparisons: by temperature ("0") a sentence each, those that are lost or not significant included.
        spread: a dict by temperature: `temperature`, and mean and `_deviation` of `tau_macro` and `speed_up` over
            checkpoints.
        missing: what was not evaluated, a sentence each.
        sources: by prompt set the address or Hub name that it is from.
        settings: how it was run: dtype, batch size, new tokens, depth, size of the tree...
        hardware, versions, command: as in [`TrainingRecord`].

    Raises:
        ValueError: if a value has another type, or a row lacks what says what it is of.
    """

    target: str | None = None
    drafter: str | None = None
    checkpoints: int | None = None
    results: list[dict[str, Any]] = field(default_factory=list)
    mean_over: list[str] = field(default_factory=list)
    acceptance: list[dict[str, Any]] = field(default_factory=list)
    compared: list[dict[str, Any]] = field(default_factory=list)
    comparisons: dict[str, list[str]] = field(default_factory=dict)
    spread: list[dict[str, Any]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    hardware: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    command: str | None = None

    def __post_init__(self):
        _settle(self)
        for name, needed in _ROWS.items():
            for row in getattr(self, name):
                if not isinstance(row, dict) or not needed <= row.keys():
                    raise ValueError(f"`{name}` holds {row!r}; expected rows with {', '.join(sorted(needed))}.")


def is_number(value: Any) -> bool:
    """Whether a value in a record is a figure: not missing, text, a truth value or infinite."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def write_training_record(folder: str | os.PathLike, record: TrainingRecord | Mapping[str, Any]) -> Path:
    """Writes `training_record.json`: fields that are known, numbers that are not finite as null, no secrets.

    Raises:
        ValueError: if `record` is a mapping with a field that [`TrainingRecord`] does not have.
    """
    return _write(Path(folder) / TRAINING_RECORD, record, TrainingRecord)


def read_training_record(folder: str | os.PathLike) -> TrainingRecord | None:
    """The record in `folder`, or None where there is none.

    Raises:
        ValueError: if the file is no JSON object, or has a field that [`TrainingRecord`] does not have.
    """
    return _read(Path(folder) / TRAINING_RECORD, TrainingRecord)


def update_training_record(folder: str | os.PathLike, **known: Any) -> Path:
    """Sets fields of the record in `folder`, or of a new one; raises as the functions that read and write it."""
    record = read_training_record(folder) or TrainingRecord()
    return write_training_record(folder, {**dataclasses.asdict(record), **known})


def write_speed_record(folder: str | os.PathLike, record: SpeedRecord | Mapping[str, Any]) -> Path:
    """Writes `speed.json`, as [`write_training_record`] does."""
    return _write(Path(folder) / SPEED_RECORD, record, SpeedRecord)


def read_speed_record(folder: str | os.PathLike) -> SpeedRecord | None:
    """The record in `folder`, or None where there is none; raises as [`read_training_record`]."""
    return _read(Path(folder) / SPEED_RECORD, SpeedRecord)


def write_evaluation_record(folder: str | os.PathLike, record: EvaluationRecord | Mapping[str, Any]) -> Path:
    """Writes `evaluation_record.json`, as [`write_training_record`] does."""
    return _write(Path(folder) / EVALUATION_RECORD, record, EvaluationRecord)


def read_evaluation_record(folder: str | os.PathLike) -> EvaluationRecord | None:
    """The record in `folder`, or None where there is none; raises as [`read_training_record`]."""
    return _read(Path(folder) / EVALUATION_RECORD, EvaluationRecord)


def _write(path: Path, record: Any, kind: type) -> Path:
    if isinstance(record, Mapping):
        record = _from_mapping(record, kind, "The record")
    known = {name: value for name, value in dataclasses.asdict(record).items() if value not in (None, [], {})}
    text = json.dumps(known, indent=2, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")  # a reader never sees half a file
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
    return path


def _read(path: Path, kind: type) -> Any:
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON ({error}). Write it anew, or delete it.") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds {type(data).__name__}; expected a JSON object with fields of {kind.__name__}.")
    return _from_mapping(data, kind, str(path))


def _from_mapping(data: Mapping[str, Any], kind: type, source: str) -> Any:
    names = [field.name for field in dataclasses.fields(kind)]
    if unknown := sorted(set(data) - set(names)):
        raise ValueError(f"{source} has fields that {kind.__name__} does not have: {unknown}. It has {names}.")
    try:
        return kind(**{name: value for name, value in data.items() if value is not None})
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _settle(record: Any) -> None:
    """Makes values what JSON can hold, and refuses types that a card would show as nonsense."""
    for field_ in dataclasses.fields(record):
        value = _plain(getattr(record, field_.name))
        setattr(record, field_.name, value)
        hint = field_.type
        parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        kinds = [typing.get_origin(part) or part for part in parts]
        if float in kinds:
            kinds.append(int)
        if not isinstance(value, tuple(kinds)):
            names = " or ".join(kind.__name__ for kind in kinds if kind is not type(None))
            raise ValueError(f"`{field_.name}` is {value!r} ({type(value).__name__}); expected {names}.")


def _plain(value: Any) -> Any:
    """What JSON can hold: numbers of numpy and torch as Python's, sequences as lists, paths and others as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int)):
        return value
    return without_secrets(str(value))
