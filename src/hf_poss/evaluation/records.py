"""The records of an evaluation: what every drafter wrote on every question, how fast, and who proposed what.

Everything that is reported can be computed anew from a folder's `evaluation.json` and `records-*.jsonl`.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..measures import DriftSums
from ..training.record_files import RecordFile, whole_lines
from ..training.settings import deciding_versions, write_json


__all__ = ["EvaluationFolder", "QuestionRecord", "TurnRecord"]

# What two runs of one evaluation may differ in.
_FREE = ("command", "hardware", "processes")


@dataclass
class TurnRecord:
    """One answer. Lists by draft position are indexed by draft position - 1.

    Args:
        prompt_tokens: of the row, without padding.
        token_ids: the new tokens, an end of sequence included.
        pieces: text of each new token; joined they are the answer.
        authors: for each new token the draft position that proposed it, 0 where the target picked it.
        seconds: of the call, divided by its rows, so that sums over records are those of the calls.
        prompt_seconds: of a call that writes one token behind the same prompt, likewise.
        rows: of the call.
        rounds: of this row; plain decoding has one a token behind the first.
        passes: of the target over drafts, or plain steps, of the call, divided by its rows.
        tokens: that the rounds emitted: the new tokens without those that came with the pass over the prompt.
        drafted, reached, accepted: by draft position, as in [`~hf_poss.statistics.CallStatistics`]; empty where no
            specialist drafts.
        drift: of the specialists' features on this text, None where it was not measured.
        parts: seconds by part of a round, of a run apart from the timed one, divided by its rows; what the
            specialists need to read the prompt counts as "prompt". None on most questions.
        pass_seconds: of the draft passes of that run, by draft position, likewise.
    """

    prompt_tokens: int
    token_ids: list[int]
    pieces: list[str]
    authors: list[int]
    seconds: float
    prompt_seconds: float
    rows: int
    rounds: int
    passes: float
    tokens: int
    drafted: list[int] = field(default_factory=list)
    reached: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    drift: DriftSums | None = None
    parts: dict[str, float] | None = None
    pass_seconds: list[float] | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "TurnRecord":
        drift = content.get("drift")
        return cls(**{**content, "drift": None if drift is None else DriftSums(**drift)})


@dataclass
class QuestionRecord:
    """The answers of one drafter to the turns of one question.

    Args:
        benchmark: name of the prompt set.
        question: id in the set.
        category: in the set, "" for none.
        drafter: label.
        checkpoint: index among the label's checkpoints; several are training seeds of one method.
        temperature: 0 for greedy search.
        seed: of the draws.
        batch_size: questions that share a call; the last call of a set may have fewer, see `TurnRecord.rows`.
        batch: index of these questions' calls in the set: with `batch_size` 2 the third question is in batch 1.
        turns: one answer each.
    """

    benchmark: str
    question: str
    category: str
    drafter: str
    checkpoint: int
    temperature: float
    seed: int
    batch_size: int
    batch: int
    turns: list[TurnRecord]

    @property
    def key(self) -> tuple[str, str, str, str, int, float, int, int]:
        """What tells this record from all others of the evaluation."""
        return (
            self.benchmark,
            self.question,
            self.category,
            self.drafter,
            self.checkpoint,
            self.temperature,
            self.seed,
            self.batch_size,
        )

    @property
    def asked(self) -> tuple[str, str, float, int, int]:
        """What all drafters were asked alike: records that differ in this cannot be set side by side."""
        return self.benchmark, self.question, self.temperature, self.seed, self.batch_size

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "QuestionRecord":
        return cls(**{**content, "turns": [TurnRecord.from_dict(turn) for turn in content["turns"]]})


class EvaluationFolder:
    """A folder with `evaluation.json`, which says what is evaluated, and a file of records for each process.

    Any process may read while others write: a record counts once its line ends.

    Args:
        path: of the folder.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)

    @property
    def about_path(self) -> Path:
        return self.path / "evaluation.json"

    def about(self) -> dict[str, Any]:
        """What is evaluated.

        Raises:
            FileNotFoundError: if no evaluation was begun here.
            ValueError: if the file is damaged.
        """
        if not self.about_path.is_file():
            raise FileNotFoundError(
                f"No {self.about_path.name} in {self.path}; expected the folder of an evaluation, which "
                "`hf-poss evaluate --output` writes."
            )
        try:
            return json.loads(self.about_path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.about_path} is no JSON: {error}. Evaluate anew with `--overwrite`.") from error

    def records(self) -> Iterator[QuestionRecord]:
        """Every complete record, each key once, in the order of the files.

        Raises:
            ValueError: if a file is damaged before its last line.
        """
        seen = set()
        for path in self._files():
            with open(path, "rb") as file:
                for content, _, _ in whole_lines(file, path):
                    record = QuestionRecord.from_dict(content)
                    if record.key not in seen:
                        seen.add(record.key)
                        yield record

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuses to go on with other settings than those that the evaluation in this folder was begun with.

        Args:
            settings: entries of `evaluation.json`; those that it names are compared, but for the command, the
                machine, the number of processes and the versions of packages that decide no text.

        Raises:
            ValueError: naming what differs, with both values.
        """
        if not self.about_path.is_file():
            if any(self._files()):
                raise ValueError(
                    f"{self.path} holds records without an evaluation.json, which says what they are of. Choose "
                    "another `--output`, or write anew with `--overwrite`."
                )
            return
        found, wanted = self.about(), json.loads(json.dumps(settings))
        differences = [
            difference
            for name, value in wanted.items()
            if name not in _FREE
            for difference in _differences(name, _deciding(name, found.get(name)), _deciding(name, value))
        ]
        if differences:
            raise ValueError(
                f"{self.path} was begun with other settings ({'; '.join(differences)}). Go on with those of the "
                "start, choose another `--output`, or write anew with `--overwrite`."
            )

    def begin(self, about: Mapping[str, Any]) -> None:
        """Writes `evaluation.json`; of an evaluation that goes on the first command stays, and each machine is named.

        Raises:
            ValueError: see [`EvaluationFolder.check`].
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self.check(about)
        about = dict(about)
        if self.about_path.is_file():
            before = self.about()
            machines = before["hardware"].split("; ")
            about["hardware"] = "; ".join(dict.fromkeys([*machines, about["hardware"]]))
            about["command"] = before["command"]
        write_json(self.about_path, about)

    def clear(self) -> None:
        """Removes an evaluation's records, so that another may begin; other files stay."""
        for path in [*self._files(), self.about_path]:
            path.unlink(missing_ok=True)

    def writer(self, process: int) -> RecordFile:
        """The file of a process, ready for more; see [`QuestionRecord.to_dict`]."""
        return RecordFile(self.path / f"records-{process:05d}.jsonl")

    def _files(self) -> list[Path]:
        return sorted(self.path.glob("records-*.jsonl"))


def _deciding(name: str, value: Any) -> Any:
    """What of a setting decides texts and counts: of all packages, those that write texts."""
    if name == "versions" and isinstance(value, dict):
        return {package: value.get(package) for package in deciding_versions()}
    return value


def _differences(name: str, found: Any, wanted: Any) -> Iterator[str]:
    """Where two settings differ, down to the entries of those that have names."""
    one, other = (_by_name(value) for value in (found, wanted))
    if one is not None and other is not None and one.keys() == other.keys():
        for entry, value in other.items():
            yield from _differences(f"{name}.{entry}", one[entry], value)
    elif one is not None and other is not None:
        yield f"{name}: {', '.join(one)} then, {', '.join(other)} now"
    elif found != wanted:
        yield f"{name}: {found!r} then, {wanted!r} now"


def _by_name(value: Any) -> dict[str, Any] | None:
    if isinstance(value, list) and value and all(isinstance(entry, dict) and "name" in entry for entry in value):
        return {entry["name"]: entry for entry in value}
    return value if isinstance(value, dict) and value else None
