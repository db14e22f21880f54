"""What an evaluation found, in a sentence that follows from its numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

from .tables import by_temperature, comparison_of, decoding_text, main_figures, shown_ratio
from .tallies import unit_of


__all__ = ["headline", "identity_sentence"]


def headline(results: Mapping[str, Any]) -> str:
    """The fastest way to draft at the lowest temperature and batch size, against plain decoding and the runner-up; who
    accepts most; who loses; the fastest at other batch sizes. What is not significant is called so."""
    of = results["decodings"][0]
    plain = next((each["name"] for each in results["evaluation"]["drafters"] if each["kind"] == "plain"), None)
    figures = main_figures(of)
    speeds = _ranked(figures, "speed_up", plain)
    if not speeds:
        return "No drafter was timed beside plain decoding: there is no speed-up to report."
    at = f"at {decoding_text(results, of)}"
    best = next(iter(speeds))
    interval = figures[best]["intervals"]["speed_up"]
    unit = unit_of("speed_up", of["batch_size"])
    facts = [f"n = {figures[best][unit]} {unit}"]
    if interval is not None:
        facts.insert(0, f"95% interval {interval[0]:.2f} to {interval[1]:.2f}")
    against_plain = comparison_of(of["comparisons"], best, plain, "speed-up")
    if speeds[best] <= 1:
        parts = [f"No drafter is faster than plain decoding {at}: the best, {best}, reaches {speeds[best]:.2f}x"]
    else:
        parts = [f"{best} decodes {speeds[best]:.2f}x as fast as plain decoding {at}"]
        if not _favours(against_plain, best):
            facts.append(f"not significant{_p(against_plain)}")
    parts[0] += f" ({', '.join(facts)})"
    parts += _lead(of["comparisons"], speeds, "speed-up", "{:.2f}x")
    taus = _ranked(figures, "tau_macro", plain)
    if len(taus) > 1:
        longest = next(iter(taus))
        tau = f"{longest} accepts most, {taus[longest]:.2f} tokens a round"
        parts.append(", ".join([tau, *_lead(of["comparisons"], taus, "tau", "{:.2f}")]))
    slower = [f"{label} ({speed:.2f}x)" for label, speed in speeds.items() if speed < 1 and label != best]
    if slower and speeds[best] > 1:
        parts.append(f"{_listed(slower)} {'is' if len(slower) == 1 else 'are'} slower than plain decoding")
    parts += _at_other_batch_sizes(results, plain)
    return f"{'; '.join(parts)}."


def _at_other_batch_sizes(results: Mapping[str, Any], plain: str | None) -> list[str]:
    """The fastest drafter of each batch size but the first, at the lowest temperature."""
    _, *others = next(iter(by_temperature(results).values()))
    parts = []
    for of in others:
        speeds = _ranked(main_figures(of), "speed_up", plain)
        if speeds:
            best, speed = next(iter(speeds.items()))
            at = f"at batch size {of['batch_size']}"
            if speed <= 1:
                parts.append(f"{at} no drafter is faster than plain decoding: the best, {best}, reaches {speed:.2f}x")
                continue
            against_plain = comparison_of(of["comparisons"], best, plain, "speed-up")
            doubt = "" if _favours(against_plain, best) else ", not significantly faster than plain decoding"
            parts.append(f"{at} {best} is the fastest with {speed:.2f}x{doubt}")
    return parts


def identity_sentence(results: Mapping[str, Any]) -> str | None:
    """How many texts of greedy search are those of plain decoding; None where none was compared."""
    counts: dict[str, dict[str, int]] = {}
    for of in results["decodings"]:
        for label, figures in of["pooled"].items():
            if of["temperature"] == 0 and figures["identical"] and _kind(results, label) != "plain":
                count = counts.setdefault(label, {"texts": 0, "of": 0})
                for name in count:
                    count[name] += figures["identical"][name]
    of = sum(count["of"] for count in counts.values())
    if not of:
        return None
    if all(count["texts"] == count["of"] for count in counts.values()):
        return f"All {of:,} texts of greedy search are, token for token, those of plain decoding."
    differing = [
        f"{label} {count['of'] - count['texts']:,} of {count['of']:,}"
        for label, count in counts.items()
        if count["texts"] < count["of"]
    ]
    sentence = f"Of {of:,} texts of greedy search, these differ from plain decoding's: {_listed(differing)}."
    dtype = results["evaluation"]["target"].get("dtype")
    if dtype in ("bfloat16", "float16"):
        sentence += f" In {dtype}, a pass over several tokens rounds otherwise, and near ties may fall the other way."
    return sentence


def _kind(results: Mapping[str, Any], label: str) -> str | None:
    return next((each["kind"] for each in results["evaluation"]["drafters"] if each["name"] == label), None)


def _ranked(figures: Mapping[str, Any], ratio: str, plain: str | None) -> dict[str, float]:
    """Drafters with their ratio, the highest first."""
    values = {label: shown_ratio(each, ratio) for label, each in figures.items() if label != plain}
    known = {label: value for label, value in values.items() if value is not None}
    return dict(sorted(known.items(), key=lambda item: -item[1]))


def _lead(comparisons: Sequence[Mapping[str, Any]], ranked: Mapping[str, float], measure: str, form: str) -> list[str]:
    """What is to be said of the first and the second; nothing of one alone."""
    if len(ranked) < 2:
        return []
    first, second = list(ranked)[:2]
    comparison = comparison_of(comparisons, first, second, measure)
    significance = "significantly" if _favours(comparison, first) else "not significantly"
    return [f"{significance} ahead of {second} ({form.format(ranked[second])}{_p(comparison)})"]


def _favours(comparison: Mapping[str, Any] | None, label: str) -> bool:
    """Whether a comparison says that `label` is significantly above."""
    return (
        comparison is not None
        and comparison["significant"]
        and (comparison["difference"] > 0) == (comparison["a"] == label)
    )


def _p(comparison: Mapping[str, Any] | None) -> str:
    if comparison is None or comparison["p_adjusted"] is None:
        return ", too few questions for a test"
    p = max(comparison["p_adjusted"], comparison["p_bootstrap_adjusted"])
    return ", p < 0.001" if p < 0.001 else f", p = {p:.2g}"


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
