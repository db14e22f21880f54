"""Position specialists: one decoder layer for each span of draft positions, and their recursive roll-out."""

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding, rotate_half
from transformers.utils import ModelOutput, logging

from .checkpoints import check_loading_info, is_published_layout, read_published, reading, repository_name
from .compatibility import (
    device_of,
    is_pipeline_parallel,
    keeps_state,
    mark_as_own,
    peft_arguments,
    unsharded_class,
)
from .configuration_poss import PosSConfig
from .draft_vocabulary import DraftHead, check_draft_vocabulary, choose_vocabulary
from .limits import check_size
from .losses import DEFAULT_LOSSES, parse_losses, roll_out_losses
from .peft_models import without_peft
from .roll_out import KeysValues, roll_out_attention


__all__ = [
    "PosSModel",
    "PosSOutput",
    "PosSPreTrainedModel",
    "TargetReference",
    "adapter_obstacle",
    "check_drafter",
    "check_target",
    "is_poss",
    "placement",
    "poss_of",
    "rotate",
]

logger = logging.get_logger(__name__)

# Cosine and sine of a run of rows, each [batch, rows, head_dim].
RotaryAngles = tuple[torch.Tensor, torch.Tensor]


def check_target(config: PosSConfig, target: PreTrainedModel) -> None:
    """Refuses a target that specialists of this geometry cannot draft for.

    Raises:
        ValueError: if the target is an encoder-decoder, keeps a recurrent state, is split into pipeline stages, has no
            head, has another width or vocabulary or too few layers, or runs under a PEFT method that specialists
            cannot follow.
    """
    name = target.__class__.__name__
    if target.config.is_encoder_decoder:
        raise ValueError(
            f"{name} is an encoder-decoder; position specialists draft for decoder-only targets. "
            "Call `generate` without this assistant."
        )
    if keeps_state(target):
        raise ValueError(
            f"{name} keeps a recurrent state that cannot go back to an earlier token, so rejected drafts cannot be "
            "undone. Call `generate` without this assistant."
        )
    if is_pipeline_parallel(target):
        raise ValueError(
            f"{name} is split into pipeline stages; specialists read embedding and head in every process. "
            "Load it with `tp_plan='auto'` or a `device_map` instead."
        )
    _check_adapters(target)
    head = target.get_output_embeddings()
    if head is None:
        raise ValueError(f"{name} has no language modelling head. Load it with `AutoModelForCausalLM`.")
    vocab_size = target.config.get_text_config().vocab_size
    if vocab_size != config.vocab_size:
        raise ValueError(
            f"The drafter was made for a vocabulary of {config.vocab_size} tokens, {name} has {vocab_size}: they do "
            f"not share a tokenizer. Use a drafter that was trained for this target{_made_for(config)}."
        )
    widths = {
        "embedding": target.get_input_embeddings().weight.shape[-1],
        "hidden states": target.config.get_text_config().hidden_size,
    }
    if hasattr(head, "in_features"):
        widths["head"] = head.in_features
    layers = getattr(target.config.get_text_config(), "num_hidden_layers", None)
    if config.feature_layers is not None and layers is not None and max(config.feature_layers) > layers:
        raise ValueError(
            f"The drafter reads the hidden states {list(config.feature_layers)}, {name} has 0 to {layers}. Use a "
            f"drafter that was trained for this target{_made_for(config)}, or other `feature_layers`."
        )
    for part, width in widths.items():
        if width != config.hidden_size:
            raise ValueError(
                f"The drafter was made for a hidden size of {config.hidden_size}, the {part} of {name} has {width}. "
                f"Use a drafter that was trained for this target{_made_for(config)}."
            )
    expected, found = config.target_name_or_path, target.config.name_or_path
    if expected and found and repository_name(expected) != repository_name(found):
        logger.warning_once(
            f"The drafter was made for {expected}, the target is {found}. The text is right in any case; if the two "
            "differ in more than the name, few drafts are accepted."
        )


def check_drafter(poss: "PosSModel") -> None:
    """Refuses specialists that cannot run where they are.

    Raises:
        ValueError: if weights are on `meta` (never loaded, or offloaded), or on several devices.
    """
    devices = sorted({str(parameter.device) for parameter in poss.parameters()})
    if len(devices) > 1 or devices == ["meta"]:
        raise ValueError(
            f"The drafter's weights are on {', '.join(devices)}; expected one device that computes. Load it without "
            "`device_map` and offloading, and move it to the device of the target's head: `poss.to(...)`."
        )
    if any(isinstance(module, nn.Dropout) and module.training and module.p > 0 for module in poss.modules()):
        logger.warning_once(
            "The drafter is in training mode, and the dropout of its adapters spoils drafts and draws random numbers. "
            "Call `poss.eval()` before `generate`."
        )


