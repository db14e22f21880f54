"""What a benchmark measured, as JSON and as tables."""

import statistics
from dataclasses import asdict
from typing import Any

from ..measures import mean_acceptance_length, round_cost, speed_up
from .benchmark import Benchmark, Run
from .contestants import CONTESTANTS, PLAIN, PLAIN_COMPILED, Contestant
from .timing import Spread


__all__ = ["figures", "tables"]

NOT_APPLICABLE = "not applicable"
_SHORTEST = 1e-9  # seconds; a clock may find a text no longer than its first token


def figures(benchmark: Benchmark, roofline: dict[str, Any] | None = None) -> dict[str, Any]:
    """Everything that was measured: numbers, strings, lists and dicts. Ratios are of runs of the same repeat on the
    same prompt; times of rounds and steps are without the pass over the prompt.

    Args:
        roofline: of [`Benchmark.roofline`].
    """
    by_place = {(run.contestant, run.repeat, run.prompt): run for run in benchmark.runs}
    return {
        "prompts": [
            {"title": prompt.title, "rows": prompt.inputs["input_ids"].shape[0], "tokens": prompt.tokens}
            for prompt in benchmark.prompts
        ],
        "repeats": max((run.repeat for run in benchmark.runs), default=0),
        "contestants": {
            contestant.name: _contestant_figures(benchmark, contestant, by_place, roofline)
            for contestant in benchmark.contestants
        },
        "roofline": roofline,
        "runs": [asdict(run) for run in benchmark.runs],
    }


def _contestant_figures(
    benchmark: Benchmark,
    contestant: Contestant,
    by_place: dict[tuple[str, int, int], Run],
    roofline: dict[str, Any] | None,
) -> dict[str, Any]:
    name = contestant.name
    if name in benchmark.failures:
        return {"description": CONTESTANTS[name], "status": "cannot run here", "reason": benchmark.failures[name]}
    runs = [run for run in benchmark.runs if run.contestant == name]
    profile = benchmark.profiles.get(name, {})
    rounds = {id(run): run.rounds or _profiled_rounds(profile, run) for run in runs}

    def ratios(baseline: str, measure) -> Spread | None:
        """Speed-up of this contestant's runs over those of the baseline beside them."""
        pairs = ((run, by_place.get((baseline, run.repeat, run.prompt))) for run in runs)
        return Spread.of(
            [speed_up(*measure(run), *measure(other)) for run, other in pairs if other is not None and _steps(run)]
        )

    def rhos() -> Spread | None:
        pairs = ((run, by_place.get((contestant.baseline, run.repeat, run.prompt))) for run in runs)
        return Spread.of(
            [
                round_cost(_decoding(run), rounds[id(run)], _decoding(plain), _steps(plain))
                for run, plain in pairs
                if plain is not None and rounds[id(run)] and _steps(plain)
            ]
        )

    with_rounds = [run for run in runs if rounds[id(run)]]
    round_seconds = Spread.of([_decoding(run) / rounds[id(run)] for run in with_rounds])
    result = {
        "description": CONTESTANTS[name],
        "status": "ok",
        **_identity(benchmark, name, runs),
        **_start_up(benchmark, name, runs),
        "draft": None if contestant.settings is None else asdict(contestant.settings),
        "tau": _tau(with_rounds, rounds, profile),
        "tokens_per_second": Spread.of([tokens / seconds for tokens, seconds in map(_whole, runs)]),
        "decoding_tokens_per_second": Spread.of(
            [tokens / seconds for tokens, seconds in map(_decoded, filter(_steps, runs))]
        ),
        "speedup_over_plain": ratios(PLAIN, _whole),
        "speedup_over_plain_compiled": ratios(PLAIN_COMPILED, _whole),
        "decoding_speedup_over_plain": ratios(PLAIN, _decoded),
        "decoding_speedup_over_plain_compiled": ratios(PLAIN_COMPILED, _decoded),
        "rho": rhos(),
        "rho_is_over": contestant.baseline,
        "round_seconds": round_seconds,
        "prompt_seconds": Spread.of([run.prompt_seconds for run in runs]),
    }
    if name in (PLAIN, PLAIN_COMPILED):
        steps = Spread.of([_decoding(run) / _steps(run) for run in runs if _steps(run)])
        result["step_seconds"] = steps
        result["roofline"] = _share(roofline, (roofline or {}).get("plain_step_bytes"), steps, 1.0)
    else:
        round_bytes = (roofline or {}).get("round_bytes", {}).get(name)
        result["roofline"] = _share(roofline, round_bytes, round_seconds, result["tau"])
    result |= {key: profile[key] for key in ("pos_acc", "breakdown", "device_calls") if key in profile}
    if "drafting_overhead" in profile:
        result["drafting_overhead"] = profile["drafting_overhead"]
    return {key: value.to_dict() if isinstance(value, Spread) else value for key, value in result.items()}


