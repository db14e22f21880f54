"""The hook that lets `generate` reach the decoding loop.

This is the one place where transformers' models are patched: [`enable`] wraps three methods of `GenerationMixin`, each
of which hands on to the original unless the assistant is made of position specialists.
"""

import copy
import functools
from typing import Any

from transformers import GenerationConfig
from transformers.generation import GenerationMode

from .candidate_generator import DraftSettings, PosSCandidateGenerator
from .compatibility import CANDIDATES, DECODE, VALIDATE, input_device, original_method, replace_method
from .decoding import decode
from .modeling_poss import check_drafter, check_target, poss_of


__all__ = ["disable", "enable"]

_CACHES = (None, "dynamic", "static")


def enable() -> None:
    """Makes `target.generate(..., assistant_model=poss)` run position specialists. `import hf_poss` calls it; calling
    it again changes nothing."""
    replace_method(VALIDATE, _validate_generation_mode)
    replace_method(CANDIDATES, _get_candidate_generator)
    replace_method(DECODE, _assisted_decoding)


def disable() -> None:
    """Puts transformers' own methods back."""
    for name in (VALIDATE, CANDIDATES, DECODE):
        replace_method(name, original_method(name))


@functools.wraps(original_method(VALIDATE))
def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
    poss = poss_of(generation_mode_kwargs.get("assistant_model"))
    if poss is not None:
        check_drafter(poss)
        check_target(poss.config, self)
        DraftSettings.of(poss, input_device(self))
        _check_mode(generation_mode, generation_config, generation_mode_kwargs)
        # transformers' own loop returns one sequence a call; ours any number.
        generation_config = copy.copy(generation_config)
        generation_config.num_return_sequences = 1
    return original_method(VALIDATE)(self, generation_mode, generation_config, generation_mode_kwargs)


def _check_mode(mode: GenerationMode, config: GenerationConfig, kwargs: dict[str, Any]) -> None:
    if mode != GenerationMode.ASSISTED_GENERATION:
        raise ValueError(
            f"The arguments ask for {mode.value} (num_beams={config.num_beams}, "
            f"penalty_alpha={config.penalty_alpha}); position specialists draft for greedy search and sampling. Leave "
            "out these arguments, or `assistant_model`."
        )
    if kwargs.get("assistant_tokenizer") is not None:
        raise ValueError(
            "`assistant_tokenizer` was given; position specialists write the target's own tokens. Leave it out."
        )
    if config.use_cache is False:
        raise ValueError(
            "`use_cache` is False, as an argument or in the target's config; drafts are verified against a cache. "
            "Pass `use_cache=True`."
        )
    if config.cache_implementation not in _CACHES:
        raise ValueError(
            f"`cache_implementation={config.cache_implementation!r}` was given; drafts are verified in a dynamic or "
            "static cache, from which rejected ones can be taken back. Leave it out, or pass 'static'."
        )


@functools.wraps(original_method(CANDIDATES))
def _get_candidate_generator(self, *args, assistant_model=None, **kwargs):
    poss = poss_of(assistant_model)
    if poss is None:
        return original_method(CANDIDATES)(self, *args, assistant_model=assistant_model, **kwargs)
    return PosSCandidateGenerator(
        input_ids=kwargs["input_ids"],
        assistant_model=poss,
        generation_config=kwargs["generation_config"],
        model_kwargs=kwargs["model_kwargs"],
        target=self,
        inputs_tensor=kwargs.get("inputs_tensor"),
        logits_processor=kwargs.get("logits_processor"),
    )


@functools.wraps(original_method(DECODE))
def _assisted_decoding(self, input_ids, **kwargs):
    poss = poss_of(kwargs.get("assistant_model"))
    if poss is None:
        return original_method(DECODE)(self, input_ids, **kwargs)
    return decode(self, input_ids, **{**kwargs, "assistant_model": poss})
