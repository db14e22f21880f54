"""Position specialists (PosS, arXiv 2506.03566) for Hugging Face transformers.

Importing the package registers its Auto classes and lets `generate` and pipelines take a [`PosSModel`]
as `assistant_model`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel

from . import generation, pipelines
from .candidate_generator import PosSCandidateGenerator
from .configuration_poss import PosSConfig
from .modeling_poss import PosSModel, PosSPreTrainedModel
from .statistics import collect_statistics


if TYPE_CHECKING:
    from .training import PosSTrainer, PosSTrainingArguments

__version__ = "0.1.0"

__all__ = [
    "PosSCandidateGenerator",
    "PosSConfig",
    "PosSModel",
    "PosSPreTrainedModel",
    "PosSTrainer",
    "PosSTrainingArguments",
    "collect_statistics",
    "disable",
    "enable",
]

# Training pulls in accelerate, so it is imported when it is asked for.
_LAZY = {"PosSTrainer": ".training", "PosSTrainingArguments": ".training"}


def enable() -> None:
    """Makes `target.generate(..., assistant_model=poss)` and pipelines run position specialists.

    `import hf_poss` calls it; calling it again changes nothing.
    """
    generation.enable()
    pipelines.enable()


def disable() -> None:
    """Puts transformers' own methods back."""
    generation.disable()
    pipelines.disable()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


AutoConfig.register("poss", PosSConfig, exist_ok=True)
AutoModel.register(PosSConfig, PosSModel, exist_ok=True)
enable()
