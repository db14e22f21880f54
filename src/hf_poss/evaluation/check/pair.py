"""A target and its specialists under test, and the text that the checks look at."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ...compatibility import input_device
from ...configuration_poss import eos_token_ids
from ...modeling_poss import PosSModel, TargetReference
from ..decoding_settings import padding_token
from ..timing import new_token_counts


__all__ = ["Pair", "Texts", "attached", "bare_settings", "left_padded", "text_logits"]

# Logits of that many tokens at a time: 256 of a vocabulary of 128k are 128 MiB.
_CHUNK = 256


@dataclass(frozen=True)
class Pair:
    """What is checked.

    Args:
        target: a decoder-only language model.
        poss: its specialists, on the device where they draft.
        tokenizer: the target's.
        prompts: token ids, without padding.
    """

    target: PreTrainedModel
    poss: PosSModel
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[list[int]]

    @property
    def eos_token_ids(self) -> list[int]:
        return eos_token_ids(self.target.generation_config)

    @property
    def pad_token_id(self) -> int:
        """A token that ends no text and that the target has an embedding of."""
        return padding_token(self.tokenizer, self.eos_token_ids, self.poss.config.vocab_size)

    def generate(self, prompts: Sequence[list[int]], **arguments: Any) -> Any:
        """`target.generate` on prompts, one row each, padded on the left if there are several."""
        inputs = left_padded(prompts, self.pad_token_id, input_device(self.target))
        return self.target.generate(**inputs, pad_token_id=self.pad_token_id, **arguments)

    def new_tokens(self, sequences: torch.LongTensor, prompt_length: int) -> list[list[int]]:
        """What each row [rows, tokens] gained, an end of sequence included, padding left out."""
        counts = new_token_counts(sequences, prompt_length, self.eos_token_ids)
        rows = sequences[:, prompt_length:].tolist()
        return [row[:count] for row, count in zip(rows, counts, strict=True)]


@dataclass(frozen=True)
class Texts:
    """Texts that a target wrote without drafts, padded on the right.

    Args:
        input_ids: int64 [texts, tokens].
        attention_mask: int64 [texts, tokens], 0 for padding.
        written: bool [texts, tokens], what the target wrote greedily; the rest is what it went on from, and padding.
    """

    input_ids: torch.LongTensor
    attention_mask: torch.LongTensor
    written: torch.BoolTensor

    @classmethod
    def of(cls, pair: Pair, texts: int, lead: int, new_tokens: int) -> "Texts":
        """`texts` below each prompt: `lead` tokens are sampled at temperature 1, so that they differ, and greedy text
        goes on from there."""
        rows, starts = [], []
        for prompt in pair.prompts:
            sequences = pair.generate([prompt] * texts, do_sample=True, top_k=0, max_new_tokens=lead)
            begun = []
            for new in pair.new_tokens(sequences, len(prompt)):
                ended = new[-1] in pair.eos_token_ids  # then the end is taken off, and the text goes on all the same
                begun.append([*prompt, *(new[:-1] if ended else new)])
            sequences = pair.generate(begun, do_sample=False, max_new_tokens=new_tokens)
            for lead_in, new in zip(begun, pair.new_tokens(sequences, max(map(len, begun))), strict=True):
                rows.append([*lead_in, *new])
                starts.append(len(lead_in))
        lengths = torch.tensor([len(row) for row in rows])
        columns = torch.arange(int(lengths.max()))
        mask = columns < lengths[:, None]
        padded = [F.pad(torch.tensor(row), (0, len(columns) - len(row)), value=pair.pad_token_id) for row in rows]
        return cls(torch.stack(padded), mask.long(), mask & (columns >= torch.tensor(starts)[:, None]))

    def batches(self, size: int) -> Iterator["Texts"]:
        """`size` texts at a time."""
        parts = (self.input_ids.split(size), self.attention_mask.split(size), self.written.split(size))
        for part in zip(*parts, strict=True):
            yield Texts(*part)


def left_padded(prompts: Sequence[list[int]], pad_token_id: int, device: torch.device) -> dict[str, torch.LongTensor]:
    """`input_ids` and `attention_mask`, int64 [prompts, tokens]."""
    longest = max(map(len, prompts))
    padded = [[pad_token_id] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {
        "input_ids": torch.tensor(padded, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


@torch.no_grad()
def text_logits(target: PreTrainedModel, sequences: torch.LongTensor, prompt_length: int) -> Iterator[torch.Tensor]:
    """The target's logits from which every new token of a text is picked, by a plain pass over all of it.

    Args:
        sequences: int64 [texts, tokens], without padding on the left.
        prompt_length: tokens before the first new one.

    Yields:
        float32 [some texts, new tokens, vocab] on the CPU's or the head's device, text after text.
    """
    new = sequences.shape[1] - prompt_length
    for rows in sequences.split(max(1, _CHUNK // new)):
        logits = target(input_ids=rows.to(input_device(target)), use_cache=False, return_dict=True).logits
        yield logits[:, prompt_length - 1 : -1].float()


@contextlib.contextmanager
def attached(pair: Pair) -> Iterator[TargetReference]:
    """The specialists refer to the target inside the block."""
    before, pair.poss.reference = pair.poss.reference, TargetReference.from_target(pair.target, pair.poss.config)
    try:
        yield pair.poss.reference
    finally:
        pair.poss.reference = before


@contextlib.contextmanager
def bare_settings(target: PreTrainedModel) -> Iterator[None]:
    """The target generates without settings of its own inside the block, but for its special tokens: no processor then
    stands between its logits and the tokens that are picked."""
    before = target.generation_config
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    target.generation_config = GenerationConfig(**{name: getattr(before, name, None) for name in names})
    try:
        yield
    finally:
        target.generation_config = before
