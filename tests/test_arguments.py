"""The arguments of `generate` with position specialists: the same outcome as without, in chains and in trees, for one
row and for a batch with padding in front."""

import itertools
import threading
import time
from collections import Counter, defaultdict
from datetime import timedelta

import pytest
import torch
from conftest import (
    PAD,
    SMALL_VOCAB,
    drafter_for,
    left_padded,
    make_prompt,
    small_target,
    unknown_attention,
    with_slips,
)
from scipy.stats import chi2, chi2_contingency
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import distributed, nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    TextIteratorStreamer,
    TextStreamer,
    WatermarkingConfig,
    set_seed,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.streamers import BaseStreamer

from hf_poss import PosSCandidateGenerator, caches, collect_statistics, static_rounds
from hf_poss.compatibility import CACHE


PROMPTS = [make_prompt(7, seed=1), make_prompt(3, seed=2), make_prompt(11, seed=3)]
# End the Llama's rows after 8, 12 and 11 tokens; after 1, 8 and 14.
STAGGERED = {"eos_token_id": [2, 3], "pad_token_id": PAD}
ONE_AT_ONCE = {"eos_token_id": [2, 6], "pad_token_id": PAD}
MANY_ENDS = {"eos_token_id": list(range(6)), "pad_token_id": PAD}


@pytest.fixture(params=[1, 3], ids=["one_row", "three_rows"])
def inputs(request) -> dict[str, torch.LongTensor]:
    """A prompt, or three of 7, 3 and 11 tokens."""
    return left_padded(PROMPTS[: request.param])


@pytest.fixture
def three_rows() -> dict[str, torch.LongTensor]:
    return left_padded(PROMPTS)


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return small_target()


@pytest.fixture(scope="module")
def eager_target() -> PreTrainedModel:
    return small_target(attention="eager")


