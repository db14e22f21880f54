"""The drafters that the study compares, all from one EAGLE layer."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from hf_poss import PosSConfig, PosSModel


@dataclass(frozen=True)
class Method:
    """A way to make a drafter.

    Args:
        title: for tables.
        positions_per_specialist: n; None for one layer at all positions.
        trained_positions: K of the training roll-out; None for the K of the run.
        make: from the folder of the EAGLE layer, n and K; `PosSModel.from_eagle` if None.
    """

    title: str
    positions_per_specialist: int | None
    trained_positions: int | None = None
    make: Callable[[Path, int, int], PosSModel] | None = None

    def build(self, start: Path, positions: int, target: PreTrainedModel) -> PosSModel:
        """The drafter before training, on the target's device."""
        positions = self.trained_positions or positions
        n = self.positions_per_specialist or positions
        made = (self.make or _copies)(start, n, positions)
        return made.to(target.device).attach(target)


def _copies(start: Path, n: int, positions: int) -> PosSModel:
    return PosSModel.from_eagle(str(start), positions_per_specialist=n, num_draft_positions=positions, dtype="float32")


def _adapters(start: Path, n: int, positions: int) -> PosSModel:
    """One shared layer, trained too, with an adapter for each specialist."""
    return PosSModel.from_eagle(
        str(start),
        positions_per_specialist=n,
        num_draft_positions=positions,
        specialist_adapter={"r": 8},
        dtype="float32",
    )


def _wide(start: Path, n: int, positions: int) -> PosSModel:
    """One layer with the parameters of PosS-2: the EAGLE layer with further MLP units, whose output is 0 at first, so
    that it begins as the same function."""
    eagle, rivals = _copies(start, positions, positions), _copies(start, 2, positions)
    config = eagle.config
    missing = _layer_parameters(rivals) - _layer_parameters(eagle)
    extra = round(missing / (3 * config.hidden_size))
    wide = PosSModel(PosSConfig.from_dict({**config.to_dict(), "intermediate_size": config.intermediate_size + extra}))
    weights = eagle.state_dict()
    for name, value in wide.state_dict().items():
        if name.endswith("mlp.down_proj.weight"):
            weights[name] = torch.cat([weights[name], torch.zeros(len(value), extra)], dim=1)
        elif ".mlp." in name and weights[name].shape != value.shape:
            weights[name] = torch.cat([weights[name], value[-extra:]])
    wide.load_state_dict(weights)
    return wide


def _layer_parameters(poss: PosSModel) -> int:
    return sum(parameter.numel() for parameter in poss.layers.parameters())


METHODS = {
    "eagle": Method("EAGLE", None, trained_positions=1),
    "hass": Method("HASS (one layer)", None),
    **{f"poss{n}": Method(f"PosS-{n}", n) for n in (1, 2, 3, 4)},
    "wide": Method("one wide layer", None, make=_wide),
    "lora2": Method("PosS-2, adapters", 2, make=_adapters),
}