def _profiled_rounds(profile: dict[str, Any], run: Run) -> int | None:
    by_prompt = profile.get("rounds_by_prompt")
    return None if by_prompt is None else by_prompt[run.prompt]


def _steps(run: Run) -> int:
    """Steps behind the pass over the prompt that plain decoding takes for this text."""
    return max(run.new_tokens) - 1


def _decoding(run: Run) -> float:
    """Seconds without those of the prompt and the first token."""
    return max(run.seconds - run.prompt_seconds, _SHORTEST)


def _whole(run: Run) -> tuple[int, float]:
    """New tokens and seconds."""
    return sum(run.new_tokens), run.seconds


def _decoded(run: Run) -> tuple[int, float]:
    """The same without the prompt and the first token of each text."""
    return sum(tokens - 1 for tokens in run.new_tokens), _decoding(run)


def _tau(runs: list[Run], rounds: dict[int, int], profile: dict[str, Any]) -> float | None:
    """Tokens a round and row. In a batch rows end one by one, and the profile tells how many take part."""
    if runs and all(len(run.new_tokens) == 1 for run in runs):
        return mean_acceptance_length(sum(run.new_tokens[0] - 1 for run in runs), sum(rounds[id(run)] for run in runs))
    return profile.get("tau")


def _identity(benchmark: Benchmark, name: str, runs: list[Run]) -> dict[str, Any]:
    if benchmark.acceptance is not None:
        return {"identical": NOT_APPLICABLE}
    differing = [run for run in runs if run.difference is not None]
    result: dict[str, Any] = {"identical": not differing, "differing_runs": len(differing)}
    if differing:
        first = differing[0]
        result["first_difference"] = {
            "repeat": first.repeat,
            "prompt": first.prompt,
            "row": first.difference[0],
            "new_token": first.difference[1],
        }
    if any(run.contestant == PLAIN_COMPILED for run in benchmark.runs):
        result["identical_to_plain_compiled"] = all(run.compiled_difference is None for run in runs)
    return result


def _start_up(benchmark: Benchmark, name: str, runs: list[Run]) -> dict[str, float]:
    """Seconds of the first run on every prompt, and what of it later runs do without."""
    warm_up = [run for run in benchmark.warm_up_runs if run.contestant == name]
    spent = sum(run.seconds + run.prompt_seconds for run in warm_up)
    later = 0.0
    for run in warm_up:
        same = [other.seconds + other.prompt_seconds for other in runs if other.prompt == run.prompt]
        later += statistics.median(same) if same else 0.0
    return {"warm_up_seconds": spent, "start_up_seconds": max(spent - later, 0.0)}


def _share(
    roofline: dict[str, Any] | None, moved: dict[str, float] | None, seconds: Spread | None, tokens: float | None
) -> dict[str, Any] | None:
    """The roofline of a step or round, and how near it was."""
    if roofline is None or moved is None or seconds is None:
        return None
    floor = sum(moved.values()) / roofline["copy_bandwidth_bytes_per_second"]
    return {
        "bytes": sum(moved.values()),
        "floor_seconds": floor,
        "tokens_per_second": roofline["rows"] * (tokens or 0.0) / floor,
        "share_reached": floor / seconds.median,
    }


# ---- Tables ----


def tables(result: dict[str, Any]) -> str:
    """The figures for a terminal, in Markdown."""
    blocks = [_speed_table(result), _round_table(result), _roofline_lines(result)]
    return "\n\n".join(block for block in blocks if block)


