"""The text of a model card. Each figure in it is one of the records'."""

import itertools
import json
import os
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..configuration_poss import PosSConfig
from .evaluation_table import comparison_table, evaluation_results, explanations, results_table
from .folder import empty_model
from .markdown import cell, cells, count, duration, grouped, hub_name, is_repo_id, linked, listed, shell
from .plots import plot_acceptance
from .record import EvaluationRecord, SpeedRecord, TrainingRecord, is_number


__all__ = [
    "KEPT_MARKER",
    "MARKER",
    "CardFacts",
    "check_card",
    "describe_loading",
    "draw_plot",
    "render_card",
]

MARKER = "<!-- Written by hf_poss from what is recorded; `hf-poss card` writes it anew. -->"
KEPT_MARKER = "<!-- hf_poss keeps what is written below this line. -->"
_TAGS = ("poss", "position-specialists", "speculative-decoding", "eagle")


@dataclass
class CardFacts:
    """What a card tells.

    Args:
        name: title.
        config: of the specialists.
        repo_id: what the examples load: a Hub name or a folder.
        record: how they were trained, and acceptance.
        speed: what a timing gave, if there was one.
        evaluation: what an evaluation gave, if there was one.
        has_code: whether `custom_generate/` lies beside the weights.
        usage: Python that stands for the usual example, where that does not fit.
        loading: Markdown on what loading does, for checkpoints of another layout.
        plot: path of the plot as the card names it.
        kept: Markdown after the generated text.
    """

    name: str
    config: PosSConfig
    repo_id: str
    record: TrainingRecord = field(default_factory=TrainingRecord)
    speed: SpeedRecord | None = None
    evaluation: EvaluationRecord | None = None
    has_code: bool = False
    usage: str = ""
    loading: str = ""
    plot: str | None = None
    kept: str = ""

    @property
    def base_model(self) -> str | None:
        """The target as the record names it, else as the config does."""
        return self.record.base_model or self.config.target_name_or_path


@dataclass
class _Acceptance:
    """A row of the table: rates of `measure` by draft position. `key` names it in the plot and in the model index."""

    measure: str
    source: str
    rates: Sequence[float]
    tau: float | None = None
    key: str | None = None

    def rate(self, position: int) -> str:
        return f"{self.rates[position - 1]:.2f}" if position <= len(self.rates) else ""

    @property
    def length(self) -> str:
        return "" if self.tau is None else f"{self.tau:.2f}"


def describe_loading(config: PosSConfig) -> str:
    """Markdown on a checkpoint in the public code's layout, which says nothing of draft positions."""
    n, k = config.positions_per_specialist, config.num_draft_positions
    text = (
        "This checkpoint has the layout of the public code, which `from_pretrained` converts on load. Its files do "
        f"not say how positions are dealt: `positions_per_specialist`, {n}, is told from the repository's name, and "
        f"`num_draft_positions`, {k}, is that times the number of layers. Under another name pass both: "
        f"`PosSModel.from_pretrained(..., positions_per_specialist={n}, num_draft_positions={k})`."
    )
    return textwrap.fill(text, 119, break_long_words=False, break_on_hyphens=False)


def draw_plot(facts: CardFacts, path: str | os.PathLike) -> bool:
    """Draws pos-acc and tau; False, and no file, where there are none or matplotlib is not installed."""
    rows = [row for row in _acceptance(facts) if row.key]
    return bool(rows) and plot_acceptance(
        path,
        {row.key: row.rates for row in rows if row.rates},
        {row.key: row.tau for row in rows if row.tau is not None},
        facts.config.positions_per_specialist,
        facts.config.num_specialists,
    )


