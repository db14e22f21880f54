"""Position specialists: one decoder layer for each span of draft positions, and their recursive roll-out."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding, rotate_half
from transformers.utils import ModelOutput, logging

from .checkpoints import check_loading_info, is_published_layout, read_published, reading, repository_name
from .compatibility import device_of, is_pipeline_parallel, keeps_state, mark_as_own, peft_arguments
from .configuration_poss import PosSConfig
from .limits import check_size


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
    "position_losses",
]

logger = logging.get_logger(__name__)

# Cosine and sine of a run of rows, each [batch, rows, head_dim].
RotaryAngles = tuple[torch.Tensor, torch.Tensor]
# Keys and values of a run of rows, each [batch, key_value_heads, rows, head_dim].
KeysValues = tuple[torch.Tensor, torch.Tensor]


def check_target(config: PosSConfig, target: PreTrainedModel) -> None:
    """Refuses a target that specialists of this geometry cannot draft for.

    Raises:
        ValueError: if the target is an encoder-decoder, keeps a recurrent state, is split into pipeline stages, has no
            head, has another width or vocabulary, or runs under a PEFT method that specialists cannot follow.
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
    """Whether `model` is made of position specialists. Their class may be one that came with a checkpoint."""
    return isinstance(model, PreTrainedModel) and model.config.model_type == PosSConfig.model_type


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
        logits = logits.to(device=features.device, dtype=torch.float32)
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


class PosSSpecialist(nn.Module):
    """One decoder layer as EAGLE has it: attention on the raw input as residual stream, no input norm, no final norm.

    Its three steps are apart because a context row needs the first only (see [`keys_values`]).
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
        return _rotate(keys, rotary), attention.split_heads(attention.v_proj(fused))

    def queries(self, fused: torch.Tensor, rotary: RotaryAngles) -> torch.Tensor:
        """Queries [batch, heads, rows, head_dim] of fused inputs [batch, rows, hidden]."""
        return _rotate(self.self_attn.split_heads(self.self_attn.q_proj(fused)), rotary)

    def complete(self, fused: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Predicted features [batch, rows, hidden] from what queries attended to [batch, heads, rows, head_dim]."""
        hidden = fused + self.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


def _rotate(heads: torch.Tensor, rotary: RotaryAngles) -> torch.Tensor:
    cos, sin = (angle.unsqueeze(1) for angle in rotary)
    return heads * cos + rotate_half(heads) * sin


