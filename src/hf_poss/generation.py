"""The decoding loop for draft trees, and the hook that lets `generate` reach it.

This is the one place where transformers is patched: [`enable`] wraps three methods of `GenerationMixin`, each of which
hands on to the original unless the assistant is a `PosSModel`.
"""

import functools
import inspect
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional as F
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.utils import logging

from .caches import holds_every_token, keep_path
from .candidate_generator import DraftSettings, PosSCandidateGenerator, eos_token_ids
from .compatibility import original_method, replace_method
from .draft_tree import DraftTree
from .modeling_poss import PosSModel, check_target
from .statistics import recorded_call
from .verification import StopCheck, TokenPicker, walk


__all__ = ["decode_with_trees", "disable", "enable"]

logger = logging.get_logger(__name__)


def enable() -> None:
    """Makes `target.generate(..., assistant_model=poss)` run position specialists. `import hf_poss` calls it; calling
    it again changes nothing."""
    replace_method("_validate_generation_mode", _validate_generation_mode)
    replace_method("_get_candidate_generator", _get_candidate_generator)
    replace_method("_assisted_decoding", _assisted_decoding)


def disable() -> None:
    """Puts transformers' own methods back."""
    for name in ("_validate_generation_mode", "_get_candidate_generator", "_assisted_decoding"):
        replace_method(name, original_method(name))


@functools.wraps(original_method("_validate_generation_mode"))
def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
    assistant = generation_mode_kwargs.get("assistant_model")
    if isinstance(assistant, PosSModel):
        check_target(assistant.config, self)
        DraftSettings.of(assistant, self.device)
    return original_method("_validate_generation_mode")(
        self, generation_mode, generation_config, generation_mode_kwargs
    )


@functools.wraps(original_method("_get_candidate_generator"))
def _get_candidate_generator(self, *args, assistant_model=None, **kwargs):
    if not isinstance(assistant_model, PosSModel):
        return original_method("_get_candidate_generator")(self, *args, assistant_model=assistant_model, **kwargs)
    return PosSCandidateGenerator(
        input_ids=kwargs["input_ids"],
        assistant_model=assistant_model,
        generation_config=kwargs["generation_config"],
        model_kwargs=kwargs["model_kwargs"],
        target=self,
        inputs_tensor=kwargs.get("inputs_tensor"),
        logits_processor=kwargs.get("logits_processor"),
    )


@functools.wraps(original_method("_assisted_decoding"))
def _assisted_decoding(self, input_ids, **kwargs):
    poss = kwargs.get("assistant_model")
    if not isinstance(poss, PosSModel):
        return original_method("_assisted_decoding")(self, input_ids, **kwargs)
    _check_call(input_ids, kwargs)
    decode = original_method("_assisted_decoding")
    continued = _cached_tokens(kwargs) > 0  # transformers' loop would feed the cached tokens again
    # ... and takes a prompt that ends like a text for finished, in some releases.
    ended = bool(input_ids.shape[1]) and int(input_ids[0, -1]) in eos_token_ids(kwargs["generation_config"])
    wants_tree = not DraftSettings.of(poss, self.device).is_chain
    if continued or ended or wants_tree:
        obstacle = _obstacle_to_trees(self, kwargs)
        if obstacle is None:
            decode = decode_with_trees
        elif continued:
            raise ValueError(f"Cannot go on from a filled `past_key_values`: {obstacle}. Leave it out.")
        elif wants_tree:
            logger.warning_once(f"Drafting chains instead of trees: {obstacle}.")
    with recorded_call(poss.config.positions_per_specialist, poss.config.num_specialists, self.device):
        return decode(self, input_ids, **kwargs)


def _check_call(input_ids: torch.LongTensor, kwargs: dict[str, Any]) -> None:
    if input_ids.shape[0] > 1:
        raise ValueError(
            f"The batch has {input_ids.shape[0]} rows; position specialists draft for one row at a time. "
            "Call `generate` once a prompt, or without `assistant_model`."
        )
    if kwargs.get("inputs_embeds") is not None:
        raise ValueError(
            "`inputs_embeds` were given; specialists read the prompt's tokens. Pass `input_ids`, or leave out "
            "`assistant_model`."
        )


def _cached_tokens(kwargs: dict[str, Any]) -> int:
    cache = kwargs.get("past_key_values")
    return cache.get_seq_length() if isinstance(cache, Cache) else 0


