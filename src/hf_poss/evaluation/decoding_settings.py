"""How the texts of an evaluation are decoded: what `generate` is given beside prompts and drafters."""

import copy
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase


__all__ = ["DecodingSettings", "call_seed", "padding_token", "parse_knobs"]

# Of sampling: `generate` warns of them in greedy search.
_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "top_h",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)
# What the command sets itself, and by which of its options.
_SET = {
    "max_new_tokens": "--max_new_tokens",
    "temperature": "--temperature",
    "do_sample": "--temperature",
    "seed": "--seeds",
    "cache_implementation": "--cache_implementation",
    "prompt_lookup_num_tokens": "--prompt_lookup_num_tokens",
    "num_assistant_tokens": "--depth",
    "draft_top_k": "--top_k",
    "draft_total_tokens": "--total_tokens",
}
# What would make a record something else than one text a prompt, decoded as the papers do.
_REFUSED = (
    "max_length",
    "num_beams",
    "num_beam_groups",
    "num_return_sequences",
    "pad_token_id",
    "return_dict_in_generate",
    "assistant_early_exit",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "transformers_version",
)


def parse_knobs(values: Iterable[str]) -> dict[str, Any]:
    """Arguments of `generate` as a command line names them, `NAME=VALUE` with a value in JSON; other text is a string.

    Raises:
        ValueError: if one has no value, `generate` does not know it or could not use it, or the command has an option
            for it.
    """
    known = GenerationConfig().to_dict().keys()
    knobs: dict[str, Any] = {}
    for given in values:
        name, is_pair, value = given.partition("=")
        if not is_pair or not name:
            raise ValueError(f"`--generate {given}`; expected NAME=VALUE, as in top_p=0.9.")
        if name in _SET:
            raise ValueError(f"`--generate {given}`: this command sets `{name}` itself; use `{_SET[name]}`.")
        if name in _REFUSED or name.startswith("_"):
            raise ValueError(
                f"`--generate {given}`: an evaluation decodes one text a prompt, without beams; leave out `{name}`."
            )
        if name not in known:
            raise ValueError(f"`--generate {given}`: `generate` knows no `{name}`; see `GenerationConfig`.")
        try:
            knobs[name] = json.loads(value)
        except json.JSONDecodeError:
            knobs[name] = value
    try:
        config = GenerationConfig(do_sample=True, **copy.deepcopy(knobs))
        config.validate(strict=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`--generate {' '.join(values)}`: {error}") from error
    return knobs


@dataclass(frozen=True)
class DecodingSettings:
    """Decoding of all texts, but for temperature and seed.

    Args:
        max_new_tokens: of an answer.
        eos_token_ids: tokens that end one.
        pad_token_id: what fills the rows of a batch; see [`padding_token`].
        generate: other arguments of `generate`, see [`parse_knobs`].
        cache_implementation: "static" for fixed shapes; None for `generate`'s own choice.
    """

    max_new_tokens: int
    eos_token_ids: Sequence[int]
    pad_token_id: int
    generate: Mapping[str, Any] = field(default_factory=dict)
    cache_implementation: str | None = None

    def arguments(self, temperature: float, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Arguments of `generate`, the same for all drafters. Sampling draws from the whole vocabulary unless
        `generate` says otherwise, whatever the target's own settings.

        Args:
            temperature: 0 for greedy search.
            tokenizer: of the target.
        """
        arguments: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": bool(temperature),
            "temperature": temperature,
            "top_p": 1.0,
            "top_k": 0,
            "eos_token_id": list(self.eos_token_ids) or None,
            "pad_token_id": self.pad_token_id,
            **self.generate,
        }
        if not temperature:
            arguments |= {name: None for name in _SAMPLING if name in arguments}
        if self.cache_implementation is not None:
            arguments["cache_implementation"] = self.cache_implementation
        if "stop_strings" in self.generate:
            arguments["tokenizer"] = tokenizer
        return arguments

    @property
    def pads_behind_texts(self) -> bool:
        """Whether a row of a batch may end, and be filled up, without one of `eos_token_ids`."""
        return "stop_strings" in self.generate


def padding_token(tokenizer: PreTrainedTokenizerBase, eos_token_ids: Sequence[int], vocab_size: int) -> int:
    """A token to fill the rows of a batch with: the tokenizer's, unless that ends texts, or the target does not know
    it. Where it ended texts, a row that was ended by a string could not be told from one that wrote an end, and
    processors that look at the prompt would take padding for ends of sequence.

    Args:
        vocab_size: of the target; tokenizers may have more tokens.
    """
    own = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id)
    known = (token for token in own if token is not None and token < vocab_size)
    candidates = itertools.chain(known, range(len(eos_token_ids) + 1))
    return next(token for token in candidates if token not in eos_token_ids)


def call_seed(*names: Any) -> int:
    """A seed that the names alone decide: neither the order of the calls, nor who makes them, nor a run that was
    stopped before."""
    digest = hashlib.sha256(repr(names).encode()).digest()
    return int.from_bytes(digest[:7], "little")
