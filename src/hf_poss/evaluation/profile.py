"""Memory and latency of specialists against one layer and plain decoding, by context length and batch, and what pays:
everything that `hf-poss profile` tells."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..candidate_generator import DraftSettings
from ..configuration_poss import PosSConfig
from ..measures import continuation, expected_tau, round_cost
from ..modeling_poss import PosSModel
from ..round_costs import CostCurve, RoundCosts
from ..statistics import collect_statistics
from .benchmark import Prompt
from .break_even import best_depth, break_even_batch, paying_gain, rates_to, speed_up_by_depth
from .contestants import PLAIN, Contestant
from .latency import PlainTimes, RoundTimes, fewer_specialists, measure_times, round_costs, specialist_traffic
from .memory import measured_memory, weight_bytes
from .memory_prediction import predicted_memory
from .rehearsal import PlainRehearsal, RoundRehearsal
from .timing import Spread


__all__ = [
    "Case",
    "LoadedPair",
    "Plan",
    "break_even",
    "measure_case",
    "measured_acceptance",
    "memory_predictions",
]

logger = logging.get_logger(__name__)

_QUARTILES = ("lower_quartile", "median", "upper_quartile")


@dataclass(frozen=True)
class Case:
    """A batch.

    Args:
        context: tokens of a prompt.
        rows: prompts.
    """

    context: int
    rows: int


@dataclass(frozen=True)
class Plan:
    """What is profiled, known before anything is loaded.

    Args:
        target: config of the target.
        drafters: configs of the specialists, by name.
        settings: shape of the drafts of each.
        cases: batches.
        new_tokens: that a call has room for.
        device, dtype: of target and specialists.
        attn_implementation: of the target.
        unpredictable: why the target's memory cannot be told from its config, if it cannot.
    """

    target: PreTrainedConfig
    drafters: Mapping[str, PosSConfig]
    settings: Mapping[str, DraftSettings]
    cases: Sequence[Case]
    new_tokens: int
    device: torch.device
    dtype: torch.dtype
    attn_implementation: str | None = None
    unpredictable: str | None = None


@dataclass(frozen=True)
class LoadedPair:
    """What is measured.

    Args:
        target: the model.
        drafters: its specialists, by name.
    """

    target: PreTrainedModel
    drafters: Mapping[str, PosSModel]


def memory_predictions(plan: Plan, on_step: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Predicted memory of plain decoding and of every drafter, before anything is loaded.

    Returns:
        by name a list with an entry a case, see [`CallMemory.to_dict`]; or {"reason": ...} where it is not predicted.
    """
    predictions: dict[str, Any] = {}
    calls = [(case.rows, case.context) for case in plan.cases]
    for name, config in {PLAIN: None, **plan.drafters}.items():
        try:
            if plan.unpredictable is not None:
                raise ValueError(plan.unpredictable)
            memory = predicted_memory(
                plan.target,
                config,
                plan.settings.get(name),
                calls,
                plan.new_tokens,
                plan.device,
                plan.dtype,
                attn_implementation=plan.attn_implementation,
            )
            predictions[name] = [of.to_dict() for of in memory]
        except ValueError as error:
            logger.warning_once(f"{name}: {error}")
            predictions[name] = {"reason": str(error)}
        on_step()
    return predictions


