"""Position specialists (PosS, arXiv 2506.03566) for Hugging Face transformers.

Importing the package registers its Auto classes and lets `generate` take a [`PosSModel`] as `assistant_model`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel

from .candidate_generator import PosSCandidateGenerator
from .configuration_poss import PosSConfig
from .generation import disable, enable
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


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


AutoConfig.register("poss", PosSConfig, exist_ok=True)
AutoModel.register(PosSConfig, PosSModel, exist_ok=True)
enable()
