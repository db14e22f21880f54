"""What an evaluation says of the specialists in a folder, for their card."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..evaluation.drafters import weights_digest
from ..evaluation.tables import batch_sizes
from ..modeling_poss import PosSModel
from .evaluation_table import MEAN
from .markdown import hub_name
from .provenance import HUB_PREFIX
from .record import EvaluationRecord


__all__ = ["evaluation_record", "find_specialists", "read_results"]

_RESULTS = "results.json"


def read_results(path: str | os.PathLike) -> dict[str, Any]:
    """Results that `hf-poss evaluate` or `hf-poss report` wrote.

    Args:
        path: their folder, or its `results.json`.

    Raises:
        FileNotFoundError: if there are none.
        ValueError: if the file holds something else.
    """
    path = Path(path)
    if path.is_dir():
        path = path / _RESULTS
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no {path}; expected the {_RESULTS} of an evaluation. `hf-poss report FOLDER` writes it anew."
        )
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON ({error}). `hf-poss report FOLDER` writes it anew.") from error
    if not isinstance(results, dict) or not {"evaluation", "decodings", "mean_over"} <= results.keys():
        raise ValueError(f"{path} holds no results of an evaluation; expected what `hf-poss evaluate` writes.")
    return results


def find_specialists(
    results: Mapping[str, Any], folder: str | os.PathLike, drafter: str | None = None
) -> tuple[str, int]:
    """Which of an evaluation's drafters the specialists in a folder are: told by their weights, wherever they lie.

    Args:
        results: of the evaluation.
        folder: that holds specialists.
        drafter: label, for weights that took part under several.

    Returns:
        label, and index among its checkpoints.

    Raises:
        ValueError: if these weights did not take part, or took part under several labels.
    """
    candidates = [entry for entry in results["evaluation"]["drafters"] if entry["kind"] == "poss"]
    digests: dict[str, str] = {}
    found = []
    for entry in candidates:
        dtype = entry["dtype"]
        if dtype not in digests:  # rounding changes the weights, so they are read as they were then
            digests[dtype] = weights_digest(PosSModel.from_pretrained(folder, dtype=getattr(torch, dtype)))
        found += [(entry["name"], index) for index, of in enumerate(entry["weights"]) if of == digests[dtype]]
    labels = [entry["name"] for entry in candidates]
    if drafter is not None and drafter not in labels:
        raise ValueError(f"The evaluation has no specialists called {drafter!r}; it has {labels}.")
    if not found:
        raise ValueError(
            f"The evaluation is of other specialists than those in {folder}: the weights of {labels} differ from "
            "theirs. Evaluate these: `hf-poss evaluate --poss FOLDER`."
        )
    chosen = [place for place in found if drafter in (None, place[0])]
    if not chosen:
        raise ValueError(f"{drafter} has other weights than {folder}, which took part as {found[0][0]}.")
    if len(chosen) > 1:
        raise ValueError(
            f"The specialists in {folder} took part as {[label for label, _ in chosen]}; say which: --drafter LABEL."
        )
    return chosen[0]


def evaluation_record(results: Mapping[str, Any], drafter: str, checkpoint: int = 0) -> EvaluationRecord:
    """The record of one drafter of an evaluation; of several batch sizes that of the smallest.

    Args:
        results: of [`~hf_poss.evaluation.results.compute_results`].
        drafter: its label.
        checkpoint: its index among those of the label.
    """
    about = results["evaluation"]
    entry = next(entry for entry in about["drafters"] if entry["name"] == drafter)
    index = checkpoint if len(entry["checkpoints"]) > 1 else None
    batch_size = batch_sizes(results)[0]
    decodings = [of for of in results["decodings"] if of["batch_size"] == batch_size]
    return EvaluationRecord(
        target=_public_name(about["target"]["name"]),
        drafter=drafter,
        checkpoints=max(len(entry["checkpoints"]), 1),
        results=[row for of in decodings for row in _results(of, drafter, index)],
        mean_over=results["mean_over"],
        acceptance=[_acceptance(of, drafter) for of in decodings if index is None and drafter in of["pooled"]],
        compared=[row for of in decodings for row in _others(of, drafter, _plain(about))],
        comparisons={f"{of['temperature']:g}": _sentences(of, drafter) for of in decodings},
        spread=[row for of in decodings for row in _spread(of, drafter)],
        missing=[
            f"{row['benchmark']} at temperature {row['temperature']:g}: {row['questions']} of {row['of']} questions"
            for row in results["missing"]
            if row["drafter"] == drafter and row["batch_size"] == batch_size
        ],
        sources={
            of["name"]: of["source"] for of in about["benchmarks"] if of["source"].startswith(("https://", HUB_PREFIX))
        },
        settings=_settings(about, entry, batch_size),
        hardware=about["hardware"],
        versions=about["versions"],
        command=about["command"],
    )


def _public_name(name: str | None) -> str | None:
    """A Hub name, or the last part of a path: a machine's folders concern nobody else."""
    return name and (hub_name(name) or os.path.basename(os.path.normpath(name)))