def render_card(facts: CardFacts, previous: ModelCardData | None = None) -> ModelCard:
    """The card that tells `facts`.

    Args:
        previous: metadata of the card that this one replaces; what the records do not decide stays.

    Raises:
        ValueError: if the metadata are not valid, see [`check_card`].
    """
    import jinja2

    config, record, speed, evaluation = facts.config, facts.record, facts.speed, facts.evaluation
    target = facts.base_model
    target_code = json.dumps(hub_name(target) or "TARGET")
    rows = _acceptance(facts)
    template = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    ).from_string(Path(__file__).with_name("card_template.md").read_text(encoding="utf-8"))
    content = template.render(
        card_data=_metadata(facts, rows, previous).to_yaml(),
        marker=MARKER,
        kept_marker=KEPT_MARKER,
        kept=facts.kept,
        name=facts.name,
        specialists=count(config.num_specialists, "position specialist"),
        target=linked(target) if target else "a target that is not named",
        size=_size(config),
        spans=_spans(config),
        target_code=target_code,
        tokenizer_code=json.dumps(hub_name(record.tokenizer)) if hub_name(record.tokenizer) else target_code,
        tokenizer=f", {linked(record.tokenizer)}" if record.tokenizer else "",
        poss_code=json.dumps(facts.repo_id),
        has_code=facts.has_code,
        low_rank=config.specialist_adapter is not None,
        usage=facts.usage.strip("\n"),
        loading=facts.loading,
        training=cells(_training(facts)) if record != TrainingRecord() else [],
        command=shell(record.command),
        acceptance=rows,
        positions=range(1, max((len(row.rates) for row in rows), default=0) + 1),
        explanations=_explanations(facts, rows),
        plot=facts.plot,
        speed=[] if speed is None else cells(_speed(speed)),
        speed_command=None if speed is None else shell(speed.command),
        evaluation=None if evaluation is None else _evaluation(evaluation),
        geometry=f"hidden size {config.hidden_size}, vocabulary {config.vocab_size}",
        depth=config.num_draft_positions,
    )
    card = ModelCard(content.rstrip("\n") + "\n")
    check_card(card)
    return card


def check_card(card: ModelCard) -> None:
    """What the Hub checks of a model card, as far as that goes without it.

    Raises:
        ValueError: if metadata that a model card has are missing, are no valid names, or results are not finite.
    """
    data = ModelCard(str(card)).data.to_dict()  # through the text: YAML may read a value as another type
    problems = []
    if not data.get("library_name"):
        problems.append("`library_name` is missing")
    for key in ("base_model", "datasets"):
        names = data.get(key) or []
        for name in [names] if isinstance(names, str) else names:
            if not is_repo_id(name):
                problems.append(f"`{key}` is {name!r}, which is no name on the Hub")
    for key in ("tags", "language"):
        values = data.get(key) or []
        if not all(isinstance(value, str) for value in ([values] if isinstance(values, str) else values)):
            problems.append(f"`{key}` is {values!r}; expected text")
    if not isinstance(data.get("license", ""), str):
        problems.append(f"`license` is {data['license']!r}; expected an identifier such as apache-2.0")
    for model in data.get("model-index", []):
        for result in model["results"]:
            for metric in result["metrics"]:
                if not isinstance(metric["value"], (int, float)) or metric["value"] != metric["value"]:
                    problems.append(f"the value of {metric['type']} is {metric['value']!r}")
    if problems:
        raise ValueError(f"The card's metadata are not valid: {'; '.join(problems)}.")


def _metadata(facts: CardFacts, rows: Iterable[_Acceptance], previous: ModelCardData | None) -> ModelCardData:
    record = facts.record
    base_model = hub_name(facts.base_model)
    datasets = [name for name in record.datasets if is_repo_id(name)]
    results = [result for row in rows if row.key for result in _results(row, facts)]
    if facts.evaluation is not None:
        results += evaluation_results(facts.evaluation)
    managed = {
        "base_model": base_model,
        # Specialists are weights beside the target's, without embedding and head: of what the Hub knows (adapter,
        # finetune, merge, quantized) the nearest is an adapter.
        "base_model_relation": "adapter" if base_model else None,
        "library_name": "hf_poss",
        "datasets": datasets or None,
        "model-index": None,
        "license": record.license,
        "language": record.language or None,
    }
    kept = {} if previous is None else previous.to_dict()
    tags = [*_TAGS, *(["custom_generate"] if facts.has_code else []), *(kept.pop("tags", None) or [])]
    for name in ("license", "language"):
        managed[name] = managed[name] or kept.get(name)
    data = ModelCardData(**{**kept, **managed}, tags=tags)
    if results:
        data.model_name, data.eval_results = facts.repo_id.split("/")[-1], results
    return data