def adapter_obstacle(target: PreTrainedModel) -> str | None:
    """Why the adapters of the call that runs do not go with drafts, or None.

    PEFT hands them to the layers by hooks, which stay behind if the call raises: such a call is not refused, but
    decoded without drafts.
    """
    arguments = peft_arguments(target)
    if len(arguments.get("adapter_names", ())) > 1:
        return "`adapter_names` gives rows adapters of their own, and rows leave the batch one by one"
    if any(offset is not None for offset in arguments.get("alora_offsets", ())):
        return "an activated LoRA (aLoRA) counts tokens from the end of a pass, and a pass over drafts has others"
    return None


def _check_adapters(target: PreTrainedModel) -> None:
    # While a PeftModel generates, its own method stands in for the target's.
    owner = getattr(getattr(target, "prepare_inputs_for_generation", None), "__self__", target)
    active = getattr(owner, "active_peft_config", None)
    if getattr(active, "is_prompt_learning", False):
        raise ValueError(
            f"The target runs with virtual tokens ({active.peft_type.value}), which specialists cannot see. "
            "Use an adapter that changes weights (LoRA and the like), or call `generate` without this assistant."
        )


def _made_for(config: PosSConfig) -> str:
    return f" (this one: {config.target_name_or_path})" if config.target_name_or_path else ""


def is_poss(model: Any) -> bool:
    """Whether `model` is made of position specialists, or a `PeftModel` around such a one."""
    return poss_of(model) is not None


def poss_of(model: Any) -> "PosSModel | None":
    """The position specialists in `model`, adapters in place if it is a `PeftModel`; None if it is another model.

    Their class may be one that came with a checkpoint.

    Raises:
        ValueError: if peft wraps LoRA specialists, whose own adapters it switches off, or adds virtual tokens.
    """
    poss = without_peft(model)
    if not isinstance(poss, PreTrainedModel) or poss.config.model_type != PosSConfig.model_type:
        return None
    if poss is not model and poss.config.specialist_adapter is not None:
        raise ValueError(
            "These specialists are made of LoRA adapters already (`specialist_adapter`), and a `PeftModel` around "
            "them switches those off. Load the specialists anew and train them as they are: their adapters, and the "
            "layer that they share."
        )
    return poss


def placement(target: PreTrainedModel) -> tuple[torch.device, torch.dtype]:
    """Device and dtype for specialists that draft for `target`: those of its head, float32 beside packed weights."""
    head = target.get_output_embeddings()
    device = target.device if head is None else device_of(head)
    return device, target.dtype if target.dtype.is_floating_point else torch.float32


class TargetReference:
    """Embedding and head of a target, held by reference: not copied, saved, moved or trained with the drafter.

    Args:
        embed_tokens: maps token ids to [..., hidden] in the width of the drafter.
        lm_head: maps features [..., hidden] to logits [..., vocab].
        config: the drafter's config, for the scaling that the target puts on its logits.
    """

    def __init__(self, embed_tokens: nn.Module, lm_head: nn.Module, config: PosSConfig):
        self.embed_tokens = embed_tokens
        self.lm_head = lm_head
        self.vocab_size = config.vocab_size
        self.logit_scale = config.logit_scale
        self.softcap = config.final_logit_softcapping

    @classmethod
    def from_target(cls, target: PreTrainedModel, config: PosSConfig) -> "TargetReference":
        """Reference to `target`'s modules, after [`check_target`]."""
        check_target(config, target)
        reference = cls(target.get_input_embeddings(), target.get_output_embeddings(), config)
        if any(parameter.is_meta for parameter in reference.lm_head.parameters()):
            logger.warning_once(
                "The target's head is offloaded, and every draft pass loads it. Keep `lm_head` and the embedding on a "
                "device (`device_map`): drafting is then much faster."
            )
        return reference

    def __deepcopy__(self, memo: dict) -> "TargetReference":
        return self

    @torch.no_grad()
    def embed(self, token_ids: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Embeddings [..., hidden] of `token_ids` [...], in the dtype and on the device of `like`."""
        embeddings = self.embed_tokens(token_ids.to(device_of(self.embed_tokens)))
        return embeddings.to(device=like.device, dtype=like.dtype)

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Logits [..., vocab] in float32 of features [..., hidden], on the features' device.

        Gradients reach the features, never the head.
        """
        features_there = features.to(device=device_of(self.lm_head), dtype=self._head_dtype())
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.lm_head.parameters()):
            frozen = {
                name: nn.Parameter(p.detach(), requires_grad=False) for name, p in self.lm_head.named_parameters()
            }
            logits = torch.func.functional_call(self.lm_head, frozen, features_there)
        else:
            logits = self.lm_head(features_there)
        return self.scaled(logits, features.device)

    def scaled(self, logits: torch.Tensor, device: torch.device) -> torch.Tensor:
        """What the target makes of its head's output: in float32 on `device`, scaled and capped."""
        logits = logits.to(device=device, dtype=torch.float32)
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def _head_dtype(self) -> torch.dtype | None:
        """What the head computes in; None for packed weights, which take what they are given."""
        dtype = next(self.lm_head.parameters()).dtype
        return dtype if dtype.is_floating_point and dtype.itemsize > 1 else None


