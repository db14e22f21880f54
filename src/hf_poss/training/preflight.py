"""What can be found wrong with a training before its target is loaded: config and tokenizer are enough for it."""

import os
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import strtobool

from ..configuration_poss import PosSConfig
from .arguments import PosSTrainingArguments
from .data import check_tokenizer
from .resume import check_output_dir, check_resume, checkpoint_to_resume, last_good_checkpoint


__all__ = ["check_launch", "check_start", "check_target_config", "choose_checkpoint"]


def check_launch() -> None:
    """Refuses launch settings under which a frozen target would have no weights.

    Raises:
        ValueError: if FSDP loads weights in one process only; it sends the others those of the trained model alone.
    """
    if all(_is_on(name) for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")):
        raise ValueError(
            "The launch asks for FSDP's memory-saving loading, which leaves the target empty in all processes but the "
            "first. Set `fsdp_cpu_ram_efficient_loading: false` in the accelerate config."
        )


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
        resume: "auto" for the newest one in `output_dir` that is whole, if there is one; "never"; or a folder.
        output_dir: of the run.
        config: of the specialists to train.

    Raises:
        ValueError: if the checkpoint is of other specialists, or the folder that was named is broken.
    """
    if resume == "never":
        return None
    if resume != "auto":
        return checkpoint_to_resume(resume, output_dir, config)
    checkpoint = last_good_checkpoint(output_dir)
    if checkpoint is not None:
        check_resume(checkpoint, config)
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
    check_launch()
    check_output_dir(args.output_dir)
    check_tokenizer(tokenizer, target_config)
    check_target_config(config, target_config)
    args.weights_of_positions(config.num_draft_positions)
    if streaming and args.max_steps <= 0:
        raise ValueError("A stream has no length to count epochs by. Say how many steps to train: `--max_steps`.")