@pytest.fixture(scope="module")
def window_target() -> PreTrainedModel:
    return small_target("mistral")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Letters; two tokens are longer, and no text is read as them."""
    words = ["<pad>", "<s>", *"abcdefgh", "ab", "ca"]
    assert len(words) == SMALL_VOCAB
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", padding_side="left")


def unpadded(sequences: torch.LongTensor, inputs: dict[str, torch.LongTensor]) -> list[list[int]]:
    """Rows without the padding of their prompts."""
    starts = (inputs["attention_mask"] == 0).sum(-1).tolist()
    return [row[start:] for row, start in zip(sequences.tolist(), starts, strict=True)]


@pytest.fixture
def compare(scripted):
    """Asserts that greedy text is the same with and without specialists; returns the plain output and the statistics.

    Drafts hold what plain `generate` wrote, with mistakes at places that differ from row to row: rows accept paths of
    every length, and each at its own pace."""

    def check(target, inputs, shape, make=dict, depth=3, **kwargs):
        kwargs = {"max_new_tokens": 24, "do_sample": False, **kwargs}
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        plain = target.generate(**inputs, **kwargs, **make())
        sequences = plain if isinstance(plain, torch.Tensor) else plain.sequences
        texts = unpadded(sequences, inputs)
        scripted(*(with_slips(text, 4 + 3 * row) for row, text in enumerate(texts)))
        with collect_statistics() as stats:
            output = target.generate(
                **inputs, assistant_model=drafter_for(target, shape, depth=depth), **kwargs, **make()
            )
        assert type(output) is type(plain)
        written = output if isinstance(output, torch.Tensor) else output.sequences
        assert written.tolist() == sequences.tolist()
        return plain, output, stats

    return check


def lengths_of(output: torch.LongTensor, inputs: dict[str, torch.LongTensor], eos: list[int]) -> list[int]:
    """New tokens of each row, the end of sequence included."""
    new = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [next((step for step, token in enumerate(row, 1) if token in eos), len(row)) for row in new]


# ---- Processors ----

ARGUMENTS = {
    "repetition_penalty": {"repetition_penalty": 1.4},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[4], [5, 6], [7, 8]]},
    "min_new_tokens": {"min_new_tokens": 12, **MANY_ENDS},
    "min_length": {"min_length": 16, **MANY_ENDS},
    "suppress_tokens": {"suppress_tokens": [9, 5]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [5, 6, 7]},
    "forced_eos_token_id": {"forced_eos_token_id": 9, "eos_token_id": 9, "pad_token_id": PAD},
    "sequence_bias": {"sequence_bias": [[[4], 3.0], [[5, 6], -9.0], [[8, 2], 4.0]]},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (4, 1.3), **STAGGERED},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.8},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "remove_invalid_values": {"remove_invalid_values": True},
    "renormalize_logits": {"renormalize_logits": True},
    "guidance_scale": {"guidance_scale": 1.7},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=4.0, seeding_scheme="lefthash")},
    "synthid": {"watermarking_config": SynthIDTextWatermarkingConfig(keys=[3, 5, 7, 11], ngram_len=3)},
    "prefix_allowed_tokens_fn": {
        # A row, the length and the last token decide.
        "prefix_allowed_tokens_fn": lambda row, prefix: [
            token for token in range(SMALL_VOCAB) if (token + row + len(prefix) + int(prefix[-1])) % 3
        ]
    },
    "several": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "suppress_tokens": [9], **STAGGERED},
}


@pytest.mark.parametrize("arguments", list(ARGUMENTS.values()), ids=list(ARGUMENTS))
def test_processors(arguments, target, inputs, shape, compare):
    _, _, stats = compare(target, inputs, shape, **arguments)
    assert sum(stats.accepted) > 0


def test_each_processor_of_the_matrix_matters(target, three_rows):
    """An argument that changes nothing would be no test; two of them change numbers only."""
    kwargs = {"max_new_tokens": 24, "do_sample": False}
    for name, arguments in ARGUMENTS.items():
        ends = {key: value for key, value in arguments.items() if key in ("eos_token_id", "pad_token_id")}
        without = target.generate(**three_rows, **{**kwargs, **ends}).tolist()
        changed = target.generate(**three_rows, **{**kwargs, **arguments}).tolist() != without
        assert changed != (name in ("remove_invalid_values", "renormalize_logits")), name


def test_guidance_by_negative_prompts(target, inputs, shape, compare):
    """A negative prompt a row, one of them padded."""
    rows = inputs["input_ids"].shape[0]
    negative = left_padded([make_prompt(4, seed=7), make_prompt(2, seed=8), make_prompt(4, seed=9)])
    prompts = {
        "negative_prompt_ids": negative["input_ids"][:rows],
        "negative_prompt_attention_mask": negative["attention_mask"][:rows],
    }
    plain, _, _ = compare(target, inputs, shape, guidance_scale=2.0, **prompts)
    assert plain.tolist() != compare(target, inputs, shape, guidance_scale=2.0)[0].tolist()


def test_a_generation_config_and_the_targets_own(target, inputs, shape, compare):
    config = GenerationConfig(max_new_tokens=20, do_sample=False, repetition_penalty=1.3, **STAGGERED)
    compare(target, inputs, shape, generation_config=config, max_new_tokens=None, do_sample=None)


def test_token_healing(target, tokenizer, shape, compare):
    """The last token of a prompt is taken back and may be chosen anew, longer."""
    rows = left_padded([torch.tensor([[5, 7, 2]]), torch.tensor([[9, 4, 8, 3, 4]])])
    kwargs = {"token_healing": True, "tokenizer": tokenizer}
    plain, _, _ = compare(target, rows, shape, **kwargs)
    assert plain[:, :5].tolist() != rows["input_ids"].tolist(), "nothing was healed"
    compare(target, {name: value[1:] for name, value in rows.items()}, shape, **kwargs)


class Recording(LogitsProcessor):
    """Writes down every prefix, and shifts the scores by how often it was called and by what the row holds."""

    def __init__(self, asked: "Asked"):
        self.asked = asked
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        self.asked.prefixes += [tuple(row) for row in input_ids.tolist()]
        shifts = (input_ids.sum(-1) + input_ids.shape[1] + 5 * self.calls).tolist()
        return torch.stack([row.roll(shift % SMALL_VOCAB) for row, shift in zip(scores, shifts, strict=True)])


class Asked(nn.Module):
    """A list that copies of a processor share, as modules are."""

    def __init__(self):
        super().__init__()
        self.prefixes: list[tuple[int, ...]] = []


def test_a_custom_processor_with_state_sees_each_prefix_once(target, inputs, shape, compare):
    lists = []

    def make():
        lists.append(Asked())
        return {"logits_processor": LogitsProcessorList([Recording(lists[-1])])}

    plain, _, stats = compare(target, inputs, shape, make)
    assert sum(stats.accepted) > 0
    assert len(set(plain.flatten().tolist())) > 5
    assert Counter(lists[1].prefixes) == Counter(lists[0].prefixes)
    assert max(Counter(lists[1].prefixes).values()) == 1


def test_a_custom_processor_is_not_asked_about_a_finished_row(target, three_rows, shape, compare):
    lists = []

    def make():
        lists.append(Asked())
        return {"logits_processor": LogitsProcessorList([Recording(lists[-1])])}

    compare(target, three_rows, shape, make, eos_token_id=[3, 8], pad_token_id=PAD)
    assert set(lists[1].prefixes) < set(lists[0].prefixes)


def test_a_custom_processor_that_cannot_be_copied(target, three_rows):
    class Locked(LogitsProcessor):
        def __init__(self):
            self.lock = threading.Lock()

        def __call__(self, input_ids, scores):
            return scores

    poss = drafter_for(target, "tree")
    with pytest.raises(ValueError, match="Locked cannot be copied.*row by row"):
        target.generate(**three_rows, assistant_model=poss, logits_processor=[Locked()], max_new_tokens=4)
    one = {name: value[:1] for name, value in three_rows.items()}
    target.generate(**one, assistant_model=poss, logits_processor=[Locked()], max_new_tokens=4)


# ---- Prompts ----


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_prompts_in_chunks(family, inputs, shape, compare):
    for chunk in (1, 4, 30):
        compare(small_target(family), inputs, shape, prefill_chunk_size=chunk)


def test_masks_are_inferred_as_ever(target, inputs, shape):
    """From the pad token."""
    kwargs = {"max_new_tokens": 24, "do_sample": False}
    plain = target.generate(inputs["input_ids"], **kwargs)
    assert target.generate(inputs["input_ids"], assistant_model=drafter_for(target, shape), **kwargs).tolist() == (
        plain.tolist()
    )
    assert plain.tolist() == target.generate(**inputs, **kwargs).tolist()


def test_prompts_of_one_token(target, shape, compare):
    prompts = left_padded([make_prompt(1, seed=seed) for seed in (1, 2, 4)])
    compare(target, prompts, shape)
    plain, _, _ = compare(target, prompts, shape, forced_bos_token_id=9)
    assert plain[:, 1].tolist() == [9, 9, 9]


def test_positions_of_the_callers_own(target, inputs, shape, compare):
    """They go on from the last one."""
    mask = inputs["attention_mask"]
    positions = mask.cumsum(-1) + 5 + 3 * (mask.cumsum(-1) > 2)
    plain, _, _ = compare(target, inputs | {"position_ids": positions * mask}, shape)
    assert plain.tolist() != target.generate(**inputs, max_new_tokens=24, do_sample=False).tolist()


@pytest.mark.parametrize("hidden", [[-3], [-5, -4], [-1]], ids=str)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_masks_with_holes(family, hidden, inputs, shape):
    """Tokens in the middle or at the end of a prompt that nothing sees."""
    target = small_target(family)
    mask = inputs["attention_mask"].clone()
    mask[:, hidden] = 0
    kwargs = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False}
    plain = target.generate(inputs["input_ids"], **kwargs)
    output = target.generate(inputs["input_ids"], assistant_model=drafter_for(target, shape), **kwargs)
    assert output.tolist() == plain.tolist()
    assert mask[:, hidden].sum() == 0


# ---- Ends ----


@pytest.mark.parametrize("depth", [1, 4])
def test_end_of_sequence_at_any_step(depth, target, inputs, shape, compare):
    """Every token in turn is the end of sequence: rows end on roots, inside paths and behind them, at other times."""
    ends = set()
    for eos in range(SMALL_VOCAB):
        plain, _, _ = compare(target, inputs, shape, depth=depth, eos_token_id=[eos], pad_token_id=PAD)
        ends.update(lengths_of(plain, inputs, [eos]))
    assert {1, 24} < ends and len(ends) >= 5


def test_padding_is_the_pad_token(target, three_rows, shape, compare):
    plain, _, _ = compare(target, three_rows, shape, eos_token_id=[2, 6], pad_token_id=9)
    assert plain[0, -1] == 9


@pytest.mark.parametrize("number", [1, 2, 3, 5, 11])
def test_every_length_is_met(number, target, inputs, shape, compare):
    plain, _, _ = compare(target, inputs, shape, max_new_tokens=number)
    assert plain.shape[1] == inputs["input_ids"].shape[1] + number


def test_max_length(target, inputs, shape, compare):
    plain, _, _ = compare(target, inputs, shape, max_new_tokens=None, max_length=17)
    assert plain.shape[1] == 17


def test_a_time_that_is_over_at_once(target, inputs, shape, compare):
    plain, _, _ = compare(target, inputs, shape, max_time=0.0)
    assert plain.shape[1] == inputs["input_ids"].shape[1] + 1


def test_a_time_that_is_over_in_the_middle(target, inputs, shape, scripted):
    """The clock runs out when a token has been picked, and that token is the last: not even the drafts of its round
    that are right are taken."""

    class Slow(LogitsProcessor):
        def __call__(self, input_ids, scores):
            time.sleep(0.2 if input_ids.shape[1] == start + 4 else 0)
            return scores

    start = inputs["input_ids"].shape[1]
    plain = target.generate(**inputs, max_new_tokens=24, do_sample=False)
    scripted(*unpadded(plain, inputs))
    output = target.generate(
        **inputs,
        assistant_model=drafter_for(target, shape, depth=8),
        max_new_tokens=24,
        do_sample=False,
        max_time=0.2,
        logits_processor=[Slow()],
        pad_token_id=PAD,
    )
    assert output.tolist() == plain[:, : start + 5].tolist()


@pytest.mark.parametrize("ends", [{}, STAGGERED], ids=["no_eos", "eos"])
@pytest.mark.parametrize("strings", ["g", ["fdg", "ab", "c"], ["hhhh"]], ids=str)
def test_stop_strings(strings, ends, target, inputs, tokenizer, shape, compare):
    compare(target, inputs, shape, stop_strings=strings, tokenizer=tokenizer, **ends)


def test_stop_strings_stop_rows_at_different_tokens(target, three_rows, tokenizer):
    """What the test before needs in order to mean something."""
    ends = {"eos_token_id": [1], "pad_token_id": PAD}
    output = target.generate(
        **three_rows, stop_strings=["g", "hab"], tokenizer=tokenizer, max_new_tokens=24, do_sample=False, **ends
    )
    assert output.shape[1] < three_rows["input_ids"].shape[1] + 24
    assert (output[:, -1] == PAD).any()


class AfterPair(StoppingCriteria):
    """Stops a row behind two tokens of which there are several kinds, as a tensor over rows."""

    def __init__(self, pairs):
        self.pairs = {tuple(pair) for pair in pairs}

    @classmethod
    def of(cls, pairs):
        return lambda: {"stopping_criteria": [cls(pairs)]}

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([tuple(pair) in self.pairs for pair in input_ids[:, -2:].tolist()])


class UntilAllSaid(StoppingCriteria):
    """Stops once every row has said the word; state is sized to the batch, the answer is a Python bool."""

    def __init__(self, word, rows, prompt_length):
        self.word, self.prompt_length, self.done_tracker = word, prompt_length, [False] * rows
        self.lengths = []

    def __call__(self, input_ids, scores, **kwargs) -> bool:
        self.lengths.append(input_ids.shape[1])
        recent = input_ids[:, self.prompt_length :][:, -len(self.word) :]
        for row, done in enumerate(self.done_tracker):
            if not done:
                self.done_tracker[row] = recent[row].tolist() == self.word
        return False not in self.done_tracker


class AtLength(StoppingCriteria):
    """Stops each row at a length of its own; the whole batch is read by position, its layout included."""

    def __init__(self, lengths):
        self.lengths = torch.tensor(lengths)

    @classmethod
    def of(cls, lengths):
        return lambda: {"stopping_criteria": [cls(lengths)]}

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.view(-1).view(len(self.lengths), -1).shape[1] >= self.lengths


class OnScores(StoppingCriteria):
    """Looks at all scores so far."""

    def __init__(self):
        self.shapes = []

    def __call__(self, input_ids, scores, **kwargs):
        self.shapes.append([tuple(step.shape) for step in scores])
        return torch.stack(scores).argmax(-1).sum(0) > 30


@pytest.mark.parametrize("ends", [{}, STAGGERED], ids=["no_eos", "eos"])
def test_a_criterion_that_stops_rows_one_by_one(ends, target, inputs, shape, compare):
    """Without an end of sequence a stopped row goes on until all have stopped."""
    lengths = set()
    text = target.generate(**inputs, max_new_tokens=20, do_sample=False)[:, inputs["input_ids"].shape[1] :].tolist()
    for step in range(1, 19, 3):
        pairs = [row[step : step + 2] for row in text]
        plain, _, _ = compare(target, inputs, shape, AfterPair.of(pairs), **ends)
        lengths.add(plain.shape[1])
    assert len(lengths) >= 3


@pytest.mark.parametrize("ends", [{}, STAGGERED, ONE_AT_ONCE], ids=["no_eos", "eos", "one_at_once"])
@pytest.mark.parametrize("word", [[8], [3, 8], [9]], ids=str)
def test_a_criterion_with_state_over_the_batch(word, ends, target, inputs, shape, compare):
    """As evaluation harnesses write them."""
    made = []

    def make():
        made.append(UntilAllSaid(word, *inputs["input_ids"].shape))
        return {"stopping_criteria": StoppingCriteriaList([made[-1]])}

    compare(target, inputs, shape, make, **ends)
    assert made[1].done_tracker == made[0].done_tracker
    assert made[1].lengths == made[0].lengths, "not asked once a step"


@pytest.mark.parametrize("ends", [{}, STAGGERED], ids=["no_eos", "eos"])
def test_a_criterion_that_reads_the_batch_by_position(ends, target, inputs, shape, compare):
    start = inputs["input_ids"].shape[1]
    for lengths in ([3, 9, 6], [1, 1, 1], [12, 2, 12]):
        own = [start + length for length in lengths[: inputs["input_ids"].shape[0]]]
        plain, _, _ = compare(target, inputs, shape, AtLength.of(own), **ends)
        assert ends or plain.shape[1] == max(own)


def test_a_criterion_on_scores(target, inputs, shape, compare):
    made = []

    def make():
        made.append(OnScores())
        return {"stopping_criteria": [made[-1]]}

    plain, _, _ = compare(target, inputs, shape, make, return_dict_in_generate=True, output_scores=True)
    assert inputs["input_ids"].shape[1] + 2 < plain.sequences.shape[1] < inputs["input_ids"].shape[1] + 24
    assert made[1].shapes == made[0].shapes


def test_a_criterion_that_stops_at_the_first_token(target, inputs, shape, compare):
    plain, _, stats = compare(target, inputs, shape, lambda: {"stopping_criteria": [lambda tokens, scores: True]})
    assert plain.shape[1] == inputs["input_ids"].shape[1] + 1
    assert stats.rounds == 0


# ---- Rows ----


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma3"])
def test_rows_are_those_of_each_prompt_alone(family, shape):
    """Drafts of the specialists themselves: a row takes as many rounds as alone."""
    target = small_target(family)
    poss = drafter_for(target, shape)
    prompts = [*PROMPTS, make_prompt(20, seed=4), make_prompt(1, seed=5)]
    kwargs = {"assistant_model": poss, "max_new_tokens": 24, "do_sample": False}
    with collect_statistics() as stats:
        output = target.generate(**left_padded(prompts), **kwargs)
    assert output.tolist() == target.generate(**left_padded(prompts), max_new_tokens=24, do_sample=False).tolist()
    rounds = []
    for row, prompt in enumerate(prompts):
        with collect_statistics() as alone:
            expected = target.generate(**left_padded([prompt]), **kwargs)
        assert output[row, 20:].tolist() == expected[0, prompt.shape[1] :].tolist()
        rounds.append(alone.rounds)
    assert [call.rounds for call in stats.calls] == rounds
    assert len(set(rounds)) > 1 and min(rounds) < 23, "all rows accepted alike, so the test shows nothing"


def test_no_row_waits_for_another(target, three_rows, shape, scripted):
    """One row's drafts are right, one's wrong, one's right up to the second: each accepts its own."""
    texts = unpadded(target.generate(**three_rows, max_new_tokens=40, do_sample=False), three_rows)
    scripted(texts[0], with_slips(texts[1], 1), with_slips(texts[2], 3))
    with collect_statistics() as stats:
        target.generate(
            **three_rows, assistant_model=drafter_for(target, shape, depth=4), max_new_tokens=21, do_sample=False
        )
    right, wrong, mixed = stats.calls
    assert (right.rounds, right.tokens) == (4, 20)
    assert (wrong.rounds, wrong.tokens) == (20, 20)
    # A slip ends a round at least every third token.
    assert 7 <= mixed.rounds <= 9


