"""Drafts whose size is chosen round by round: whatever is decided, the text is the same; what pays is found."""

import contextlib
import copy
import random
import threading
import time

import pytest
import torch
from conftest import PAD, drafter_for, make_poss, make_prompt, small_target
from test_static_rounds import BATCHES, PROMPTS, STAGGERED, STATIC, checked_contexts
from torch import distributed
from transformers import GenerationConfig, GenerationMixin, set_seed

from hf_poss import PosSCandidateGenerator, PosSModel, collect_statistics, decoding, round_sizes
from hf_poss.candidate_generator import DraftSettings
from hf_poss.draft_pace import Pace, TrialBudget
from hf_poss.draft_passes import DraftPasses
from hf_poss.draft_planner import DraftPlanner, RoundPlan
from hf_poss.round_costs import CostCurve, RoundCosts
from hf_poss.verification import scripted_picks


KNOBS = {
    "depth": {"num_assistant_tokens": "auto"},
    "nodes": {"draft_total_tokens": "auto"},
    "both": {"num_assistant_tokens": "auto", "draft_total_tokens": "auto"},
}


def automatic(target, shape, knobs: str = "both", **kwargs) -> PosSModel:
    poss = drafter_for(target, shape, **kwargs)
    for name, value in KNOBS[knobs].items():
        setattr(poss.generation_config, name, value)
    return poss


@pytest.fixture(scope="module")
def target():
    """Of all tests that do not look at what is measured: known once."""
    return small_target()


@pytest.fixture(params=list(KNOBS))
def knobs(request) -> str:
    return request.param


CASES = pytest.mark.parametrize(
    ("mode", "knobs"),
    [({}, "depth"), ({}, "nodes"), ({}, "both"), (STATIC, "both")],
    ids=["depth", "nodes", "both", "static"],
)


@pytest.fixture(params=list(BATCHES))
def inputs(request) -> dict[str, torch.LongTensor]:
    return BATCHES[request.param]


def decide_at_random(monkeypatch, seed: int, idle: int = 0) -> list[tuple[int, int | None]]:
    """Planners that decide anything that they may, with stretches of up to `idle` rounds without drafts; returns the
    depth and size, if decided ahead, of the rounds to come."""
    source, begin_round, decided, rest = random.Random(seed), DraftPlanner.begin_round, [], []

    def begin(self, costs, rows, room=None, ahead=False):
        plan = begin_round(self, costs, rows, room)
        most = self.max_depth if room is None else min(room, self.max_depth)
        if not rest:
            rest.extend([True] * source.randint(0, idle) + [False] * source.randint(1, 4))
        if rest.pop(0) or not most:
            plan.depth = 0
        else:
            plan.depth = source.randint(1, most) if self.depth is None else most
        plan.passes, plan.size = 0, None
        if ahead and plan.depth:
            plan.passes, plan.size = plan.depth, source.randint(1, self.max_nodes)
        decided.append((plan.depth, plan.size))
        return plan

    def deepen(self, frontier):
        self.passes += 1
        self.hopes.append(0.5)
        return self.passes < self.depth and (self.planner.depth is not None or source.random() < 0.7)

    def nodes(self, scores, depths):
        assert all(row == sorted(row, reverse=True) for row in scores)
        assert [len(row) for row in scores] == [len(row) for row in depths]
        return source.randint(1, min(self.planner.max_nodes, len(scores[0]) + 1))

    monkeypatch.setattr(DraftPlanner, "begin_round", begin)
    monkeypatch.setattr(RoundPlan, "deepen", deepen)
    monkeypatch.setattr(RoundPlan, "nodes", nodes)
    return decided


# ---- The same text, whatever is decided ----


@CASES
def test_greedy_text_is_the_same(mode, knobs, shape, inputs, target):
    poss = automatic(target, shape, knobs)
    for ends in ({}, STAGGERED):
        kwargs = {"max_new_tokens": 40, "do_sample": False, **ends}
        expected = target.generate(**inputs, **kwargs)
        assert target.generate(**inputs, assistant_model=poss, **kwargs, **mode).tolist() == expected.tolist()


