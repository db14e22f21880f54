"""`target.generate(**inputs, custom_generate=folder, trust_remote_code=True)` without this package.

A saved drafter holds a copy of this module as `custom_generate/generate.py`, beside copies of what it imports.
"""

import functools
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from .compatibility import custom_generate_source, is_hooked
from .generation import enable
from .modeling_poss import PosSModel, placement


__all__ = ["generate"]

_HUB_ARGUMENTS = ("cache_dir", "local_files_only", "revision", "token")


def generate(
    model: PreTrainedModel, assistant_model: PreTrainedModel | None = None, **kwargs: Any
) -> ModelOutput | torch.LongTensor:
    """`model.generate(**kwargs)` with the position specialists that this code came with.

    They are loaded by the first call, from the folder or repository that `custom_generate` names.

    Args:
        model: the target.
        assistant_model: specialists to use instead.
        kwargs: as in `generate`, and `revision`, `token`, `cache_dir` and `local_files_only` of the repository.

    Raises:
        ValueError: if it is not called through `custom_generate=`, and no `assistant_model` is given.
    """
    hub = tuple((name, kwargs.pop(name)) for name in _HUB_ARGUMENTS if name in kwargs)
    if assistant_model is None:
        source = custom_generate_source()
        if source is None:
            raise ValueError(
                "This `generate` cannot tell where its position specialists are. Call it as "
                "`target.generate(..., custom_generate=folder, trust_remote_code=True)`, or pass `assistant_model=`."
            )
        assistant_model = _specialists(source, hub, *placement(model), _state(source))
    # An installed package goes first: its statistics see the call, and one copy of the loop is in place.
    if not is_hooked():
        enable()
    # Not `model.generate`, which may be bound to this very function.
    return GenerationMixin.generate(model, assistant_model=assistant_model, **kwargs)


def _state(source: str) -> tuple[tuple[str, int], ...]:
    """Names and times of a folder's files: specialists that were saved anew are loaded anew."""
    return tuple(sorted((file.name, file.stat().st_mtime_ns) for file in Path(source).glob("*.*")))


@functools.lru_cache(maxsize=4)
def _specialists(
    source: str,
    hub: tuple[tuple[str, Any], ...],
    device: torch.device,
    dtype: torch.dtype,
    state: tuple[tuple[str, int], ...],
) -> PosSModel:
    return PosSModel.from_pretrained(source, dtype=dtype, **dict(hub)).to(device)
