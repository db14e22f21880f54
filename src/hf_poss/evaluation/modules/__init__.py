"""The measures as modules of Hugging Face `evaluate`, each in a folder that `evaluate.load` takes by its path."""

from pathlib import Path


try:
    import evaluate as _  # noqa: F401
except ImportError as error:
    raise ImportError(
        "These modules are made for Hugging Face `evaluate`, which is not installed. "
        "Install it: pip install 'hf-poss[evaluation]'."
    ) from error

from .acceptance_length.acceptance_length import AcceptanceLength
from .output_identity.output_identity import OutputIdentity
from .position_acceptance.position_acceptance import PositionAcceptance
from .speculative_speedup.speculative_speedup import SpeculativeSpeedup


__all__ = ["AcceptanceLength", "OutputIdentity", "PositionAcceptance", "SpeculativeSpeedup", "metric_path"]

METRICS = ("acceptance_length", "output_identity", "position_acceptance", "speculative_speedup")


def metric_path(name: str) -> str:
    """Folder of a module, as `evaluate.load` and `evaluate.combine` take it.

    Args:
        name: acceptance_length, output_identity, position_acceptance or speculative_speedup.

    Raises:
        ValueError: if there is no such module.
    """
    if name not in METRICS:
        raise ValueError(f"There is no module {name!r}; expected one of {', '.join(METRICS)}.")
    return str(Path(__file__).parent / name)