def _results(row: _Acceptance, facts: CardFacts) -> list[EvalResult]:
    datasets = facts.record.datasets if row.key == "simulated" else []
    common = {
        "task_type": "text-generation",
        "task_name": "Speculative decoding",
        "dataset_type": datasets[0] if datasets else "custom",
        "dataset_name": row.source,
        "dataset_config": row.key,
    }
    results = []
    if row.tau is not None:
        results.append(
            EvalResult(**common, metric_type="tau", metric_name="tau", metric_value=round(float(row.tau), 4))
        )
    for position, rate in enumerate(row.rates, start=1):
        name = f"pos-acc, draft position {position}"
        results.append(
            EvalResult(
                **common,
                metric_type="pos_acc",
                metric_name=name,
                metric_value=round(float(rate), 4),
                metric_args={"position": position},
            )
        )
    return results


# ---- Parts ----


def _acceptance(facts: CardFacts) -> list[_Acceptance]:
    record, speed = facts.record, facts.speed
    simulated = _joined("simulated", record.eval_samples, "sample")
    rows = [
        _Acceptance("top-1 accuracy", simulated, record.by_position("accuracy")),
        _Acceptance("pos-acc", simulated, record.by_position("pos_acc"), record.metrics.get("eval_tau"), "simulated"),
        _Acceptance(
            "pos-acc",
            _joined("generate", record.generate_prompts, "prompt"),
            record.generate_pos_acc,
            record.generate_tau,
            "generate",
        ),
    ]
    if speed is not None:
        timed = _joined("generate, timed", speed.prompts, "prompt")
        rows.append(_Acceptance("pos-acc", timed, speed.pos_acc, speed.tau, "timed"))
    if facts.evaluation is not None:
        for row in facts.evaluation.acceptance:
            temperature = f"temperature {row['temperature']:g}"
            source = _joined(f"evaluation, {temperature}", row["questions"], "question")
            rows.append(_Acceptance("pos-acc", source, row["pos_acc"], row["tau"], temperature))
    rows = [
        replace(
            row,
            rates=list(itertools.takewhile(is_number, row.rates)),
            tau=row.tau if is_number(row.tau) else None,
        )
        for row in rows
    ]
    return [row for row in rows if row.rates or row.tau is not None]


def _joined(source: str, number: int | None, noun: str) -> str:
    return f"{source}, {count(number, noun)}" if number else source


def _explanations(facts: CardFacts, rows: Iterable[_Acceptance]) -> list[str]:
    keys = {row.key for row in rows}
    lines = []
    if "simulated" in keys:
        lines.append(
            "Simulated: chains start at every row of fixed text, and a draft counts as accepted where it is the "
            "target's most likely token."
        )
    if None in keys:
        lines.append("Top-1 accuracy: the same over all rows, whatever came before in the chain.")
    if "generate" in keys:
        settings = listed(facts.record.generate_settings)
        lines.append(f"generate: what the target accepted while it wrote{f' ({settings})' if settings else ''}.")
    if facts.evaluation is not None and facts.evaluation.acceptance:
        lines.append("evaluation: what the target accepted while it answered the prompts of the evaluation below.")
    return lines


