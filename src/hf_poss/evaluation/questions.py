"""Prompt sets of an evaluation: those that ship with the package, files of one's own, data sets on the Hub."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..hub.provenance import HUB_PREFIX
from ..training.formats import Conversation
from ..training.regenerated import rows_digest


__all__ = [
    "BENCHMARKS",
    "PAPER_BENCHMARKS",
    "Question",
    "QuestionSet",
    "demo_set",
    "json_lines",
    "load_benchmark",
    "load_benchmarks",
]

_EAGLE = "https://github.com/SafeAILab/EAGLE"
_SPEC_BENCH = "https://github.com/hemingkx/Spec-Bench"

# The six sets of PosS (arXiv 2506.03566, section 4.1), those of EAGLE-2 and HASS too.
PAPER_BENCHMARKS = ("mt_bench", "alpaca", "gsm8k", "humaneval", "qa", "sum")
# Source and licence of each set that ships; every prompt of mt_bench, qa and sum is in spec_bench, too.
BENCHMARKS = {**dict.fromkeys(PAPER_BENCHMARKS, (_EAGLE, "Apache-2.0")), "spec_bench": (_SPEC_BENCH, "Apache-2.0")}

_EXPECTED = 'a "prompt" (text or messages), or "turns" (texts), or "messages" (with "role" and "content")'


@dataclass(frozen=True)
class Question:
    """What drafters answer: one turn or several.

    Args:
        id: in its set.
        category: in its set, "" for none.
        conversation: the messages. Answers of the assistant behind `prompt_length` are written anew by every drafter,
            each after its own earlier ones; one is added if the last message is none.
    """

    id: str
    category: str
    conversation: Conversation

    @property
    def texts(self) -> list[str]:
        """What is said before each answer, for targets without a chat template; messages are parted by a blank
        line."""
        parts: list[list[str]] = [[]]
        for place, message in enumerate(self.conversation.messages):
            if _is_answer(message, place, self.conversation.prompt_length):
                parts.append([])
            else:
                parts[-1].append(message["content"])
        return ["\n\n".join(part) for part in parts if part]

    @classmethod
    def of(cls, record: Any, number: int, place: str) -> "Question":
        """The question that a line of a file or a row of a data set holds.

        Args:
            record: a dict with a "prompt", "turns" or "messages"; "question_id" or "id", and "category", if it has
                them.
            number: stands for an id that is missing.
            place: where it was found, for error messages.

        Raises:
            ValueError: if it holds no question.
        """
        conversation = _conversation_of(record) if isinstance(record, Mapping) else None
        if conversation is None:
            raise ValueError(f"{place} has neither {_EXPECTED.replace(', or ', ', nor ')}, with something to answer.")
        given = (record[name] for name in ("question_id", "id") if record.get(name) is not None)
        return cls(str(next(given, number)), str(record.get("category") or ""), conversation)


def _is_answer(message: Mapping[str, Any], place: int, prompt_length: int) -> bool:
    return message["role"] == "assistant" and place >= max(prompt_length, 1)


def _conversation_of(record: Mapping[str, Any]) -> Conversation | None:
    prompt, turns, messages = (record.get(name) for name in ("prompt", "turns", "messages"))
    if isinstance(prompt, str) and prompt:
        return _of_turns([prompt])
    if _are_messages(prompt) and prompt[-1]["role"] != "assistant":
        return Conversation(list(prompt), prompt_length=len(prompt))
    if prompt is None and _are(turns, str) and all(turns):
        return _of_turns(turns)
    if prompt is None and turns is None and _are_messages(messages):
        return Conversation(list(messages))
    return None


def _of_turns(turns: Sequence[str]) -> Conversation:
    messages: list[dict[str, Any]] = []
    for turn in turns:
        messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": ""}]
    return Conversation(messages[:-1])


def _are(values: Any, kind: type) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(value, kind) for value in values)


def _are_messages(value: Any) -> bool:
    if not _are(value, dict):
        return False
    whole = all(isinstance(message.get(name), str) for message in value for name in ("role", "content"))
    return whole and any(message["role"] == "user" for message in value)


@dataclass(frozen=True)
class QuestionSet:
    """A prompt set.

    Args:
        name: short, as in tables.
        questions: in the order of the set; ids are unique.
        source: where it comes from.
        license: of the set, None where it is not known.
        skipped: questions that were left out, since they do not fit into the target.

    Raises:
        ValueError: if two questions have the same id.
    """

    name: str
    questions: tuple[Question, ...]
    source: str
    license: str | None = None
    skipped: int = 0

    def __post_init__(self):
        twice = [name for name, count in Counter(question.id for question in self.questions).items() if count > 1]
        if twice:
            raise ValueError(
                f"{self.source} has several questions with the id {twice[0]!r}; expected ids that differ "
                '("question_id" or "id"), or none.'
            )

    @property
    def turns(self) -> int:
        """Answers that the questions ask for."""
        return sum(len(question.texts) for question in self.questions)

    def about(self) -> dict[str, Any]:
        """What `evaluation.json` says of it."""
        return {
            "name": self.name,
            "questions": len(self.questions),
            "skipped": self.skipped,
            "turns": self.turns,
            "source": self.source,
            "license": self.license,
            "digest": rows_digest(vars(question.conversation) for question in self.questions),
        }


def json_lines(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Number, from 1, and content of every line of a JSON lines file that is not blank.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if a line is no JSON, or there is none.
    """
    empty = True
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"Line {number} of {path} is no JSON: {error}.") from error
        empty = False
    if empty:
        raise ValueError(f"{path} is empty; expected JSON lines with {_EXPECTED}.")