@pytest.fixture
def passes(monkeypatch):
    """Rows in each pass of the target behind the prompt's, and in each draft."""
    counts = defaultdict(list)

    def watch(target):
        def count(module, args, kwargs):
            counts["target"].append(kwargs["input_ids"].shape[0])

        draft = PosSCandidateGenerator.draft

        def counted(self, root_tokens, *args):
            counts["drafter"].append(root_tokens.shape[0])
            return draft(self, root_tokens, *args)

        extend_context = PosSCandidateGenerator.extend_context

        def extended(self, features, *args):
            counts["context"].append(features.shape[0])
            return extend_context(self, features, *args)

        monkeypatch.setattr(PosSCandidateGenerator, "draft", counted)
        monkeypatch.setattr(PosSCandidateGenerator, "extend_context", extended)
        hooks.append(target.register_forward_pre_hook(count, with_kwargs=True))
        return counts

    hooks = []
    yield watch
    for hook in hooks:
        hook.remove()


def test_finished_rows_cost_nothing(target, three_rows, shape, scripted, passes):
    """Right drafts of four: a row of n tokens takes part in (n - 1) / 5 rounds, rounded up, and in no more."""
    plain = target.generate(**three_rows, max_new_tokens=24, do_sample=False, **ONE_AT_ONCE)
    new = lengths_of(plain, three_rows, ONE_AT_ONCE["eos_token_id"])
    assert new == [1, 8, 14], "the rows were to end at these tokens"
    scripted(*unpadded(plain, three_rows))
    counts = passes(target)
    output = target.generate(
        **three_rows,
        assistant_model=drafter_for(target, shape, depth=4),
        max_new_tokens=24,
        do_sample=False,
        **ONE_AT_ONCE,
    )
    assert output.tolist() == plain.tolist()
    rounds = [-(-(number - 1) // 5) for number in new]
    active = [sum(of_row > index for of_row in rounds) for index in range(max(rounds))]
    assert active == [2, 2, 1]
    assert counts["drafter"] == counts["context"] == active
    # Releases that do not tell whose cache it is read the last tokens of ended rows in one pass more.
    assert counts["target"][: 1 + len(active)] == [3, *active]
    assert len(counts["target"]) <= 2 + len(active)


def test_the_target_runs_less_often_than_it_writes(target, inputs, shape, scripted, passes):
    scripted(*unpadded(target.generate(**inputs, max_new_tokens=40, do_sample=False), inputs))
    counts = passes(target)
    target.generate(**inputs, assistant_model=drafter_for(target, shape, depth=4), max_new_tokens=21, do_sample=False)
    assert len(counts["target"]) == 1 + 20 // 5


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_the_targets_cache_is_not_copied(family, three_rows, shape, monkeypatch, scripted):
    """While there is room, keys and values stay where they are, but for the round that is first to move any and brings
    the layers together; what moves inside is what was accepted."""
    target = small_target(family)
    texts = unpadded(target.generate(**three_rows, max_new_tokens=60, do_sample=False), three_rows)
    scripted(*(with_slips(text, 4 + 3 * row) for row, text in enumerate(texts)))
    places, storages, moved, copied = [], set(), [], []

    def see(module, args, kwargs):
        layers = kwargs[CACHE].layers
        held = [states for layer in layers if layer.buffer.states for states in layer.buffer.states]
        places.append([states.data_ptr() for states in held])
        storages.update(states.untyped_storage().data_ptr() for states in held)

    move, cat = caches.move_entries, torch.cat

    def seen_move(tensors, slots, *columns):
        for states in tensors:  # keys or values of several layers
            assert states.dim() == 5
            moved.append(len(states) * len(slots))
        move(tensors, slots, *columns)

    def seen_cat(tensors, *args, **kwargs):
        copied.extend(tensor for tensor in tensors if tensor.untyped_storage().data_ptr() in storages)
        return cat(tensors, *args, **kwargs)

    for module in (caches, static_rounds):
        monkeypatch.setattr(module, "move_entries", seen_move)
    monkeypatch.setattr(torch, "cat", seen_cat)
    hook = target.register_forward_pre_hook(see, with_kwargs=True)
    try:
        with collect_statistics() as stats:
            target.generate(
                **three_rows, assistant_model=drafter_for(target, shape, depth=3), max_new_tokens=40, do_sample=False
            )
    finally:
        hook.remove()
    assert places[0] == [] and len(places[1]) == 2 * target.config.num_hidden_layers
    assert len(places) > 4 and len(list(itertools.groupby(places[1:]))) <= 2
    assert 0 < sum(moved) <= 2 * stats.tokens * target.config.num_hidden_layers
    # At the end each layer's keys and values are handed back to the cache of the call, once.
    assert len(copied) <= 2 * target.config.num_hidden_layers


# ---- Sampling ----


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"temperature": 0.6, "top_k": 5, "top_p": 0.9},
        {"min_p": 0.05, "repetition_penalty": 1.3},
        {"typical_p": 0.8, "no_repeat_ngram_size": 2},
        {"epsilon_cutoff": 0.02, "eta_cutoff": 0.02, "top_h": 0.6, "temperature": 3.0},
        {"renormalize_logits": True, **STAGGERED},
    ],
    ids=lambda arguments: "-".join(arguments) or "plain",
)
def test_one_row_samples_what_plain_generate_samples(arguments, target, shape):
    """One draw a token from the same distribution, in the same order: a seed gives the same text."""
    poss = drafter_for(target, shape)
    kwargs = {"max_new_tokens": 24, "do_sample": True, "top_k": 0, **arguments}
    texts, accepted = set(), 0
    for seed in range(4):
        set_seed(seed)
        plain = target.generate(PROMPTS[0], **kwargs).tolist()
        set_seed(seed)
        with collect_statistics() as stats:
            assert target.generate(PROMPTS[0], assistant_model=poss, **kwargs).tolist() == plain
        texts.add(str(plain))
        accepted += sum(stats.accepted)
    assert len(texts) > 1 and accepted > 0


