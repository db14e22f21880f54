"""Who decodes in an evaluation: plain `generate`, transformers' own drafters, and methods with their checkpoints."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..candidate_generator import DraftSettings
from ..modeling_poss import PosSModel, placement
from .contestants import PLAIN, Contestant


__all__ = [
    "ASSISTANT",
    "BASELINES",
    "PROMPT_LOOKUP",
    "Drafter",
    "DrafterSpec",
    "assistant_drafter",
    "load_specialists",
    "parse_drafters",
    "plain_drafter",
    "prompt_lookup_drafter",
    "specialists_drafter",
    "takes_rows",
    "weights_digest",
]

PROMPT_LOOKUP, ASSISTANT = "prompt-lookup", "assistant"
BASELINES = (PROMPT_LOOKUP, ASSISTANT)

_SAMPLED = 1024  # values of a tensor that a digest reads


@dataclass(frozen=True)
class DrafterSpec:
    """A method and where its checkpoints are.

    Args:
        name: label.
        checkpoints: folders or Hub names; several are training seeds of one method.
    """

    name: str
    checkpoints: tuple[str, ...]


def takes_rows(kind: str, rows: int) -> bool:
    """Whether what is of a kind, see [`Drafter`], decodes so many rows a call: transformers drafts for one only."""
    return rows == 1 or kind not in BASELINES


def parse_drafters(values: Iterable[str]) -> list[DrafterSpec]:
    """Methods as a command line names them: `NAME=PATH`, `NAME=PATH,PATH`, or a path alone, named after its folder.

    Raises:
        ValueError: if there is no path, several paths have no name, or two methods have one name.
    """
    specs: list[DrafterSpec] = []
    for value in values:
        name, named, rest = value.partition("=")
        if not named or "/" in name:
            name, rest = "", value
        paths = tuple(path.strip() for path in rest.split(",") if path.strip())
        if not paths:
            raise ValueError(f"`--poss {value}` names no folder; expected NAME=PATH, NAME=PATH,PATH or PATH.")
        if not name and len(paths) > 1:
            raise ValueError(
                f"`--poss {value}` has {len(paths)} checkpoints and no name; expected NAME={','.join(paths)}."
            )
        name = name or Path(paths[0].rstrip("/")).name
        if name in (PLAIN, *BASELINES) or name in (spec.name for spec in specs):
            raise ValueError(f"Two drafters would be called {name!r}; give this one another name: NAME={rest}.")
        specs.append(DrafterSpec(name, paths))
    return specs


@dataclass(frozen=True)
class Drafter:
    """A method: one contestant a checkpoint.

    Args:
        name: label.
        kind: "plain", "prompt-lookup", "assistant" or "poss".
        contestants: ways to decode, by checkpoint.
        checkpoints: folders or Hub names; none for what has no weights.
        details: what `evaluation.json` says beside these.
    """

    name: str
    kind: str
    contestants: tuple[Contestant, ...]
    checkpoints: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    def about(self) -> dict[str, Any]:
        """What `evaluation.json` says of it."""
        return {"name": self.name, "kind": self.kind, "checkpoints": list(self.checkpoints), **self.details}


def plain_drafter() -> Drafter:
    """`generate` without drafts, which all others are measured by."""
    return Drafter(PLAIN, PLAIN, (Contestant(PLAIN, {}),), details={"parameters": 0})


def prompt_lookup_drafter(num_tokens: int = 10) -> Drafter:
    """Drafts looked up in the text so far, transformers' `prompt_lookup_num_tokens`."""
    contestant = Contestant(PROMPT_LOOKUP, {"prompt_lookup_num_tokens": num_tokens})
    return Drafter(
        PROMPT_LOOKUP, PROMPT_LOOKUP, (contestant,), details={"parameters": 0, "prompt_lookup_num_tokens": num_tokens}
    )


def assistant_drafter(assistant: PreTrainedModel, checkpoint: str) -> Drafter:
    """A smaller language model of the target's vocabulary drafts, as in transformers."""
    details = {"parameters": _parameters(assistant), "weights": [weights_digest(assistant)]}
    return Drafter(
        ASSISTANT, ASSISTANT, (Contestant(ASSISTANT, {"assistant_model": assistant}),), (checkpoint,), details
    )


def specialists_drafter(
    spec: DrafterSpec, models: Sequence[PosSModel], device: torch.device, knobs: Mapping[str, Any]
) -> Drafter:
    """Specialists: PosS, and EAGLE and HASS, which are one for all positions.

    Args:
        spec: of the method.
        models: its checkpoints.
        device: of the target.
        knobs: of `poss.generation_config` while they draft; those that are None stay the drafter's own.

    Raises:
        ValueError: if the checkpoints differ in size or in how they draft, or a knob is impossible.
    """
    given = {name: value for name, value in knobs.items() if value is not None}
    contestants = [Contestant(spec.name, {"assistant_model": poss}, knobs=given) for poss in models]
    described = [_described(contestant, device) for contestant in contestants]
    for path, other in zip(spec.checkpoints, described, strict=True):
        differences = [name for name, value in other.items() if described[0][name] != value]
        if differences:
            name = differences[0]
            raise ValueError(
                f"The checkpoints of {spec.name} are no seeds of one method: `{name}` is {described[0][name]} in "
                f"{spec.checkpoints[0]} and {other[name]} in {path}. Give each method a name of its own."
            )
    details = {**described[0], "weights": [weights_digest(poss) for poss in models]}
    return Drafter(spec.name, "poss", tuple(contestants), spec.checkpoints, details)


def _described(contestant: Contestant, device: torch.device) -> dict[str, Any]:
    poss = contestant.arguments["assistant_model"]
    with contestant.set_up():
        settings = DraftSettings.of(poss, device)
    return {
        "parameters": _parameters(poss),
        "positions_per_specialist": poss.config.positions_per_specialist,
        "num_specialists": poss.config.num_specialists,
        "num_draft_positions": poss.config.num_draft_positions,
        "draft_vocab_size": poss.config.draft_vocab_size,
        "dtype": str(poss.dtype).removeprefix("torch."),
        "depth": "auto" if settings.auto_depth else settings.depth,
        "top_k": settings.top_k,
        "total_tokens": "auto" if settings.auto_nodes else settings.total_tokens,
    }


def load_specialists(target: PreTrainedModel, path: str) -> PosSModel:
    """Specialists on the device of the target's head, in its dtype.

    Args:
        path: folder or Hub name; published PosS, EAGLE and HASS checkpoints are converted.
    """
    device, dtype = placement(target)
    return PosSModel.from_pretrained(path, dtype=dtype).to(device).eval()


def weights_digest(model: torch.nn.Module) -> str:
    """A digest of the weights by a sample of each tensor, to tell a checkpoint from another of the same size. Weights
    that are not in memory are left out."""
    digest = hashlib.sha256()
    for name, tensor in _tensors(model):
        values = tensor.detach().flatten()
        sample = values[:: max(len(values) // _SAMPLED, 1)].to("cpu", torch.float32)
        digest.update(f"{name} {list(tensor.shape)} ".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return (
        (name, parameter) for name, parameter in sorted(model.named_parameters()) if parameter.device.type != "meta"
    )


def _parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
