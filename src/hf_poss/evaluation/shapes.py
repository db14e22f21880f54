"""Targets and specialists of random weights at real sizes, to measure what a round costs without the weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..configuration_poss import PosSConfig
from ..modeling_poss import PosSModel, placement


__all__ = ["SHAPES", "random_poss", "random_prompt", "random_target", "shape_config"]

# As in the config.json of each; "llama-32x512" is a deep, narrow one that a CPU runs at some speed.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "rms_norm_eps": 1e-5,
    },
    "llama-2-13b": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "rms_norm_eps": 1e-5,
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "rms_norm_eps": 1e-6,
    },
    "llama-32x512": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 32,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "rms_norm_eps": 1e-5,
    },
    "tiny": {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "rms_norm_eps": 1e-5,
    },
}


def shape_config(name: str) -> PreTrainedConfig:
    """The config of a named shape, or of a `config.json` or a folder with one. No end of sequence: a text of random
    weights ends where the benchmark says.

    Raises:
        ValueError: if the name is unknown, or the file is no config of a model.
    """
    if name in SHAPES:
        fields = dict(SHAPES[name])
    else:
        path = Path(name)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(
                f"There is no shape {name!r}, and no file: expected {', '.join(SHAPES)}, or a config.json."
            )
        try:
            fields = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}. Expected a model's config.json.") from error
        if not isinstance(fields, dict) or "model_type" not in fields:
            raise ValueError(f"{path} has no `model_type`; expected a model's config.json.")
    fields.pop("quantization_config", None)
    try:
        config = AutoConfig.for_model(**fields)
    except StrictDataclassError as error:
        raise ValueError(f"{name} is no config of a model: {error} Correct the field.") from error
    config.eos_token_id = config.get_text_config().eos_token_id = None
    return config


def random_target(
    config: PreTrainedConfig, device: torch.device, dtype: torch.dtype, attn_implementation: str | None = None
) -> PreTrainedModel:
    """A target of random weights, which never exist in another dtype or on another device."""
    target = _materialized(
        lambda: AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation), device, dtype
    )
    target.generation_config.eos_token_id = None
    target.generation_config.pad_token_id = 0
    return target


def random_poss(target: PreTrainedModel, **config_kwargs: Any) -> PosSModel:
    """Specialists of random weights for `target`, attached to it.

    `fc` keeps the size of the features that it reads, so that a draft at depth 6 is as sure as at depth 1. With
    `draft_vocab_size` the draft vocabulary is the lowest ids.

    Args:
        config_kwargs: fields of [`PosSConfig`]: `positions_per_specialist`, `num_draft_positions`...
    """
    config = PosSConfig.from_target_config(target.config, **config_kwargs)
    poss = _materialized(lambda: PosSModel(config), *placement(target))
    torch.nn.init.normal_(poss.fc.weight, std=config.hidden_size**-0.5)
    if config.draft_vocab_size is not None:
        poss.set_draft_vocabulary(torch.arange(config.vocab_size, 0, -1))
    return poss.attach(target)


def _materialized(make: Callable[[], PreTrainedModel], device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """What `make` makes, on `device` in `dtype`; weights that were not there before are random."""
    with torch.device("meta"):
        model = make()
    for parameter in model.parameters():  # not the buffers: rotary frequencies are float32
        parameter.data = parameter.data.to(dtype)
    model.to_empty(device=device)
    model.init_weights()
    return model.requires_grad_(False).eval()


def random_prompt(vocab_size: int, rows: int, tokens: int, seed: int, device: torch.device) -> dict[str, torch.Tensor]:
    """`input_ids` int64 [rows, tokens] of random ids, and an `attention_mask` of ones."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(vocab_size, (rows, tokens), generator=generator).to(device)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
