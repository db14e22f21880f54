"""A benchmark's runs: turns, counted rounds, identity of texts, contestants that cannot run."""

import pytest
import torch
from conftest import EOS, drafter_for, left_padded, make_prompt, make_target

from hf_poss import collect_statistics
from hf_poss.evaluation.acceptance import Acceptance
from hf_poss.evaluation.benchmark import Benchmark, Prompt
from hf_poss.evaluation.contestants import Contestant, fixed_settings, make_contestants


CPU = torch.device("cpu")


def prompt_of(length: int, seed: int = 1) -> Prompt:
    ids = make_prompt(length, seed, vocab=90)
    return Prompt(f"{length} tokens", {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


@pytest.fixture
def target():
    return make_target("llama", seed=4, scale=10.0)


@pytest.fixture
def poss(target):
    return drafter_for(target, "tree")


def benchmark_of(target, poss, *names: str, prompts=(7, 12), new_tokens=10, **kwargs) -> Benchmark:
    contestants = make_contestants(names, poss, fixed_settings(poss, CPU), CPU)
    return Benchmark(target, poss, contestants, [prompt_of(length) for length in prompts], new_tokens, **kwargs)


def test_contestants_take_turns_and_who_is_first_changes(target, poss):
    seen = []
    benchmark = benchmark_of(target, poss, "poss-chain", "poss-tree", on_run=lambda: seen.append(1))
    benchmark.warm_up()
    assert not benchmark.runs and len(benchmark.warm_up_runs) == len(seen) == benchmark.steps == 6
    # the longest prompt is the first: caches of one size are made for it
    assert [run.prompt for run in benchmark.warm_up_runs] == [1, 0] * 3
    for repeat in (1, 2, 3):
        benchmark.repeat(repeat)
    names = ["plain", "poss-chain", "poss-tree"]
    firsts = set()
    for start in range(0, 18, 3):
        turn = benchmark.runs[start : start + 3]
        assert {(run.repeat, run.prompt) for run in turn} == {(start // 6 + 1, start // 3 % 2)}
        order = [run.contestant for run in turn]
        first = names.index(order[0])
        assert order == names[first:] + names[:first]
        firsts.add(order[0])
    assert firsts == set(names)
    assert len(seen) == 4 * benchmark.steps


def test_rounds_are_those_of_the_loop_and_texts_those_of_plain_generate(target, poss):
    benchmark = benchmark_of(target, poss, "poss-chain", "poss-tree", "prompt-lookup")
    benchmark.warm_up()
    benchmark.repeat(1)
    for run in benchmark.runs:
        assert run.difference is None
        assert run.seconds > 0 and run.prompt_seconds > 0
        assert len(run.new_tokens) == 1
        contestant = next(each for each in benchmark.contestants if each.name == run.contestant)
        if contestant.has_specialists:
            with contestant.set_up(), collect_statistics() as stats:
                target.generate(
                    **benchmark.prompts[run.prompt].inputs, **contestant.arguments, max_new_tokens=10, do_sample=False
                )
            assert run.rounds == stats.rounds
            assert sum(run.new_tokens) == stats.tokens + 1
        else:
            assert (run.rounds is None) == (run.contestant == "plain")


def test_rounds_of_stock_speculation_are_the_targets_passes(target, poss):
    benchmark = benchmark_of(target, poss, "prompt-lookup", prompts=(12,), new_tokens=4)
    benchmark.warm_up()
    passes = []
    hook = target.register_forward_hook(lambda *_: passes.append(1))
    benchmark.repeat(1)
    hook.remove()
    plain, lookup = sorted(benchmark.runs, key=lambda run: run.contestant)
    assert plain.new_tokens == lookup.new_tokens == [4]
    # Beside the rounds: plain reads the prompt twice and takes three steps, prompt lookup reads the prompt twice.
    assert lookup.rounds == len(passes) - 5 - 2


def test_a_text_that_differs_is_marked_at_its_first_token(target, poss):
    plain = target.generate(**prompt_of(7).inputs, max_new_tokens=10, do_sample=False)[0, 7:].tolist()
    place = next(index for index in range(3, 10) if plain[index] not in plain[:index])
    other = Contestant("prompt-lookup", {"suppress_tokens": [plain[place]]})
    chain = make_contestants(["poss-chain"], poss, fixed_settings(poss, CPU), CPU)
    benchmark = Benchmark(target, poss, [*chain, other], [prompt_of(7)], 10)
    benchmark.warm_up()
    benchmark.repeat(1)
    assert {run.contestant: run.difference for run in benchmark.runs} == {
        "plain": None,
        "poss-chain": None,
        "prompt-lookup": [0, place],
    }


def test_a_text_that_ends_early_differs_where_it_ends(target, poss):
    shorter = Contestant("prompt-lookup", {"stopping_criteria": [lambda ids, scores: ids.new_ones(len(ids)).bool()]})
    plain = make_contestants([], poss, fixed_settings(poss, CPU), CPU)
    benchmark = Benchmark(target, poss, [*plain, shorter], [prompt_of(7)], 6)
    benchmark.warm_up()
    benchmark.repeat(1)
    assert {run.contestant: run.difference for run in benchmark.runs} == {"plain": None, "prompt-lookup": [0, 1]}


def test_batches_tell_the_row_and_count_by_row(target, poss):
    prompts = [make_prompt(5, 1, 90), make_prompt(9, 2, 90), make_prompt(7, 3, 90)]
    batch = Prompt("three", left_padded(prompts))
    plain = target.generate(**batch.inputs, max_new_tokens=12, do_sample=False)[:, 9:]
    contestants = make_contestants(["poss-tree", "prompt-lookup"], poss, fixed_settings(poss, CPU), CPU)
    benchmark = Benchmark(target, poss, contestants, [batch], 12)
    benchmark.warm_up()
    benchmark.repeat(1)
    benchmark.profile()
    runs = {run.contestant: run for run in benchmark.runs}
    assert set(runs) == {"plain", "poss-tree"} and "prompt-lookup" in benchmark.failures  # stock loop: one row
    wanted = [(row.tolist() + [EOS]).index(EOS) + 1 for row in plain]
    for run in runs.values():
        assert run.new_tokens == [min(length, 12) for length in wanted]
        assert run.difference is None


def test_who_cannot_run_is_listed_and_the_others_go_on(target, poss, warnings_seen):
    broken = Contestant("assistant", {"no_such_argument": 1})
    contestants = make_contestants(["poss-chain"], poss, fixed_settings(poss, CPU), CPU)
    benchmark = Benchmark(target, poss, [contestants[0], broken, contestants[1]], [prompt_of(7)], 6)
    benchmark.warm_up()
    benchmark.repeat(1)
    benchmark.profile()
    assert list(benchmark.failures) == ["assistant"]
    assert "no_such_argument" in benchmark.failures["assistant"]
    assert {run.contestant for run in benchmark.runs} == {"plain", "poss-chain"}
    assert [told for told in warnings_seen() if "assistant cannot run here" in told]


def test_plain_generate_has_to_run(target, poss):
    benchmark = Benchmark(target, poss, [Contestant("plain", {"no_such_argument": 1})], [prompt_of(7)], 6)
    with pytest.raises(ValueError, match="no_such_argument"):
        benchmark.warm_up()


def test_a_profile_breaks_rounds_down(target, poss):
    benchmark = benchmark_of(target, poss, "poss-tree")
    benchmark.profile()
    profile = benchmark.profiles["poss-tree"]
    breakdown = profile["breakdown"]
    assert set(breakdown["parts"]) == {
        "context fill",
        "draft passes",
        "tree building",
        "verification forward",
        "walk",
        "cache upkeep",
        "host time",
    }
    milliseconds = [part["milliseconds"] for part in breakdown["parts"].values()]
    assert min(milliseconds) >= 0 and sum(milliseconds) == pytest.approx(breakdown["round_milliseconds"])
    assert sum(part["share"] for part in breakdown["parts"].values()) == pytest.approx(1)
    assert len(breakdown["draft_pass_milliseconds"]) == 4
    passes = breakdown["parts"]["draft passes"]["milliseconds"]
    assert sum(breakdown["draft_pass_milliseconds"]) == pytest.approx(passes)
    assert breakdown["rounds"] == sum(profile["rounds_by_prompt"])
    overhead = profile["drafting_overhead"]
    bare = overhead["bare_operations_milliseconds"]
    assert overhead["ratio"] == pytest.approx(overhead["drafting_milliseconds"] / bare["all"])
    assert profile["device_calls"] is None  # no CUDA device


def test_scripted_drafts_are_accepted_and_texts_not_compared(target, poss):
    acceptance = Acceptance([1.0], 4)
    benchmark = benchmark_of(target, poss, "poss-chain", prompts=(7,), new_tokens=11, acceptance=acceptance)
    target.generation_config.eos_token_id = None
    benchmark.warm_up()
    benchmark.repeat(1)
    run = next(run for run in benchmark.runs if run.contestant == "poss-chain")
    assert run.rounds == 2 and run.new_tokens == [11]  # 1 + 5 + 5
    assert run.difference is None


def test_the_roofline_knows_the_cache(target, poss, monkeypatch):
    monkeypatch.setattr("hf_poss.evaluation.benchmark.copy_bandwidth", lambda device: 1e9)
    benchmark = benchmark_of(target, poss, "poss-chain", "poss-tree", "poss-auto", prompts=(8,), new_tokens=10)
    roofline = benchmark.roofline()
    entry = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, float32
    assert roofline["context_tokens"] == 8 + 10 / 2
    assert roofline["plain_step_bytes"]["target cache"] == pytest.approx(entry * 13)
    assert set(roofline["round_bytes"]) == {"poss-chain", "poss-tree"}  # "auto" has no one size