def _plain(about: Mapping[str, Any]) -> set[str]:
    return {entry["name"] for entry in about["drafters"] if entry["kind"] == "plain"}


def _results(of: Mapping[str, Any], drafter: str, checkpoint: int | None) -> Iterator[dict[str, Any]]:
    sets = {name: by_label[drafter] for name, by_label in of["benchmarks"].items() if drafter in by_label}
    if drafter in of["mean"] and len(of["mean"][drafter]["benchmarks"]) > 1:
        sets[MEAN] = of["mean"][drafter]
    for name, figures in sets.items():
        row = {"temperature": of["temperature"], "benchmark": name, "questions": figures["questions"]}
        if checkpoint is not None:
            yield row | {ratio: _of_run(figures, ratio, checkpoint) for ratio in ("tau", "tau_macro", "speed_up")}
            continue
        row |= {ratio: figures[ratio] for ratio in ("tau", "tau_macro", "speed_up")}
        row |= {f"{ratio}_interval": figures["intervals"][ratio] for ratio in ("tau_macro", "speed_up")}
        if (identical := figures.get("identical")) is not None:
            row |= {"identical": identical["texts"], "compared": identical["of"]}
        yield row


def _of_run(figures: Mapping[str, Any], ratio: str, checkpoint: int) -> float | None:
    runs = figures["runs"]
    if runs is None or checkpoint not in runs["indices"]:
        return None
    return runs["values"][ratio][runs["indices"].index(checkpoint)]


def _acceptance(of: Mapping[str, Any], drafter: str) -> dict[str, Any]:
    figures = of["pooled"][drafter]
    return {"temperature": of["temperature"]} | {name: figures[name] for name in ("questions", "tau", "pos_acc")}


def _others(of: Mapping[str, Any], drafter: str, plain: set[str]) -> Iterator[dict[str, Any]]:
    for label, figures in of["mean"].items():
        if label != drafter and label not in plain:
            means = {ratio: _mean_of_runs(figures, ratio) for ratio in ("tau_macro", "speed_up")}
            yield {"temperature": of["temperature"], "drafter": label, **means}


def _mean_of_runs(figures: Mapping[str, Any], ratio: str) -> float | None:
    runs = figures["runs"]
    mean = None if runs is None else runs["mean"][ratio]
    return figures[ratio] if mean is None else mean


def _sentences(of: Mapping[str, Any], drafter: str) -> list[str]:
    return [entry["sentence"] for entry in of["comparisons"] if drafter in (entry["a"], entry["b"])]


def _spread(of: Mapping[str, Any], drafter: str) -> Iterator[dict[str, Any]]:
    runs = of["mean"].get(drafter, {}).get("runs")
    if runs is not None and runs["over"] == "checkpoint":
        row = {"temperature": of["temperature"]}
        for ratio in ("tau_macro", "speed_up"):
            row |= {ratio: runs["mean"][ratio], f"{ratio}_deviation": runs["deviation"][ratio]}
        yield row


def _settings(about: Mapping[str, Any], entry: Mapping[str, Any], batch_size: int) -> dict[str, Any]:
    seeds: Sequence[int] = about["seeds"]
    settings = {
        "dtype": about["target"].get("dtype"),
        "batch size": batch_size,
        "max_new_tokens": about["max_new_tokens"],
        "depth": entry.get("depth"),
        "draft_top_k": entry.get("top_k"),
        "draft_total_tokens": entry.get("total_tokens"),
        "chat template": "yes" if about["chat"] else "no",
        "seeds": list(seeds) if len(seeds) > 1 else None,
        "processes": about["processes"] if about["processes"] > 1 else None,
        **about["generate"],
    }
    return {name: value for name, value in settings.items() if value is not None}
