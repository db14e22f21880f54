"""The run of an evaluation: all drafters in turns on the same questions, each answer with its counts and times."""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..compatibility import input_device
from ..measures import DriftSums
from ..statistics import TARGET, GenerationStatistics, collect_statistics
from ..training.record_files import RecordFile
from ..training.regeneration import left_padded
from ..training.requests import Request
from .breakdown import profiled_call
from .contestants import Contestant
from .decoding_settings import DecodingSettings, call_seed
from .drafters import Drafter, takes_rows
from .drift import feature_drift
from .passes import emitted_tokens, target_passes
from .questions import Question, QuestionSet
from .records import QuestionRecord, TurnRecord
from .timing import new_token_counts, timed_generate
from .token_pieces import token_pieces


__all__ = ["EvaluationRun", "Unit", "fitting_questions", "make_units"]

logger = logging.get_logger(__name__)

# New tokens of the calls that warm a drafter up; static caches need all, since their size is that of the longest call.
_WARM_UP_TOKENS = 32


@dataclass(frozen=True)
class Unit:
    """Questions that are decoded in one batch, by every drafter in turn.

    Args:
        number: of the unit among all of the evaluation: it says which drafter is the first.
        benchmark: name of the prompt set.
        questions: one or more.
        temperature, seed: of the draws.
        batch_size: of the calls; the last unit of a set may have fewer questions.
        batch: index of the questions in their set, in steps of `batch_size`.
        is_broken_down: whether the time of a round is broken down, in runs apart.
    """

    number: int
    benchmark: str
    questions: tuple[Question, ...]
    temperature: float
    seed: int
    batch_size: int
    batch: int
    is_broken_down: bool

    def key(self, question: Question, drafter: str, checkpoint: int) -> tuple:
        """Of the record of one of the questions."""
        return self.record(question, drafter, checkpoint, []).key

    def record(self, question: Question, drafter: str, checkpoint: int, turns: list[TurnRecord]) -> QuestionRecord:
        """Of one of the questions."""
        return QuestionRecord(
            self.benchmark,
            question.id,
            question.category,
            drafter,
            checkpoint,
            self.temperature,
            self.seed,
            self.batch_size,
            self.batch,
            turns,
        )


def make_units(
    sets: Sequence[QuestionSet],
    temperatures: Sequence[float],
    seeds: Sequence[int],
    batch_sizes: Sequence[int] = (1,),
    breakdown_questions: int = 0,
) -> list[Unit]:
    """All units of an evaluation, in its order. Which questions share a batch depends on the sets alone.

    Args:
        temperatures: greedy search, 0, is run with the first seed only, since seeds change nothing in it.
        batch_sizes: questions a call.
        breakdown_questions: the first ones of each set, of which rounds are broken down with the first seed.
    """
    modes = [
        (float(temperature), seed, batch_size)
        for temperature in temperatures
        for seed in (seeds if temperature else seeds[:1])
        for batch_size in batch_sizes
    ]
    units: list[Unit] = []
    for questions in sets:
        for temperature, seed, batch_size in modes:
            for start in range(0, len(questions.questions), batch_size):
                part = questions.questions[start : start + batch_size]
                place = batch_size, start // batch_size
                broken_down = seed == seeds[0] and start < breakdown_questions
                units.append(Unit(len(units), questions.name, part, temperature, seed, *place, broken_down))
    return units


def fitting_questions(
    questions: QuestionSet, begin: Callable[[Question], Request], room: int | None
) -> tuple[QuestionSet, str | None]:
    """The questions whose first prompt the target takes, and one reason why others were left out.

    Args:
        begin: of a dialogue, see [`~hf_poss.evaluation.dialogues.dialogue_maker`].
        room: tokens of a prompt, at most; None for any number.
    """
    kept, reason = [], None
    for question in questions.questions:
        dialogue = begin(question)
        if dialogue.prompt is None:
            reason = f"question {question.id}: {dialogue.refusal}"
        elif not dialogue.prompt:
            reason = f"question {question.id} has no tokens"
        elif room is not None and len(dialogue.prompt) > room:
            reason = (
                f"question {question.id} has {len(dialogue.prompt)} tokens, and {room} leave room for an answer of "
                "`--max_new_tokens`"
            )
        else:
            kept.append(question)
    skipped = len(questions.questions) - len(kept)
    return QuestionSet(questions.name, tuple(kept), questions.source, questions.license, skipped), reason


@dataclass
class _Call:
    """A timed `generate` call of one contestant.

    Args:
        prompts: token ids of each row.
        new_tokens: those that each row wrote.
        seconds: of the call.
        prompt_seconds: of a call that writes one token.
        statistics: of specialists.
        cached: of the target's passes, where transformers drafts; see [`target_passes`].
    """

    prompts: Sequence[Sequence[int]]
    new_tokens: Sequence[Sequence[int]]
    seconds: float
    prompt_seconds: float
    statistics: GenerationStatistics
    cached: list[int] | None


