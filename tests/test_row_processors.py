"""Logits processors of each row, against the same processors on the whole batch in step."""

import copy
import threading

import pytest
import torch
from conftest import SMALL_VOCAB, small_target
from torch import nn
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
    WatermarkLogitsProcessor,
)

from hf_poss.row_processors import processors_by_row


ROWS, PROMPT, STEPS = 4, 5, 6
TEXT = torch.randint(3, SMALL_VOCAB, (ROWS, PROMPT + STEPS), generator=torch.Generator().manual_seed(0))
SCORES = torch.randn(STEPS, ROWS, SMALL_VOCAB, generator=torch.Generator().manual_seed(1))


class Calls(LogitsProcessor):
    """State over the prefix: how often it was called, and the sum of all last tokens."""

    def __init__(self):
        self.calls, self.total = 0, None

    def __call__(self, input_ids, scores):
        self.calls += 1
        self.total = input_ids[:, -1] + (0 if self.total is None else self.total)
        return scores + self.calls * self.total[:, None] * torch.arange(SMALL_VOCAB)


def allowed(row: int, prefix: torch.LongTensor) -> list[int]:
    return [token for token in range(SMALL_VOCAB) if (token + row + int(prefix.sum())) % 3]


def guidance(**kwargs) -> UnbatchedClassifierFreeGuidanceLogitsProcessor:
    return UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, small_target(), **kwargs)


NEGATIVE = {
    "unconditional_ids": torch.tensor([[0, 5, 6], [3, 4, 5], [7, 7, 3], [0, 0, 9]]),
    "unconditional_attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1], [1, 1, 1], [0, 0, 1]]),
}
SYNTHID = {
    "ngram_len": 3,
    "keys": [3, 5, 7],
    "sampling_table_size": 64,
    "sampling_table_seed": 0,
    "context_history_size": 9,
}
PROCESSORS = {
    "penalty": lambda: RepetitionPenaltyLogitsProcessor(1.5),
    "ngrams": lambda: NoRepeatNGramLogitsProcessor(2),
    "temperature": lambda: TemperatureLogitsWarper(0.7),
    "suppressed": lambda: SuppressTokensLogitsProcessor([3, 4]),
    "prompt_penalty": lambda: EncoderRepetitionPenaltyLogitsProcessor(1.5, TEXT[:, :PROMPT]),
    "prompt_ngrams": lambda: EncoderNoRepeatNGramLogitsProcessor(1, TEXT[:, :PROMPT]),
    "prefix_function": lambda: PrefixConstrainedLogitsProcessor(allowed, num_beams=1),
    "guidance": guidance,
    "guidance_by_negative_prompts": lambda: guidance(**NEGATIVE),
    "guidance_without_cache": lambda: guidance(use_cache=False),
    "watermark": lambda: WatermarkLogitsProcessor(SMALL_VOCAB, "cpu"),
    "synthid": lambda: SynthIDTextWatermarkLogitsProcessor(device=torch.device("cpu"), **SYNTHID),
    "own": Calls,
}


def assert_rows_agree(make) -> None:
    """Rows processed alone, one far ahead of the others, get what they get in one batch in step."""
    whole = LogitsProcessorList([make()])
    with torch.no_grad():
        expected = [whole(TEXT[:, : PROMPT + step], SCORES[step].clone()) for step in range(STEPS)]
        by_row = processors_by_row(LogitsProcessorList([make()]), ROWS)
        for row in (2, 0, 3, 1):
            for step in range(STEPS):
                scores = by_row[row](TEXT[row : row + 1, : PROMPT + step], SCORES[step, row : row + 1].clone())
                torch.testing.assert_close(scores, expected[step][row : row + 1], rtol=1e-4, atol=1e-4)
    assert not all(torch.equal(expected[step], SCORES[step]) for step in range(STEPS)), "it processes nothing"


@pytest.mark.parametrize("make", list(PROCESSORS.values()), ids=list(PROCESSORS))
def test_rows_are_processed_as_in_the_batch(make):
    assert_rows_agree(make)


