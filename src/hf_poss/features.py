"""What specialists read of a target's hidden states."""

from collections.abc import Sequence

import torch

from .compatibility import SELECTS_HIDDEN_STATES


__all__ = ["hidden_states_wanted", "select_features"]


def hidden_states_wanted(feature_layers: Sequence[int] | None) -> bool | list[int]:
    """Value of `output_hidden_states` for which a target returns what specialists read, and the last hidden states.

    Older releases of transformers return those of every layer.
    """
    return [*(feature_layers or ()), -1] if SELECTS_HIDDEN_STATES else True


def select_features(
    hidden_states: Sequence[torch.Tensor | None], feature_layers: Sequence[int] | None
) -> torch.Tensor:
    """The features that specialists read, [batch, tokens, layers * hidden]: the last hidden states, which the target's
    head reads, or those that `feature_layers` names, side by side (EAGLE-3).

    Args:
        hidden_states: of the target's output, by layer, [batch, tokens, hidden] each; the embedding's first.
        feature_layers: indices of them, or None.
    """
    if feature_layers is None:
        return hidden_states[-1]
    device = hidden_states[-1].device  # layers may lie on several
    return torch.cat([hidden_states[layer].to(device) for layer in feature_layers], dim=-1)
