"""Start-up that is paid ahead: what a call after it still compiles or measures."""

import pytest
import torch
from conftest import PAD, SHAPES, SMALL_VOCAB, drafter_for, left_padded, make_prompt, small_target
from test_static_rounds import compiled, graphs, little_target, nothing_compiled, nothing_compiles  # noqa: F401
from transformers import LogitsProcessor, StoppingCriteria

from hf_poss import collect_statistics, round_sizes


KNOBS = {"fixed": {}, "auto": {"num_assistant_tokens": "auto", "draft_total_tokens": "auto"}}


def batch_of(rows: int, length: int) -> dict[str, torch.LongTensor]:
    return left_padded([make_prompt(max(length - 2 * row, 1), seed=row) for row in range(rows)])


def drafter(target, shape, knobs):
    poss = drafter_for(target, shape, depth=2, num_draft_positions=2)
    for name, value in KNOBS[knobs].items():
        setattr(poss.generation_config, name, value)
    return poss


@pytest.mark.parametrize(("rows", "shape", "knobs"), [(1, "tree", "fixed"), (2, "chain", "fixed")])
def test_calls_that_follow_compile_nothing(rows, shape, knobs):
    target = little_target()
    poss, mode = drafter(target, shape, knobs), compiled()
    seconds = poss.warm_up(target, max_length=200, batch_size=rows, **mode)
    assert seconds > 0 and not counters_of_breaks()
    made = graphs()
    for length, written in ((3, 20), (40, 12), (150, 50)):
        inputs = batch_of(rows, length)
        plain = target.generate(**inputs, max_new_tokens=written, do_sample=False)
        with nothing_compiles():
            output = target.generate(**inputs, assistant_model=poss, max_new_tokens=written, do_sample=False, **mode)
        assert output.tolist() == plain.tolist()
    assert graphs() == made


def counters_of_breaks() -> dict:
    return torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("shape", SHAPES)
def test_auto_compiles_every_size_ahead_and_measures_once(shape, monkeypatch):
    """Whatever the planner decides afterwards; here, at random."""
    from test_automatic_drafts import decide_at_random

    target, measured = little_target(), []
    measure = round_sizes.measure_curve

    def counted(*args, **kwargs):
        measured.append(args)
        return measure(*args, **kwargs)

    monkeypatch.setattr(round_sizes, "measure_curve", counted)
    poss, mode = drafter(target, shape, "auto"), compiled()
    poss.warm_up(target, max_length=200, batch_size=2, **mode)
    assert len(measured) == 1
    made = graphs()
    decide_at_random(monkeypatch, seed=1)
    for length, written in ((3, 40), (40, 60)):
        inputs = batch_of(2, length)
        plain = target.generate(**inputs, max_new_tokens=written, do_sample=False)
        with nothing_compiles(), collect_statistics() as stats:
            output = target.generate(**inputs, assistant_model=poss, max_new_tokens=written, do_sample=False, **mode)
        assert output.tolist() == plain.tolist()
        assert sum(stats.drafted) > 0
    assert len(measured) == 1 and graphs() == made


def test_another_bucket_or_batch_is_not_warm():
    """The tests above would notice."""
    target = little_target()
    poss, mode = drafter(target, "chain", "fixed"), compiled()
    poss.warm_up(target, max_length=200, **mode)
    for inputs, written in ((batch_of(1, 4), 400), (batch_of(2, 4), 20)):
        with nothing_compiles(), pytest.raises(RuntimeError, match="recompile"):
            target.generate(**inputs, assistant_model=poss, max_new_tokens=written, do_sample=False, **mode)


class Counts(LogitsProcessor):
    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores


class Never(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        raise AssertionError("asked about a text that is thrown away")


class Silent:
    def put(self, value):
        raise AssertionError("streamed a text that is thrown away")

    end = put


def passes_of(target) -> list[int]:
    """Nodes of each pass that the target runs from here on."""
    seen = []
    target.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return seen


def test_a_target_that_would_end_at_once_is_warmed_all_the_same():
    """By its own ends of a sequence, lengths, criteria and streamers of the calls to come."""
    target = small_target()
    target.generation_config.eos_token_id = list(range(SMALL_VOCAB))
    target.generation_config.max_new_tokens = 1
    before = target.generation_config.to_dict()
    poss, seen, counts = drafter_for(target, "tree"), passes_of(target), Counts()
    poss.warm_up(
        target,
        max_length=600,
        max_new_tokens=1,
        eos_token_id=list(range(SMALL_VOCAB)),
        pad_token_id=PAD,
        stopping_criteria=[Never()],
        logits_processor=[counts],
        streamer=Silent(),
    )
    assert len(seen) > 3 and counts.calls > 10
    assert target.generation_config.to_dict() == before
    assert target._previous_max_cache_length >= 599


@pytest.mark.parametrize("depth", [4, 30])
def test_two_rounds_run_however_much_the_first_accepts(depth, scripted):
    target = small_target()
    prompt = torch.ones(1, 8, dtype=torch.long)
    text = target.generate(prompt, max_new_tokens=100, do_sample=False)[0].tolist()
    scripted(text)
    with collect_statistics() as stats:
        drafter_for(target, "chain", depth=depth).warm_up(target, max_length=300)
    assert sum(stats.accepted) >= depth and stats.rounds >= 2


@pytest.mark.parametrize("max_length", [2, 3, 9])
def test_little_room(max_length):
    target = small_target()
    assert drafter_for(target, "tree").warm_up(target, max_length=max_length) > 0


@pytest.mark.parametrize("wrong", [{"max_length": 1}, {"batch_size": 0}])
def test_no_room_is_refused(wrong):
    target = small_target()
    with pytest.raises(ValueError, match="expected 1 row and 2 tokens"):
        drafter_for(target, "tree").warm_up(target, **wrong)


def test_neither_random_numbers_nor_weights_are_touched():
    target = small_target()
    poss = drafter_for(target, "tree")
    weights = {name: value.clone() for name, value in (target.state_dict() | poss.state_dict()).items()}
    state = torch.random.get_rng_state()
    poss.warm_up(target, max_length=100)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, weights[name]) for name, value in (target.state_dict() | poss.state_dict()).items())