def load_benchmark(name: str) -> QuestionSet:
    """A prompt set.

    Args:
        name: one of `BENCHMARKS`; the path of a JSON lines file, or of a folder with a `question.jsonl`; or
            `hub:owner/name`, `hub:owner/name:split` for a data set on the Hub (the split `test`, else the only one).
            `label=` before a path or a Hub name gives it another name than its own.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if there is no such set, or it holds what is no question; see [`Question.of`].
    """
    if name in BENCHMARKS:
        source, licensed = BENCHMARKS[name]
        path = Path(__file__).parents[1] / "assets" / "benchmarks" / f"{name}.jsonl"
        return QuestionSet(name, _read(path), source, licensed)
    label, found, source = name.partition("=")
    if not found or "/" in label or label.startswith(HUB_PREFIX):
        label, source = "", name
    if source.startswith(HUB_PREFIX):
        return _of_hub(label, source)
    path = Path(source).expanduser()
    path = path / "question.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"There is no prompt set {name!r}: expected {', '.join(BENCHMARKS)}, the path of a JSON lines file, or "
            "hub:owner/name[:split]."
        )
    # EAGLE's layout: mt_bench/question.jsonl
    label = label or (path.resolve().parent.name if path.stem == "question" else path.stem)
    return QuestionSet(label, _read(path), str(source))


def load_benchmarks(names: Iterable[str], limit: int | None = None) -> list[QuestionSet]:
    """Several prompt sets, see [`load_benchmark`].

    Args:
        names: each may hold several, parted by commas.
        limit: the first questions of each only.

    Raises:
        ValueError: if two sets have one name.
    """
    sets = [load_benchmark(part.strip()) for name in names for part in name.split(",") if part.strip()]
    twice = [name for name, count in Counter(of.name for of in sets).items() if count > 1]
    if twice:
        raise ValueError(
            f"Two prompt sets are called {twice[0]!r}; give one of them another name: `--benchmarks label=path`."
        )
    return [QuestionSet(of.name, of.questions[:limit], of.source, of.license) for of in sets]


def demo_set(count: int = 6) -> QuestionSet:
    """The prompts of the demo: up to `count` starts of code, of modules that the shipped pair has never seen."""
    from ..demo import demo_prompts

    questions = tuple(Question(title, "code", _of_turns([text])) for title, text in demo_prompts(count))
    return QuestionSet("demo", questions, "Python standard library, modules held out of training", "PSF-2.0")


def _read(path: Path) -> tuple[Question, ...]:
    return tuple(Question.of(record, number, f"Line {number} of {path}") for number, record in json_lines(path))


def _of_hub(label: str, source: str) -> QuestionSet:
    from datasets import Dataset, DatasetDict, load_dataset

    name, _, split = source.removeprefix(HUB_PREFIX).partition(":")
    if not name:
        raise ValueError(f"`{source}` names no data set; expected hub:owner/name[:split].")
    data = load_dataset(name, split=split or None)
    if isinstance(data, DatasetDict):
        if "test" not in data and len(data) != 1:
            raise ValueError(f"{name} has the splits {', '.join(data)}; name one: hub:{name}:{next(iter(data))}.")
        data = data["test" if "test" in data else next(iter(data))]
    if not isinstance(data, Dataset) or not len(data):
        raise ValueError(f"{source} holds no rows; expected rows with {_EXPECTED}.")
    rows = (Question.of(row, number, f"Row {number} of {source}") for number, row in enumerate(data))
    return QuestionSet(label or name.rpartition("/")[2], tuple(rows), source, data.info.license or None)
