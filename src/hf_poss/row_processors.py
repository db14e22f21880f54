"""Logits processors for rows that grow at their own pace: each row is processed alone, as a batch of one."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase
from transformers.generation import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from .compatibility import prefix_function


__all__ = ["processors_by_row"]


def processors_by_row(processors: LogitsProcessorList, rows: int) -> list[LogitsProcessorList]:
    """The processors of each row of a batch.

    A row sees the prefix that it would see without drafts, once for every emitted token, as a batch of one. Processors
    of transformers that know which row they serve (`prefix_allowed_tokens_fn`, guidance with negative prompts,
    penalties on the prompt) serve that row; its others keep no state and are shared.

    A processor of the caller's own may keep state over the prefix: row 0 takes the object itself, every other row a
    deep copy, in which modules and tokenizers are shared. One that holds an item a row (an attribute as long as the
    batch) tells rows by their place, and is called with a batch in which every row is the one that it serves.

    Raises:
        ValueError: if the caller's processor cannot be copied.
    """
    return [LogitsProcessorList(_for_row(processor, row, rows) for processor in processors) for row in range(rows)]


def _for_row(processor: LogitsProcessor, row: int, rows: int) -> LogitsProcessor:
    if rows == 1:
        return processor
    if type(processor) is PrefixConstrainedLogitsProcessor:
        allowed = prefix_function(processor)
        return PrefixConstrainedLogitsProcessor(lambda _, prefix: allowed(row, prefix), num_beams=1)
    if type(processor) is UnbatchedClassifierFreeGuidanceLogitsProcessor:
        context = processor.unconditional_context
        return UnbatchedClassifierFreeGuidanceLogitsProcessor(
            processor.guidance_scale,
            processor.model,
            unconditional_ids=_row_of(context["input_ids"], row, rows),
            unconditional_attention_mask=_row_of(context["attention_mask"], row, rows),
            use_cache=context["use_cache"],
        )
    if type(processor) is EncoderRepetitionPenaltyLogitsProcessor:
        own = copy.copy(processor)
        own.encoder_input_ids = _row_of(processor.encoder_input_ids, row, rows)
        return own
    if type(processor) is EncoderNoRepeatNGramLogitsProcessor:
        own = copy.copy(processor)
        own.batch_size, own.generated_ngrams = 1, _row_of(processor.generated_ngrams, row, rows)
        return own
    ignored = getattr(processor, "prompt_ignore_length", None)
    if type(processor) is RepetitionPenaltyLogitsProcessor and isinstance(ignored, torch.Tensor):
        own = copy.copy(processor)
        own.prompt_ignore_length = _row_of(ignored, row, rows)
        return own
    stateless = type(processor).__module__.startswith("transformers.")
    if stateless and type(processor) is not SynthIDTextWatermarkLogitsProcessor:
        return processor
    own = processor if row == 0 else _copied(processor)
    return _InItsPlace(own, row, rows) if _tells_rows(processor, rows) else own


def _tells_rows(processor: LogitsProcessor, rows: int) -> bool:
    attributes = getattr(processor, "__dict__", {}).values()
    return any(
        len(value) == rows
        for value in attributes
        if isinstance(value, (list, tuple, dict)) or (isinstance(value, torch.Tensor) and value.dim())
    )


class _InItsPlace(LogitsProcessor):
    """Runs a processor on a batch in which every row is the given one, and takes the row at that one's place."""

    def __init__(self, processor: LogitsProcessor, row: int, rows: int):
        self.processor, self.row, self.rows = processor, row, rows

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        batch = (states.repeat(self.rows, 1) for states in (input_ids, scores))
        return self.processor(*batch)[self.row : self.row + 1]


def _row_of(states: Any, row: int, rows: int) -> Any:
    """A row's part, kept as a batch of one, of what there is one of for each prompt; `num_return_sequences` makes
    several rows of a prompt."""
    if states is None:
        return None
    prompt = row * len(states) // rows
    return states[prompt : prompt + 1]


def _copied(processor: LogitsProcessor) -> LogitsProcessor:
    shared: dict[int, Any] = {
        id(value): value
        for value in getattr(processor, "__dict__", {}).values()
        if isinstance(value, (nn.Module, PreTrainedTokenizerBase))
    }
    try:
        return copy.deepcopy(processor, shared)
    except Exception as error:  # whatever the caller's object raises while it is copied
        raise ValueError(
            f"{type(processor).__name__} cannot be copied ({type(error).__name__}: {error}), and the rows of a batch "
            "need one each, since they grow at their own pace. Give it a `__deepcopy__`, or generate row by row."
        ) from error
