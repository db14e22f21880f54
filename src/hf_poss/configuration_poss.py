"""Configuration of position specialists."""

import copy
import os
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.utils import logging

from .adapter_settings import complete_adapter
from .compatibility import relative_imports


__all__ = ["PosSConfig", "eos_token_ids", "specialist_index"]

logger = logging.get_logger(__name__)

DEFAULT_ROPE_THETA = 10000.0
EPSILON_NAMES = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_eps", "norm_epsilon")


@strict
class PosSConfig(PreTrainedConfig):
    r"""Configuration of a [`PosSModel`]: the target's geometry, and how draft positions are dealt to specialists.

    Args:
        vocab_size (`int`, defaults to 32000): Vocabulary of the target; `generate` compares the two.
        hidden_size (`int`, defaults to 4096): Width of the target's features and of every specialist.
        intermediate_size (`int`, defaults to 11008): Width of a specialist's MLP.
        num_attention_heads (`int`, defaults to 32): Query heads of a specialist.
        num_key_value_heads (`int`, *optional*): Key-value heads; `num_attention_heads` if not given.
        head_dim (`int`, *optional*): Width of a head, even; `hidden_size // num_attention_heads` if not given.
        hidden_act (`str`, defaults to `"silu"`): Activation of the gated MLP.
        max_position_embeddings (`int`, defaults to 2048): Longest sequence of the target.
        rms_norm_eps (`float`, defaults to 1e-6): Epsilon of the norm after attention.
        initializer_range (`float`, defaults to 0.02): Standard deviation of fresh weights.
        rope_parameters (`dict`, *optional*): Rotary embedding of the target, or plain RoPE where it has none.
        attention_bias (`bool`, defaults to `False`): Bias in the query, key and value projections.
        mlp_bias (`bool`, defaults to `False`): Bias in the MLP.
        fc_bias (`bool`, defaults to `True`): Bias in `fc`, which fuses an embedding with a feature; EAGLE has one.
        positions_per_specialist (`int`, defaults to 2): n, the draft positions that one specialist serves. PosS-n in
            the paper.
        num_draft_positions (`int`, defaults to 6): K, the draft positions trained. Drafting may go deeper: the last
            specialist goes on.
        logit_scale (`float`, defaults to 1.0): Factor that the target puts on its logits (Cohere, Granite).
        final_logit_softcapping (`float`, *optional*): Soft cap of the target's logits (Gemma 2).
        target_name_or_path (`str`, *optional*): The target that the specialists draft for.
        feature_layers (`list[int]`, *optional*): Hidden states of the target that specialists read, through one
            projection (EAGLE-3: a low, a middle and a high one): 0 is the embedding's, i that behind layer i. The last
            ones, which the head reads, if not given.
        draft_vocab_size (`int`, *optional*): Tokens that specialists draft from, the most frequent ones; all of the
            target's if not given.
        specialist_adapter (`dict`, *optional*): Makes specialists one full layer with a low-rank adapter for each, of
            peft's LoRA layers. Keys are `r` (16), `lora_alpha` (2 * r), `lora_dropout` (0.0), `use_rslora` (False) and
            `target_modules` (all projections of a specialist), as in `peft.LoraConfig`; what is left out is filled in.
            Full layers if not given.

    Raises:
        huggingface_hub.errors.StrictDataclassError: if a field has another type.
        ValueError: if a count is below 1, heads do not divide, `head_dim` is odd, the activation is unknown, or
            `specialist_adapter` has other keys, other modules or values that are out of range.

    Example:

    ```python
    >>> from hf_poss import PosSConfig

    >>> config = PosSConfig(positions_per_specialist=2, num_draft_positions=6)
    >>> config.num_specialists, [config.specialist_index(k) for k in (1, 2, 3, 6, 9)]
    (3, [0, 0, 1, 2, 2])
    ```"""

    model_type = "poss"
    _auto_class = "AutoConfig"  # what is saved holds the code, for whoever does not have this package
    keys_to_ignore_at_inference = ["predictions"]

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    rope_parameters: dict | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    fc_bias: bool = True
    positions_per_specialist: int = 2
    num_draft_positions: int = 6
    logit_scale: float = 1.0
    final_logit_softcapping: float | None = None
    target_name_or_path: str | None = None
    feature_layers: list[int] | None = None
    draft_vocab_size: int | None = None
    specialist_adapter: dict | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads >= 1:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": DEFAULT_ROPE_THETA}
        if isinstance(self.specialist_adapter, dict):
            self.specialist_adapter = complete_adapter(self.specialist_adapter)
        super().__post_init__(**kwargs)
        self.validate_architecture()  # a plain ValueError, before `@strict` would wrap it

    def validate_architecture(self):
        """Part of `@strict`'s validation: values that fit together."""
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
            "positions_per_specialist",
            "num_draft_positions",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; expected 1 or more.")
        if self.num_attention_heads % self.num_key_value_heads:
            divisors = [n for n in range(1, self.num_attention_heads + 1) if self.num_attention_heads % n == 0]
            raise ValueError(
                f"`num_key_value_heads` is {self.num_key_value_heads}; expected a divisor of `num_attention_heads` "
                f"({self.num_attention_heads}): one of {divisors}."
            )
        if self.head_dim % 2:
            raise ValueError(f"`head_dim` is {self.head_dim}; rotary embeddings need an even number.")
        if self.draft_vocab_size is not None and not 1 <= self.draft_vocab_size <= self.vocab_size:
            raise ValueError(
                f"`draft_vocab_size` is {self.draft_vocab_size}; expected 1 to `vocab_size` ({self.vocab_size}), or "
                "None for all tokens."
            )
        if self.feature_layers is not None:
            layers = list(self.feature_layers)
            if not layers or any(layer < 0 for layer in layers) or len(set(layers)) < len(layers):
                raise ValueError(
                    f"`feature_layers` is {layers}; expected different indices of hidden states, 0 (the embedding's) "
                    "or above, or None for the last hidden states."
                )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` is {self.hidden_act!r}; expected one of {sorted(ACT2FN)}.")

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As in transformers, with the code that `target.generate(custom_generate=save_directory)` runs.

        A model's `save_pretrained` calls it, in the one process that writes and before anything is uploaded.
        """
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        if self._auto_class is not None:
            _save_custom_generate(Path(save_directory) / "custom_generate")

    @property
    def num_specialists(self) -> int:
        """S = ceil(K / n)."""
        return -(-self.num_draft_positions // self.positions_per_specialist)

    @property
    def feature_size(self) -> int:
        """Width of the target's features: `hidden_size` for each of `feature_layers`."""
        return self.hidden_size * (1 if self.feature_layers is None else len(self.feature_layers))

    def specialist_index(self, position: int) -> int:
        """Specialist (0-based) of draft position k (1-based): min((k - 1) // n, S - 1).

        Raises:
            ValueError: if `position` is below 1.
        """
        if position < 1:
            raise ValueError(f"Draft position {position} does not exist; positions count from 1.")
        return specialist_index(position, self.positions_per_specialist, self.num_specialists)

    @classmethod
    def from_target_config(cls, target_config: PreTrainedConfig, **kwargs: Any) -> "PosSConfig":
        """The geometry of a decoder-only target's text model, overridden by `kwargs`.

        Attributes are read under the names that transformers' families use; what a family lacks (a GPT-2 has no
        RoPE and no RMS norm) takes this class's default.

        Raises:
            ValueError: if the target is an encoder-decoder, or its width or vocabulary cannot be read.
        """
        if target_config.is_encoder_decoder:
            raise ValueError(
                f"The target is an encoder-decoder ({target_config.model_type}); position specialists draft for "
                "decoder-only targets. Pass a causal language model."
            )
        text = copy.copy(target_config.get_text_config())
        # Families whose layers differ (Gemma 4) then answer with the value of most layers, where they else raise.
        text.allow_global_per_layer_attribute_access = True
        hidden_size = _first(text, "hidden_size")
        vocab_size = _first(text, "vocab_size")
        heads = _first(text, "num_attention_heads")
        if hidden_size is None or vocab_size is None or heads is None:
            raise ValueError(
                f"The config of the target ({target_config.model_type}) lacks `hidden_size`, `vocab_size` or "
                "`num_attention_heads`. Pass the config of a decoder-only language model."
            )
        geometry = {
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": _intermediate_size(text, hidden_size),
            "num_attention_heads": heads,
            **_head_geometry(text, hidden_size, heads),
            "hidden_act": _first(text, "hidden_act", "hidden_activation", "activation_function") or "silu",
            "max_position_embeddings": _first(text, "max_position_embeddings") or 2048,
            "rms_norm_eps": float(_first(text, *EPSILON_NAMES) or 1e-6),
            "rope_parameters": _rope_parameters(text),
            "logit_scale": _logit_scale(text),
            "final_logit_softcapping": _first(text, "final_logit_softcapping"),
            "bos_token_id": _token_id(_first(text, "bos_token_id")),
            "eos_token_id": _first(text, "eos_token_id"),
            "pad_token_id": _token_id(_first(text, "pad_token_id")),
            "target_name_or_path": target_config.name_or_path or None,
        }
        return cls(**{**geometry, **kwargs})


def _save_custom_generate(folder: Path) -> None:
    source = Path(__file__).with_name("custom_generate.py")
    if not source.is_file():  # this module came with a checkpoint itself, and transformers copied what it imports only
        logger.warning_once(
            f"Saved without {folder.name}/: its code is not beside {__file__}. Copy that folder from the checkpoint "
            "that was loaded, or save with hf_poss installed."
        )
        return
    folder.mkdir(exist_ok=True)
    shutil.copyfile(source, folder / "generate.py")
    for module in relative_imports(source):
        shutil.copyfile(module, folder / module.name)


def specialist_index(position: int, positions_per_specialist: int, num_specialists: int) -> int:
    """min((k - 1) // n, S - 1) of draft position k (1-based)."""
    return min((position - 1) // positions_per_specialist, num_specialists - 1)


def eos_token_ids(config: Any) -> list[int]:
    """The end-of-sequence tokens that a config names, of a model or of a call: none, one or several."""
    eos = getattr(config, "eos_token_id", None)
    return [] if eos is None else [int(token) for token in (eos if isinstance(eos, (list, tuple)) else [eos])]


def _first(config: PreTrainedConfig, *names: str) -> Any:
    """The first of the named attributes that is there and not None."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _token_id(value: Any) -> int | None:
    return value[0] if isinstance(value, (list, tuple)) else value


def _intermediate_size(text: PreTrainedConfig, hidden_size: int) -> int:
    width = _first(text, "intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "moe_intermediate_size")
    if isinstance(width, (list, tuple)):
        width = max(width)
    return width or 4 * hidden_size


def _head_geometry(text: PreTrainedConfig, hidden_size: int, heads: int) -> dict[str, int]:
    # Multi-head latent attention (DeepSeek) has no plain head width; its specialist takes the usual one.
    latent = _first(text, "kv_lora_rank") is not None
    head_dim = None if latent else _first(text, "head_dim")
    key_value_heads = heads if latent else _first(text, "num_key_value_heads", "num_kv_heads") or heads
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        key_value_heads = 1
    head_dim = head_dim or hidden_size // heads
    # A rotary embedding turns pairs; a target without one may have heads of odd width.
    return {"num_key_value_heads": key_value_heads, "head_dim": head_dim + head_dim % 2}


def _rope_parameters(text: PreTrainedConfig) -> dict[str, Any] | None:
    rope = getattr(text, "rope_parameters", None)
    if not rope:
        return None
    # Families that alternate windows keep one set a layer type; a specialist sees the whole context.
    nested = [value for value in rope.values() if isinstance(value, dict)]
    rope = dict(rope.get("full_attention") or nested[0] if nested else rope)
    rope.pop("partial_rotary_factor", None)
    rope.pop("mrope_section", None)
    rope["rope_theta"] = rope.get("rope_theta") or DEFAULT_ROPE_THETA
    if rope.get("rope_type") not in ("default", "linear", "dynamic", "yarn", "llama3"):
        rope = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    return rope


def _logit_scale(text: PreTrainedConfig) -> float:
    if (scaling := _first(text, "logits_scaling")) is not None:
        # HyperCLOVA X multiplies by it; Granite, which named it, divides.
        return float(scaling) if text.model_type.startswith("hyperclovax") else 1.0 / float(scaling)
    if text.model_type == "mpt":  # has a `logit_scale` that its class does not apply
        return 1.0
    return float(_first(text, "logit_scale") or 1.0)