def _shift_right(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Row t takes row t - count along dim -2; the first `count` rows are zero."""
    return F.pad(rows, (0, 0, count, 0))[..., : rows.shape[-2], :] if count else rows


def roll_out_attention(
    query: torch.Tensor, streams: Sequence[KeysValues], valid_keys: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention of draft position k + 1, with k = len(streams) - 1, over all rows at once (HASS).

    Row t sees the target's features of rows <= t - k (`streams[0]`), then for each earlier draft position j = 1..k one
    key: stream j at row t - k + j. With k = 2, row 7 sees target rows 0..5, stream 1 at row 6, stream 2 at row 7:
    what it would see in a round of drafting that began after row 5. Hidden positions have no weight.

    Args:
        query: [batch, heads, rows, head_dim].
        streams: keys and values of each stream, by the specialist that asks.
        valid_keys: bool [batch, rows], False for padding.

    Returns:
        [batch, heads, rows, head_dim]
    """
    k = len(streams) - 1
    keys, values = streams[0]
    rows = query.shape[-2]
    grouped = query.unflatten(1, (keys.shape[1], -1)) * query.shape[-1] ** -0.5  # [batch, kv_heads, group, rows, dim]

    visible = torch.ones(rows, rows, dtype=torch.bool, device=query.device).tril(-k)
    if valid_keys is not None:
        visible = visible & valid_keys[:, None, None, None, :]
        if k == 0:  # padding sees itself: a row without any key would have no softmax
            visible = visible | torch.eye(rows, dtype=torch.bool, device=query.device)
    scores = torch.matmul(grouped, keys.unsqueeze(2).transpose(-1, -2)).float()
    scores = scores.masked_fill(~visible, float("-inf"))  # [batch, kv_heads, group, rows, rows]

    if k == 0:
        weights = scores.softmax(-1).to(values.dtype)
        return torch.matmul(weights, values.unsqueeze(2)).flatten(1, 2)

    own_keys, own_values = (
        torch.stack([_shift_right(stream[part], k - j) for j, stream in enumerate(streams)][1:], dim=-2)
        for part in (0, 1)
    )  # [batch, kv_heads, rows, k, dim]
    own_scores = torch.einsum("bgqtd,bgtkd->bgqtk", grouped, own_keys).float()
    j = torch.arange(1, k + 1, device=query.device)
    source = torch.arange(rows, device=query.device)[:, None] - k + j  # row of stream j that row t sees
    hidden = source < 0
    if valid_keys is not None:
        padding = ~valid_keys[:, source.clamp(min=0)] & (j < k)
        hidden = (hidden | padding)[:, None, None]
    own_scores = own_scores.masked_fill(hidden, float("-inf"))

    weights = torch.cat((scores, own_scores), dim=-1).softmax(-1).to(values.dtype)
    attended = torch.matmul(weights[..., :rows], values.unsqueeze(2))
    attended = attended + torch.einsum("bgqtk,bgtkd->bgqtd", weights[..., rows:], own_values)
    return attended.flatten(1, 2)


def position_losses(
    predicted: torch.Tensor,
    target_features: torch.Tensor,
    logits: torch.Tensor,
    target_logits: torch.Tensor,
    row_weights: torch.Tensor,
    top_k: int = 10,
) -> torch.Tensor:
    """The three losses of one draft position, summed over the weighted rows (PosS, HASS).

    Args:
        predicted, target_features: [batch, rows, hidden].
        logits, target_logits: float32 [batch, rows, vocab], of the two.
        row_weights: float [batch, rows], 1 for a row that counts.
        top_k: tokens of the target that the third loss looks at.

    Returns:
        float32 [3]: smooth L1 between features (mean over hidden), soft cross-entropy against the target's
        distribution, and the part of that cross-entropy that the target's `top_k` tokens contribute.
    """
    feature = F.smooth_l1_loss(predicted.float(), target_features.float(), reduction="none").mean(-1)
    target_probabilities = target_logits.softmax(-1)
    log_probabilities = logits.log_softmax(-1)
    token = -(target_probabilities * log_probabilities).sum(-1)
    best, best_tokens = target_probabilities.topk(min(top_k, logits.shape[-1]), dim=-1)
    best_part = -(best * log_probabilities.gather(-1, best_tokens)).sum(-1)
    return torch.stack([(loss * row_weights).sum() for loss in (feature, token, best_part)])


@dataclass
class PosSOutput(ModelOutput):
    """What the roll-out of [`PosSModel`] returns.

    Args:
        loss (`torch.FloatTensor` of shape `()`): weighted sum of the losses, over all draft positions.
        position_losses (`torch.FloatTensor` of shape `(num_draft_positions, 3)`): feature, token and top-k loss of
            each position, unweighted, means over the rows that count.
        counts (`torch.LongTensor` of shape `(batch, 4, num_draft_positions)`, outside of training): rows that count;
            of these, rows where the drafted token is the target's; rows that a chain reached with every token before
            accepted; and of these, rows where it was accepted once more.
        predictions (`tuple` of `torch.FloatTensor` of shape `(batch, rows, hidden)`): features by draft position.
    """

    loss: torch.FloatTensor | None = None
    position_losses: torch.FloatTensor | None = None
    counts: torch.LongTensor | None = None
    predictions: tuple[torch.FloatTensor, ...] | None = None


class PosSPreTrainedModel(PreTrainedModel):
    config_class = PosSConfig
    base_model_prefix = "poss"
    main_input_name = "input_ids"
    _no_split_modules = ["PosSSpecialist"]
    _supports_sdpa = True


class PosSModel(PosSPreTrainedModel, GenerationMixin):
    """Position specialists (PosS, arXiv 2506.03566) for a decoder-only target.

    The model holds `fc` and the specialists alone; embedding and head are the target's, referenced after
    [`PosSModel.attach`]. It drafts as `target.generate(..., assistant_model=poss)` and learns through `forward`, the
    recursive roll-out. Drafting knobs are fields of `generation_config`:

    - `num_assistant_tokens`: depth of a draft, K by default; deeper than K, the last specialist goes on;
    - `draft_top_k`: branches a node; 10 by default on an accelerator, less on a CPU; 1 makes drafts chains;
    - `draft_total_tokens`: nodes verified a round, the root included; 60 by default on an accelerator, less on a CPU.

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
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=config.fc_bias)
        self.layers = nn.ModuleList(PosSSpecialist(config) for _ in range(config.num_specialists))
        self.rotary_emb = PosSRotaryEmbedding(config)
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
        cls, path_or_repo: str, positions_per_specialist: int = 2, num_draft_positions: int = 6, **kwargs: Any
    ) -> "PosSModel":
        """Specialists that are all copies of one EAGLE (or HASS) layer, the paper's start.

        Args:
            path_or_repo: folder or Hub name of a checkpoint of one layer, published or saved by this class.
            positions_per_specialist: n, draft positions a specialist serves.
            num_draft_positions: K, draft positions in all.
            kwargs: as in `from_pretrained`.

        Raises:
            ValueError: if the checkpoint has more layers than one, or cannot be read.
        """
        eagle = cls.from_pretrained(path_or_repo, **kwargs)
        if eagle.config.num_specialists != 1:
            raise ValueError(
                f"{path_or_repo} has {eagle.config.num_specialists} layers; expected an EAGLE checkpoint of one. "
                "Load checkpoints of several specialists with `PosSModel.from_pretrained`."
            )
        config = PosSConfig.from_dict(
            {
                **eagle.config.to_dict(),
                "positions_per_specialist": positions_per_specialist,
                "num_draft_positions": num_draft_positions,
            }
        )
        poss = cls(config).to(device=eagle.device, dtype=eagle.dtype)
        poss.fc.load_state_dict(eagle.fc.state_dict())
        for layer in poss.layers:
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
        return (model, info) if wants_info else model

    # ---- The target ----

    def attach(self, target: PreTrainedModel) -> "PosSModel":
        """References `target`'s embedding and head, which training reads; `generate` brings its own target.

        Raises:
            ValueError: if the target does not fit, see [`check_target`].
        """
        self.reference = TargetReference.from_target(target, self.config)
        return self

    def _attached(self) -> TargetReference:
        if self.reference is None:
            raise ValueError(
                "This PosSModel has no target yet: embedding and head are the target's own. "
                "Call `poss.attach(target)` first, or draft with `target.generate(..., assistant_model=poss)`."
            )
        return self.reference

    def get_input_embeddings(self) -> nn.Module | None:
        """None: the embedding is the target's."""
        return None

    def get_output_embeddings(self) -> nn.Module | None:
        """None: the head is the target's."""
        return None

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
        attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Predicted features of every draft position, over all rows of a sequence at once (PosS).

        Row t of position 1 reads the target's feature of t and token t + 1, and predicts the feature of t + 1. Row t
        of position k + 1 reads what position k predicted at row t - 1, detached; row 0 keeps its feature.

        Args:
            features: [batch, rows, hidden], the target's.
            next_tokens: [batch, rows], row t holds token t + 1.
            position_ids: [batch or 1, rows]; 0, 1, 2... if not given.
            attention_mask: [batch, rows], 0 for padding, which no row attends to.

        Returns:
            `num_draft_positions` tensors [batch, rows, hidden].
        """
        features = features.to(device=self.fc.weight.device, dtype=self.dtype)
        if position_ids is None:
            position_ids = torch.arange(features.shape[1], device=features.device)[None]
        valid_keys = None if attention_mask is None else attention_mask.to(features.device).bool()
        embeddings = self._attached().embed(next_tokens, like=features)
        rotary = self.rotary(features, position_ids.to(features.device))
        attend = roll_out_attention
        if torch.is_grad_enabled():
            # Scores are [rows, rows] a head and position: cheap to make again, too large to keep until backward.
            attend = functools.partial(checkpoint, roll_out_attention, use_reentrant=False)

        # bool [batch or 1, rows, 1]: rows behind another one; the first row of a sample has nothing to take over.
        if valid_keys is None:
            follows = torch.arange(features.shape[1], device=features.device)[None, :, None] > 0
        else:
            follows = F.pad(valid_keys[:, :-1], (1, 0))[..., None]

        fused_streams, predictions = [], []
        keys_values = [[] for _ in self.layers]  # of each specialist, by stream
        stream = features
        for position in range(1, self.config.num_draft_positions + 1):
            fused_streams.append(self.fuse(embeddings, stream))
            index = self.config.specialist_index(position)
            layer, streams = self.layers[index], keys_values[index]
            streams.extend(layer.keys_values(fused, rotary) for fused in fused_streams[len(streams) :])
            attended = attend(layer.queries(fused_streams[-1], rotary), tuple(streams), valid_keys)
            predictions.append(layer.complete(fused_streams[-1], attended))
            shifted = F.pad(predictions[-1].detach()[:, :-1], (0, 0, 1, 0))
            stream = torch.where(follows, shifted, stream)
        return tuple(predictions)

    def forward(
        self,
        input_ids: torch.LongTensor,
        features: torch.Tensor,
        labels: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        target_features: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        feature_loss_weight: float = 1.0,
        token_loss_weight: float = 0.1,
        topk_loss_weight: float = 0.0,
        loss_top_k: int = 10,
    ) -> PosSOutput:
        """The recursive roll-out with its losses: sum over draft positions of
        `feature_loss_weight` * smooth L1 + `token_loss_weight` * soft cross-entropy + `topk_loss_weight` * its top-k
        part (PosS; weights 1.0, 0.1 and 0 or 1.0 in the public code).

        Args:
            input_ids: [batch, tokens].
            features: [batch, tokens, hidden], the target's last hidden states, possibly with noise.
            labels: [batch, tokens]; -100 at t leaves out the rows that predict the feature of t. All count if absent.
            attention_mask: [batch, tokens], 0 for padding.
            position_ids: [batch or 1, tokens].
            target_features: [batch, tokens, hidden], what is to be predicted; `features` if not given.
            num_items_in_batch: rows to divide by, for gradient accumulation; this batch's if not given.

        Raises:
            ValueError: if no target is attached, shapes do not fit, no row counts, or features are not finite.
        """
        reference = self._attached()
        target_features = features if target_features is None else target_features
        expected = (*input_ids.shape, self.config.hidden_size)
        for name, value in (("features", features), ("target_features", target_features)):
            if tuple(value.shape) != expected:
                raise ValueError(f"`{name}` has shape {tuple(value.shape)}; expected {expected}, one row a token.")
        if input_ids.shape[1] < 2:
            raise ValueError("Samples have one token; predicting a feature needs two or more.")
        device = self.fc.weight.device
        target_features = target_features[:, 1:].to(device)
        if not (torch.isfinite(features).all() and torch.isfinite(target_features).all()):
            raise ValueError(
                "The target's features hold NaN or infinite values. Run the target in bfloat16 or float32, and check "
                "its weights."
            )
        counted = torch.ones_like(input_ids) if labels is None else labels.ne(-100)
        if attention_mask is not None:
            counted = counted * attention_mask
        counted = counted[:, 1:].to(device).bool()  # [batch, rows], row t predicts the feature of t + 1

        predictions = self.roll_out(
            features[:, :-1],
            input_ids[:, 1:],
            position_ids=None if position_ids is None else position_ids[:, :-1],
            attention_mask=None if attention_mask is None else attention_mask[:, :-1],
        )
        with torch.no_grad():
            target_logits = reference.logits(target_features)  # [batch, rows, vocab]
            target_tokens = target_logits.argmax(-1)
        losses, tokens = [], []
        for predicted in predictions:
            logits = reference.logits(predicted)
            losses.append(
                position_losses(predicted, target_features, logits, target_logits, counted.float(), loss_top_k)
            )
            if not self.training:
                tokens.append(logits.argmax(-1))
        losses = torch.stack(losses)  # [positions, 3]
        weights = losses.new_tensor((feature_loss_weight, token_loss_weight, topk_loss_weight))
        rows = counted.sum().clamp(min=1)
        items = rows if num_items_in_batch is None else num_items_in_batch
        items = items.to(device) if isinstance(items, torch.Tensor) else items
        return PosSOutput(
            loss=(losses * weights).sum() / items,
            position_losses=losses.detach() / rows,
            counts=None if self.training else chain_counts(torch.stack(tokens, 1), target_tokens, counted),
            predictions=predictions,
        )


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