@CASES
def test_any_decisions_give_the_same_text_and_true_counts(mode, knobs, shape, inputs, target, monkeypatch):
    """Among them no drafts for long, trees of nothing but a root, and drafts that stop at once."""
    poss, passes, verified, told = automatic(target, shape, knobs), [], [], []
    decided = decide_at_random(monkeypatch, seed=4, idle=5)
    monkeypatch.setattr(decoding, "MOST_PENDING", 3)
    observe, walk = DraftPlanner.observe, decoding._Loop._walk

    def seen_walk(self, tree, logits, plan):
        passes.append(tree.tokens.shape[1])
        found = walk(self, tree, logits, plan)
        verified.extend(depth for walked, depths in zip(found[0], found[1], strict=True) if walked for depth in depths)
        return found

    def seen(self, plan, depths, scores, accepted, seconds):
        told.append((plan.depth, depths, scores, accepted))
        return observe(self, plan, depths, scores, accepted, seconds)

    monkeypatch.setattr(decoding._Loop, "_walk", seen_walk)
    monkeypatch.setattr(DraftPlanner, "observe", seen)
    sizes = set()
    for ends in ({}, STAGGERED):
        for recorder in (passes, verified, told, decided):
            recorder.clear()
        kwargs = {"max_new_tokens": 60, "do_sample": False, **ends}
        expected = target.generate(**inputs, **kwargs)
        with collect_statistics() as stats:
            output = target.generate(**inputs, assistant_model=poss, **kwargs, **mode)
        assert output.tolist() == expected.tolist()
        assert stats.records[0].rounds == len(passes) == len(decided) == len(told)
        assert stats.drafted == [verified.count(depth) for depth in range(1, len(stats.drafted) + 1)]
        assert sum(stats.accepted) == sum(sum(map(sum, accepted)) for *_, accepted in told)
        for (depth, _), nodes in zip(decided, passes, strict=True):
            assert depth or nodes == 1
        for _, depths, scores, accepted in told:
            for its_depths, its_scores, its_accepted in zip(depths, scores, accepted, strict=True):
                assert len(its_depths) == len(its_scores) >= len(its_accepted)
                hit = [its_depths[node] for node, hit in enumerate(its_accepted) if hit]
                assert hit == list(range(1, len(hit) + 1)), "accepted nodes are one path"
                assert all(score <= 0 for score in its_scores[: len(its_accepted)])
        sizes.update(passes)
    assert 1 in sizes and len(sizes) > 2


