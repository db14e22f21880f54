"""Figures and tables of runs whose times are known."""

import json

import pytest
import torch
from conftest import drafter_for

from hf_poss.evaluation.benchmark import Benchmark, Prompt, Run
from hf_poss.evaluation.contestants import fixed_settings, make_contestants
from hf_poss.evaluation.report import figures, tables


CPU = torch.device("cpu")


def run(contestant: str, repeat: int, seconds: float, rounds: int | None = None, **kwargs) -> Run:
    """A prompt of one second, and 21 tokens."""
    return Run(contestant, repeat, 0, seconds, 1.0, [21], rounds, **kwargs)


@pytest.fixture
def benchmark(llama) -> Benchmark:
    """Plain takes 20 steps of 1, 2 and 4 seconds; a tree 5 rounds of 2, 2 and 10; compiled steps take half a second,
    and compiled rounds 1."""
    poss = drafter_for(llama, "tree")
    contestants = make_contestants(
        ["poss-tree", "poss-compiled", "assistant"], poss, fixed_settings(poss, CPU), CPU, llama
    )
    ids = torch.zeros(1, 7, dtype=torch.long)
    benchmark = Benchmark(llama, poss, contestants, [Prompt("zeros", {"input_ids": ids})], 21)
    benchmark.failures["assistant"] = "ValueError: too | wide"
    for repeat, (step, round_) in enumerate([(1, 2), (2, 2), (4, 10)], start=1):
        benchmark.runs += [
            run("plain", repeat, 1 + 20 * step),
            run("poss-tree", repeat, 1 + 5 * round_, rounds=5),
            run("plain-compiled", repeat, 1 + 20 * 0.5),
            run("poss-compiled", repeat, 1 + 5 * 1, rounds=5),
        ]
    benchmark.warm_up_runs = [run("plain", 0, 41.0), run("poss-compiled", 0, 70.0, rounds=5)]
    return benchmark


def test_ratios_are_of_runs_side_by_side(benchmark):
    of = figures(benchmark)["contestants"]
    tree, compiled = of["poss-tree"], of["poss-compiled"]
    assert tree["rho"]["median"] == 2.0 and (tree["rho"]["lowest"], tree["rho"]["highest"]) == (1.0, 2.5)
    assert compiled["rho"]["median"] == 2.0  # over plain compiled steps of half a second
    assert (tree["rho_is_over"], compiled["rho_is_over"]) == ("plain", "plain-compiled")
    speedups = sorted([21 / 11, 41 / 11, 81 / 51])
    assert tree["speedup_over_plain"]["median"] == pytest.approx(speedups[1])
    assert tree["speedup_over_plain"]["highest"] == pytest.approx(speedups[2])
    assert tree["speedup_over_plain_compiled"]["median"] == pytest.approx(11 / 11)
    assert tree["decoding_speedup_over_plain"]["median"] == pytest.approx(20 / 10)
    assert tree["tau"] == compiled["tau"] == 4.0
    assert tree["tokens_per_second"]["highest"] == pytest.approx(21 / 11)
    assert tree["decoding_tokens_per_second"]["highest"] == pytest.approx(20 / 10)
    assert of["plain"]["step_seconds"]["median"] == 2.0
    assert of["plain"]["speedup_over_plain"]["lowest"] == of["plain"]["speedup_over_plain"]["highest"] == 1.0


def test_speed_up_is_tau_over_rho(benchmark):
    for of in figures(benchmark)["contestants"].values():
        if of.get("rho"):
            spread = of[f"decoding_speedup_over_{of['rho_is_over'].replace('-', '_')}"]
            assert spread["median"] == pytest.approx(of["tau"] / of["rho"]["median"])


def test_start_up_is_what_later_runs_do_without(benchmark):
    of = figures(benchmark)["contestants"]
    assert of["poss-compiled"]["warm_up_seconds"] == 71.0
    assert of["poss-compiled"]["start_up_seconds"] == 71.0 - (6.0 + 1.0)
    assert of["plain"]["start_up_seconds"] == 0.0