def _is_windowed(config: PreTrainedConfig) -> bool:
    """Whether some layer does not see the whole sequence."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        return any(layer_type != "full_attention" for layer_type in layer_types)
    return getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)


def _obstacle_to_trees(target: PreTrainedModel, kwargs: dict[str, Any]) -> str | None:
    """Why this target cannot verify a tree in this call, or None."""
    config, text = kwargs["generation_config"], target.config.get_text_config()
    cache = kwargs.get("past_key_values")
    name = target.__class__.__name__
    parameters = inspect.signature(target.forward).parameters
    attention = text._attn_implementation
    if attention not in ("eager", "sdpa"):
        return f"{attention} attention takes no tree mask; load the target with `attn_implementation='sdpa'`"
    if not {"attention_mask", "position_ids"} <= parameters.keys() or getattr(text, "alibi", False):
        return f"{name} takes no position ids or uses ALiBi, so two nodes cannot share a position"
    if _is_windowed(text):
        return f"{name} has layers that see a part of the sequence only (a sliding window)"
    if not isinstance(cache, Cache) or not holds_every_token(cache):
        return f"the cache ({type(cache).__name__}) does not keep every token as plain tensors"
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        return "attentions and hidden states of a tree are not those of a sequence"
    if kwargs.get("synced_gpus"):
        return "ranks that wait for each other (synced_gpus) need rounds of one shape"
    return None


@torch.no_grad()
def decode_with_trees(
    target: PreTrainedModel,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    assistant_model: PosSModel,
    streamer: Any = None,
    synced_gpus: bool = False,
    inputs_tensor: torch.Tensor | None = None,
    tokenizer: Any = None,
    assistant_tokenizer: Any = None,
    **model_kwargs: Any,
) -> GenerateDecoderOnlyOutput | torch.LongTensor:
    """Draft a tree, verify it in one pass of the target, walk it; until the sequence ends.

    Takes the arguments of transformers' `_assisted_decoding` and returns what it returns. `synced_gpus` and the
    tokenizers are not used.

    Args:
        input_ids: int64 [1, tokens].

    Raises:
        ValueError: if `past_key_values` holds more than a part of `input_ids`.
    """
    as_dict = generation_config.return_dict_in_generate
    picker = TokenPicker(
        logits_processor,
        generation_config.do_sample,
        keep_scores=as_dict and generation_config.output_scores,
        keep_logits=as_dict and generation_config.output_logits,
    )
    stop = StopCheck(stopping_criteria)
    drafter = target._get_candidate_generator(
        generation_config=generation_config,
        input_ids=input_ids,
        inputs_tensor=inputs_tensor,
        logits_processor=logits_processor,
        model_kwargs=model_kwargs,
        assistant_model=assistant_model,
    )
    settings = drafter.settings
    cache: Cache = model_kwargs["past_key_values"]

    drafter.enter("verifying")
    outputs = _prompt_pass(target, input_ids, model_kwargs, drafter.model_kwargs_overrides)
    drafter.enter("other")
    prompt_length = input_ids.shape[1]
    token = picker.pick(input_ids, outputs.logits[:, -1])
    input_ids = torch.cat((input_ids, input_ids.new_tensor([[token]])), dim=1)
    finished = stop(input_ids, token, picker.scores)
    features = outputs.hidden_states[-1]
    prompt_mask = model_kwargs.get("attention_mask")
    if drafter.record is not None:
        drafter.record.add_prompt_pass()
    if streamer is not None:
        streamer.put(input_ids[:, prompt_length:].cpu())

    while not finished:
        drafter.enter("drafting")
        drafter.extend_context(features, input_ids)
        # The last token of the budget is the target's own, so a draft need not reach it.
        depth = min(settings.depth, generation_config.max_length - input_ids.shape[1] - 1)
        tree = drafter.draft(input_ids[:, -1], replace(settings, depth=depth)) if depth > 0 else _root(input_ids)

        drafter.enter("verifying")
        start = input_ids.shape[1] - 1
        outputs = target(
            input_ids=tree.tokens.to(target.device),
            attention_mask=_tree_mask(tree, start, prompt_mask, target),
            position_ids=(tree.depths + start - drafter.num_padding).to(target.device),
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
            **drafter.model_kwargs_overrides,
        )

        drafter.enter("other")
        result = walk(tree, outputs.logits, input_ids, picker, stop)
        keep_path(cache, start, result.path)
        features = outputs.hidden_states[-1][:, result.path]
        if streamer is not None:
            streamer.put(result.input_ids[:, input_ids.shape[1] :].cpu())
        if drafter.record is not None:
            drafter.record.add_round(_level_sizes(tree), result.accepted, result.emitted)
        input_ids, finished = result.input_ids, result.finished

    if streamer is not None:
        streamer.end()
    if not as_dict:
        return input_ids
    return GenerateDecoderOnlyOutput(
        sequences=input_ids,
        scores=None if picker.scores is None else tuple(picker.scores),
        logits=None if picker.logits is None else tuple(picker.logits),
        past_key_values=cache,
    )


def _prompt_pass(
    target: PreTrainedModel, input_ids: torch.LongTensor, model_kwargs: dict[str, Any], overrides: dict[str, Any]
) -> Any:
    """The target's pass over the part of the prompt that its cache does not hold yet."""
    cached = model_kwargs["past_key_values"].get_seq_length()
    if cached >= input_ids.shape[1]:
        raise ValueError(
            f"`past_key_values` holds {cached} tokens and `input_ids` has {input_ids.shape[1]}; expected the whole "
            "sequence in `input_ids`, the cached tokens included, and at least one new token."
        )
    model_inputs = target.prepare_inputs_for_generation(
        input_ids,
        next_sequence_length=input_ids.shape[1] - cached if cached else None,
        is_first_iteration=True,
        **model_kwargs,
    )
    return target(**{**model_inputs, **overrides, "return_dict": True})


def _root(input_ids: torch.LongTensor) -> DraftTree:
    """A tree of the root alone, for a round that needs no draft."""
    zero = torch.zeros_like(input_ids[:, -1:])
    return DraftTree(tokens=input_ids[:, -1:], parents=zero, depths=zero, max_depth=0)


def _tree_mask(tree: DraftTree, start: int, prompt_mask: torch.Tensor | None, target: PreTrainedModel) -> torch.Tensor:
    """Additive mask [1, 1, nodes, start + nodes] in the target's dtype: every node sees the `start` tokens before the
    root, as far as they are no padding, itself and its ancestors.

    Additive, because eager attention adds whatever mask it is given to the scores.
    """
    visible = F.pad(tree.ancestor_mask(), (start, 0), value=True).to(target.device)
    if prompt_mask is not None:
        visible[..., : prompt_mask.shape[1]] &= prompt_mask[:, None].bool().to(target.device)
    mask = torch.zeros(visible.shape, dtype=target.dtype, device=target.device)
    return mask.masked_fill_(~visible, torch.finfo(target.dtype).min)[:, None]


def _level_sizes(tree: DraftTree) -> list[int]:
    """Nodes by draft position - 1."""
    return torch.bincount(tree.depths[0], minlength=1)[1:].tolist()