def test_padding_is_ignored_row_by_row():
    """The repetition penalty of releases that leave out each row's own padding."""
    try:
        RepetitionPenaltyLogitsProcessor(1.5, prompt_ignore_length=torch.tensor([1]))
    except ValueError:
        pytest.skip("this release of transformers penalises padding")
    ignored = torch.tensor([0, 3, 1, 5])
    assert_rows_agree(lambda: RepetitionPenaltyLogitsProcessor(1.5, prompt_ignore_length=ignored))


def test_rows_of_one_prompt_share_what_there_is_of_it():
    """Two prompts that write two texts each."""
    prompts = TEXT[:2, :PROMPT]
    by_row = processors_by_row(
        LogitsProcessorList([EncoderRepetitionPenaltyLogitsProcessor(1.5, prompts), *_ngrams(prompts)]), ROWS
    )
    for row in range(ROWS):
        prompt = prompts[row // 2 : row // 2 + 1]
        own = LogitsProcessorList([EncoderRepetitionPenaltyLogitsProcessor(1.5, prompt), *_ngrams(prompt)])
        scores = SCORES[0, row : row + 1]
        prefix = TEXT[row : row + 1]
        torch.testing.assert_close(by_row[row](prefix, scores.clone()), own(prefix, scores.clone()))


def _ngrams(prompts: torch.LongTensor) -> list[LogitsProcessor]:
    return [EncoderNoRepeatNGramLogitsProcessor(1, prompts)]


def test_one_row_takes_the_objects_themselves():
    processors = [Calls(), TemperatureLogitsWarper(0.7), PrefixConstrainedLogitsProcessor(allowed, num_beams=1)]
    (alone,) = processors_by_row(LogitsProcessorList(processors), 1)
    assert all(one is other for one, other in zip(alone, processors, strict=True))


def test_the_first_row_takes_the_callers_own_object():
    """So that a caller can read its state afterwards."""
    mine = Calls()
    by_row = processors_by_row(LogitsProcessorList([mine]), 3)
    assert by_row[0][0] is mine
    assert len({id(processors[0]) for processors in by_row}) == 3


def test_copies_share_modules_and_nothing_else():
    class Guided(LogitsProcessor):
        def __init__(self):
            self.model, self.state = nn.Linear(2, 2), {"seen": []}

        def __call__(self, input_ids, scores):
            return scores

    mine = Guided()
    _, (theirs,) = processors_by_row(LogitsProcessorList([mine]), 2)
    assert theirs.model is mine.model
    assert theirs.state == mine.state and theirs.state["seen"] is not mine.state["seen"]


def test_what_cannot_be_copied_is_refused_for_several_rows():
    class Locked(LogitsProcessor):
        def __init__(self):
            self.lock = threading.Lock()

    with pytest.raises(TypeError):
        copy.deepcopy(Locked())
    with pytest.raises(ValueError, match="Locked cannot be copied.*__deepcopy__.*row by row"):
        processors_by_row(LogitsProcessorList([Locked()]), 2)
    processors_by_row(LogitsProcessorList([Locked()]), 1)


def test_processors_that_hold_an_item_a_row_serve_their_row():
    class Biased(LogitsProcessor):
        def __init__(self, bias):
            self.bias = bias

        def __call__(self, input_ids, scores):
            return scores + self.bias

    class Listed(LogitsProcessor):
        def __init__(self, tokens):
            self.tokens = tokens

        def __call__(self, input_ids, scores):
            scores = scores.clone()
            for row, token in enumerate(self.tokens):
                scores[row, token] += 1.0 + input_ids[row, -1]
            return scores

    prompts, scores = torch.arange(6).view(3, 2), torch.randn(3, 5)
    for mine in (Biased(torch.randn(3, 5)), Listed([1, 4, 2])):
        expected = mine(prompts, scores)
        for row, (own,) in enumerate(processors_by_row(LogitsProcessorList([mine]), 3)):
            torch.testing.assert_close(own(prompts[row : row + 1], scores[row : row + 1]), expected[row : row + 1])
