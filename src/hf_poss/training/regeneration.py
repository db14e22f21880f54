"""Responses that the target writes itself, for data that says what the target says."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ..compatibility import input_device
from ..configuration_poss import eos_token_ids as ends_of
from .record_files import RecordFile
from .requests import Request
from .row_sampling import RowSampling, draws


__all__ = ["Sampling", "answer", "end_tokens", "left_padded", "regenerate"]

# Requests at hand for one batch: enough that prompts of like length can be put together.
_OPEN_BATCHES = 8


@dataclass(frozen=True)
class Sampling:
    """How answers are written.

    Args:
        max_new_tokens: of an answer; one that reaches it without an end counts as unfinished.
        temperature: 0 for greedy search.
        top_p: smallest set of tokens with this probability; 1 for all.
        top_k: most probable tokens; 0 for all.
        seed: with the number of a record and of a turn it decides the draws of an answer.

    Raises:
        ValueError: for values that no sampling could use.
    """

    max_new_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self):
        bounds = {
            "max_new_tokens": self.max_new_tokens >= 1,
            "temperature": 0 <= self.temperature < float("inf"),
            "top_p": 0 < self.top_p <= 1,
            "top_k": self.top_k >= 0,
        }
        expected = {
            "max_new_tokens": "1 or more",
            "temperature": "0 (greedy) or more",
            "top_p": "more than 0, up to 1",
            "top_k": "0 (all tokens) or more",
        }
        for name, good in bounds.items():
            if not good:
                raise ValueError(f"`{name}` is {getattr(self, name)}; expected {expected[name]}.")

    def processors(self, places: Sequence[tuple[int, int]], prompt_length: int) -> LogitsProcessorList:
        """Processors that make greedy search write samples; none for greedy search.

        Args:
            places: number of the record and of the turn, for each row.
            prompt_length: tokens of the padded prompts.
        """
        if not self.temperature:
            return LogitsProcessorList()
        numbers = torch.stack([draws(self.max_new_tokens, self.seed, *place) for place in places])
        processors = [TemperatureLogitsWarper(float(self.temperature))] if self.temperature != 1 else []
        processors += [TopKLogitsWarper(self.top_k)] if self.top_k else []
        processors += [TopPLogitsWarper(self.top_p)] if self.top_p < 1 else []
        return LogitsProcessorList([*processors, RowSampling(numbers, prompt_length)])


def end_tokens(target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text of the target: those of its generation config, else the tokenizer's."""
    ends = ends_of(target.generation_config)
    return ends or ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])


def left_padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, int64 [batch, tokens], of prompts of any length, one token or more each."""
    longest = max(len(prompt) for prompt in prompts)
    input_ids = [[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {
        "input_ids": torch.tensor(input_ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def answer(
    target: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    places: Sequence[tuple[int, int]],
    eos_token_ids: Sequence[int],
    assistant_model: PreTrainedModel | None = None,
) -> list[tuple[list[int], bool]]:
    """What the target writes behind each prompt, without the token that ends it, and whether there was one.

    Args:
        prompts: token ids, one or more each; padded on the left here.
        sampling: how.
        places: number of the record and of the turn, for each prompt: with the seed they decide its draws.
        eos_token_ids: tokens that end an answer.
        assistant_model: position specialists; the text is the same, sooner.
    """
    pad = eos_token_ids[0] if eos_token_ids else 0
    inputs = left_padded(prompts, pad, input_device(target))
    longest = inputs["input_ids"].shape[1]
    output = target.generate(
        **inputs,
        # Draws are made by the processors: to `generate` this is greedy search, whatever the target's own settings.
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        logits_processor=sampling.processors(places, longest),
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(eos_token_ids) or None,
        pad_token_id=pad,
        **({} if assistant_model is None else {"assistant_model": assistant_model}),
    )
    answers = []
    for row in output[:, longest:].tolist():
        end = next((place for place, token in enumerate(row) if token in eos_token_ids), None)
        answers.append((row[:end], end is not None))
    return answers


def regenerate(
    target: PreTrainedModel,
    requests: Iterable[Request],
    output: RecordFile,
    sampling: Sampling,
    eos_token_ids: Sequence[int],
    batch_size: int = 8,
    max_length: int | None = None,
    assistant_model: PreTrainedModel | None = None,
) -> Iterator[Request]:
    """Lets the target answer requests, appends each to `output` when it is done, and yields it.

    Prompts of like length run together, the longest first, so that conversations that were begun are ended before
    others begin. What a row says does not depend on the rows beside it but for rounding, nor on the number of
    processes, nor on where a run was stopped.

    Args:
        target: runs in evaluation mode.
        requests: made when they are needed; a few batches of them are at hand at a time.
        output: takes the records.
        sampling: how answers are written.
        eos_token_ids: tokens that end an answer.
        batch_size: prompts that the target runs at once.
        max_length: tokens of a prompt and its answer together, at most; a prompt without room for `max_new_tokens`
            is not answered.
        assistant_model: as in [`answer`].
    """
    target.eval()
    room = None if max_length is None else max_length - sampling.max_new_tokens
    waiting: list[Request] = []
    source = iter(requests)
    while True:
        while len(waiting) < batch_size * _OPEN_BATCHES and (request := next(source, None)) is not None:
            if _waits(request, room):
                waiting.append(request)
            else:
                output.append(request.record())
                yield request
        if not waiting:
            return
        waiting.sort(key=lambda request: len(request.prompt))
        batch, waiting = waiting[-batch_size:], waiting[:-batch_size]
        answers = answer(
            target,
            [request.prompt for request in batch],
            sampling,
            [(request.index, request.turn) for request in batch],
            eos_token_ids,
            assistant_model,
        )
        for request, (token_ids, finished) in zip(batch, answers, strict=True):
            request.take(token_ids, finished)
            if _waits(request, room):
                waiting.append(request)
            else:
                output.append(request.record())
                yield request


def _waits(request: Request, room: int | None) -> bool:
    """Whether there is something to ask; a prompt that is too long is refused."""
    if request.prompt is not None and room is not None and len(request.prompt) > room:
        request.refuse(f"the prompt has {len(request.prompt)} tokens, and room is for {room} before the answer")
    return request.prompt is not None
