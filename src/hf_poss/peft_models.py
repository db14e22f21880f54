"""Models that peft wraps: what lies inside, its adapters in place."""

import sys
from typing import Any

from transformers import PreTrainedModel


__all__ = ["without_peft"]


def _is_peft_model(model: Any) -> bool:
    """Whether `model` is a `PeftModel` or a `PeftMixedModel`. Where peft is not imported there is none."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, (peft.PeftModel, peft.PeftMixedModel))


def without_peft(model: Any) -> PreTrainedModel:
    """The model that a `PeftModel` wraps; other models come back as they are.

    Its layers are the adapted ones, so it goes on obeying the wrapper: `set_adapter`, `disable_adapter`, dropout.

    Raises:
        ValueError: if it runs under virtual tokens, which live in the wrapper.
    """
    while _is_peft_model(model):
        active = getattr(model, "active_peft_config", None)
        if getattr(active, "is_prompt_learning", False):
            raise ValueError(
                f"The model runs with virtual tokens ({active.peft_type.value}), which specialists cannot follow. "
                "Use an adapter that changes weights (LoRA and the like)."
            )
        # A `PeftMixedModel` has no `get_base_model`; its attribute is the tuner, whose own is the model.
        model = model.get_base_model() if hasattr(type(model), "get_base_model") else model.base_model.model
    return model
