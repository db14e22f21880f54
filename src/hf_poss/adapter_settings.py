"""What `specialist_adapter` of a config may say."""

from collections.abc import Mapping
from typing import Any


__all__ = ["PROJECTIONS", "complete_adapter"]

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Adapters on every projection, as QLoRA (arXiv 2305.14314) found to matter more than their rank.
_DEFAULTS = {"r": 16, "lora_dropout": 0.0, "use_rslora": False, "target_modules": PROJECTIONS}
_KEYS = (*_DEFAULTS, "lora_alpha")


def complete_adapter(given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a specialist's LoRA, the missing ones filled in; they are arguments of `peft.LoraConfig`.

    Args:
        given: some of `r` (16), `lora_alpha` (2 * r), `lora_dropout` (0.0), `use_rslora` (False) and `target_modules`
            (all of `PROJECTIONS`, also called "all-linear").

    Raises:
        ValueError: if there are other keys or modules, or a value is out of range.
    """
    unknown = sorted(str(key) for key in given if key not in _KEYS)
    if unknown:
        raise ValueError(
            f"`specialist_adapter` has unknown keys: {', '.join(unknown)}; expected some of "
            f"{', '.join(sorted(_KEYS))}."
        )
    settings = {**_DEFAULTS, **given}
    rank, dropout = settings["r"], settings["lora_dropout"]
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise _refused("r", rank, "an integer of 1 or more")
    settings.setdefault("lora_alpha", 2 * rank)
    if not _is_number(settings["lora_alpha"]) or settings["lora_alpha"] <= 0:
        raise _refused("lora_alpha", settings["lora_alpha"], "a number above 0")
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise _refused("lora_dropout", dropout, "0 or more, below 1")
    if not isinstance(settings["use_rslora"], bool):
        raise _refused("use_rslora", settings["use_rslora"], "True or False")

    modules = settings["target_modules"]
    if not isinstance(modules, (str, list, tuple, set)):
        raise _refused("target_modules", modules, f"a list of some of {', '.join(PROJECTIONS)}")
    names = [modules] if isinstance(modules, str) else list(modules)
    names = list(PROJECTIONS) if names == ["all-linear"] else names
    wrong = sorted(str(name) for name in names if name not in PROJECTIONS)
    if wrong or not names:
        raise _refused("target_modules", ", ".join(wrong) or [], f"some of {', '.join(PROJECTIONS)}")
    settings["target_modules"] = [name for name in PROJECTIONS if name in names]
    return settings


def _refused(key: str, found: Any, expected: str) -> ValueError:
    return ValueError(f"`specialist_adapter[{key!r}]` is {found!r}; expected {expected}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