class PosSRotaryEmbedding(LlamaRotaryEmbedding):
    """Llama's rotary embedding, whose frequencies stay in float32 when the model is cast."""

    def _apply(self, fn, recurse=True):
        exact = self.inv_freq
        super()._apply(fn, recurse)
        if self.inv_freq.dtype != torch.float32 and exact.dtype == torch.float32 and not exact.is_meta:
            self.inv_freq = exact.to(self.inv_freq.device)
            self.original_inv_freq = self.inv_freq.clone()
        return self


class PosSAttention(nn.Module):
    """Projections of a specialist's attention; which keys a query sees is the caller's matter."""

    def __init__(self, config: PosSConfig):
        super().__init__()
        self.head_dim = config.head_dim
        query_width = config.num_attention_heads * config.head_dim
        key_value_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=False)

    def split_heads(self, projected: torch.Tensor) -> torch.Tensor:
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [batch, heads, rows, head_dim]


class PosSSpecialist(GradientCheckpointingLayer):
    """One decoder layer as EAGLE has it: attention on the raw input as residual stream, no input norm, no final norm.

    Its three steps are apart because a context row needs the first only (see [`keys_values`]). Training calls them
    together, as a module, so that gradient checkpointing and sharding take effect.
    """

    def __init__(self, config: PosSConfig):
        super().__init__()
        self.self_attn = PosSAttention(config)
        self.mlp = LlamaMLP(config)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def keys_values(self, fused: torch.Tensor, rotary: RotaryAngles) -> KeysValues:
        """Keys and values [batch, key_value_heads, rows, head_dim] of fused inputs [batch, rows, hidden]."""
        attention = self.self_attn
        keys = attention.split_heads(attention.k_proj(fused))
        return rotate(keys, rotary), attention.split_heads(attention.v_proj(fused))

    def queries(self, fused: torch.Tensor, rotary: RotaryAngles) -> torch.Tensor:
        """Queries [batch, heads, rows, head_dim] of fused inputs [batch, rows, hidden]."""
        return rotate(self.self_attn.split_heads(self.self_attn.q_proj(fused)), rotary)

    def complete(self, fused: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Predicted features [batch, rows, hidden] from what queries attended to [batch, heads, rows, head_dim]."""
        hidden = fused + self.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))

    def forward(
        self,
        fused_streams: Sequence[torch.Tensor],
        streams: Sequence[KeysValues],
        rotary: RotaryAngles,
        segment_ids: torch.LongTensor | None = None,
    ) -> tuple[torch.Tensor, tuple[KeysValues, ...]]:
        """One draft position of the training roll-out, see [`roll_out_attention`].

        Args:
            fused_streams: fused inputs [batch, rows, hidden] of the streams that follow `streams`; the last one's rows
                are the queries.
            streams: keys and values of the streams before, as an earlier call returned them.
            rotary: angles of the rows.
            segment_ids: int64 [batch, rows].

        Returns:
            predicted features [batch, rows, hidden], and the keys and values of all streams.
        """
        streams = (*streams, *(self.keys_values(fused, rotary) for fused in fused_streams))
        attended = roll_out_attention(self.queries(fused_streams[-1], rotary), streams, segment_ids)
        return self.complete(fused_streams[-1], attended), streams


def rotate(heads: torch.Tensor, rotary: RotaryAngles) -> torch.Tensor:
    """Turns heads [batch, ..., rows, head_dim] by angles [batch, rows, head_dim]."""
    cos, sin = (angle.unflatten(0, (-1, *(1,) * (heads.dim() - 3))) for angle in rotary)
    return heads * cos + rotate_half(heads) * sin


@dataclass
class PosSOutput(ModelOutput):
    """What the roll-out of [`PosSModel`] returns.

    Args:
        loss (`torch.FloatTensor` of shape `()`): weighted sum of the losses, over all draft positions.
        loss_sums (`torch.FloatTensor` of shape `(batch, losses, num_draft_positions)`): unweighted losses in the order
            in which they were named, sums over the rows that count.
        counts (`torch.LongTensor` of shape `(batch, 4, num_draft_positions)`): rows that count; of these, rows where
            the drafted token is the target's; rows that a chain reached with every token before accepted; and of
            these, rows where it was accepted once more.
        predictions (`tuple` of `torch.FloatTensor` of shape `(batch, rows, hidden)`): features by draft position.
    """

    loss: torch.FloatTensor | None = None
    loss_sums: torch.FloatTensor | None = None
    counts: torch.LongTensor | None = None
    predictions: tuple[torch.FloatTensor, ...] | None = None


class PosSPreTrainedModel(PreTrainedModel):
    config_class = PosSConfig
    base_model_prefix = "poss"
    main_input_name = "input_ids"
    _no_split_modules = ["PosSSpecialist"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        if hasattr(module, "initialize"):  # a part of an adapter, see `SharedLayer`
            module.initialize(module.weight)
        else:
            super()._init_weights(module)


class PosSModel(PosSPreTrainedModel, GenerationMixin):
    """Position specialists (PosS, arXiv 2506.03566) for a decoder-only target.

    The model holds `fc` and the specialists alone; embedding and head are the target's, referenced after
    [`PosSModel.attach`]. It drafts as `target.generate(..., assistant_model=poss)` and learns through `forward`, the
    recursive roll-out. Drafting knobs are fields of `generation_config`:

    - `num_assistant_tokens`: depth of a draft, K by default; deeper than K, the last specialist goes on;
    - `draft_top_k`: branches a node; 10 by default on an accelerator, less on a CPU; 1 makes drafts chains;
    - `draft_total_tokens`: nodes verified a round, the root included; 60 by default on an accelerator, less on a CPU.

    The first and the last may be "auto": every round then drafts and verifies as much as pays on this device.

    Example:

    ```python
    >>> from transformers import AutoModelForCausalLM
    >>> from hf_poss import PosSModel

    >>> target = AutoModelForCausalLM.from_pretrained("meta-llama/Meta-Llama-3-8B-Instruct")
    >>> poss = PosSModel.from_pretrained("HINT-lab/PosS3-Llama3-8B-Instruct")
    >>> output = target.generate(**inputs, assistant_model=poss)
    ```"""

    _auto_class = "AutoModel"  # what is saved holds the code, for whoever does not have this package

    def __init__(self, config: PosSConfig):
        super().__init__(config)
        if config.feature_layers is not None:
            self.feature_fc = nn.Linear(config.feature_size, config.hidden_size, bias=False)
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=config.fc_bias)
        if config.specialist_adapter is None:
            self.layers = nn.ModuleList(PosSSpecialist(config) for _ in range(config.num_specialists))
        else:
            from .specialist_adapters import SharedLayer  # needs peft

            self.shared_layer = SharedLayer(PosSSpecialist(config))
            with torch.device("meta"):
                specialists = [PosSSpecialist(config) for _ in range(config.num_specialists)]
            self.layers = nn.ModuleList(self.shared_layer.adapted(layer, config) for layer in specialists)
        self.rotary_emb = PosSRotaryEmbedding(config)
        if config.draft_vocab_size is not None:  # int64, by frequency; -1 until it is set
            self.register_buffer("draft_vocabulary", torch.full((config.draft_vocab_size,), -1))
        self.reference: TargetReference | None = None
        self.generation_config.num_assistant_tokens = config.num_draft_positions
        self.generation_config.draft_top_k = None
        self.generation_config.draft_total_tokens = None
        # A generation config that counts as derived from the model's drops fields that it does not know.
        mark_as_own(self.generation_config)
        self.post_init()

    # ---- Making one ----

    @classmethod
    def from_target(
        cls,
        target: PreTrainedModel,
        positions_per_specialist: int = 2,
        num_draft_positions: int = 6,
        **config_kwargs: Any,
    ) -> "PosSModel":
        """Fresh specialists in the geometry, dtype and device of `target`, attached to it.

        Args:
            target: a decoder-only language model.
            positions_per_specialist: n, draft positions a specialist serves.
            num_draft_positions: K, draft positions in all.
            config_kwargs: other fields of [`PosSConfig`] to set.

        Raises:
            ValueError: if `target` is no decoder-only language model, K or n is below 1, or the specialists do not fit
                into the memory of the target's device.
        """
        target = without_peft(target)
        config = PosSConfig.from_target_config(
            target.config,
            positions_per_specialist=positions_per_specialist,
            num_draft_positions=num_draft_positions,
            **config_kwargs,
        )
        check_size(config, placement(target)[0])
        check_target(config, target)
        poss = cls(config)
        device, dtype = placement(target)
        return poss.to(device=device, dtype=dtype).attach(target)

    @classmethod
    def from_eagle(
        cls,
        path_or_repo: str,
        positions_per_specialist: int = 2,
        num_draft_positions: int = 6,
        specialist_adapter: dict[str, Any] | None = None,
        draft_vocab_size: int | None = None,
        **kwargs: Any,
    ) -> "PosSModel":
        """Specialists that are all copies of one EAGLE (or HASS) layer, the paper's start.

        Args:
            path_or_repo: folder or Hub name of a checkpoint of one layer, published or saved by this class.
            positions_per_specialist: n, draft positions a specialist serves.
            num_draft_positions: K, draft positions in all.
            specialist_adapter: makes them one copy of it with an adapter for each, see [`PosSConfig`].
            draft_vocab_size: tokens to draft from, which `set_draft_vocabulary` is to choose; as the layer if not
                given.
            kwargs: as in `from_pretrained`.

        Raises:
            ValueError: if the checkpoint has more layers than one, or an adapter, or cannot be read, or if
                `feature_layers` are given.
        """
        if kwargs.get("feature_layers") is not None:
            raise ValueError(
                "An EAGLE layer reads the features that it was trained on, so `feature_layers` cannot be chosen for "
                "its copies. Leave it out, or start from fresh specialists: `PosSModel.from_target`."
            )
        eagle = cls.from_pretrained(path_or_repo, **kwargs)
        if eagle.config.num_specialists != 1:
            raise ValueError(
                f"{path_or_repo} has {eagle.config.num_specialists} layers; expected an EAGLE checkpoint of one. "
                "Load checkpoints of several specialists with `PosSModel.from_pretrained`."
            )
        if eagle.config.specialist_adapter is not None:
            raise ValueError(
                f"{path_or_repo} holds a shared layer with an adapter; expected an EAGLE checkpoint of one full "
                "layer. Go on from it with `PosSModel.from_pretrained`."
            )
        config = PosSConfig.from_dict(
            {
                **eagle.config.to_dict(),
                "positions_per_specialist": positions_per_specialist,
                "num_draft_positions": num_draft_positions,
                "specialist_adapter": specialist_adapter,
                "draft_vocab_size": draft_vocab_size or eagle.config.draft_vocab_size,
            }
        )
        poss = cls(config).to(device=eagle.device, dtype=eagle.dtype)
        weights = {name: value for name, value in eagle.state_dict().items() if not name.startswith("layers.")}
        if draft_vocab_size is not None:
            weights.pop("draft_vocabulary", None)
        poss.load_state_dict(weights, strict=False)
        for layer in poss.layers if specialist_adapter is None else (poss.shared_layer,):
            layer.load_state_dict(eagle.layers[0].state_dict())
        return poss

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | None, *model_args: Any, **kwargs: Any):
        """Loads a saved `PosSModel`, or a published PosS, EAGLE-1/2 or HASS checkpoint, converted on load.

        Args:
            pretrained_model_name_or_path: a folder or a name on the Hub.
            positions_per_specialist (`int`, *optional*): for published checkpoints of several layers, which do not
                store it; told from the repository's name (`PosS2-...`) where that says it.
            num_draft_positions (`int`, *optional*): for published checkpoints; by default
                `positions_per_specialist` times the number of layers, and 6 for a single layer (EAGLE, HASS).
            kwargs: as in [`~transformers.PreTrainedModel.from_pretrained`].

        Raises:
            ValueError: if the file is corrupt, its keys are not exactly those of position specialists, or the
                positions per specialist are unknown.
        """
        source = pretrained_model_name_or_path
        with reading(source):
            if kwargs.get("config") is None and is_published_layout(pretrained_model_name_or_path, kwargs):
                config, state_dict = read_published(pretrained_model_name_or_path, kwargs)
                kwargs |= {"config": config, "state_dict": state_dict}
                pretrained_model_name_or_path = None
            # Mismatched shapes come back in `info`, and are refused with the other keys that do not fit.
            wants_info = kwargs.pop("output_loading_info", False)
            kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
            model, info = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        check_loading_info(info, source)
        if model.config.draft_vocab_size is not None:
            check_draft_vocabulary(model.config, model.draft_vocabulary)
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As in transformers, also for specialists that FSDP2 has sharded, whose whole `state_dict` is then given."""
        with unsharded_class(self):
            super().save_pretrained(save_directory, *args, **kwargs)

    # ---- The target ----

    def attach(self, target: PreTrainedModel) -> "PosSModel":
        """References `target`'s embedding and head, which training reads; `generate` brings its own target.

        Raises:
            ValueError: if the target does not fit, see [`check_target`].
        """
        self.reference = TargetReference.from_target(without_peft(target), self.config)
        return self

    def _attached(self) -> TargetReference:
        if self.reference is None:
            raise ValueError(
                "This PosSModel has no target yet: embedding and head are the target's own. "
                "Call `poss.attach(target)` first, or draft with `target.generate(..., assistant_model=poss)`."
            )
        return self.reference

    def set_draft_vocabulary(
        self,
        counts: torch.LongTensor | Iterable[Any] | None,
        size: int | None = None,
        coverage: float | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> "PosSModel":
        """Drafts from the most frequent tokens alone: a draft pass reads fewer rows of the head, and the text stays
        the same, since the target verifies over its full vocabulary (FR-Spec, EAGLE-3). No training is needed. The
        tokens are saved with the weights.

        Ends of a sequence are kept in any case, and with a tokenizer also the special tokens that its chat template
        writes.

        Args:
            counts: int64 [vocab], how often each token occurs in text like the target's; or the text itself, see
                [`corpus_counts`]: strings, chats or token ids, in a list, a generator, a column of a dataset. None
                drafts from all tokens again.
            size: tokens to keep; `config.draft_vocab_size` if neither it nor `coverage` is given.
            coverage: keeps as many as make up this share of the text, such as 0.99, in place of a size.
            tokenizer: the target's; needed for strings and chats.

        Raises:
            TypeError: if the text is of something else.
            ValueError: if counts are not one a token or all 0, tokens lie outside of the vocabulary, the size is not 1
                to the target's vocabulary or too small for the tokens that are always kept, or the share is not above
                0 and up to 1.

        Example:

        ```python
        >>> poss.set_draft_vocabulary(load_dataset("text", data_files="answers.txt")["train"]["text"], 32000,
        ...     tokenizer=tokenizer)
        >>> target.generate(**inputs, assistant_model=poss)
        ```"""
        if counts is None:
            if size is not None or coverage is not None:
                raise ValueError("There is nothing to choose tokens by. Pass counts or text, or None alone for all.")
            if self.config.draft_vocab_size is not None:
                del self.draft_vocabulary
            self.config.draft_vocab_size = None
            return self
        vocabulary = choose_vocabulary(self.config, counts, size, coverage, tokenizer)
        self.config.draft_vocab_size = len(vocabulary)
        self.register_buffer("draft_vocabulary", vocabulary.to(self.fc.weight.device))
        return self

    def warm_up(
        self,
        target: PreTrainedModel,
        max_length: int = 1024,
        batch_size: int = 1,
        new_tokens: int = 16,
        **generate_kwargs: Any,
    ) -> float:
        """Pays ahead what first calls would: compiles rounds of fixed shapes, and measures what "auto" wants to know.

        Calls that follow compile nothing, as long as they have the same batch size, knobs and `generate_kwargs`, and
        their `max_length` falls into the same bucket or below.

        Args:
            target: that will be drafted for.
            max_length: longest text of the calls to come, prompt and new tokens.
            batch_size: rows of the calls to come.
            new_tokens: tokens that are written and thrown away; two rounds of them at least.
            generate_kwargs: of the calls to come; `cache_implementation="static"` if that is not among them. What ends
                or streams a text is left out.

        Returns:
            seconds that it took.

        Raises:
            ValueError: if there is no room for a prompt and a new token.
        """
        if max_length < 2 or batch_size < 1:
            raise ValueError(
                f"A warm-up of {batch_size} row(s) of up to {max_length} token(s); expected 1 row and 2 tokens (a "
                "prompt and a new one) or more."
            )
        start = time.perf_counter()
        device = device_of(target.get_input_embeddings())
        prompt = torch.ones(batch_size, min(8, max_length - 1), dtype=torch.long, device=device)
        depth = self.generation_config.num_assistant_tokens
        depth = depth if isinstance(depth, int) else self.config.num_draft_positions
        written = max(new_tokens, depth + 3)  # a first round may bring all that it drafts, and one more
        arguments = {"cache_implementation": "static", "do_sample": False, "pad_token_id": 0, **generate_kwargs}
        arguments |= {
            "assistant_model": self,
            "max_new_tokens": max_length - prompt.shape[1],
            "eos_token_id": None,
            "stopping_criteria": StoppingCriteriaList([_StopAt(prompt.shape[1] + written)]),
            "streamer": None,
        }
        target.generate(prompt, attention_mask=torch.ones_like(prompt), **arguments)
        seconds = time.perf_counter() - start
        logger.info(f"Start-up of rounds of {batch_size} row(s), texts up to {max_length} tokens: {seconds:.1f} s.")
        return seconds

    def draft_head(self, reference: TargetReference) -> DraftHead:
        """A target's head over the tokens that are drafted from.

        Raises:
            ValueError: if the draft vocabulary is not set.
        """
        return DraftHead(reference, None if self.config.draft_vocab_size is None else self.draft_vocabulary)

    def get_input_embeddings(self) -> nn.Module | None:
        """None: the embedding is the target's."""
        return None

    def get_output_embeddings(self) -> nn.Module | None:
        """None: the head is the target's."""
        return None

    def enable_input_require_grads(self) -> None:
        """Nothing: checkpoints inside need no input that asks for gradients."""

    def generate(self, *args: Any, **kwargs: Any):
        """Specialists only draft.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "A PosSModel drafts for its target and cannot write alone. "
            "Call `target.generate(**inputs, assistant_model=poss)`."
        )

    def load_custom_generate(self, *args: Any, **kwargs: Any):
        """Specialists have none: the `custom_generate/` that is saved with them is for their target.

        Raises:
            OSError: always, which `from_pretrained` takes for a checkpoint without one.
        """
        raise OSError(
            "A PosSModel cannot write alone, so it takes no custom `generate`. "
            "Call `target.generate(**inputs, custom_generate=folder, trust_remote_code=True)`."
        )

    # ---- What training and drafting share ----

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """The target's features in the width of the specialists: [batch, rows, feature size] to [batch, rows, hidden].

        One projection fuses those of several layers (EAGLE-3); the last hidden states alone stay as they are.
        """
        return features if self.config.feature_layers is None else self.feature_fc(features)

    def fuse(self, embeddings: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """fc([embedding of token t + 1; feature of t]): [batch, rows, hidden] each, and so is the result."""
        return self.fc(torch.cat((embeddings, features), dim=-1))

    def rotary(self, like: torch.Tensor, position_ids: torch.Tensor) -> RotaryAngles:
        """Angles of position ids [batch, rows], in the dtype and on the device of `like`."""
        return self.rotary_emb(like, position_ids)

    def specialist(self, position: int) -> PosSSpecialist:
        """The specialist of draft position k (1-based)."""
        return self.layers[self.config.specialist_index(position)]

    # ---- Training ----

    def roll_out(
        self,
        features: torch.Tensor,
        next_tokens: torch.LongTensor,
        position_ids: torch.LongTensor | None = None,
        segment_ids: torch.LongTensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Predicted features of every draft position, over all rows of a sequence at once (PosS).

        Row t of position 1 reads the target's feature of t and token t + 1, and predicts the feature of t + 1. Row t
        of position k + 1 reads what position k predicted at row t - 1, detached; the first row of a document keeps its
        feature.

        Args:
            features: [batch, rows, feature size], the target's.
            next_tokens: [batch, rows], row t holds token t + 1.
            position_ids: [batch or 1, rows]; 0, 1, 2... if not given.
            segment_ids: int64 [batch, rows], rows attend to rows of their own number: 0 for padding, then by
                document. An attention mask is one.

        Returns:
            `num_draft_positions` tensors [batch, rows, hidden].
        """
        stream = self.project(features.to(device=self.fc.weight.device, dtype=self.dtype))
        device = stream.device
        if position_ids is None:
            position_ids = torch.arange(stream.shape[1], device=device)[None]
        embeddings = self._attached().embed(next_tokens, like=stream)
        rotary = self.rotary(stream, position_ids.to(device))

        # bool [batch or 1, rows, 1]: rows behind another one; the first row of a document has nothing to take over.
        if segment_ids is None:
            follows = torch.arange(stream.shape[1], device=device)[None, :, None] > 0
        else:
            segment_ids = segment_ids.to(device)
            before = F.pad(segment_ids[:, :-1], (1, 0))
            follows = ((segment_ids == before) & (segment_ids > 0))[..., None]

        fused_streams, predictions = [], []
        keys_values = [()] * len(self.layers)  # of each specialist, by stream
        for position in range(1, self.config.num_draft_positions + 1):
            fused_streams.append(self.fuse(embeddings, stream))
            index = self.config.specialist_index(position)
            new = tuple(fused_streams[len(keys_values[index]) :])
            predicted, keys_values[index] = self.layers[index](new, keys_values[index], rotary, segment_ids)
            predictions.append(predicted)
            shifted = F.pad(predicted.detach()[:, :-1], (0, 0, 1, 0))
            stream = torch.where(follows, shifted, stream)
        return tuple(predictions)

    def forward(
        self,
        input_ids: torch.LongTensor,
        features: torch.Tensor,
        labels: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        segment_ids: torch.LongTensor | None = None,
        target_features: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        losses: Mapping[str, float] | None = None,
        position_weights: Sequence[float] | None = None,
        loss_top_k: int = 10,
        **kwargs: Any,
    ) -> PosSOutput:
        """The recursive roll-out with its losses: a weighted sum over losses and draft positions (PosS).

        Args:
            input_ids: [batch, tokens].
            features: [batch, tokens, feature size], the target's hidden states that `feature_layers` names, possibly
                with noise.
            labels: [batch, tokens]; -100 at t leaves out the rows that predict the feature of t. All count if absent.
            attention_mask: [batch, tokens], 0 for padding.
            position_ids: [batch or 1, tokens].
            segment_ids: int64 [batch, tokens] of packed samples: 0 for padding, then the number of the document that a
                token is of. In place of `attention_mask`.
            target_features: [batch, tokens, hidden], the last hidden states, which are to be predicted; `features` if
                not given.
            num_items_in_batch: rows to divide by, for gradient accumulation; this batch's if not given.
            losses: weights by name, see [`parse_losses`]; 1.0 for "token" alone if not given.
            position_weights: of each draft position; 1 if not given.
            loss_top_k: tokens that the loss "topk" looks at.
            kwargs: nothing but None: what `PeftModelForCausalLM` hands on of a language model's arguments.

        Raises:
            TypeError: if `kwargs` holds a value.
            ValueError: if no target is attached, shapes do not fit, features are not finite, a loss is unknown, or the
                draft vocabulary is not set.
        """
        if unknown := sorted(name for name, value in kwargs.items() if value is not None):
            raise TypeError(f"PosSModel.forward() takes no {', '.join(unknown)}; see its arguments.")
        reference = self._attached()
        losses = DEFAULT_LOSSES if losses is None else parse_losses(losses)
        if position_weights is None:
            position_weights = [1.0] * self.config.num_draft_positions
        target_features = features if target_features is None else target_features
        for name, value, width in (
            ("features", features, self.config.feature_size),
            ("target_features", target_features, self.config.hidden_size),
        ):
            if tuple(value.shape) != (*input_ids.shape, width):
                raise ValueError(
                    f"`{name}` has shape {tuple(value.shape)}; expected {(*input_ids.shape, width)}, one row a token."
                )
        if input_ids.shape[1] < 2:
            raise ValueError("Samples have one token; predicting a feature needs two or more.")
        if len(position_weights) != self.config.num_draft_positions:
            raise ValueError(
                f"`position_weights` has {len(position_weights)} entries; expected one for each of the "
                f"{self.config.num_draft_positions} draft positions."
            )
        device = self.fc.weight.device
        target_features = target_features[:, 1:].to(device)
        if not (torch.isfinite(features).all() and torch.isfinite(target_features).all()):
            raise ValueError(
                "The target's features hold NaN or infinite values. Run the target in bfloat16 or float32, and check "
                "its weights."
            )
        if segment_ids is None and attention_mask is not None:
            segment_ids = attention_mask.long()
        # [batch, rows], row t predicts the feature of t + 1
        counted = torch.ones_like(input_ids[:, 1:], dtype=torch.bool) if labels is None else labels[:, 1:].ne(-100)
        if segment_ids is not None:  # nothing predicts the first feature of a document, nor those of padding
            counted = counted & segment_ids[:, 1:].ne(0) & segment_ids[:, 1:].eq(segment_ids[:, :-1])
        counted = counted.to(device)

        predictions = self.roll_out(
            features[:, :-1],
            input_ids[:, 1:],
            position_ids=None if position_ids is None else position_ids[:, :-1],
            segment_ids=None if segment_ids is None else segment_ids[:, :-1],
        )
        head = self.draft_head(reference)
        result = roll_out_losses(predictions, target_features, counted, head, losses, position_weights, loss_top_k)
        items = counted.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        items = items.to(device) if isinstance(items, torch.Tensor) else items
        return PosSOutput(
            loss=result.total / items,
            loss_sums=result.sums,
            counts=chain_counts(result.tokens, result.target_tokens, counted),
            predictions=predictions,
        )


class _StopAt(StoppingCriteria):
    """Stops all rows at a length, whatever room the call has."""

    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length, device=input_ids.device)


def chain_counts(tokens: torch.Tensor, target_tokens: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Counts behind top-1 accuracy and simulated pos-acc, see [`PosSOutput`].

    A chain that starts at row a drafts position k at row a + k - 1, and goes on while each token is the target's.

    Args:
        tokens: drafted tokens [batch, positions, rows].
        target_tokens: [batch, rows].
        counted: bool [batch, rows].

    Returns:
        int64 [batch, 4, positions]
    """
    hits = (tokens == target_tokens[:, None]) & counted[:, None]
    alive = counted
    counts = []
    for position in range(tokens.shape[1]):
        hit = hits[:, position]
        accepted = alive & hit
        counts.append(torch.stack([rows.sum(-1) for rows in (counted, hit, alive, accepted)], dim=-1))
        alive = F.pad(accepted[:, :-1], (1, 0)) & counted
    return torch.stack(counts, dim=-1)