@pytest.mark.parametrize("returned", [1, 2])
def test_a_seed_gives_the_same_batch(returned, target, inputs, shape):
    poss = drafter_for(target, shape)
    kwargs = {"max_new_tokens": 24, "do_sample": True, "num_return_sequences": returned, **STAGGERED}

    def write(seed):
        set_seed(seed)
        return target.generate(**inputs, assistant_model=poss, **kwargs).tolist()

    assert write(3) == write(3)
    assert len({str(write(seed)) for seed in range(4)}) > 1


def test_a_sampled_row_does_not_depend_on_its_neighbours(target, shape):
    """Neither on what they say nor on how far they got."""
    poss = drafter_for(target, shape)

    def write(*prompts):
        set_seed(5)
        output = target.generate(
            **left_padded([*PROMPTS[1:], *prompts]), assistant_model=poss, max_new_tokens=24, do_sample=True
        )
        return output[:2, 11:].tolist()

    assert write(make_prompt(4, seed=8)) == write(make_prompt(9, seed=9)) == write(PROMPTS[0], PROMPTS[0])


@pytest.mark.parametrize("rows", [1, 2])
def test_num_return_sequences(rows, target, shape):
    inputs = left_padded(PROMPTS[:rows])
    start = inputs["input_ids"].shape[1]
    set_seed(0)
    output = target.generate(
        **inputs,
        assistant_model=drafter_for(target, shape),
        max_new_tokens=16,
        do_sample=True,
        num_return_sequences=3,
        return_dict_in_generate=True,
        output_scores=True,
    )
    sequences = output.sequences
    assert sequences.shape == (3 * rows, start + 16)
    assert sequences[:, :start].tolist() == inputs["input_ids"].repeat_interleave(3, dim=0).tolist()
    for first in range(0, 3 * rows, 3):
        assert len({str(row) for row in sequences[first : first + 3, start:].tolist()}) == 3
    assert [tuple(step.shape) for step in output.scores] == [(3 * rows, SMALL_VOCAB)] * 16


