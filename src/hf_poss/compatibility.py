"""What hf_poss needs of transformers beyond its public interface, looked up once.

Nothing else in the package touches these names.
"""

import inspect
from collections.abc import Callable
from typing import Any

import transformers
from transformers import GenerationMixin
from transformers.generation.candidate_generator import AssistedCandidateGenerator
from transformers.utils import output_capturing


__all__ = ["LAST_HIDDEN_STATE", "original_method", "replace_method"]

_WORKING_VERSIONS = "transformers>=5.15"

# The places where `generate` reaches an assistant, with the arguments that are read there.
_HOOKS = {
    "_validate_generation_mode": ("generation_mode", "generation_config", "generation_mode_kwargs"),
    "_get_candidate_generator": ("generation_config", "input_ids", "logits_processor", "model_kwargs"),
    "_assisted_decoding": (
        "input_ids",
        "logits_processor",
        "stopping_criteria",
        "generation_config",
        "synced_gpus",
        "streamer",
        "assistant_model",
    ),
}


def _check_hooks() -> None:
    missing = []
    for name, arguments in _HOOKS.items():
        method = getattr(GenerationMixin, name, None)
        if method is None:
            missing.append(f"GenerationMixin.{name}")
            continue
        parameters = inspect.signature(inspect.unwrap(method)).parameters
        missing.extend(f"{name}({argument}=)" for argument in arguments if argument not in parameters)
    if not hasattr(AssistedCandidateGenerator, "requires_model_outputs"):
        missing.append("CandidateGenerator.requires_model_outputs")
    if missing:
        raise ImportError(
            f"transformers {transformers.__version__} lacks what hf_poss hooks into: {', '.join(missing)}. "
            f"Install a version that works: pip install '{_WORKING_VERSIONS}'."
        )


_check_hooks()
_originals: dict[str, Callable[..., Any]] = {name: getattr(GenerationMixin, name) for name in _HOOKS}

# Value of `output_hidden_states` that makes the target return its last hidden state. Newer releases take an index and
# keep that layer only; older ones keep all layers.
LAST_HIDDEN_STATE: int | bool = -1 if hasattr(output_capturing, "selected_hidden_states") else True


def original_method(name: str) -> Callable[..., Any]:
    """transformers' own method of `GenerationMixin`."""
    return _originals[name]


def replace_method(name: str, method: Callable[..., Any]) -> None:
    """Puts `method` in the place of `GenerationMixin`'s; `original_method(name)` puts it back."""
    setattr(GenerationMixin, name, method)
