"""All contestants in turns on the same prompts, in one process: times, identity of texts, and where the time goes."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..compatibility import CACHE
from ..configuration_poss import eos_token_ids
from ..draft_tree import DraftTree
from ..modeling_poss import PosSModel, TargetReference
from ..statistics import GenerationStatistics
from ..verification import scripted_picks
from .acceptance import Acceptance, AcceptanceScript
from .bare_operations import bare_draft_seconds
from .breakdown import count_kernels, count_waits, profiled_call, round_parts
from .contestants import PLAIN, PLAIN_COMPILED, Contestant
from .passes import target_passes
from .roofline import copy_bandwidth, plain_step_bytes, round_bytes
from .timing import new_token_counts, timed_generate


__all__ = ["Benchmark", "Prompt", "Run"]

logger = logging.get_logger(__name__)

# New tokens of the calls in which kernels are counted: a profiler keeps a record of each.
_COUNTED_TOKENS = 32


@dataclass(frozen=True)
class Prompt:
    """A batch of prompts of one `generate` call.

    Args:
        title: of the prompt, for the reader.
        inputs: `input_ids` int64 [rows, tokens] and `attention_mask`, on the target's device.
    """

    title: str
    inputs: dict[str, torch.Tensor]

    @property
    def tokens(self) -> int:
        return self.inputs["input_ids"].shape[1]


@dataclass
class Run:
    """One timed `generate` call, and the call beside it that reads the same prompt and writes one token.

    Args:
        contestant: its name.
        repeat: 0 for the warm-up, then from 1 on.
        prompt: its index.
        seconds: of the call.
        prompt_seconds: of the call of one token.
        new_tokens: by row, an end of sequence included.
        rounds: passes of the target over drafts, where they can be told.
        difference: row and index, from 0 on, of the first new token that is not plain `generate`'s; None if all are.
        compiled_difference: likewise, from plain compiled `generate`'s; None too where it does not run.
    """

    contestant: str
    repeat: int
    prompt: int
    seconds: float
    prompt_seconds: float
    new_tokens: list[int]
    rounds: int | None = None
    difference: list[int] | None = None
    compiled_difference: list[int] | None = None


@dataclass
class Benchmark:
    """Contestants, prompts and what was measured.

    Args:
        target: the model.
        poss: its specialists.
        contestants: plain `generate` among them.
        prompts: every contestant decodes all of them.
        new_tokens: of a call, fewer where a text ends.
        acceptance: which drafts are accepted, where weights are random.
        on_run: called after every measurement, for progress.

    Attributes:
        runs: timed calls.
        warm_up_runs: the first call of every contestant on every prompt, not counted among the others.
        failures: by contestant why it cannot run here.
        profiles: by contestant what runs apart from the timed ones told, see [`Benchmark.profile`].
    """

    target: PreTrainedModel
    poss: PosSModel
    contestants: Sequence[Contestant]
    prompts: Sequence[Prompt]
    new_tokens: int
    acceptance: Acceptance | None = None
    on_run: Callable[[], None] = lambda: None
    runs: list[Run] = field(default_factory=list)
    warm_up_runs: list[Run] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    profiles: dict[str, dict[str, Any]] = field(default_factory=dict)
    _outputs: dict[tuple[str, int], torch.LongTensor] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Measurements of the warm-up; a repeat has as many."""
        return len(self.contestants) * len(self.prompts)

    @property
    def running(self) -> list[Contestant]:
        """Contestants that have not failed."""
        return [contestant for contestant in self.contestants if contestant.name not in self.failures]

    # ---- Timed runs ----

    def warm_up(self) -> None:
        """Runs every contestant on every prompt, the longest first, after which static caches keep their size."""
        order = sorted(range(len(self.prompts)), key=lambda index: -self.prompts[index].tokens)
        for contestant in self.contestants:
            for index in order:
                self._measure(contestant, index, repeat=0)

    def repeat(self, number: int) -> None:
        """Runs every contestant on every prompt, in turns; who is first changes from prompt to prompt and repeat to
        repeat.

        Args:
            number: of the repeat, from 1 on.
        """
        for index in range(len(self.prompts)):
            first = (number + index) % len(self.contestants)
            for contestant in [*self.contestants[first:], *self.contestants[:first]]:
                self._measure(contestant, index, number)

    def _measure(self, contestant: Contestant, index: int, repeat: int) -> None:
        if contestant.name not in self.failures:
            try:
                run = self._timed(contestant, index, repeat)
                (self.runs if repeat else self.warm_up_runs).append(run)
            except Exception as error:  # whatever keeps it from running here is what is to be told of it
                self._fail(contestant, error)
        self.on_run()

    def _fail(self, contestant: Contestant, error: Exception) -> None:
        if contestant.name == PLAIN:
            raise error
        self.failures[contestant.name] = f"{type(error).__name__}: {error}".strip()
        logger.warning(f"{contestant.name} cannot run here: {self.failures[contestant.name]}")
        logger.debug("It was raised here:", exc_info=error)

    def _timed(self, contestant: Contestant, index: int, repeat: int) -> Run:
        prompt, name = self.prompts[index], contestant.name
        _, prompt_seconds, _ = self._generate(contestant, prompt, 1)
        output, seconds, rounds = self._generate(contestant, prompt, self.new_tokens)
        if repeat == 0 and name in (PLAIN, PLAIN_COMPILED):
            self._outputs[name, index] = output
        ends = eos_token_ids(self.target.generation_config)
        return Run(
            contestant=name,
            repeat=repeat,
            prompt=index,
            seconds=seconds,
            prompt_seconds=prompt_seconds,
            new_tokens=new_token_counts(output, prompt.tokens, ends),
            rounds=rounds,
            difference=self._difference(PLAIN, index, output),
            compiled_difference=self._difference(PLAIN_COMPILED, index, output),
        )

    def _difference(self, name: str, index: int, output: torch.LongTensor) -> list[int] | None:
        """Row and index of the first new token that differs."""
        wanted = self._outputs.get((name, index))
        if wanted is None or self.acceptance is not None:
            return None
        start, width = self.prompts[index].tokens, max(output.shape[1], wanted.shape[1])
        padded = [
            torch.nn.functional.pad(ids, (0, width - ids.shape[1]), value=-1)[:, start:] for ids in (output, wanted)
        ]
        places = (padded[0] != padded[1]).nonzero()
        return min(places.tolist(), key=lambda place: place[1]) if len(places) else None

    def _generate(
        self, contestant: Contestant, prompt: Prompt, new_tokens: int
    ) -> tuple[torch.LongTensor, float, int | None]:
        """Output, seconds and rounds of a call."""
        with contestant.set_up(), self._counting(contestant) as count:
            output, seconds = timed_generate(
                self.target, prompt.inputs, **contestant.arguments, do_sample=False, max_new_tokens=new_tokens
            )
        return output, seconds, count.get("rounds")

    @contextmanager
    def _counting(self, contestant: Contestant) -> Iterator[Counter]:
        """Counts the rounds of a call, without waiting for the device: by the script that the target's picks go
        through, or by the passes of an eager target behind its pass over the prompt."""
        count: Counter = Counter()
        if contestant.has_specialists:
            script = None if self.acceptance is None else AcceptanceScript(self.acceptance, self.poss.device)

            def counted(tree: DraftTree, picks: torch.LongTensor) -> torch.LongTensor:
                count["rounds"] += 1
                return picks if script is None else script(tree, picks)

            with scripted_picks(counted):
                yield count
        elif contestant.name in (PLAIN, PLAIN_COMPILED):
            yield count
        else:
            with target_passes(self.target) as passes:
                yield count
            count["rounds"] = len(passes) - 1

    # ---- Runs apart from the timed ones ----

    def profile(self) -> None:
        """What a round is made of, for every contestant with specialists: the time of its parts on all prompts, and on
        a CUDA device the kernels and waits of a round."""
        for contestant in self.running:
            if contestant.has_specialists:
                try:
                    self.profiles[contestant.name] = self._profile(contestant)
                except Exception as error:  # as in a timed run
                    self._fail(contestant, error)
            self.on_run()

    def _profile(self, contestant: Contestant) -> dict[str, Any]:
        fill, stats = 0.0, GenerationStatistics()
        for prompt in self.prompts:
            whole, read = profiled_call(partial(self._generate, contestant, prompt), self.new_tokens)
            fill += read
            stats.records.extend(whole.records)
        profile = {
            "tau": stats.tau,
            "pos_acc": stats.pos_acc,
            "rounds_by_prompt": [record.rounds for record in stats.records],
            "breakdown": round_parts(stats, fill),
            "device_calls": self._device_calls(contestant),
        }
        if contestant.settings is not None:
            profile["drafting_overhead"] = self._drafting_overhead(contestant, profile)
        return profile

    def _device_calls(self, contestant: Contestant) -> dict[str, float] | None:
        """Kernels, launches and waits a round; None where no CUDA device is."""
        if self.target.device.type != "cuda":
            return None
        rounds: int | None = None
        counts: Counter = Counter()
        for sign, tokens in ((-1, 1), (1, min(self.new_tokens, _COUNTED_TOKENS))):

            def run(tokens: int = tokens) -> None:
                nonlocal rounds
                rounds = self._generate(contestant, self.prompts[0], tokens)[2]

            for name, value in {**count_kernels(run), "waits": count_waits(run)}.items():
                counts[name] += sign * value
        return {name: value / (rounds or 1) for name, value in counts.items()}

    def _drafting_overhead(self, contestant: Contestant, profile: dict[str, Any]) -> dict[str, Any]:
        """The draft phase over the sum of its bare operations, timed here and now."""
        parts = profile["breakdown"]["parts"]
        drafting = sum(parts[name]["milliseconds"] for name in ("context fill", "draft passes", "tree building"))
        settings = contestant.settings.up_to(contestant.settings.depth)
        rows = self.prompts[0].inputs["input_ids"].shape[0]
        nodes = self.prompts[0].inputs["input_ids"].new_zeros(rows, settings.total_tokens)
        bare = bare_draft_seconds(
            self.poss,
            TargetReference.from_target(self.target, self.poss.config),
            settings,
            rows,
            round(self.mean_context),
            max(round(profile["tau"]), 1),
            prepare=lambda: self.target(input_ids=nodes, use_cache=False),
        )
        return {
            "drafting_milliseconds": drafting,
            "bare_operations_milliseconds": {kind: 1e3 * seconds for kind, seconds in bare.items()},
            "ratio": drafting / (1e3 * bare["all"]),
        }

    @property
    def mean_context(self) -> float:
        """Entries of a row's context, in the mean over prompts and over the decoding of each."""
        return sum(prompt.tokens for prompt in self.prompts) / len(self.prompts) + self.new_tokens / 2

    def roofline(self) -> dict[str, Any]:
        """What memory allows: bytes of a plain step and of each contestant's round, and the speed of copying."""
        bandwidth = copy_bandwidth(self.target.device)
        prompt = self.prompts[0]
        rows = prompt.inputs["input_ids"].shape[0]
        cache_bytes = self._cache_bytes(prompt) * self.mean_context / prompt.tokens
        rounds = {}
        for contestant in self.running:
            if contestant.settings is not None:
                settings = contestant.settings.up_to(contestant.settings.depth)
                nodes, entries = rows * settings.total_tokens, rows * self.mean_context
                rounds[contestant.name] = round_bytes(
                    self.target, self.poss, settings.depth, nodes, cache_bytes, entries
                )
        return {
            "copy_bandwidth_bytes_per_second": bandwidth,
            "context_tokens": self.mean_context,
            "rows": rows,
            "plain_step_bytes": plain_step_bytes(self.target, cache_bytes),
            "round_bytes": rounds,
        }

    def _cache_bytes(self, prompt: Prompt) -> int:
        """Of the target's keys and values after a prompt, all rows."""
        output = self.target.generate(
            **prompt.inputs, do_sample=False, max_new_tokens=1, return_dict_in_generate=True, use_cache=True
        )
        held = ((getattr(layer, name, None) for name in ("keys", "values")) for layer in output[CACHE].layers)
        return sum(states.nbytes for pair in held for states in pair if states is not None)