def test_several_greedy_texts_of_one_prompt_are_refused_as_ever(target):
    messages = []
    for assistant in ({}, {"assistant_model": drafter_for(target, "tree")}):
        with pytest.raises(ValueError) as error:
            target.generate(PROMPTS[0], do_sample=False, num_return_sequences=2, max_new_tokens=4, **assistant)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


ERROR_RATE = 1e-4  # chance that a correct sampler fails one of these tests, seeds being free


@pytest.fixture(scope="module")
def tiny_target() -> PreTrainedModel:
    """Six tokens, none of which is certain."""
    return small_target(seed=5, vocab_size=6, hidden_size=16, num_hidden_layers=1, pad_token_id=PAD)


def joint_of_three(target, prompt, penalty) -> dict[tuple[int, ...], float]:
    """Probability of every three tokens, from the target's own passes."""
    joint = {(): 1.0}
    for _ in range(3):
        prefixes = torch.tensor([[*prompt[0].tolist(), *tokens] for tokens in joint])
        with torch.no_grad():
            logits = target(prefixes).logits[:, -1].float()
        rows = (RepetitionPenaltyLogitsProcessor(penalty)(prefixes, logits) / 1.5).softmax(-1).tolist()
        joint = {
            (*tokens, token): before * row[token]
            for (tokens, before), row in zip(joint.items(), rows, strict=True)
            for token in range(6)
        }
    return joint


