"""Wrong use is refused with what was found, what was expected and what to do, and leaves everything as it was."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import drafter_for, left_padded, make_poss, make_prompt, make_target, small_target, widened
from transformers import (
    DynamicCache,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    PreTrainedModel,
)
from transformers.generation.streamers import BaseStreamer

from hf_poss import PosSCandidateGenerator, PosSModel, collect_statistics


PROMPTS = [make_prompt(7, seed=1), make_prompt(3, seed=2)]
HUGE = 10**9


@pytest.fixture
def target() -> PreTrainedModel:
    return small_target()


def passes(target: PreTrainedModel) -> list[None]:
    """Grows by an item with each pass of the target from here on."""
    seen: list[None] = []
    target.register_forward_pre_hook(lambda *_: seen.append(None))
    return seen


def generate(target: PreTrainedModel, input_ids: torch.LongTensor, **kwargs: Any) -> list[list[int]]:
    settings = {"attention_mask": torch.ones_like(input_ids), "max_new_tokens": 24, "do_sample": False}
    return target.generate(input_ids, **{**settings, **kwargs}).tolist()


# ---- A drafter for another target ----


def test_another_vocabulary(target):
    poss, counted = make_poss(make_target()), passes(target)
    with pytest.raises(ValueError, match=r"97 tokens, LlamaForCausalLM has 12.*tokenizer"):
        generate(target, PROMPTS[0], assistant_model=poss)
    assert not counted


def test_an_assistant_tokenizer(target, shape):
    poss = drafter_for(target, shape)
    with pytest.raises(ValueError, match="assistant_tokenizer"):
        generate(target, PROMPTS[0], assistant_model=poss, tokenizer=object(), assistant_tokenizer=object())


@pytest.mark.parametrize(
    ("made_for", "found"),
    [
        ("org/tiny", "org/other"),
        ("org/tiny", "/models/tiny-2"),
        ("org/tiny", "/hub/models--org--other/snapshots/0123abc"),
    ],
)
def test_another_name_warns_once(made_for, found, target, shape, warnings_seen):
    poss = drafter_for(target, shape)
    poss.config.target_name_or_path, target.config.name_or_path = made_for, found
    plain = generate(target, PROMPTS[0])
    for _ in range(2):
        assert generate(target, PROMPTS[0], assistant_model=poss) == plain
    (warning,) = warnings_seen()
    assert made_for in warning and found in warning


@pytest.mark.parametrize(
    ("made_for", "found"),
    [
        ("org/tiny", "org/tiny"),
        ("org/tiny", "/models/tiny/"),
        ("org/tiny", "/hub/models--org--tiny/snapshots/0123abc"),
        (None, "org/tiny"),
        ("org/tiny", ""),
    ],
)
def test_the_same_name_does_not_warn(made_for, found, target, warnings_seen):
    poss = drafter_for(target, "tree")
    poss.config.target_name_or_path, target.config.name_or_path = made_for, found
    generate(target, PROMPTS[0], assistant_model=poss)
    assert not warnings_seen()


# ---- A drafter that cannot run ----


@pytest.mark.parametrize("part", ["all", "a_specialist"])
def test_a_drafter_without_weights(part, target, shape):
    poss, counted = drafter_for(target, shape), passes(target)
    (poss if part == "all" else poss.layers[1]).to("meta")
    with pytest.raises(ValueError, match=r"weights are on (cpu, )?meta; expected one device"):
        generate(target, PROMPTS[0], assistant_model=poss)
    assert not counted


def test_a_target_without_a_cache(shape):
    config = OpenAIGPTConfig(vocab_size=12, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    target = widened(OpenAIGPTLMHeadModel(config).eval(), 6.0)
    plain = generate(target, make_prompt(5))
    with pytest.raises(ValueError, match="not filled the cache.*without this assistant"):
        generate(target, make_prompt(5), assistant_model=drafter_for(target, shape))
    assert generate(target, make_prompt(5)) == plain


def test_a_head_that_does_more_than_its_last_layer_warns_and_writes_the_same(shape, warnings_seen):
    """The specialists know one module as the head; what a target does behind it they do not see."""
    target = small_target()

    def reverse(module, inputs, output):
        output.logits = output.logits.flip(-1)

    target.register_forward_hook(reverse)
    plain = generate(target, make_prompt(5))
    assert generate(target, make_prompt(5), assistant_model=drafter_for(target, shape)) == plain
    assert sum("drafts are scored otherwise" in message for message in warnings_seen()) == 1


# ---- Prompts and drafts beyond the limits ----


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_prompt_beyond_the_positions(family, shape):
    target = small_target(family, max_position_embeddings=16)
    poss = drafter_for(target, shape)
    counted = passes(target)
    with pytest.raises(ValueError, match=r"17 tokens.* 16 positions"):
        generate(target, make_prompt(17), assistant_model=poss)
    assert not counted


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_prompt_that_takes_all_positions(family, shape):
    target = small_target(family, max_position_embeddings=16)
    poss = drafter_for(target, shape)
    for prompt, new in ((make_prompt(16), 1), (make_prompt(12), 5)):
        plain = generate(target, prompt, max_new_tokens=new)
        assert generate(target, prompt, max_new_tokens=new, assistant_model=poss) == plain


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_text_that_reaches_the_last_position_and_one_that_outgrows_it(family, shape):
    """The last token of a text is not read, so 33 tokens fit into 32 positions; drafts must not reach beyond."""
    target = small_target(family, max_position_embeddings=32)
    poss, prompt = drafter_for(target, shape), make_prompt(20)
    plain = generate(target, prompt, max_new_tokens=13)
    assert generate(target, prompt, max_new_tokens=13, assistant_model=poss) == plain
    with pytest.raises(IndexError):
        generate(target, prompt, max_new_tokens=14)
    with pytest.raises(ValueError, match="outgrown the 32 positions"):
        generate(target, prompt, max_new_tokens=14, assistant_model=poss)


def test_padding_takes_no_positions(shape):
    target = small_target("gpt2", max_position_embeddings=16)
    inputs = left_padded([make_prompt(18), make_prompt(5)])
    inputs = {name: values[1:] for name, values in inputs.items()}  # 13 columns of padding and 5 tokens
    plain = generate(target, **inputs, max_new_tokens=8)
    assert generate(target, **inputs, max_new_tokens=8, assistant_model=drafter_for(target, shape)) == plain


def test_rotary_frequencies_that_grow_with_the_text_have_no_limit(shape):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    # The frequencies stay where a call has left them, so each call gets a target of its own.
    plain, assisted = (small_target(max_position_embeddings=16, rope_parameters=rope) for _ in range(2))
    text = generate(plain, make_prompt(20))
    assert generate(assisted, make_prompt(20), assistant_model=drafter_for(plain, shape)) == text


@pytest.mark.parametrize(
    "knobs",
    [
        {"num_assistant_tokens": HUGE, "draft_top_k": 1},
        {"num_assistant_tokens": HUGE, "draft_top_k": 4},
        {"num_assistant_tokens": HUGE, "draft_top_k": 4, "draft_total_tokens": HUGE},
        {"num_assistant_tokens": 10_000, "draft_top_k": HUGE, "draft_total_tokens": HUGE},
    ],
    ids=["chain", "depth", "nodes", "branches"],
)
def test_drafts_beyond_the_memory(knobs):
    target = small_target(vocab_size=2000)
    poss, counted = drafter_for(target, "tree"), passes(target)
    for name, value in knobs.items():
        setattr(poss.generation_config, name, value)
    with pytest.raises(ValueError, match=r"needs about \S+ bytes.* has \S+\. Lower `num_assistant_tokens`"):
        generate(target, PROMPTS[0], max_new_tokens=HUGE, assistant_model=poss)
    assert not counted


# ---- What is left behind ----


class Breakdown(Exception):
    """Stands for whatever may go wrong."""


class FailingProcessor(LogitsProcessor):
    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.calls += 1
        if self.calls == 5:
            raise Breakdown
        return scores


class FailingStreamer(BaseStreamer):
    def __init__(self):
        self.calls = 0

    def put(self, value: torch.LongTensor) -> None:
        self.calls += 1
        if self.calls == 4:
            raise Breakdown

    def end(self) -> None:
        pass


@contextmanager
def failing_pass(module: torch.nn.Module, error: BaseException) -> Iterator[dict[str, Any]]:
    """The third pass through a module fails."""
    calls = [0]

    def hook(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == 3:
            raise error

    handle = module.register_forward_pre_hook(hook)
    yield {}
    handle.remove()


@contextmanager
def failing_draft() -> Iterator[dict[str, Any]]:
    draft, calls = PosSCandidateGenerator.draft, [0]

    def fail(self: PosSCandidateGenerator, *args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise Breakdown
        return draft(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PosSCandidateGenerator, "draft", fail)
        yield {}


@contextmanager
def arguments(**kwargs: Any) -> Iterator[dict[str, Any]]:
    yield kwargs


# Calls that are refused, and calls that break off: what they run under, which gives arguments of theirs.
FAILURES: dict[str, Callable[[PreTrainedModel, PosSModel], Any]] = {
    "another_vocabulary": lambda target, poss: arguments(assistant_model=make_poss(make_target())),
    "no_weights": lambda target, poss: arguments(assistant_model=drafter_for(target, "chain").to("meta")),
    "assistant_tokenizer": lambda target, poss: arguments(tokenizer=object(), assistant_tokenizer=object()),
    "beams": lambda target, poss: arguments(num_beams=2),
    "processor": lambda target, poss: arguments(logits_processor=LogitsProcessorList([FailingProcessor()])),
    "streamer": lambda target, poss: arguments(streamer=FailingStreamer()),
    "target": lambda target, poss: failing_pass(target, Breakdown()),
    "last_layer": lambda target, poss: failing_pass(target.model.layers[1], Breakdown()),
    "interrupt": lambda target, poss: failing_pass(target.model.layers[1], KeyboardInterrupt()),
    "draft": lambda target, poss: failing_draft(),
}


@pytest.fixture(params=FAILURES)
def fail(request) -> Callable[..., None]:
    """Runs a call that does not succeed."""

    def run(target: PreTrainedModel, poss: PosSModel, input_ids: torch.LongTensor, **kwargs: Any) -> None:
        with FAILURES[request.param](target, poss) as own:
            with pytest.raises((ValueError, Breakdown, KeyboardInterrupt)):
                generate(target, input_ids, **{"assistant_model": poss, **kwargs, **own})

    return run


def test_the_target_stays_usable(fail, target, shape):
    poss = drafter_for(target, shape)
    methods = dict(vars(GenerationMixin))
    knobs = poss.generation_config.to_dict()
    before = generate(target, PROMPTS[0])
    fail(target, poss, PROMPTS[0])
    assert dict(vars(GenerationMixin)) == methods
    assert not {"forward", "generate", "prepare_inputs_for_generation"} & set(vars(target))
    assert poss.generation_config.to_dict() == knobs
    assert generate(target, PROMPTS[0]) == before
    with collect_statistics() as stats:
        assert generate(target, PROMPTS[0], assistant_model=poss) == before
    assert len(stats.calls) == 1


def test_a_batch_stays_usable(fail, target, shape):
    poss, inputs = drafter_for(target, shape), left_padded(PROMPTS)
    before = generate(target, **inputs)
    fail(target, poss, **inputs)
    assert generate(target, **inputs) == before
    assert generate(target, **inputs, assistant_model=poss) == before


def test_a_cache_of_the_caller_stays_as_it_was(fail, target, shape):
    poss, prompt = drafter_for(target, shape), PROMPTS[0]
    before = generate(target, prompt)
    cache = DynamicCache(config=target.config)
    with torch.no_grad():
        target(prompt[:, :-1], past_key_values=cache)
    held = [(layer, layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    fail(target, poss, prompt, past_key_values=cache)
    assert len(cache.layers) == len(held)
    for layer, (same, keys, values) in zip(cache.layers, held, strict=True):
        assert layer is same
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
    assert cache.get_seq_length() == prompt.shape[1] - 1
    assert generate(target, prompt, past_key_values=cache) == before


# ---- Padding on the wrong side ----


def test_padding_behind_the_prompt_warns_as_ever(target, shape, warnings_seen):
    inputs = left_padded(PROMPTS)
    inputs = {name: values.clone() for name, values in inputs.items()}
    for values in inputs.values():
        values[1] = values[1].roll(PROMPTS[1].shape[1])
    assert inputs["attention_mask"][1].tolist() == [1, 1, 1, 0, 0, 0, 0]
    plain = generate(target, **inputs)
    stock = [warning for warning in warnings_seen("transformers") if "right-padding" in warning]
    assert generate(target, **inputs, assistant_model=drafter_for(target, shape)) == plain
    assert [warning for warning in warnings_seen("transformers") if "right-padding" in warning] == stock * 2 and stock