def _speed_table(result: dict[str, Any]) -> str:
    lines = [
        "| contestant | tokens/s | speed-up over plain | over plain compiled | tau | rho | round or step, ms | "
        "start-up, s | same text |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, of in result["contestants"].items():
        if of["status"] != "ok":
            lines.append(f"| {name} | {of['status']}: {_one_line(of['reason'])} | | | | | | | |")
            continue
        step = of.get("step_seconds") or of["round_seconds"]
        cells = [
            name,
            _spread(of["tokens_per_second"], ".1f"),
            _spread(of["speedup_over_plain"], ".2f"),
            _spread(of["speedup_over_plain_compiled"], ".2f"),
            "–" if of["tau"] is None else f"{of['tau']:.2f}",
            _spread(of["rho"], ".2f"),
            "–" if step is None else f"{1e3 * step['median']:.2f}",
            f"{of['start_up_seconds']:.1f}",
            _same_text(of),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    lines.append(
        "Medians, in brackets quartiles, then lowest and highest. rho: a round over a plain step in the same mode."
    )
    return "\n".join(lines)


def _spread(spread: dict[str, float] | None, form: str) -> str:
    if spread is None:
        return "–"
    median, low, high, lowest, highest = (
        format(spread[key], form) for key in ("median", "lower_quartile", "upper_quartile", "lowest", "highest")
    )
    return f"{median} ({low}–{high}; {lowest}–{highest})" if spread["count"] > 1 else median


def _same_text(of: dict[str, Any]) -> str:
    if of["identical"] == NOT_APPLICABLE:
        return NOT_APPLICABLE
    if of["identical"]:
        return "yes"
    first = of["first_difference"]
    return f"NO: prompt {first['prompt'] + 1}, row {first['row'] + 1}, new token {first['new_token'] + 1}"


def _one_line(text: str) -> str:
    line = " ".join(text.replace("|", "/").split())
    return line if len(line) <= 160 else f"{line[:159]}…"


def _round_table(result: dict[str, Any]) -> str:
    rounds = {name: of for name, of in result["contestants"].items() if "breakdown" in of}
    if not rounds:
        return ""
    parts = list(next(iter(rounds.values()))["breakdown"]["parts"])
    lines = [
        f"| a round, ms (share) | {' | '.join(parts)} | each draft pass, ms | drafting overhead | kernels | "
        "launches | waits |",
        "|" + "---|" * (len(parts) + 6),
    ]
    for name, of in rounds.items():
        breakdown = of["breakdown"]
        cells = [
            f"{breakdown['parts'][part]['milliseconds']:.2f} ({breakdown['parts'][part]['share']:.0%})"
            for part in parts
        ]
        cells.append(" ".join(f"{pass_:.2f}" for pass_ in breakdown["draft_pass_milliseconds"]) or "–")
        overhead = of.get("drafting_overhead")
        cells.append("–" if overhead is None else f"{overhead['ratio']:.2f}")
        calls = of["device_calls"]
        cells += ["not counted" if calls is None else f"{calls[key]:.1f}" for key in ("kernels", "launches", "waits")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append("")
    lines.append(
        "From runs apart from the timed ones. Drafting overhead: context fill, draft passes and tree building over "
        "their bare operations, timed alone at the same shapes, each time after a pass of the target."
    )
    return "\n".join(lines)


def _roofline_lines(result: dict[str, Any]) -> str:
    roofline = result["roofline"]
    if roofline is None:
        return ""
    bandwidth = roofline["copy_bandwidth_bytes_per_second"]
    lines = [
        f"Roofline: {bandwidth / 1e9:.1f} GB/s copied (read and written), {roofline['rows']} row(s) of "
        f"{roofline['context_tokens']:.0f} tokens.",
    ]
    moved = {
        PLAIN: roofline["plain_step_bytes"],
        PLAIN_COMPILED: roofline["plain_step_bytes"],
        **roofline["round_bytes"],
    }
    for name, parts in moved.items():
        of = result["contestants"].get(name, {}).get("roofline")
        if of is None:
            continue
        summands = ", ".join(f"{part} {_bytes(size)}" for part, size in parts.items())
        lines.append(
            f"- {name}: {_bytes(of['bytes'])} ({summands}): {1e3 * of['floor_seconds']:.2f} ms at the least, "
            f"{of['tokens_per_second']:.0f} tokens/s at the most; {of['share_reached']:.0%} of it reached."
        )
    if any((of.get("roofline") or {}).get("share_reached", 0) > 1 for of in result["contestants"].values()):
        lines.append("More than 100%: what moves fits into a cache that is faster than memory.")
    return "\n".join(lines)


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