def test_a_share_of_the_roofline_is_of_the_median_round(benchmark):
    roofline = {
        "copy_bandwidth_bytes_per_second": 1000.0,
        "context_tokens": 20.0,
        "rows": 1,
        "plain_step_bytes": {"target weights": 400.0, "target cache": 100.0},
        "round_bytes": {"poss-tree": {"target weights": 400.0, "specialists": 600.0}},
    }
    result = figures(benchmark, roofline)
    of = result["contestants"]
    assert of["poss-tree"]["roofline"] == {
        "bytes": 1000.0,
        "floor_seconds": 1.0,
        "tokens_per_second": 4.0,  # tau 4 in a second
        "share_reached": 0.5,  # of rounds of 2 seconds
    }
    assert of["plain"]["roofline"]["share_reached"] == 0.25
    assert of["poss-compiled"]["roofline"] is None
    told = tables(result)
    assert "- poss-tree: 1 kB (target weights 400 B, specialists 600 B): 1000.00 ms at the least" in told


def test_texts_that_differ_are_marked(benchmark):
    benchmark.runs[-3].difference = [0, 4]
    result = figures(benchmark)
    of = result["contestants"]
    assert of["plain"]["identical"] is True
    assert of["poss-tree"]["identical"] is False and of["poss-tree"]["differing_runs"] == 1
    assert of["poss-tree"]["first_difference"] == {"repeat": 3, "prompt": 0, "row": 0, "new_token": 4}
    row = next(line for line in tables(result).splitlines() if line.startswith("| poss-tree |"))
    assert "NO: prompt 1, row 1, new token 5" in row


def test_who_cannot_run_has_a_line_with_the_reason(benchmark):
    result = figures(benchmark)
    assert result["contestants"]["assistant"]["status"] == "cannot run here"
    assert result["contestants"]["assistant"]["reason"] == "ValueError: too | wide"
    lines = [line for line in tables(result).splitlines() if line.startswith("| assistant |")]
    assert lines[0].startswith("| assistant | cannot run here: ValueError: too / wide |")


def test_every_row_of_a_table_has_its_cells(benchmark):
    benchmark.profiles["poss-tree"] = {
        "tau": 4.0,
        "pos_acc": [0.9],
        "rounds_by_prompt": [5],
        "device_calls": {"kernels": 300.0, "launches": 200.0, "waits": 1.0},
        "breakdown": {
            "parts": {"walk": {"milliseconds": 2.0, "share": 0.25}},
            "draft_pass_milliseconds": [1.0, 2.0],
        },
        "drafting_overhead": {"ratio": 1.25},
    }
    told = tables(figures(benchmark))
    for block in told.split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) <= 1
    assert "| poss-tree | 2.00 (25%) | 1.00 2.00 | 1.25 | 300.0 | 200.0 | 1.0 |" in told


def test_rounds_that_were_not_counted_are_those_of_the_profile(benchmark):
    """Picks of calls with processors do not go through a script."""
    for run_ in benchmark.runs:
        run_.rounds = None
    benchmark.profiles["poss-tree"] = {"tau": 4.0, "rounds_by_prompt": [5]}
    of = figures(benchmark)["contestants"]
    assert of["poss-tree"]["rho"]["median"] == 2.0 and of["poss-tree"]["tau"] == 4.0
    assert of["poss-compiled"]["rho"] is None and of["poss-compiled"]["tau"] is None


def test_figures_are_json_and_runs_come_back(benchmark):
    result = json.loads(json.dumps(figures(benchmark)))
    assert [Run(**each) for each in result["runs"]] == benchmark.runs
    assert result["repeats"] == 3
    assert result["prompts"] == [{"title": "zeros", "rows": 1, "tokens": 7}]