@pytest.mark.parametrize("mode", [{}, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("most", [0, 5])
def test_caches_are_those_of_a_fresh_prefill(mode, most, shape, inputs, target, monkeypatch):
    """After rounds without drafts too, of which the specialists hear when they draft next, or when they are many."""
    poss = automatic(target, shape)
    decided = decide_at_random(monkeypatch, seed=2, idle=12)
    monkeypatch.setattr(decoding, "MOST_PENDING", most)
    plain = target.generate(**inputs, max_new_tokens=50, do_sample=False)
    texts = [row[mask.argmax() :] for row, mask in zip(plain, inputs["attention_mask"], strict=True)]
    # The first round measures, which is no round: its contexts count for nothing.
    target.generate(**inputs, assistant_model=poss, max_new_tokens=50, do_sample=False, **mode)
    decided.clear()
    with checked_contexts(poss, target, texts) as seen:
        output = target.generate(**inputs, assistant_model=poss, max_new_tokens=50, do_sample=False, **mode)
    assert output.tolist() == plain.tolist()
    steps = [after[row] - before[row] for before, after in zip(seen, seen[1:], strict=False) for row in after]
    drafting = sum(depth > 0 for depth, _ in decided)
    assert len(seen) >= drafting
    assert drafting < len(decided)
    if most == 5:
        assert len(seen) > drafting and max(steps) > 1, "nothing was flushed"


def test_near_the_last_learned_position(shape, inputs, monkeypatch):
    target = small_target("gpt2", n_positions=48)
    poss = automatic(target, shape)
    decide_at_random(monkeypatch, seed=3)
    for mode in ({}, STATIC):
        for length in (36, 48):
            kwargs = {"max_length": length, "do_sample": False}
            expected = target.generate(**inputs, **kwargs)
            assert target.generate(**inputs, assistant_model=poss, **kwargs, **mode).tolist() == expected.tolist()


def test_one_row_samples_what_plain_generate_samples(shape, target, monkeypatch):
    poss = automatic(target, shape)
    decide_at_random(monkeypatch, seed=5, idle=2)
    texts, accepted = set(), 0
    for seed in range(4):
        written = []
        for assistant in (None, poss):
            poss.generation_config.num_assistant_tokens = "auto"
            set_seed(seed)
            with collect_statistics() as stats:
                output = target.generate(PROMPTS[0], assistant_model=assistant, max_new_tokens=30, do_sample=True)
            written.append(output.tolist())
        assert written[0] == written[1]
        texts.add(str(written[0]))
        accepted += sum(stats.accepted)
    assert len(texts) > 1 and accepted > 0


def test_attentions_scores_and_caches_are_returned(inputs, monkeypatch):
    target = small_target(attention="eager")
    decide_at_random(monkeypatch, seed=6, idle=3)
    kwargs = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True}
    kwargs |= {"output_attentions": True, "output_scores": True, "output_hidden_states": True}
    plain = target.generate(**inputs, **kwargs)
    output = target.generate(**inputs, assistant_model=automatic(target, "chain"), **kwargs)
    assert output.sequences.tolist() == plain.sequences.tolist()
    for step, other in zip(output.scores, plain.scores, strict=True):
        torch.testing.assert_close(step, other, rtol=1e-4, atol=1e-4)
    assert [len(step) for step in output.attentions] == [len(step) for step in plain.attentions]
    assert output.past_key_values.get_seq_length() == plain.past_key_values.get_seq_length()


def test_threads_share_a_planner(target):
    poss = automatic(target, "tree")
    prompts = [make_prompt(6, seed=seed) for seed in range(3)]
    kwargs = {"max_new_tokens": 40, "do_sample": False}
    expected, found = [target.generate(prompt, **kwargs).tolist() for prompt in prompts], {}

    def write(index):
        found[index] = target.generate(prompts[index], assistant_model=poss, **kwargs).tolist()

    threads = [threading.Thread(target=write, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[index] for index in range(3)] == expected


# ---- What pays ----


class Clock:
    """Time that passes by what is computed, and by nothing else."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """A pass of the target takes a second, and 0.01 for each further node; a draft pass 0.1, context 0.05."""
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    expand, commit = DraftPasses.expand, DraftPasses.commit

    def timed_expand(self, *args, **kwargs):
        clock.now += 0.1
        return expand(self, *args, **kwargs)

    def timed_commit(self, *args, **kwargs):
        clock.now += 0.05
        return commit(self, *args, **kwargs)

    monkeypatch.setattr(DraftPasses, "expand", timed_expand)
    monkeypatch.setattr(DraftPasses, "commit", timed_commit)
    return clock


@contextlib.contextmanager
def timed(target, clock: Clock):
    """Gives the nodes of every pass of the target inside the block, which the clock runs by."""
    passes = []

    def run(module, args, kwargs):
        passes.append(kwargs["input_ids"].shape[1])
        clock.now += 1 + 0.01 * (passes[-1] - 1)

    hook = target.register_forward_pre_hook(run, with_kwargs=True)
    try:
        yield passes
    finally:
        hook.remove()


@CASES
def test_a_useless_drafter_is_hardly_used(mode, knobs, shape, llama, clock):
    """Random weights, 97 tokens: drafting stops, and a long text takes hardly longer than without."""
    poss = automatic(llama, shape, knobs)
    prompt, kwargs = make_prompt(7, vocab=97), {"do_sample": False, "eos_token_id": None, "pad_token_id": PAD, **mode}
    with timed(llama, clock):
        llama.generate(prompt, assistant_model=poss, max_new_tokens=8, **kwargs)  # measures
    with timed(llama, clock) as passes:
        began = clock.now
        output = llama.generate(prompt, assistant_model=poss, max_new_tokens=300, **kwargs)
    assert output.shape[1] == 307
    assert sum(nodes > 1 for nodes in passes[1:]) < 0.15 * len(passes)
    assert clock.now - began < 1.05 * 300 + 10  # ten steps to find out, in so short a text


def believed(tree, picks):
    """A target that goes where the drafter's first children go."""
    picks = picks.clone()
    for node in range(tree.tokens.shape[1] - 1, 0, -1):
        picks.scatter_(1, tree.parents[:, node : node + 1], tree.tokens[:, node : node + 1])
    return picks


@pytest.mark.parametrize("mode", [{}, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_perfect_drafter_drafts_deep(mode, rows, shape, llama, clock):
    """Though it is unsure of everything: what it says of its drafts is learned to mean nothing."""
    poss = automatic(llama, shape)
    prompt = make_prompt(7, vocab=97).repeat(rows, 1)
    kwargs = {"do_sample": False, "eos_token_id": None, "pad_token_id": PAD, **mode}
    with timed(llama, clock), scripted_picks(believed):
        llama.generate(prompt, assistant_model=poss, max_new_tokens=250, **kwargs)
        began = clock.now
        with collect_statistics() as stats:
            llama.generate(prompt, assistant_model=poss, max_new_tokens=250, **kwargs)
    deepest = DraftSettings.of(poss, "cpu").depth
    if shape == "tree":  # of nodes that are all alike, 39 are four levels
        deepest = 4
    assert stats.tau > 0.7 * (deepest + 1)
    assert clock.now - began < 0.6 * 250  # of plain decoding's


# ---- What is measured ----


@pytest.fixture
def measured(monkeypatch) -> list:
    calls, measure = [], round_sizes.measure_curve

    def counted(run, sizes, *args, **kwargs):
        calls.append(list(sizes))
        return measure(run, sizes, *args, **kwargs)

    monkeypatch.setattr(round_sizes, "measure_curve", counted)
    return calls


def test_costs_are_measured_once_for_each_kind_of_round(measured, clock):
    """By device, dtype, rows and length of the context: the next call begins with what the last one knew."""
    target = small_target()
    poss, kwargs = automatic(target, "tree"), {"do_sample": False, "max_new_tokens": 12}

    def new(inputs, assistant=poss, **more) -> int:
        before = len(measured)
        with timed(target, clock):
            target.generate(inputs, assistant_model=assistant, **kwargs | more)
        return len(measured) - before

    assert new(PROMPTS[0]) == 1
    assert new(PROMPTS[0]) == new(PROMPTS[2]) == 0
    assert new(PROMPTS[0].repeat(3, 1)) == 1 and new(PROMPTS[0].repeat(4, 1)) == 0
    assert new(make_prompt(300)) == 1 and new(make_prompt(400)) == 0
    assert new(make_prompt(240), max_new_tokens=40) == 0, "both lengths are known"
    assert new(PROMPTS[0], **STATIC) == 1 and new(PROMPTS[2], **STATIC) == 0
    target.double()
    assert new(PROMPTS[0]) == 1
    assert all(sizes[0] == 1 and sizes[-1] == 40 for sizes in measured)


def test_measuring_leaves_no_trace(measured, inputs, monkeypatch):
    """In a text that grows from one length of context into the next."""
    target = small_target()
    poss = automatic(target, "tree")
    decide_at_random(monkeypatch, seed=7, idle=4)
    longer = {
        "input_ids": torch.cat((inputs["input_ids"], make_prompt(225).repeat(len(inputs["input_ids"]), 1)), dim=1),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 225), value=1),
    }
    kwargs = {"max_new_tokens": 60, "do_sample": False}
    plain = target.generate(**longer, **kwargs)
    with collect_statistics() as stats:
        assert target.generate(**longer, assistant_model=poss, **kwargs).tolist() == plain.tolist()
    assert len(measured) >= 2
    assert sum(call.tokens for call in stats.calls) == 59 * len(plain)


# ---- Knobs ----


@pytest.mark.parametrize("knob", ["num_assistant_tokens", "draft_total_tokens"])
@pytest.mark.parametrize("wrong", ["Auto", "fast", "", True, 0, -1, 2.5])
def test_wrong_values_are_refused(knob, wrong, target):
    poss = drafter_for(target, "tree")
    setattr(poss.generation_config, knob, wrong)
    with pytest.raises(ValueError, match=f'{knob}.*"auto"'):
        target.generate(PROMPTS[0], assistant_model=poss, max_new_tokens=4)


def test_branches_are_not_chosen(target):
    poss = drafter_for(target, "tree")
    poss.generation_config.draft_top_k = "auto"
    with pytest.raises(ValueError, match="draft_top_k.*expected an integer"):
        target.generate(PROMPTS[0], assistant_model=poss, max_new_tokens=4)


def test_knobs_are_saved_and_loaded(knobs, target, tmp_path):
    poss = automatic(target, "tree", knobs)
    poss.generation_config.validate()
    poss.save_pretrained(tmp_path)
    for loaded in (PosSModel.from_pretrained(tmp_path), copy.deepcopy(poss)):
        found = loaded.generation_config
        assert {name: getattr(found, name) for name in KNOBS[knobs]} == KNOBS[knobs]
        assert DraftSettings.of(loaded, "cpu") == DraftSettings.of(poss, "cpu")
    assert (
        GenerationConfig.from_pretrained(tmp_path).num_assistant_tokens == poss.generation_config.num_assistant_tokens
    )


def test_what_auto_tries_at_most(knobs):
    poss = automatic(small_target(), "tree", knobs, depth=3, total=11)
    settings, default = DraftSettings.of(poss, "cpu"), DraftSettings.of(poss, "cpu", auto=False)
    assert settings.auto_depth == (knobs != "nodes") and settings.auto_nodes == (knobs != "depth")
    assert settings.depth == (3 if knobs == "nodes" else 8) and settings.total_tokens == (
        11 if knobs == "depth" else 40
    )
    assert not default.is_auto
    assert default.depth == (3 if knobs == "nodes" else 4)
    assert default.total_tokens == (11 if knobs == "depth" else 20)


def test_transformers_own_loop_takes_the_knobs(knobs, target):
    """Which asks the generator for a chain, as it asks its own."""
    poss = automatic(target, "tree", knobs)
    config = GenerationConfig(max_length=40)
    drafter = GenerationMixin._get_candidate_generator(
        target,
        generation_config=config,
        input_ids=PROMPTS[0],
        inputs_tensor=PROMPTS[0],
        logits_processor=None,
        model_kwargs={},
        assistant_model=poss,
    )
    assert type(drafter) is PosSCandidateGenerator
    outputs = target(PROMPTS[0], output_hidden_states=True)
    input_ids = torch.cat((PROMPTS[0], outputs.logits[:, -1:].argmax(-1)), dim=1)
    candidates, _ = drafter.get_candidates(input_ids, {}, model_outputs=outputs, is_first_iteration=False)
    assert candidates.shape[1] == input_ids.shape[1] + DraftSettings.of(poss, "cpu").depth


@pytest.fixture
def group(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield distributed.group.WORLD
    distributed.destroy_process_group()


@pytest.mark.parametrize("how", ["synced_gpus", "tensor parallel"])
def test_processes_that_must_choose_alike_take_the_defaults(how, group, shape, target, warnings_seen, monkeypatch):
    poss, kwargs = automatic(target, shape), {"max_new_tokens": 20, "do_sample": False}
    expected, asked = target.generate(PROMPTS[0], **kwargs), []
    draft = PosSCandidateGenerator.draft

    def seen(self, roots, settings, enter, plan):
        asked.append((settings.depth, settings.total_tokens, plan))
        return draft(self, roots, settings, enter, plan)

    monkeypatch.setattr(PosSCandidateGenerator, "draft", seen)
    if how == "synced_gpus":
        kwargs["synced_gpus"] = True
    else:
        monkeypatch.setattr(decoding, "tensor_parallel_group", lambda target: group)
    for _ in range(2):
        assert target.generate(PROMPTS[0], assistant_model=poss, **kwargs).tolist() == expected.tolist()
    assert len([message for message in warnings_seen() if "auto" in message]) == 1
    assert asked[0] == ((4, 5, None) if shape == "chain" else (4, 20, None))
    assert all(plan is None for *_, plan in asked)


def test_other_drafters_learn_apart(target):
    """What one drafter was worth says nothing about another one of the same target."""
    planners = [
        round_sizes._planner(target, poss, DraftSettings.of(poss, "cpu"))
        for poss in (automatic(target, "tree"), automatic(target, "tree"), automatic(target, "chain"))
    ]
    assert len(set(map(id, planners))) == 3
    assert make_poss(target).generation_config.num_assistant_tokens != "auto"


def test_rounds_that_break_off_do_no_harm():
    """A trial of drafting begins, in one thread, and others ask before it has ended; or it never does."""
    pace, budget = Pace(RoundCosts(1.0, CostCurve([1, 16], [1.0, 3.0]), draft_pass=0.5)), TrialBudget()
    budget.elapsed = 1e6  # trials may cost what they like
    while pace.drafts(budget):
        pace.observe_draft(2, 8, tokens=1.0, expected=1.0, seconds=4.0, budget=budget)
    while not pace.drafts(budget):
        pace.observe_plain(1.0, budget)
    assert all(pace.drafts(budget) for _ in range(100))
