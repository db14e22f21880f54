"""Ways to decode that a benchmark sets against each other."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CompileConfig, PreTrainedModel

from ..candidate_generator import DraftSettings
from ..compatibility import compile_everywhere
from ..modeling_poss import PosSModel


__all__ = ["CONTESTANTS", "PLAIN", "PLAIN_COMPILED", "Contestant", "fixed_settings", "make_contestants"]

PLAIN, PLAIN_COMPILED = "plain", "plain-compiled"

CONTESTANTS = {
    PLAIN: "`generate` as it is, eager",
    PLAIN_COMPILED: "`generate` with a static cache and torch.compile",
    "prompt-lookup": "drafts looked up in the text so far (`prompt_lookup_num_tokens`)",
    "assistant": "drafts of a smaller language model",
    "poss-chain": "specialists, one branch",
    "poss-tree": "specialists, a tree of one size",
    "poss-auto": "specialists, the tree that pays most by measured costs",
    "poss-compiled": "specialists, the tree of one size, static caches and torch.compile",
    "poss-auto-compiled": "specialists, the tree that pays most, static caches and torch.compile",
}


@dataclass(frozen=True)
class Contestant:
    """A way to decode.

    Args:
        name: one of `CONTESTANTS`.
        arguments: of `generate`, beside the prompt and what all contestants share.
        settings: of the drafts if they are of one size.
        knobs: of `poss.generation_config` while it runs; None where no specialists draft.
    """

    name: str
    arguments: dict[str, Any]
    settings: DraftSettings | None = None
    knobs: dict[str, Any] | None = None

    @property
    def has_specialists(self) -> bool:
        return self.knobs is not None

    @property
    def baseline(self) -> str:
        """The contestant that decodes without drafts in the same mode."""
        return PLAIN_COMPILED if "compile_config" in self.arguments else PLAIN

    @contextmanager
    def set_up(self) -> Iterator[None]:
        """Sets the knobs of the specialists for the block."""
        if not self.has_specialists:
            yield
            return
        with _knobs_set(self.arguments["assistant_model"], self.knobs):
            yield


def fixed_settings(
    poss: PosSModel,
    device: torch.device,
    depth: int | None = None,
    top_k: int | None = None,
    total_tokens: int | None = None,
) -> DraftSettings:
    """Drafts of one size: what is None is the drafter's knob, or its default if that is no number.

    Raises:
        ValueError: if a number is too small.
    """
    knobs = {"num_assistant_tokens": depth, "draft_top_k": top_k, "draft_total_tokens": total_tokens}
    for name, value in knobs.items():
        own = getattr(poss.generation_config, name, None)
        knobs[name] = own if value is None and isinstance(own, int) else value
    with _knobs_set(poss, knobs):
        return DraftSettings.of(poss, device)


@contextmanager
def _knobs_set(poss: PosSModel, knobs: dict[str, Any]) -> Iterator[None]:
    config = poss.generation_config
    before = {name: getattr(config, name, None) for name in knobs}
    for name, value in knobs.items():
        setattr(config, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def make_contestants(
    names: Sequence[str],
    poss: PosSModel,
    settings: DraftSettings,
    device: torch.device,
    assistant: PreTrainedModel | None = None,
    prompt_lookup_num_tokens: int = 10,
) -> list[Contestant]:
    """The named contestants, and plain `generate` in the modes that they run in, which they are measured by.

    On a CPU transformers compiles only if it is told to, and "reduce-overhead", CUDA graphs, means nothing there.

    Args:
        settings: of trees; chains have their depth.
        assistant: a language model of the target's vocabulary.

    Raises:
        ValueError: if a name is unknown, or "assistant" is named and there is none.
    """
    unknown = sorted(set(names) - set(CONTESTANTS))
    if unknown:
        raise ValueError(f"Unknown contestants: {', '.join(unknown)}; expected some of {', '.join(CONTESTANTS)}.")
    if "assistant" in names and assistant is None:
        raise ValueError("The contestant `assistant` needs a smaller language model: pass `--assistant`.")
    config = CompileConfig(mode="default" if device.type == "cpu" else "reduce-overhead")
    compiled = {"cache_implementation": "static", "compile_config": compile_everywhere(config)}
    chain = DraftSettings(settings.depth, 1, settings.depth + 1)

    def specialists(settings: DraftSettings | None, knobs: dict[str, Any], mode: dict[str, Any] | None = None):
        return {"assistant_model": poss, **(mode or {})}, settings, knobs

    fixed, automatic = _knobs(settings), {"num_assistant_tokens": "auto", "draft_total_tokens": "auto"}
    parts = {
        PLAIN: ({},),
        PLAIN_COMPILED: (compiled,),
        "prompt-lookup": ({"prompt_lookup_num_tokens": prompt_lookup_num_tokens},),
        "assistant": ({"assistant_model": assistant},),
        "poss-chain": specialists(chain, _knobs(chain)),
        "poss-tree": specialists(settings, fixed),
        "poss-auto": specialists(None, {**fixed, **automatic}),
        "poss-compiled": specialists(settings, fixed, compiled),
        "poss-auto-compiled": specialists(None, {**fixed, **automatic}, compiled),
    }
    made = {name: Contestant(name, *of) for name, of in parts.items()}
    baselines = dict.fromkeys([PLAIN, *(made[name].baseline for name in names)])
    return [made[name] for name in dict.fromkeys((*baselines, *names))]


def _knobs(settings: DraftSettings) -> dict[str, Any]:
    return {
        "num_assistant_tokens": settings.depth,
        "draft_top_k": settings.top_k,
        "draft_total_tokens": settings.total_tokens,
    }
