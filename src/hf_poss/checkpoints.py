"""Reading checkpoints: the published PosS, EAGLE and HASS layout, and what is refused."""

import contextlib
import json
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig
from transformers.utils import cached_file, logging

from .configuration_poss import PosSConfig


__all__ = ["check_loading_info", "is_published_layout", "read_published", "reading", "repository_name"]

logger = logging.get_logger(__name__)

EAGLE_DRAFT_POSITIONS = 6  # EAGLE-2 drafts six levels deep
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
# In the files, but not ours: the embedding is the target's, the frequencies are computed.
_LEFT_OUT = re.compile(r"embed_tokens\.weight|(.*\.)?rotary_emb\.inv_freq")


@contextlib.contextmanager
def reading(path_or_repo: str | None) -> Iterator[None]:
    """Turns what readers raise on damaged files into one error that says what to do.

    Raises:
        ValueError: for a corrupt or truncated safetensors file or index, or a `.bin` that holds more than tensors.
    """
    try:
        yield
    except (SafetensorError, EOFError, pickle.UnpicklingError, json.JSONDecodeError) as error:
        raise ValueError(
            f"The weights in {path_or_repo} cannot be read ({type(error).__name__}: {_first_line(error)}). The file "
            "is corrupt, truncated, or a pickle that holds more than tensors, which is never executed. Download it "
            "again, or ask its author for safetensors."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["no message"])[0]


def check_loading_info(info: dict[str, Any], source: Any) -> None:
    """Refuses a checkpoint that did not fill the model exactly; transformers alone would start from random weights.

    Raises:
        ValueError: naming the missing, unexpected and mismatched keys.
    """
    problems = {
        "missing": sorted(info.get("missing_keys", ())),
        "unexpected": sorted(info.get("unexpected_keys", ())),
        "of another shape": sorted(str(key) for key in info.get("mismatched_keys", ())),
    }
    _refuse_keys({kind: keys for kind, keys in problems.items() if keys}, source)


def _refuse_keys(problems: dict[str, list[str]], source: Any) -> None:
    if problems:
        listing = "; ".join(
            f"{kind}: {', '.join(keys[:8])}{' ...' * (len(keys) > 8)}" for kind, keys in problems.items()
        )
        source = f"{source} " if isinstance(source, str) else ""
        raise ValueError(
            f"The checkpoint {source}does not hold position specialists of this shape ({listing}). Expected `fc` and "
            "`layers.{i}` with q, k, v, o, gate, up and down projections and `post_attention_layernorm`, and nothing "
            "else. EAGLE-3 and full language models have another layout; a cut-off file lacks keys: download it again."
        )


def is_published_layout(path_or_repo: str | None, kwargs: dict[str, Any]) -> bool:
    """Whether the config at `path_or_repo` is another model's: published drafters carry their target's."""
    if path_or_repo is None:
        return False
    config, _ = PreTrainedConfig.get_config_dict(path_or_repo, **_hub_arguments(kwargs))
    return config.get("model_type") != PosSConfig.model_type


def _hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: kwargs[name] for name in _HUB_ARGUMENTS if kwargs.get(name) is not None}


def read_published(path_or_repo: str, kwargs: dict[str, Any]) -> tuple[PosSConfig, dict[str, torch.Tensor]]:
    """Config and weights of a published checkpoint, in our names.

    Args:
        path_or_repo: folder or Hub name.
        kwargs: of `from_pretrained`; `positions_per_specialist` and `num_draft_positions` are taken out.

    Raises:
        ValueError: if keys or shapes are not those of position specialists, the layers cannot be dealt to positions,
            or the config is missing.
    """
    positions_per_specialist = kwargs.pop("positions_per_specialist", None)
    num_draft_positions = kwargs.pop("num_draft_positions", None)
    hub = _hub_arguments(kwargs)
    config_dict, _ = PreTrainedConfig.get_config_dict(path_or_repo, **hub)
    if not config_dict:
        raise ValueError(f"No config.json in {path_or_repo}: it tells the specialists' geometry. Put it there again.")
    files, keys = _weight_files(path_or_repo, hub)
    if keys is not None:
        _check_names(keys, path_or_repo)
    state_dict: dict[str, torch.Tensor] = {}
    for file in files:
        state_dict |= _load(file)
    left_out = sorted(key for key in state_dict if _LEFT_OUT.fullmatch(key))
    state_dict = {key: value for key, value in state_dict.items() if key not in left_out}
    num_layers = _check_names(state_dict, path_or_repo)

    target_config = AutoConfig.from_pretrained(path_or_repo, **hub) if "model_type" in config_dict else None
    n, k = _positions(path_or_repo, num_layers, positions_per_specialist, num_draft_positions)
    config = PosSConfig.from_target_config(
        target_config or LlamaConfig(**config_dict),
        positions_per_specialist=n,
        num_draft_positions=k,
        fc_bias="fc.bias" in state_dict,
        attention_bias="layers.0.self_attn.q_proj.bias" in state_dict,
        mlp_bias="layers.0.mlp.gate_proj.bias" in state_dict,
        target_name_or_path=None,
        dtype=str(state_dict["fc.weight"].dtype).removeprefix("torch."),
    )
    logger.info(
        f"Read {num_layers} layer(s) from {path_or_repo} as position specialists: n = {n}, K = {k}. "
        f"Left to the target: {', '.join(left_out) or 'nothing'}."
    )
    return config, state_dict


