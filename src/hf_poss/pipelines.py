"""`pipeline("text-generation", model=..., assistant_model=...)` with position specialists."""

import functools
from typing import Any

from transformers import PreTrainedModel

from .checkpoints import is_published_layout
from .compatibility import original_method, replace_method
from .modeling_poss import PosSModel, is_poss, placement


__all__ = ["disable", "enable"]


def enable() -> None:
    """Makes pipelines take position specialists, as an object or as the name of a saved one."""
    replace_method("load_assistant_model", _load_assistant_model)


def disable() -> None:
    """Puts transformers' own function back."""
    replace_method("load_assistant_model", original_method("load_assistant_model"))


@functools.wraps(original_method("load_assistant_model"))
def _load_assistant_model(
    model: PreTrainedModel, assistant_model: Any, assistant_tokenizer: Any
) -> tuple[PreTrainedModel | None, Any]:
    if isinstance(assistant_model, str) and not is_published_layout(assistant_model, {}):
        device, dtype = placement(model)
        assistant_model = PosSModel.from_pretrained(assistant_model, dtype=dtype).to(device)
    if is_poss(assistant_model) and model.can_generate():
        return assistant_model, None  # they write the target's tokens, and need no tokenizer of their own
    return original_method("load_assistant_model")(model, assistant_model, assistant_tokenizer)
