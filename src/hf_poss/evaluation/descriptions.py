"""What a measurement says of the target that it is of."""

from typing import Any

from transformers import PreTrainedModel


__all__ = ["describe_target"]


def describe_target(target: PreTrainedModel, name: str | None = None) -> dict[str, Any]:
    """Name, size and dtype.

    Args:
        name: what it is called; by default where it was loaded from.
    """
    of = target.config.get_text_config()
    return {
        "name": name or target.config.name_or_path,
        "type": of.model_type,
        "parameters": sum(parameter.numel() for parameter in target.parameters()),
        "layers": of.num_hidden_layers,
        "hidden_size": of.hidden_size,
        "vocab_size": of.vocab_size,
        "dtype": str(target.dtype).removeprefix("torch."),
    }