def _training(facts: CardFacts) -> list[tuple[str, Any]]:
    config, record = facts.config, facts.record
    revision = f" at `{record.base_model_revision}`" if record.base_model_revision else ""
    data = [*map(linked, record.datasets), *(f"`{name}`" for name in record.files)]
    return [
        ("Target", linked(facts.base_model) + revision if facts.base_model else None),
        ("Started from", linked(record.init_from) if record.init_from else None),
        ("Data", ", ".join(data)),
        ("Samples", grouped(record.samples)),
        ("Tokens an epoch", grouped(record.tokens)),
        ("Losses", listed(record.losses)),
        ("Draft positions, K", config.num_draft_positions),
        ("Positions a specialist, n", config.positions_per_specialist),
        ("Target layers read", ", ".join(map(str, config.feature_layers or ()))),
        ("Draft vocabulary", grouped(config.draft_vocab_size)),
        ("Specialists", f"low-rank: {listed(config.specialist_adapter)}" if config.specialist_adapter else None),
        *((name.replace("_", " ").capitalize(), value) for name, value in record.hyperparameters.items()),
        ("Hardware", record.hardware),
        ("Time", None if record.seconds is None else duration(record.seconds)),
        ("Versions", listed(record.versions)),
    ]


def _speed(speed: SpeedRecord) -> list[tuple[str, Any]]:
    speedup = None if speed.speedup is None else f"{speed.speedup:.2f}x"
    if speedup and speed.runs:
        speedup += f", median of {count(speed.runs, 'paired run')}"
    if speedup and speed.lowest is not None and speed.highest is not None:
        speedup += f" (lowest {speed.lowest:.2f}x, highest {speed.highest:.2f}x)"
    identical = None
    if speed.identical is not None and speed.prompts:
        identical = f"{speed.identical} of {speed.prompts}"
    tau = None if speed.tau is None else f"{speed.tau:.2f}"
    if tau and speed.tokens and speed.rounds:
        tau += f" ({grouped(speed.tokens)} tokens in {grouped(speed.rounds)} rounds)"
    return [
        ("Speed-up", speedup),
        ("Tokens a second without specialists", None if speed.plain_rate is None else f"{speed.plain_rate:.1f}"),
        ("Tokens a second with specialists", None if speed.poss_rate is None else f"{speed.poss_rate:.1f}"),
        ("Outputs identical to plain `generate`", identical),
        ("tau", tau),
        ("Time spent", ", ".join(f"{name} {share:.0%}" for name, share in speed.time_shares.items())),
        ("Target", linked(speed.target) if speed.target else None),
        ("Settings", listed(speed.settings)),
        ("Machine", speed.hardware),
        ("Versions", listed(speed.versions)),
    ]


def _evaluation(record: EvaluationRecord) -> dict[str, Any]:
    """What the template has of an evaluation."""
    about = [
        ("Target", linked(record.target) if record.target else None),
        ("Settings", listed(record.settings)),
        ("Machine", record.hardware),
        ("Versions", listed(record.versions)),
    ]
    return {
        "drafter": cell(record.drafter),
        "results": results_table(record),
        "explanations": explanations(record),
        "compared": comparison_table(record),
        "comparisons": {name: list(map(cell, sentences)) for name, sentences in record.comparisons.items()},
        "about": cells(about),
        "command": shell(record.command),
    }


def _spans(config: PosSConfig) -> list[tuple[int, str]]:
    """Specialist (1-based) and the draft positions that it was trained on."""
    n, spans = config.positions_per_specialist, []
    for index in range(config.num_specialists):
        first, last = index * n + 1, min((index + 1) * n, config.num_draft_positions)
        spans.append((index + 1, str(first) if first == last else f"{first} to {last}"))
    return spans


def _size(config: PosSConfig) -> str:
    parameters = sum(parameter.numel() for parameter in empty_model(config).parameters())
    dtype = getattr(config, "dtype", None)
    stored = f" in {str(dtype).removeprefix('torch.')}" if dtype is not None else ""
    for unit, size in (("billion", 1e9), ("million", 1e6)):
        if parameters >= size:
            return f"{parameters / size:.2f} {unit} parameters{stored}."
    return f"{parameters:,} parameters{stored}."
