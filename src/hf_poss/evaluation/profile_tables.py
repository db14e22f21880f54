"""A profile as tables for a terminal, in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..training.sizes import readable


__all__ = ["break_even_table", "latency_table", "memory_table", "switching_table"]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def memory_table(
    cases: Sequence[Mapping[str, int]], predictions: Mapping[str, Any], measured: Sequence[Mapping[str, Any]]
) -> str:
    """Memory by case and drafter.

    Args:
        cases: "context" and "rows" of each.
        predictions: of [`memory_predictions`].
        measured: what is measured so far, in the order of the cases.
    """
    rows = []
    for index, case in enumerate(cases):
        found = measured[index]["memory"] if index < len(measured) else {}
        for name, of in predictions.items():
            predicted = None if "reason" in of else of[index]
            held = found.get(name)
            parts = held or predicted
            if parts is None:
                rows.append([str(case["context"]), str(case["rows"]), name, *["not predicted"] * 2, *["–"] * 5])
                continue
            needed = max(parts["activations"], key=parts["activations"].get)
            rows.append(
                [
                    str(case["context"]),
                    str(case["rows"]),
                    name,
                    "not predicted" if predicted is None else readable(predicted["peak"]),
                    "–" if held is None else readable(held["peak"]),
                    "–" if held is None or predicted is None else f"{predicted['peak'] / held['peak'] - 1:+.1%}",
                    f"{readable(parts['target_weights'])} + {readable(parts['drafter_weights'])}",
                    f"{readable(parts['target_cache'])} + {readable(parts['specialist_caches'])}",
                    readable(parts["copies"]),
                    f"{readable(parts['activations'][needed])} ({needed})",
                ]
            )
    header = ["context", "rows", "drafter", "predicted peak", "measured peak", "off by", "weights", "caches"]
    return (
        _table([*header, "copies", "activations"], rows)
        + "\n\nOf target + specialists; embedding and head count once. Activations: the part of a call that needs "
        "most."
    )


def latency_table(measured: Sequence[Mapping[str, Any]]) -> str:
    """Latency by case and drafter: medians in milliseconds, quartiles in brackets."""
    rows = []
    for case in measured:
        for name, of in case["latency"].items():
            place = [str(case["context"]), str(case["rows"]), name]
            if "step" in of:
                rows.append([*place, _ms(of["prompt"]), "–", "–", "–", "–", _ms(of["step"]), "1.00"])
                continue
            passes = " ".join(f"{1e3 * spread['median']:.2f}" for spread in of["passes"])
            parts = of["parts"]
            rest = sum(parts[name]["median"] for name in ("context", "tree", "walk", "cache"))
            rows.append(
                [
                    *place,
                    f"{_ms(of['prompt'])} + {_ms(of['prompt_context'])}",
                    passes,
                    _ms(parts["verification"]),
                    f"{1e3 * parts['context']['median']:.2f}",
                    f"{1e3 * (rest - parts['context']['median']):.2f}",
                    _ms(of["round"]),
                    f"{of['rho']:.2f}",
                ]
            )
    header = ["context", "rows", "drafter", "prompt (+ specialists'), ms", "each draft pass", "verification"]
    return (
        _table([*header, "context", "tree, walk, cache", "round or step, ms", "rho"], rows)
        + "\n\nMedians, quartiles in brackets; rho: a round over a plain step."
    )


def _ms(spread: Mapping[str, float]) -> str:
    median, low, high = (1e3 * spread[key] for key in ("median", "lower_quartile", "upper_quartile"))
    return f"{median:.2f} ({low:.2f}–{high:.2f})"


def switching_table(measured: Sequence[Mapping[str, Any]]) -> str:
    """What rounds of several specialists cost beyond those of one; empty where all have one."""
    rows = []
    for case in measured:
        for name, of in case["switching"].items():
            own, one, over = of["bytes"], of["bytes_of_one"], of["over_one"]
            rows.append(
                [
                    str(case["context"]),
                    str(case["rows"]),
                    name,
                    str(of["specialists"]),
                    _ms(over["added_seconds"]),
                    f"{over['added_seconds']['median'] / over['round_seconds_of_fewer']['median']:+.1%}",
                    f"{readable(own['distinct_weights'])} / {readable(one['distinct_weights'])}",
                    f"{readable(own['weights'])} / {readable(one['weights'])}",
                    f"{readable(own['caches'])} / {readable(one['caches'])}",
                ]
            )
    if not rows:
        return ""
    header = ["context", "rows", "drafter", "specialists", "added to a round, ms", "of it"]
    return (
        _table([*header, "distinct weights, all / one", "weights read", "keys and values"], rows)
        + "\n\nA round whose positions all specialists serve against the same round with the first one at every "
        "position, pair by pair. Bytes are those of the operands in a draft phase."
    )


def break_even_table(result: Mapping[str, Any]) -> str:
    """What pays."""
    batches = {(entry["drafter"], entry["context"]): entry for entry in result["batches"]}
    rows = []
    for entry in result["rounds"]:
        last = entry.get("last_specialist")
        batch = batches[entry["drafter"], entry["context"]]
        found, largest = batch["break_even_rows"], batch["measured_rows"][-1]
        rows.append(
            [
                str(entry["context"]),
                str(entry["rows"]),
                entry["drafter"],
                f"{entry['tau']:.2f}",
                f"{entry['speed_up_by_depth'][-1]:.2f}",
                f"{entry['best_depth']} ({entry['speed_up_by_depth'][entry['best_depth']]:.2f})",
                "–" if last is None else f"{_gains(last['paying_gain'])} from position {last['first_position']} on",
                f"pays up to {largest}" if found is None else f"{found} row{'s' * (found > 1)}",
            ]
        )
    header = ["context", "rows", "drafter", "tau", "speed-up", "deepest that pays (speed-up)"]
    return (
        _table([*header, "the last specialist pays with", "drafting stops paying at"], rows)
        + "\n\nPoints of acceptance at the median of what it adds to a round, in brackets at the quartiles: where "
        "these lie far apart, time more rounds (`--repeats`)."
    )


def _gains(gains: Mapping[str, float | None]) -> str:
    low, median, high = ("never" if gain is None else f"{100 * gain:+.2f}" for gain in _in_order(gains))
    return f"{median} ({low} to {high}) points"


def _in_order(gains: Mapping[str, float | None]) -> list[float | None]:
    return [gains[key] for key in ("lower_quartile", "median", "upper_quartile")]