@dataclass
class EvaluationRun:
    """What decodes, and how.

    Args:
        target, tokenizer: of the evaluation.
        drafters: all of them; see [`Drafter`].
        begin: a dialogue about a question.
        decoding: of all texts.
        room: tokens of a prompt at most, None for any number; a dialogue ends where its next prompt is longer.
        drift: whether feature drift is measured, in greedy search, for specialists.
    """

    target: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    drafters: Sequence[Drafter]
    begin: Callable[[Question], Request]
    decoding: DecodingSettings
    room: int | None = None
    drift: bool = True
    _warned: set[str] = field(default_factory=set)

    def contestants(self, unit: Unit) -> list[tuple[Drafter, int]]:
        """Every drafter that decodes as many rows, with the index of each of its checkpoints."""
        drafters = [drafter for drafter in self.drafters if takes_rows(drafter.kind, unit.batch_size)]
        return [(drafter, index) for drafter in drafters for index in range(len(drafter.contestants))]

    def missing(self, unit: Unit, finished: Set[tuple]) -> list[tuple[Drafter, int]]:
        """The contestants whose records of a unit are not all there."""
        return [
            (drafter, index)
            for drafter, index in self.contestants(unit)
            if any(unit.key(question, drafter.name, index) not in finished for question in unit.questions)
        ]

    def warm_up(self, units: Sequence[Unit]) -> Iterator[str]:
        """One call of every contestant in every mode, on the longest of the first prompts, which is not counted;
        yields who was warm."""
        modes = {}
        for unit in units:
            prompts = [self.begin(question).prompt for question in unit.questions]
            longest = max(map(len, prompts))
            mode = bool(unit.temperature), unit.batch_size
            if mode not in modes or longest > modes[mode][0]:
                modes[mode] = (longest, unit, prompts)
        new_tokens = self.decoding.max_new_tokens
        if self.decoding.cache_implementation is None:
            new_tokens = min(new_tokens, _WARM_UP_TOKENS)
        for _, unit, prompts in modes.values():
            for drafter, index in self.contestants(unit):
                self._generate(drafter.contestants[index], unit, 0, prompts, new_tokens)
                yield drafter.name

    def run(self, unit: Unit, output: RecordFile, finished: Set[tuple] = frozenset()) -> Iterator[str]:
        """Lets every contestant whose records are not all there answer the questions of a unit, who is first changing
        from unit to unit, and appends the records that are missing; yields the name of each that is done.

        Args:
            unit: of [`make_units`].
            output: takes the records.
            finished: keys of the records that are there.
        """
        turns = self.contestants(unit)
        first = unit.number % len(turns)
        missing = self.missing(unit, finished)
        for drafter, index in [*turns[first:], *turns[:first]]:
            if (drafter, index) not in missing:
                continue
            answers = self._converse(drafter, drafter.contestants[index], unit)
            for question, turn_records in zip(unit.questions, answers, strict=True):
                if unit.key(question, drafter.name, index) not in finished:
                    output.append(unit.record(question, drafter.name, index, turn_records).to_dict())
            yield drafter.name

    def _converse(self, drafter: Drafter, contestant: Contestant, unit: Unit) -> list[list[TurnRecord]]:
        """The answers to all turns of the unit's questions, by question. A batch holds those that have a turn left."""
        dialogues = [self.begin(question) for question in unit.questions]
        answers: list[list[TurnRecord]] = [[] for _ in dialogues]
        turn = 0
        while rows := [row for row, dialogue in enumerate(dialogues) if self._goes_on(dialogue, unit)]:
            prompts = [dialogues[row].prompt for row in rows]
            records = self._answer(drafter, contestant, unit, turn, prompts)
            for row, record in zip(rows, records, strict=True):
                answers[row].append(record)
                token_ids = record.token_ids
                ended = bool(token_ids) and token_ids[-1] in self.decoding.eos_token_ids
                dialogues[row].take(token_ids[:-1] if ended else token_ids, ended)
            turn += 1
        return answers

    def _goes_on(self, dialogue: Request, unit: Unit) -> bool:
        if dialogue.prompt is None:
            return False
        if self.room is None or len(dialogue.prompt) <= self.room:
            return True
        if unit.benchmark not in self._warned:
            self._warned.add(unit.benchmark)
            logger.warning(
                f"{unit.benchmark}: a turn behind the first is left out where its prompt, with the answers before it, "
                f"has more than {self.room} tokens: the target's positions without `--max_new_tokens`."
            )
        return False

    # ---- One turn ----

    def _answer(
        self, drafter: Drafter, contestant: Contestant, unit: Unit, turn: int, prompts: Sequence[Sequence[int]]
    ) -> list[TurnRecord]:
        call = self._timed(drafter, contestant, unit, turn, prompts)
        parts, pass_seconds = None, None
        if unit.is_broken_down and contestant.has_specialists:
            parts, pass_seconds = self._parts(contestant, unit, turn, prompts)
        rows = len(prompts)
        return [
            TurnRecord(
                prompt_tokens=len(prompt),
                token_ids=list(new_tokens),
                pieces=token_pieces(self.tokenizer, prompt, new_tokens),
                seconds=call.seconds / rows,
                prompt_seconds=call.prompt_seconds / rows,
                rows=rows,
                **self._counts(call, row),
                drift=self._drift(contestant, unit, prompt, new_tokens),
                parts=parts,
                pass_seconds=pass_seconds,
            )
            for row, (prompt, new_tokens) in enumerate(zip(prompts, call.new_tokens, strict=True))
        ]

    def _timed(
        self, drafter: Drafter, contestant: Contestant, unit: Unit, turn: int, prompts: Sequence[Sequence[int]]
    ) -> _Call:
        _, prompt_seconds = self._generate(contestant, unit, turn, prompts, 1)
        passes: AbstractContextManager = nullcontext()
        if drafter.kind not in ("plain", "poss"):
            passes = target_passes(self.target)
        with passes as cached, collect_statistics(timed=False) as statistics:
            output, seconds = self._generate(contestant, unit, turn, prompts, self.decoding.max_new_tokens)
        return _Call(prompts, self._new_tokens(output, prompts), seconds, prompt_seconds, statistics, cached)

    def _generate(
        self, contestant: Contestant, unit: Unit, turn: int, prompts: Sequence[Sequence[int]], new_tokens: int
    ) -> tuple[torch.LongTensor, float]:
        """int64 [rows, tokens], and seconds. Calls of all contestants, and of the same turn again, draw alike."""
        inputs = left_padded(prompts, self.decoding.pad_token_id, input_device(self.target))
        arguments = self.decoding.arguments(unit.temperature, self.tokenizer) | {"max_new_tokens": new_tokens}
        torch.manual_seed(call_seed(unit.seed, unit.benchmark, *(question.id for question in unit.questions), turn))
        with contestant.set_up():
            return timed_generate(self.target, inputs, **contestant.arguments, **arguments)

    def _new_tokens(self, output: torch.LongTensor, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        longest = max(map(len, prompts))
        counts = new_token_counts(output, longest, self.decoding.eos_token_ids)
        texts = [row[longest : longest + count] for row, count in zip(output.tolist(), counts, strict=True)]
        if self.decoding.pads_behind_texts and len(texts) > 1:
            for text in texts:
                while text and text[-1] == self.decoding.pad_token_id:
                    text.pop()
        return texts

    def _counts(self, call: _Call, row: int) -> dict[str, Any]:
        """What the rounds of a row did, and its share of the target's passes."""
        rows, written = len(call.prompts), len(call.new_tokens[row])
        if call.statistics.records:
            of_row = call.statistics.records[0].rows[row]
            return {
                "authors": of_row.authors[:written],
                "rounds": of_row.rounds,
                "passes": call.statistics.passes / rows,
                "tokens": of_row.tokens,
                "drafted": of_row.drafted,
                "reached": of_row.reached,
                "accepted": of_row.accepted,
            }
        if call.cached:
            emitted = emitted_tokens(call.cached, len(call.prompts[row]), written)
            # A pass emits drafted tokens and one of the target's own.
            authors = [author for count in emitted if count for author in (*range(1, count), TARGET)]
            return {
                "authors": authors,
                "rounds": len(emitted) - 1,
                "passes": float(len(emitted) - 1),
                "tokens": written - emitted[0],
            }
        return {
            "authors": [TARGET] * written,
            "rounds": written - 1,
            "passes": (max(map(len, call.new_tokens)) - 1) / rows,
            "tokens": written - 1,
        }

    # ---- Beside the timed runs ----

    def _drift(
        self, contestant: Contestant, unit: Unit, prompt: Sequence[int], new_tokens: Sequence[int]
    ) -> DriftSums | None:
        if not self.drift or unit.temperature or not contestant.has_specialists:
            return None
        text = torch.tensor([[*prompt, *new_tokens]])  # [1, tokens]
        counted = torch.arange(text.shape[1])[None] >= len(prompt)
        return feature_drift(self.target, contestant.arguments["assistant_model"], text, counted=counted)

    def _parts(
        self, contestant: Contestant, unit: Unit, turn: int, prompts: Sequence[Sequence[int]]
    ) -> tuple[Mapping[str, float], list[float]]:
        """Seconds of a row by part of a round and by draft pass; reading the prompt is a part of its own."""
        generate = partial(self._generate, contestant, unit, turn, prompts)
        statistics, read = profiled_call(generate, self.decoding.max_new_tokens)
        parts = statistics.seconds
        read = min(read, parts["context"])
        parts |= {"context": parts["context"] - read, "prompt": parts["prompt"] + read}
        rows = len(prompts)
        return {part: seconds / rows for part, seconds in parts.items()}, [
            seconds / rows for seconds in statistics.pass_seconds
        ]
