"""What the passes of a call take, by part of a round, drafters in turns; and what switching specialists adds."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..candidate_generator import DraftSettings
from ..compatibility import operations_through
from ..configuration_poss import PosSConfig
from ..draft_tree import DraftTree
from ..modeling_poss import PosSModel
from ..round_costs import CostCurve, RoundCosts
from ..transfers import upload
from .rehearsal import PlainRehearsal, RoundRehearsal
from .timing import Spread, synchronize


__all__ = [
    "PlainTimes",
    "RoundTimes",
    "fewer_specialists",
    "measure_times",
    "round_costs",
    "specialist_traffic",
    "verification_sizes",
]

_WARM_UP = 2  # rounds that do not count


@dataclass
class PlainTimes:
    """Seconds of a call without drafts, one a measurement.

    Args:
        prompt: of the target's pass over the prompts.
        step: of a step.
    """

    prompt: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {"prompt": _spread(self.prompt), "step": _spread(self.step)}


@dataclass
class RoundTimes:
    """Seconds of a call with specialists, one a measurement.

    Args:
        prompt: of the target's pass over the prompts.
        prompt_context: of the specialists' reading of them.
        parts: of a round, by name: "context", "tree", "verification", "walk", "cache".
        passes: of the draft passes, by draft position - 1.
        whole: of rounds in which nothing but the whole was timed.
        verification: of the target's passes, by nodes.
    """

    prompt: list[float] = field(default_factory=list)
    prompt_context: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=dict)
    passes: list[list[float]] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    verification: dict[int, list[float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "prompt": _spread(self.prompt),
            "prompt_context": _spread(self.prompt_context),
            "parts": {name: _spread(seconds) for name, seconds in self.parts.items()},
            "passes": [_spread(seconds) for seconds in self.passes],
            "round": _spread(self.whole),
            "verification_by_nodes": {str(nodes): _spread(times) for nodes, times in self.verification.items()},
        }


def _spread(seconds: Sequence[float]) -> dict[str, float | int] | None:
    spread = Spread.of(seconds)
    return None if spread is None else spread.to_dict()


def measure_times(
    target: PreTrainedModel,
    drafters: Mapping[str, tuple[PosSModel, DraftSettings]],
    rows: int,
    context: int,
    repeats: int = 20,
    prompt_repeats: int = 3,
    accepted: int | None = None,
    on_run: Callable[[], None] = lambda: None,
) -> tuple[PlainTimes, dict[str, RoundTimes]]:
    """Times plain steps and the rounds of every drafter at one length of the context, in turns, so that what drifts on
    a machine falls on all alike. Rounds are repeated where they are; the times are those of the passes, without what
    `generate` does between them on the host.

    Args:
        target: the model.
        drafters: specialists and the shape of their drafts, by name.
        rows, context: prompts of the batch, and tokens of each.
        repeats: rounds and steps that count.
        prompt_repeats: passes over the prompts that count.
        accepted: drafted tokens that a round accepts, see [`RoundRehearsal`].
        on_run: called after every turn of all, `repeats` + `prompt_repeats` times.
    """
    plain, times = PlainTimes(), {name: RoundTimes() for name in drafters}
    device = target.device
    steps = _WARM_UP + repeats + 2  # that a plain call needs room for

    def rehearsals(stack: ExitStack) -> tuple[PlainRehearsal, dict[str, RoundRehearsal]]:
        return stack.enter_context(PlainRehearsal(target, rows, context, steps)), {
            name: stack.enter_context(
                RoundRehearsal(target, poss, settings, rows, context, 2 * (settings.depth + 2), accepted)
            )
            for name, (poss, settings) in drafters.items()
        }

    for repeat in range(prompt_repeats + 1):
        with ExitStack() as stack:
            undrafted, drafted = rehearsals(stack)
            with _timed(device, plain.prompt if repeat else []):
                undrafted.read_prompt()
            for name, rehearsal in drafted.items():
                of = times[name]
                with _timed(device, of.prompt if repeat else []):
                    rehearsal.read_prompt()
                with _timed(device, of.prompt_context if repeat else []):
                    rehearsal.extend()
            if repeat < prompt_repeats:
                if repeat:
                    on_run()
                continue
            on_run()
            for rehearsal in drafted.values():
                rehearsal.draft()
                rehearsal.verify()
                rehearsal.keep()
            for turn in range(_WARM_UP + repeats):
                counts = turn >= _WARM_UP
                with _timed(device, plain.step if counts else []):
                    undrafted.step()
                # Who follows whom changes from turn to turn: a processor's caches hold what the one before left.
                names = list(drafted)
                for name in [*names[turn % len(names) :], *names[: turn % len(names)]] if names else ():
                    _time_round(drafted[name], times[name] if counts else RoundTimes(), device)
                if counts:
                    on_run()
    return plain, times


@contextmanager
def _timed(device: torch.device, seconds: list[float]) -> Iterator[None]:
    synchronize(device)
    start = time.perf_counter()
    yield
    synchronize(device)
    seconds.append(time.perf_counter() - start)


def _time_round(rehearsal: RoundRehearsal, times: RoundTimes, device: torch.device) -> None:
    """A whole round, then one part by part, then passes of the target over other numbers of nodes."""
    with _timed(device, times.whole):
        rehearsal.round()
    rehearsal.rewind()

    def part(name: str):
        return _timed(device, times.parts.setdefault(name, []))

    with part("context"):
        rehearsal.extend()
    stopwatch = _Stopwatch(device)
    rehearsal.draft(stopwatch.enter)
    stopwatch.stop()
    times.parts.setdefault("tree", []).append(stopwatch.tree)
    for position, seconds in enumerate(stopwatch.passes):
        if position == len(times.passes):
            times.passes.append([])
        times.passes[position].append(seconds)
    with part("verification"):
        rehearsal.verify()
    with part("walk"):
        rehearsal.walk()
    with part("cache"):
        rehearsal.keep()
    for nodes in verification_sizes(rehearsal.settings):
        tree = DraftTree.star(upload(rehearsal.pending.newest, device), nodes)
        with _timed(device, times.verification.setdefault(nodes, [])):
            rehearsal.verify(tree)
    rehearsal.rewind()


def verification_sizes(settings: DraftSettings) -> list[int]:
    """Numbers of nodes whose verification is timed: some up to those of the deepest draft."""
    most = settings.most_nodes(settings.depth)
    return sorted({size for size in (1, 2, 4, 8, 16, 32) if size < most} | {most})


class _Stopwatch:
    """Times the parts of a draft."""

    def __init__(self, device: torch.device):
        self.device = device
        self.passes: list[float] = []
        self.tree = 0.0
        self._part: str | None = None
        synchronize(device)
        self._since = time.perf_counter()

    def enter(self, part: str, position: int) -> None:
        self.stop()
        self._part = part

    def stop(self) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        if self._part == "passes":
            # What is prepared before the first pass is a part of it.
            self.passes.append(now - self._since)
        elif self._part == "tree":
            self.tree = now - self._since
        if self._part is not None:
            self._since = now


def round_costs(plain: PlainTimes, times: RoundTimes) -> RoundCosts:
    """Prices of a round of any depth up to the measured one, of medians."""

    def median(seconds: Sequence[float]) -> float:
        return Spread.of(seconds).median

    sizes = sorted(times.verification)
    return RoundCosts(
        plain=median(plain.step),
        verification=CostCurve(sizes, [median(times.verification[size]) for size in sizes]),
        draft_pass=[median(seconds) for seconds in times.passes],
        context=median(times.parts["context"]),
        overhead=sum(median(times.parts[name]) for name in ("tree", "walk", "cache")),
    )


def fewer_specialists(poss: PosSModel, count: int) -> PosSModel:
    """The first `count` specialists of `poss`, the last of which serves all positions behind its own. Their weights
    are those of `poss`, not copies.

    Raises:
        ValueError: if there are not as many.
    """
    if not 1 <= count <= len(poss.layers):
        raise ValueError(f"There are {len(poss.layers)} specialists; {count} of them were asked for.")
    positions = min(count * poss.config.positions_per_specialist, poss.config.num_draft_positions)
    config = PosSConfig.from_dict(
        {**poss.config.to_dict(), "num_draft_positions": positions, "specialist_adapter": None}
    )
    with torch.device("meta"):
        twin = PosSModel(config)
    for name, module in poss.named_children():
        if name != "shared_layer":
            setattr(twin, name, module)
    twin.layers = nn.ModuleList(list(poss.layers)[:count])
    if config.draft_vocab_size is not None:
        twin.register_buffer("draft_vocabulary", poss.draft_vocabulary)
    return twin.eval()


def specialist_traffic(rehearsal: RoundRehearsal) -> dict[str, int]:
    """Bytes of specialists that the operations of a draft are given, from the reading of the context to the tree.

    Run between [`RoundRehearsal.keep`] and the next round.

    Returns:
        "weights": of the specialists' matrices, as often as they are read; "distinct_weights": each once, what has to
        come from memory if nothing of it is near; "caches": keys and values that are read and written.
    """
    poss = rehearsal.drafter.assistant_model
    owned = [*poss.layers.parameters(), *rehearsal.projections]
    weights = {id(tensor.untyped_storage()): tensor.untyped_storage() for tensor in owned}
    read: dict[int, list[tuple[int, int]]] = {}  # spans of bytes, by storage
    bytes_of = {"weights": 0, "caches": 0}

    def run(operation: Callable, arguments: tuple, keyword_arguments: dict[str, Any]) -> Any:
        caches = {id(tensor.untyped_storage()) for tensor in rehearsal.specialist_caches}
        if not getattr(operation, "is_view", False):
            for tensor in _tensors_in((*arguments, *keyword_arguments.values())):
                key = id(tensor.untyped_storage())
                if key in weights:
                    bytes_of["weights"] += tensor.nbytes
                    start = tensor.storage_offset() * tensor.element_size()
                    read.setdefault(key, []).append((start, start + tensor.nbytes))
                elif key in caches:
                    bytes_of["caches"] += tensor.nbytes
        return operation(*arguments, **keyword_arguments)

    with operations_through(run):
        rehearsal.extend()
        rehearsal.draft()
    distinct = sum(_covered(spans) for spans in read.values())
    return {"weights": bytes_of["weights"], "distinct_weights": distinct, "caches": bytes_of["caches"]}


def _covered(spans: Sequence[tuple[int, int]]) -> int:
    """How much spans cover together."""
    total, reached = 0, 0
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0)
        reached = max(reached, end)
    return total


def _tensors_in(values: Sequence[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors_in(value)