def test_rows_of_a_batch_have_the_targets_distribution(tiny_target, shape):
    """Joint distribution of the first three tokens of two prompts, 600 rows each; and neighbours are independent."""
    prompts = [torch.tensor([[3, 1, 4]]), torch.tensor([[2, 5, 1, 1, 4]])]
    poss = drafter_for(tiny_target, shape)
    set_seed(0)
    with collect_statistics() as stats:
        new = tiny_target.generate(
            **left_padded(prompts),
            assistant_model=poss,
            max_new_tokens=4,
            do_sample=True,
            temperature=1.5,
            repetition_penalty=1.3,
            num_return_sequences=600,
        )[:, 5:8]
    assert stats.accepted[0] > 100 and stats.accepted[1] > 0
    for prompt, rows in zip(prompts, new.split(600), strict=True):
        joint = joint_of_three(tiny_target, prompt, 1.3)
        assert sum(probability > 0.01 for probability in joint.values()) > 15, "too concentrated to tell anything"
        counts = Counter(map(tuple, rows.tolist()))
        large = [cell for cell, probability in joint.items() if probability * 600 >= 5]
        observed = [counts[cell] for cell in large]
        expected = [joint[cell] * 600 for cell in large]
        observed.append(600 - sum(observed))
        expected.append(600 - sum(expected))
        statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
        assert chi2.sf(statistic, len(expected) - 1) > ERROR_RATE

        table = torch.zeros(6, 6)
        for left, right in zip(rows[::2].tolist(), rows[1::2].tolist(), strict=True):
            table[left[0], right[0]] += 1
        table = table[table.sum(1) > 0][:, table.sum(0) > 0]
        assert chi2_contingency(table.numpy()).pvalue > ERROR_RATE


# ---- Streamers ----


class Recorder(BaseStreamer):
    """Takes batches too."""

    def __init__(self):
        self.values, self.ended = [], 0

    def put(self, value):
        assert self.ended == 0
        self.values.append(value)

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("ends", [{}, STAGGERED], ids=["no_eos", "eos"])
@pytest.mark.parametrize("criterion", [False, True])
def test_streamers_get_what_they_get_without_drafts(criterion, ends, target, inputs, shape, compare):
    """A value a token with all rows in it, the same shapes and dtypes, and one end."""
    made = []

    def make():
        made.append(Recorder())
        criteria = {"stopping_criteria": [UntilAllSaid([3], *inputs["input_ids"].shape)]} if criterion else {}
        return {"streamer": made[-1], **criteria}

    compare(target, inputs, shape, make, **ends)
    plain, drafted = made
    assert plain.ended == drafted.ended == 1
    assert len(plain.values) == len(drafted.values)
    for value, wanted in zip(drafted.values, plain.values, strict=True):
        assert value.dtype == wanted.dtype and value.tolist() == wanted.tolist()


def test_tokens_are_streamed_round_by_round(target, inputs, shape, scripted):
    """Not all at once at the end."""
    scripted(*unpadded(target.generate(**inputs, max_new_tokens=40, do_sample=False), inputs))
    streamer = Recorder()
    seen = []
    hook = target.register_forward_pre_hook(lambda *_: seen.append(len(streamer.values)))
    try:
        poss = drafter_for(target, shape, depth=4)
        target.generate(**inputs, assistant_model=poss, max_new_tokens=21, do_sample=False, streamer=streamer)
    finally:
        hook.remove()
    assert seen == [1, 2, 7, 12, 17]


def test_text_streamers(target, tokenizer, shape, capsys):
    kwargs = {"max_new_tokens": 24, "do_sample": False}
    plain = target.generate(PROMPTS[0], streamer=TextStreamer(tokenizer, skip_prompt=True), **kwargs)
    text = capsys.readouterr().out
    poss = drafter_for(target, shape)
    target.generate(PROMPTS[0], assistant_model=poss, streamer=TextStreamer(tokenizer, skip_prompt=True), **kwargs)
    assert capsys.readouterr().out == text

    streamer = TextIteratorStreamer(tokenizer, timeout=30)
    thread = threading.Thread(
        target=target.generate, args=(PROMPTS[0],), kwargs={**kwargs, "assistant_model": poss, "streamer": streamer}
    )
    thread.start()
    assert "".join(streamer) == tokenizer.decode(plain[0])
    thread.join()


def test_text_streamers_refuse_batches_as_ever(target, three_rows, tokenizer, shape):
    messages = []
    for assistant in ({}, {"assistant_model": drafter_for(target, shape)}):
        with pytest.raises(ValueError) as error:
            target.generate(**three_rows, streamer=TextStreamer(tokenizer), max_new_tokens=4, **assistant)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


# ---- What is returned beside the text ----


def assert_same_steps(steps, plain_steps, lengths) -> None:
    """Tensors [rows, ...] by step, as far as each row goes; zero behind its end."""
    assert len(steps) == len(plain_steps)
    for step, (states, plain) in enumerate(zip(steps, plain_steps, strict=True)):
        assert states.shape == plain.shape and states.dtype == plain.dtype
        for row, length in enumerate(lengths):
            if step < length:
                torch.testing.assert_close(states[row], plain[row], rtol=1e-3, atol=1e-3)
            else:
                assert not states[row].any()


@pytest.mark.parametrize("ends", [{}, STAGGERED], ids=["no_eos", "eos"])
def test_scores_and_logits(ends, target, inputs, shape, compare):
    plain, output, _ = compare(
        target,
        inputs,
        shape,
        repetition_penalty=1.1,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        **ends,
    )
    lengths = lengths_of(plain.sequences, inputs, ends.get("eos_token_id", []))
    assert_same_steps(output.scores, plain.scores, lengths)
    assert_same_steps(output.logits, plain.logits, lengths)
    assert not torch.equal(output.scores[0], output.logits[0])


