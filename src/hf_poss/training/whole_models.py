"""Models that are whole in every process, whatever splits the specialists."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import TrainingArguments


__all__ = ["whole_models"]


@contextmanager
def whole_models(args: TrainingArguments) -> Iterator[None]:
    """Within, models load whole under ZeRO-3, too, for which transformers splits whatever it loads from when `args`
    exist on. A target is not trained, so DeepSpeed would never bring its parts together; the specialists are split
    when training begins."""
    plugin = getattr(args, "deepspeed_plugin", None)
    if plugin is None:
        yield
        return
    from transformers.integrations import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(plugin.dschf)