def measure_case(
    plan: Plan, pair: LoadedPair, case: Case, repeats: int, on_step: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Memory and latency of one batch: of plain decoding, and of every drafter. One of several specialists is set
    beside the same drafter with its first specialist at all positions, and with its last one left out.

    Args:
        repeats: rounds that count.
        on_step: called for progress, once for plain decoding and every drafter, and once in the end.

    Returns:
        "memory" (see [`CallMemory.to_dict`]), "latency" and "costs" (seconds of medians, see [`RoundCosts`]) by name,
        and "switching" by name of the drafters of several specialists.
    """
    target, drafters, settings = pair.target, pair.drafters, plan.settings
    memory = {}
    for name, poss in {PLAIN: None, **drafters}.items():

        def make(name: str = name, poss: PosSModel | None = poss) -> RoundRehearsal | PlainRehearsal:
            if poss is None:
                return PlainRehearsal(target, case.rows, case.context, plan.new_tokens)
            return RoundRehearsal(target, poss, settings[name], case.rows, case.context, plan.new_tokens)

        memory[name] = measured_memory(make, weight_bytes(target, poss), target.device).to_dict()
        on_step()
    timed = {name: (poss, settings[name]) for name, poss in drafters.items()}
    for name, poss in drafters.items():
        for count in {1, poss.config.num_specialists - 1} - {0, poss.config.num_specialists}:
            timed[_twin(name, count)] = fewer_specialists(poss, count), settings[name]
    plain, times = measure_times(target, timed, case.rows, case.context, repeats)
    switching = {}
    for name, poss in drafters.items():
        if poss.config.num_specialists > 1:
            one, fewer = _twin(name, 1), _twin(name, poss.config.num_specialists - 1)
            switching[name] = {
                "specialists": poss.config.num_specialists,
                "over_one": _compared(times[name], times[one]),
                "over_one_less": _compared(times[name], times[fewer]),
                "bytes": _traffic(target, *timed[name], case),
                "bytes_of_one": _traffic(target, *timed[one], case),
            }
    on_step()
    step = Spread.of(plain.step).median
    return {
        **asdict(case),
        "memory": memory,
        "latency": {
            PLAIN: plain.to_dict(),
            **{
                name: {**times[name].to_dict(), "rho": round_cost(Spread.of(times[name].whole).median, 1, step, 1)}
                for name in drafters
            },
        },
        "switching": switching,
        "costs": {name: _costs(plain, of) for name, of in times.items()},
    }


def _twin(name: str, count: int) -> str:
    """What a drafter is called with its first specialists alone."""
    return f"{name}, first {count}"


def _compared(times: RoundTimes, fewer: RoundTimes) -> dict[str, Any]:
    """Rounds of all specialists, and what they take beyond those of fewer, turn by turn."""
    added = [of_all - of_fewer for of_all, of_fewer in zip(times.whole, fewer.whole, strict=True)]
    spreads = {"round_seconds": times.whole, "round_seconds_of_fewer": fewer.whole, "added_seconds": added}
    return {name: Spread.of(seconds).to_dict() for name, seconds in spreads.items()}


def _traffic(target: PreTrainedModel, poss: PosSModel, settings: DraftSettings, case: Case) -> dict[str, int]:
    with RoundRehearsal(target, poss, settings, case.rows, case.context, 3 * (settings.depth + 2)) as call:
        call.read_prompt()
        call.round()
        return specialist_traffic(call)


def _costs(plain: PlainTimes, times: RoundTimes) -> dict[str, Any]:
    costs = round_costs(plain, times)
    return {
        "plain": costs.plain,
        "verification": {"nodes": costs.verification.sizes, "seconds": costs.verification.seconds},
        "draft_pass": list(costs.draft_pass),
        "context": costs.context,
        "overhead": costs.overhead,
        "round": Spread.of(times.whole).median,
    }


def _costs_of(figures: Mapping[str, Any]) -> RoundCosts:
    curve = CostCurve(figures["verification"]["nodes"], figures["verification"]["seconds"])
    return RoundCosts(figures["plain"], curve, figures["draft_pass"], figures["context"], figures["overhead"])


def measured_acceptance(
    target: PreTrainedModel, poss: PosSModel, settings: DraftSettings, prompts: Sequence[Prompt], new_tokens: int
) -> list[float]:
    """Of greedy texts by draft position - 1, see [`~hf_poss.measures.continuation`]."""
    knobs = {
        "num_assistant_tokens": settings.depth,
        "draft_top_k": settings.top_k,
        "draft_total_tokens": settings.total_tokens,
    }
    contestant = Contestant("poss", {"assistant_model": poss}, settings, knobs)
    with contestant.set_up(), collect_statistics(timed=False) as stats:
        for prompt in prompts:
            target.generate(**prompt.inputs, **contestant.arguments, do_sample=False, max_new_tokens=new_tokens)
    return continuation(stats.accepted, stats.rounds)


def break_even(
    plan: Plan, cases: Sequence[Mapping[str, Any]], acceptance: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """What pays, by what cases cost and what drafts are accepted.

    Args:
        cases: of [`measure_case`].
        acceptance: by draft position - 1, by drafter; see [`~hf_poss.measures.continuation`].

    Returns:
        "rounds", an entry a drafter and case: tau, the speed-up by depth from 0 on, the depth beyond which no other
        position pays, and, for several specialists, the gain in acceptance from the last one's first position on at
        which it pays, see [`paying_gain`]; "batches", an entry a drafter and context: the batch at which drafting
        stops paying, None where it pays up to the largest measured.
    """
    rounds, batches = [], []
    for name, config in plan.drafters.items():
        settings = plan.settings[name]
        rates = rates_to(acceptance[name], settings.depth)

        def nodes(depth: int, settings: DraftSettings = settings) -> int:
            return settings.up_to(depth).most_nodes(depth)

        for case in cases:
            speed_ups = speed_up_by_depth(_costs_of(case["costs"][name]), rates, settings.depth, nodes)
            entry = {
                "drafter": name,
                "context": case["context"],
                "rows": case["rows"],
                "acceptance": rates,
                "tau": expected_tau(rates),
                "speed_up_by_depth": speed_ups,
                "best_depth": best_depth(speed_ups),
            }
            first = (config.num_specialists - 1) * config.positions_per_specialist + 1
            if 1 < first <= settings.depth:
                over = case["switching"][name]["over_one_less"]
                entry["last_specialist"] = _last_specialist(over, rates, settings.depth, first)
            rounds.append(entry)
        for context in sorted({case["context"] for case in cases}):
            of = sorted((case for case in cases if case["context"] == context), key=lambda case: case["rows"])
            measured = [case["rows"] for case in of]
            plain_seconds = [case["costs"][name]["plain"] for case in of]
            round_seconds = [case["costs"][name]["round"] for case in of]
            batches.append(
                {
                    "drafter": name,
                    "context": context,
                    "measured_rows": measured,
                    "speed_up": [
                        expected_tau(rates) / round_cost(seconds, 1, step, 1)
                        for seconds, step in zip(round_seconds, plain_seconds, strict=True)
                    ],
                    "break_even_rows": break_even_batch(measured, plain_seconds, round_seconds, expected_tau(rates)),
                }
            )
    return {"rounds": rounds, "batches": batches}


def _last_specialist(over: Mapping[str, Any], rates: Sequence[float], depth: int, first: int) -> dict[str, Any]:
    """The gain at which the last specialist pays, at the median of what it adds to a round and at its quartiles.

    Args:
        over: rounds with it and without, see [`_compared`].
    """
    seconds, added = over["round_seconds_of_fewer"]["median"], over["added_seconds"]
    gains = {key: paying_gain(rates, depth, first, seconds, added[key]) for key in _QUARTILES}
    return {"first_position": first, "added_share": added["median"] / seconds, "paying_gain": gains}