@pytest.mark.parametrize("ends", [{}, STAGGERED], ids=["no_eos", "eos"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_hidden_states(family, ends, inputs, shape, compare):
    target = small_target(family)
    plain, output, _ = compare(
        target, inputs, shape, return_dict_in_generate=True, output_hidden_states=True, output_scores=True, **ends
    )
    lengths = lengths_of(plain.sequences, inputs, ends.get("eos_token_id", []))
    assert len(output.hidden_states) == len(plain.hidden_states)
    layers = target.config.num_hidden_layers + 1
    for layer in range(layers):
        steps, plain_steps = ([step[layer] for step in steps] for steps in (output.hidden_states, plain.hidden_states))
        assert all(len(step) == layers for step in output.hidden_states)
        assert_same_steps(steps, plain_steps, lengths)
    assert output.attentions is None


@pytest.mark.parametrize("ends", [{}, STAGGERED], ids=["no_eos", "eos"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_attentions_of_chains(family, ends, inputs, compare):
    target = small_target(family, attention="eager")
    plain, output, _ = compare(target, inputs, "chain", return_dict_in_generate=True, output_attentions=True, **ends)
    lengths = lengths_of(plain.sequences, inputs, ends.get("eos_token_id", []))
    for layer in range(2):
        steps, plain_steps = ([step[layer] for step in steps] for steps in (output.attentions, plain.attentions))
        assert_same_steps(steps, plain_steps, lengths)
    assert output.hidden_states is None


def test_attentions_of_trees_are_refused(eager_target, inputs):
    with pytest.raises(ValueError, match="output_attentions.*draft_top_k = 1"):
        eager_target.generate(
            **inputs,
            assistant_model=drafter_for(eager_target, "tree"),
            max_new_tokens=4,
            return_dict_in_generate=True,
            output_attentions=True,
        )


def test_nothing_is_returned_that_was_not_asked_for(target, inputs, shape, compare):
    _, output, _ = compare(target, inputs, shape, return_dict_in_generate=True)
    assert output.scores is output.logits is output.hidden_states is output.attentions is None


# ---- Caches ----


def real_entries(cache, layer, row, mask):
    """Keys and values of a row's tokens that are no padding, of a layer that keeps its newest ones at least."""
    layer = cache.layers[layer]
    kept = mask[row].bool()[-layer.keys.shape[-2] :]
    return layer.keys[row][:, kept], layer.values[row][:, kept]


@pytest.mark.parametrize("ends", [{}, STAGGERED, ONE_AT_ONCE], ids=["no_eos", "eos", "one_at_once"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "unknown_attention"])
def test_the_returned_cache_is_that_of_the_text(family, ends, inputs, shape, compare):
    """Entries of all tokens, of rows that end at different times too; layers come back as they were made."""
    if family == "unknown_attention":  # rows that have to stay of one length
        target = small_target("mistral", attention=unknown_attention())
    else:
        target = small_target(family)
    plain, output, _ = compare(target, inputs, shape, return_dict_in_generate=True, **ends)
    cache, plain_cache = output.past_key_values, plain.past_key_values
    assert type(cache) is type(plain_cache)
    assert cache.get_seq_length() == plain_cache.get_seq_length() == plain.sequences.shape[1] - 1
    start = inputs["input_ids"].shape[1]
    lengths = lengths_of(plain.sequences, inputs, ends.get("eos_token_id", []))
    mask = torch.cat((inputs["attention_mask"], torch.ones_like(plain.sequences[:, start + 1 :])), dim=1)
    for row, length in enumerate(lengths):
        mask[row, start + length :] = 0  # the last token of a row is read if others go on
    for layer, plain_layer in enumerate(plain_cache.layers):
        assert type(cache.layers[layer]) is type(plain_layer)
        assert cache.layers[layer].keys.shape == plain_layer.keys.shape
        for row in range(len(lengths)):
            for states, wanted in zip(
                real_entries(cache, layer, row, mask), real_entries(plain_cache, layer, row, mask), strict=True
            ):
                torch.testing.assert_close(states, wanted, rtol=1e-3, atol=1e-3)


def test_layer_types_of_a_windowed_cache(window_target, inputs, shape):
    """A cache without windows stays one, and the other way round."""
    poss = drafter_for(window_target, shape)
    for cache, kind in (
        (DynamicCache(config=window_target.config), DynamicSlidingWindowLayer),
        (DynamicCache(), DynamicLayer),
    ):
        plain = window_target.generate(
            **inputs, max_new_tokens=24, do_sample=False, past_key_values=DynamicCache(config=window_target.config)
        )
        output = window_target.generate(
            **inputs, assistant_model=poss, max_new_tokens=24, do_sample=False, past_key_values=cache
        )
        assert output.tolist() == plain.tolist()
        assert {type(layer) for layer in cache.layers} == {kind}
        assert cache.get_seq_length() == output.shape[1] - 1


TURNS = list(itertools.product(["plain", "poss"], repeat=2))[1:]


@pytest.mark.parametrize("only_new_tokens", [False, True], ids=["whole", "new"])
@pytest.mark.parametrize("turns", TURNS, ids="-".join)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_conversation_goes_on_from_a_cache(family, turns, only_new_tokens, inputs, shape):
    """Two turns with the user's words between them, each with or without specialists."""
    target = small_target(family)
    poss = drafter_for(target, shape)
    rows = inputs["input_ids"].shape[0]
    words = torch.cat([make_prompt(4, seed=20 + row) for row in range(rows)])

    def talk(first, second):
        cache = DynamicCache(config=target.config)
        mask, tokens = inputs["attention_mask"], inputs["input_ids"]
        for turn, assistant in enumerate((first, second)):
            given = tokens
            if turn:
                given = words if only_new_tokens else torch.cat((tokens, words), dim=1)
                # The last token of the first turn is in no cache yet.
                if only_new_tokens:
                    given = torch.cat((tokens[:, -1:], words), dim=1)
                mask = torch.cat((mask, mask.new_ones(rows, tokens.shape[1] + 4 - mask.shape[1])), dim=1)
            new = target.generate(
                given,
                attention_mask=mask,
                past_key_values=cache,
                assistant_model=poss if assistant == "poss" else None,
                max_new_tokens=16,
                do_sample=False,
            )[:, given.shape[1] :]
            tokens = torch.cat((torch.cat((tokens, words), dim=1) if turn else tokens, new), dim=1)
        return tokens.tolist(), cache

    try:
        expected, plain_cache = talk("plain", "plain")
    except (IndexError, RuntimeError, ValueError):
        assert only_new_tokens, "plain generate goes on from a cache with the whole text"
        pytest.skip("this release of transformers takes the whole text only")
    written, cache = talk(*turns)
    assert written == expected
    assert cache.get_seq_length() == plain_cache.get_seq_length()


def test_a_conversation_goes_on_behind_rows_that_ended(target, three_rows, shape):
    """Rows of unequal length in the cache: padding in the middle, hidden by the mask of the next turn."""
    poss = drafter_for(target, shape)
    words = torch.cat([make_prompt(4, seed=20 + row) for row in range(3)])

    def talk(first, second):
        cache = DynamicCache(config=target.config)
        kwargs = {"past_key_values": cache, "max_new_tokens": 16, "do_sample": False}
        said = target.generate(**three_rows, assistant_model=first, **STAGGERED, **kwargs)
        start = three_rows["input_ids"].shape[1]
        mask = torch.cat((three_rows["attention_mask"], torch.ones_like(said[:, start:])), dim=1)
        for row, length in enumerate(lengths_of(said, three_rows, STAGGERED["eos_token_id"])):
            mask[row, start + length :] = 0
        turn = torch.cat((said, words), dim=1)
        mask = torch.cat((mask, torch.ones_like(words)), dim=1)
        return target.generate(turn, attention_mask=mask, assistant_model=second, **kwargs).tolist()

    expected = talk(None, None)
    for first, second in ((poss, None), (None, poss), (poss, poss)):
        assert talk(first, second) == expected


def test_a_cache_of_other_rows_is_refused(target, three_rows):
    cache = DynamicCache(config=target.config)
    with torch.no_grad():
        target(PROMPTS[0][:, :2], past_key_values=cache)
    with pytest.raises(ValueError, match="1 row.*3.*batch_repeat_interleave"):
        target.generate(
            **three_rows, past_key_values=cache, assistant_model=drafter_for(target, "tree"), max_new_tokens=4
        )


# ---- Refusals ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 3}, "num_beams|beam_search"),
        ({"num_beams": 3, "do_sample": True}, "num_beams|beam_sample"),
        ({"penalty_alpha": 0.6, "top_k": 4, "trust_remote_code": True}, "penalty_alpha"),
        ({"use_cache": False}, "use_cache"),
        ({"cache_implementation": "offloaded"}, "cache_implementation"),
    ],
    ids=["beams", "beam_sampling", "contrastive", "no_cache", "offloaded_cache"],
)
def test_other_ways_of_decoding_are_refused(arguments, message, target, inputs):
    ran = []
    hook = target.register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        with pytest.raises(ValueError, match=message):
            target.generate(**inputs, assistant_model=drafter_for(target, "tree"), max_new_tokens=4, **arguments)
    finally:
        hook.remove()
    assert not ran, "the target ran before the call was refused"


def test_embeddings_are_refused(target, inputs, shape):
    embeddings = target.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ValueError, match="inputs_embeds"):
        target.generate(
            inputs_embeds=embeddings,
            attention_mask=inputs["attention_mask"],
            assistant_model=drafter_for(target, shape),
            max_new_tokens=4,
        )


# ---- Threads and processes ----


@pytest.mark.parametrize("targets", [1, 2])
def test_threads_do_not_see_each_other(targets, shape):
    """One drafter, with one target or two; one thread writes single texts, the other batches."""
    models = [small_target(seed=4), small_target(seed=3)][:targets]
    poss = drafter_for(models[0], shape)
    single = [left_padded([make_prompt(7, seed=seed)]) for seed in range(3)]
    batches = [left_padded([make_prompt(length, seed=length + seed) for length in (3, 9)]) for seed in range(3)]

    def write(model, calls, **kwargs):
        with collect_statistics() as stats:
            texts = [model.generate(**call, max_new_tokens=20, do_sample=False, **kwargs).tolist() for call in calls]
        return texts, stats.rounds, stats.accepted

    work = [(models[0], single), (models[-1], batches)]
    expected = [write(*job, assistant_model=poss) for job in work]
    for (texts, *_), job in zip(expected, work, strict=True):
        assert texts == write(*job)[0]

    barrier = threading.Barrier(2)
    results = [None, None]

    def run(index):
        barrier.wait()
        results[index] = write(*work[index], assistant_model=poss)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == expected


def write_in_step(rank: int, file: str) -> None:
    """One of two processes that have to run the target equally often, as if it was sharded between them."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{file}", timedelta(seconds=60), rank=rank, world_size=2)
    target = small_target()
    inputs = left_padded(PROMPTS if rank else PROMPTS[:1])
    ran = []

    def meet(*_):
        ran.append(1)
        distributed.all_reduce(torch.zeros(1))

    for shape, ends, numbers in (("chain", STAGGERED, (2, 12)), ("tree", {}, (2, 12)), ("tree", STAGGERED, (12, 2))):
        kwargs = {"max_new_tokens": numbers[rank], "do_sample": False, "return_dict_in_generate": True, **ends}
        expected = target.generate(**inputs, **kwargs)
        hook = target.register_forward_pre_hook(meet)
        output = target.generate(**inputs, assistant_model=drafter_for(target, shape), synced_gpus=True, **kwargs)
        hook.remove()
        assert output.sequences.tolist() == expected.sequences.tolist()
        assert output.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()
        counts = [None, None]
        distributed.all_gather_object(counts, len(ran))
        assert counts[0] == counts[1] > 0
    distributed.destroy_process_group()


def test_synced_processes_run_the_target_equally_often(tmp_path):
    torch.multiprocessing.spawn(write_in_step, (str(tmp_path / "rendezvous"),), nprocs=2)
