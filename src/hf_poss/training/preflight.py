"""What can be found wrong with a training before its target is loaded: config and tokenizer are enough for it."""

import os
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import strtobool

from ..configuration_poss import PosSConfig
from .arguments import PosSTrainingArguments
from .checks import check_tokenizer
from .metrics import metric_names
from .resume import check_output_dir, check_resume, checkpoint_to_resume, last_good_checkpoint


__all__ = [
    "check_evaluation",
    "check_launch",
    "check_start",
    "check_target_config",
    "check_trackers",
    "choose_checkpoint",
]


def check_launch(args: PosSTrainingArguments) -> None:
    """Refuses launch settings that training could not keep to.

    Raises:
        ValueError: if FSDP loads weights in one process only: it sends the others those of the trained model alone, so
            the target would have none. If gradient entries are to be clipped under DeepSpeed.
    """
    if all(_is_on(name) for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")):
        raise ValueError(
            "The launch asks for FSDP's memory-saving loading, which leaves the target empty in all processes but the "
            "first. Set `fsdp_cpu_ram_efficient_loading: false` in the accelerate config."
        )
    if args.max_grad_value and args.deepspeed_plugin is not None:
        raise ValueError(
            f"`max_grad_value` ({args.max_grad_value}) does not exist under DeepSpeed, which clips by norm only. Pass "
            "--max_grad_value 0 --max_grad_norm 0.5 (EAGLE's own DeepSpeed setting)."
        )


def check_trackers(trackers: Sequence[str]) -> None:
    """Refuses trackers (`report_to`) that transformers does not know or that are not installed.

    Raises:
        ValueError: naming them.
    """
    get_reporting_integration_callbacks(list(trackers))
    missing = sorted(set(trackers) - {*get_available_reporting_integrations(), "azure_ml", "flyte"})
    if missing:
        raise ValueError(
            f"`--report_to` names {', '.join(missing)}, which is not installed. Install it (pip install "
            f"{' '.join(missing)}), or leave it out."
        )


def check_evaluation(args: PosSTrainingArguments, num_draft_positions: int, has_evaluation_data: bool) -> None:
    """Refuses arguments that ask for evaluations without data, or to keep the best by a metric that does not exist.

    Raises:
        ValueError: saying how to name evaluation data, or which metrics there are.
    """
    if args.eval_strategy != IntervalStrategy.NO and not has_evaluation_data:
        raise ValueError(
            f"`--eval_strategy {args.eval_strategy.value}` asks for evaluations, and there is no data for them. Name "
            "it with `--eval_dataset`, or keep a share of the data with `--eval_share 0.02`."
        )
    metric = (args.metric_for_best_model or "loss").removeprefix("eval_")
    known = ["loss", *metric_names(list(args.losses), num_draft_positions)]
    known += ["generate_tau"] * bool(args.eval_generate_prompts)
    if metric not in known and not metric.startswith("generate_pos_acc_"):
        raise ValueError(f"There is no metric {metric!r} for `--metric_for_best_model`; expected {', '.join(known)}.")


def _is_on(name: str) -> bool:
    return bool(strtobool(os.environ.get(name) or "false"))


def check_target_config(config: PosSConfig, target_config: PreTrainedConfig) -> None:
    """Refuses specialists that the target's config already rules out.

    Raises:
        ValueError: if `feature_layers` names layers that the target does not have, or width or vocabulary differ.
    """
    text = target_config.get_text_config()
    layers = text.num_hidden_layers
    if config.feature_layers is not None and max(config.feature_layers) > layers:
        raise ValueError(
            f"`feature_layers` is {list(config.feature_layers)}; the target has hidden states 0 (the embedding's) to "
            f"{layers} (behind its last layer)."
        )
    for name in ("hidden_size", "vocab_size"):
        expected, found = getattr(text, name), getattr(config, name)
        if expected != found:
            raise ValueError(
                f"The specialists have a `{name}` of {found}, the target one of {expected}: they are of another "
                "target. Start from a checkpoint that was made for this one, or from random weights."
            )


def choose_checkpoint(resume: str, output_dir: str | Path, config: PosSConfig) -> str | None:
    """The checkpoint that a run goes on from, or None to begin.

    Args:
        resume: "auto" for the newest one in `output_dir` that is whole, if there is one; "never", for a folder that
            has none; or a folder.
        output_dir: of the run.
        config: of the specialists to train.

    Raises:
        ValueError: if the checkpoint, or what a finished run left in `output_dir`, is of other specialists; if the
            folder that was named is broken; or if there are checkpoints in spite of "never".
    """
    if resume not in ("auto", "never"):
        return checkpoint_to_resume(resume, output_dir, config)
    checkpoint = last_good_checkpoint(output_dir)
    if checkpoint is not None and resume == "never":
        raise ValueError(
            f"{checkpoint} is of an earlier run, and would later be taken for one of this run. Remove the checkpoints "
            f"of {output_dir}, or train into another folder."
        )
    check_resume(checkpoint or output_dir, config)
    return checkpoint


def check_start(
    args: PosSTrainingArguments,
    config: PosSConfig,
    target_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    streaming: bool = False,
) -> None:
    """All of the above that concerns a new run, and the arguments that depend on one another.

    Args:
        args: of the training.
        config: of the specialists.
        target_config, tokenizer: of the target.
        streaming: whether the length of the data is unknown.

    Raises:
        ValueError: saying what was found, what was expected, and what to do.
    """
    check_launch(args)
    check_trackers(args.report_to)
    check_output_dir(args.output_dir)
    check_tokenizer(tokenizer, target_config)
    check_target_config(config, target_config)
    args.weights_of_positions(config.num_draft_positions)
    if streaming and args.max_steps <= 0:
        raise ValueError("A stream has no length to count epochs by. Say how many steps to train: `--max_steps`.")
