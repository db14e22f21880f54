"""What a card tells of an evaluation: tables, sentences, entries of the model index. Figures are the record's."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult

from .markdown import cell
from .provenance import HUB_PREFIX
from .record import EvaluationRecord, is_number


__all__ = ["MEAN", "comparison_table", "evaluation_results", "explanations", "results_table"]

MEAN = "mean"
UNKNOWN = "–"


def results_table(record: EvaluationRecord) -> list[list[str]]:
    """Rows of temperature, prompt set, questions, tau (macro and micro), speed-up and identical texts."""
    return [
        [
            f"{row['temperature']:g}",
            _set_name(record, row["benchmark"]),
            f"{row['questions']:,}",
            _figure(row, "tau_macro"),
            _figure(row, "tau"),
            _figure(row, "speed_up", "x"),
            f"{row['identical']:,} of {row['compared']:,}" if row.get("compared") else "",
        ]
        for row in record.results
    ]


def comparison_table(record: EvaluationRecord) -> list[list[str]]:
    """Rows of temperature, drafter, tau (macro) and speed-up: what was compared, over the same prompt sets."""
    return [
        [f"{row['temperature']:g}", cell(row["drafter"]), _figure(row, "tau_macro"), _figure(row, "speed_up", "x")]
        for row in record.compared
    ]


def explanations(record: EvaluationRecord) -> list[str]:
    """What the figures are, and what is missing, a sentence each."""
    lines = []
    sets = {row["benchmark"]: None for row in record.results}
    if MEAN in sets:
        over = ", ".join(map(cell, record.mean_over))
        left_out = ", ".join(cell(name) for name in sets if name not in (MEAN, *record.mean_over))
        without = f"; {left_out} is left out, since it holds prompts of theirs" if left_out else ""
        lines.append(f"The mean is over prompt sets, each weighing the same: {over}{without}.")
    if (record.checkpoints or 1) > 1:
        lines.append(
            f"These specialists are one of {record.checkpoints} checkpoints of {cell(record.drafter)}, training runs "
            "that differ in their seed: the table above is of this one, comparisons are of all."
        )
    if record.settings.get("batch size", 1) > 1:
        lines.append(
            f"{record.settings['batch size']} questions share a call and its time: intervals and comparisons of "
            "speed-up are over calls."
        )
    lines += [
        f"Mean and standard deviation of the {record.checkpoints} at temperature {row['temperature']:g}: tau "
        f"{_spread(row, 'tau_macro')}, speed-up {_spread(row, 'speed_up', 'x')}."
        for row in record.spread
    ]
    return [*lines, *(f"Not complete: {cell(line)}." for line in record.missing)]


def evaluation_results(record: EvaluationRecord) -> Iterator[EvalResult]:
    """Entries of the model index, their types named after the modules for Hugging Face `evaluate`."""
    for row in record.results:
        name = row["benchmark"]
        common = {
            "task_type": "text-generation",
            "task_name": "Speculative decoding",
            "dataset_type": _on_hub(record, name) or "custom",
            "dataset_name": f"mean of {', '.join(record.mean_over)}" if name == MEAN else name,
            # The Hub takes results of one type and config for one entry
            "dataset_config": f"{name}, temperature {row['temperature']:g}",
            "metric_args": {"temperature": row["temperature"], "questions": row["questions"]},
        }
        for ratio, kind, title in (
            ("tau_macro", "acceptance_length", "tau, macro average"),
            ("tau", "acceptance_length", "tau, micro average"),
            ("speed_up", "speculative_speedup", "speed-up over plain decoding"),
        ):
            if is_number(row.get(ratio)):
                yield EvalResult(**common, metric_type=kind, metric_name=title, metric_value=round(row[ratio], 4))
        if row.get("compared"):
            share = round(row["identical"] / row["compared"], 4)
            yield EvalResult(
                **common, metric_type="output_identity", metric_name="identical texts", metric_value=share
            )


def _set_name(record: EvaluationRecord, name: str) -> str:
    on_hub = _on_hub(record, name)
    source = f"https://huggingface.co/datasets/{on_hub}" if on_hub else record.sources.get(name)
    return f"[{cell(name)}]({source})" if source else cell(name)


def _on_hub(record: EvaluationRecord, name: str) -> str | None:
    """Name of the data set on the Hub that a prompt set is from."""
    source = record.sources.get(name, "")
    return source.removeprefix(HUB_PREFIX).partition(":")[0] if source.startswith(HUB_PREFIX) else None


def _figure(row: Mapping[str, Any], name: str, unit: str = "") -> str:
    if not is_number(row.get(name)):
        return UNKNOWN
    interval: Sequence[float] | None = row.get(f"{name}_interval")
    text = f"{row[name]:.2f}{unit}"
    return text if not interval else f"{text} ({interval[0]:.2f} to {interval[1]:.2f})"


def _spread(row: Mapping[str, Any], name: str, unit: str = "") -> str:
    if not is_number(row.get(name)):
        return UNKNOWN
    deviation = row.get(f"{name}_deviation")
    return f"{row[name]:.2f}{unit}" + (f" ± {deviation:.2f}" if is_number(deviation) else "")