def _weight_files(path_or_repo: str, hub: dict[str, Any]) -> tuple[list[str], list[str] | None]:
    """Files to read, and all their keys where an index lists them."""
    for name in _WEIGHT_FILES:
        file = cached_file(path_or_repo, name, _raise_exceptions_for_missing_entries=False, **hub)
        if file is None:
            continue
        if not name.endswith(".index.json"):
            return [file], None
        weight_map = json.loads(Path(file).read_text())["weight_map"]
        shards = [cached_file(path_or_repo, shard, **hub) for shard in sorted(set(weight_map.values()))]
        return shards, list(weight_map)
    raise ValueError(f"No weights in {path_or_repo}: expected one of {', '.join(_WEIGHT_FILES)}.")


def _load(file: str) -> dict[str, torch.Tensor]:
    if file.endswith(".safetensors"):
        return load_file(file)
    try:
        state_dict = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged archive or pickle raises depends on the byte that is damaged
        raise pickle.UnpicklingError(_first_line(error)) from error
    if not isinstance(state_dict, dict) or not all(isinstance(value, torch.Tensor) for value in state_dict.values()):
        raise ValueError(f"{file} holds {type(state_dict).__name__}; expected a dict of tensors by name.")
    return state_dict


def _layer_keys(index: int) -> set[str]:
    return {
        f"layers.{index}.{name}.weight"
        for name in (
            *(f"self_attn.{part}_proj" for part in "qkvo"),
            *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
            "post_attention_layernorm",
        )
    }


def _check_names(keys: Any, source: str) -> int:
    """Number of layers, after a strict comparison of names."""
    keys = {key for key in keys if not _LEFT_OUT.fullmatch(key)}
    indices = {int(match[1]) for key in keys if (match := re.match(r"layers\.(\d+)\.", key))}
    num_layers = max(indices, default=0) + 1
    expected = {"fc.weight"}.union(*(_layer_keys(index) for index in range(num_layers)))
    optional = {key.replace(".weight", ".bias") for key in expected if not re.search("o_proj|layernorm", key)}
    problems = {"missing": sorted(expected - keys), "unexpected": sorted(keys - expected - optional)}
    _refuse_keys({kind: names for kind, names in problems.items() if names}, source)
    return num_layers


def repository_name(path_or_repo: str) -> str:
    """Last part of a repository's or folder's name; for a snapshot in the Hub's cache the repository it is of."""
    if match := re.search(r"models--[^/\\]*--([^/\\]+)[/\\]snapshots[/\\]", str(path_or_repo)):
        return match[1]
    return os.path.basename(os.path.normpath(str(path_or_repo)))


def _positions(path_or_repo: str, num_layers: int, n: int | None, k: int | None) -> tuple[int, int]:
    """Positions per specialist and draft positions, from arguments, the name, or the layout itself."""
    if n is None and (match := re.search(r"poss[-_]?(\d+)(?!\d)", repository_name(path_or_repo), re.IGNORECASE)):
        n = int(match[1])
    if n is None and num_layers == 1:
        n = k = k or EAGLE_DRAFT_POSITIONS
    if n is None:
        raise ValueError(
            f"{path_or_repo} has {num_layers} layers and does not say how many draft positions each serves. "
            "Pass `positions_per_specialist=` (PosS-2 is 2)."
        )
    k = n * num_layers if k is None else k
    if n < 1 or -(-k // n) != num_layers:
        raise ValueError(
            f"{path_or_repo} has {num_layers} layer(s); `positions_per_specialist={n}` and `num_draft_positions={k}` "
            f"need {-(-k // n) if n >= 1 else 'another number'}. Pass values for which "
            "ceil(num_draft_positions / positions_per_specialist) is the number of layers."
        )
    return n, k
