"""Profiles: what is measured of a batch, and what pays by costs that are given."""

import pytest
import torch
from conftest import SIZES, make_poss
from transformers import LlamaConfig

from hf_poss import collect_statistics
from hf_poss.candidate_generator import DraftSettings
from hf_poss.configuration_poss import PosSConfig
from hf_poss.demo import demo_prompts, load_demo_pair
from hf_poss.evaluation.break_even import paying_gain
from hf_poss.evaluation.profile import (
    Case,
    LoadedPair,
    Plan,
    break_even,
    measure_case,
    measured_acceptance,
    memory_predictions,
)
from hf_poss.evaluation.profile_figure import plot_profile
from hf_poss.evaluation.profile_tables import break_even_table, latency_table, memory_table, switching_table
from hf_poss.evaluation.prompts import batches
from hf_poss.evaluation.shapes import random_target
from hf_poss.measures import expected_tau


SETTINGS = DraftSettings(4, 1, 5)


def make_plan(**changes) -> Plan:
    config = LlamaConfig(**SIZES)
    config.eos_token_id = None
    drafters = {
        name: PosSConfig.from_target_config(config, positions_per_specialist=n, num_draft_positions=4)
        for name, n in (("EAGLE", 4), ("PosS-2", 2))
    }
    arguments = {
        "target": config,
        "drafters": drafters,
        "settings": dict.fromkeys(drafters, SETTINGS),
        "cases": [Case(8, 1), Case(8, 2)],
        "new_tokens": 16,
        "device": torch.device("cpu"),
        "dtype": torch.float32,
    }
    return Plan(**{**arguments, **changes})


@pytest.fixture(scope="module")
def measured():
    plan = make_plan()
    target = random_target(plan.target, plan.device, plan.dtype)
    drafters = {
        name: make_poss(target, positions_per_specialist=config.positions_per_specialist, num_draft_positions=4)
        for name, config in plan.drafters.items()
    }
    steps = []
    cases = [measure_case(plan, LoadedPair(target, drafters), case, 2, lambda: steps.append(1)) for case in plan.cases]
    assert len(steps) == 2 * 4
    return plan, memory_predictions(plan), cases


def test_a_batch_is_measured_against_what_was_predicted(measured):
    plan, predictions, cases = measured
    assert list(predictions) == ["plain", "EAGLE", "PosS-2"]
    for index, case in enumerate(cases):
        for name, memory in case["memory"].items():
            assert predictions[name][index]["peak"] == pytest.approx(memory["peak"], rel=0.05)
    assert cases[0]["memory"]["PosS-2"]["drafter_weights"] > cases[0]["memory"]["EAGLE"]["drafter_weights"] > 0
    assert cases[0]["memory"]["plain"]["drafter_weights"] == 0
    assert cases[0]["latency"]["PosS-2"]["rho"] > 0 and cases[0]["latency"]["plain"]["step"]["count"] == 2
    assert list(cases[0]["switching"]) == ["PosS-2"]
    switching = cases[0]["switching"]["PosS-2"]
    assert switching["bytes"]["distinct_weights"] == 2 * switching["bytes_of_one"]["distinct_weights"]


def test_tables_and_figure_tell_of_every_batch(measured, tmp_path):
    plan, predictions, cases = measured
    result = break_even(plan, cases, {"EAGLE": [0.8], "PosS-2": [0.8, 0.7]})
    planned = [{"context": case.context, "rows": case.rows} for case in plan.cases]
    memory = memory_table(planned, predictions, cases)
    for name in ("plain", "EAGLE", "PosS-2"):
        assert memory.count(f"| {name} |") == 2
    assert "not predicted" not in memory
    assert memory_table(planned, {"plain": {"reason": "packed"}}, []).count("not predicted") >= 2
    assert latency_table(cases).count("| PosS-2 |") == 2
    assert switching_table(cases).count("| PosS-2 |") == 2
    assert switching_table([{"switching": {}}]) == ""
    assert break_even_table(result).count("| EAGLE |") == 2
    figures = {"cases": cases, "planned": planned, "predictions": predictions, "break_even": result}
    pytest.importorskip("matplotlib")
    for name, of in (("all.png", figures), ("predicted.png", {**figures, "cases": []})):
        of = {key: value for key, value in of.items() if of["cases"] or key != "break_even"}
        assert plot_profile(tmp_path / name, of)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def given_case(rows: int, plain: float, round_seconds: float, added: float) -> dict:
    """Costs that nobody measured: a verification that is free, and a price of 0.1 a pass."""
    costs = {
        "plain": plain,
        "verification": {"nodes": [1, 5], "seconds": [plain, plain]},
        "draft_pass": [0.1] * 4,
        "context": 0.0,
        "overhead": 0.0,
        "round": round_seconds,
    }
    spread = dict.fromkeys(("lower_quartile", "median", "upper_quartile"), added)
    over = {"round_seconds_of_fewer": {"median": round_seconds - added}, "added_seconds": spread}
    return {
        "context": 8,
        "rows": rows,
        "costs": {"EAGLE": costs, "PosS-2": costs},
        "switching": {"PosS-2": {"over_one_less": over}},
    }


@pytest.mark.parametrize("settings", [DraftSettings(4, 1, 5), DraftSettings(4, 3, 6)], ids=["chain", "small tree"])
def test_acceptance_of_prompts_is_that_of_their_rounds(settings):
    """A tree of 6 nodes ends before depth 4 here and there: tau by these rates is the rounds' own all the same."""
    target, poss, tokenizer = load_demo_pair()
    prompts = batches(demo_prompts(2), tokenizer, 1, target.device)
    found = measured_acceptance(target, poss, settings, prompts, 24)
    knobs = {
        "num_assistant_tokens": settings.depth,
        "draft_top_k": settings.top_k,
        "draft_total_tokens": settings.total_tokens,
    }
    poss.generation_config.update(**knobs)
    with collect_statistics() as stats:
        for prompt in prompts:
            target.generate(**prompt.inputs, assistant_model=poss, do_sample=False, max_new_tokens=24)
    assert expected_tau(found) == pytest.approx(1 + sum(stats.accepted) / stats.rounds)
    if settings.top_k > 1:
        assert expected_tau(stats.pos_acc) > expected_tau(found) + 0.05


def test_what_pays_follows_from_costs_and_acceptance():
    plan = make_plan()
    cases = [given_case(1, 1.0, 1.4, 0.05), given_case(2, 1.0, 2.8, 0.05), given_case(4, 1.0, 5.6, 0.05)]
    result = break_even(plan, cases, {"EAGLE": [0.5], "PosS-2": [0.9, 0.8]})
    eagle, *_ = (entry for entry in result["rounds"] if entry["drafter"] == "EAGLE")
    assert eagle["acceptance"] == [0.5] * 4 and eagle["tau"] == 1 + 0.5 + 0.25 + 0.125 + 0.0625
    # (1 + 1/2 + ... ) / (1 + K / 10), the highest of 1, 1.364, 1.458, 1.442 and 1.384.
    assert eagle["best_depth"] == 2 and eagle["speed_up_by_depth"][2] == pytest.approx(1.75 / 1.2)
    assert "last_specialist" not in eagle
    poss, *_ = (entry for entry in result["rounds"] if entry["drafter"] == "PosS-2")
    expected = paying_gain([0.9, 0.8, 0.8, 0.8], 4, 3, 1.35, 0.05)
    assert poss["last_specialist"]["first_position"] == 3
    assert poss["last_specialist"]["paying_gain"]["median"] == pytest.approx(expected)
    batches = {entry["drafter"]: entry for entry in result["batches"]}
    assert batches["EAGLE"]["measured_rows"] == [1, 2, 4]
    # tau 1.9375 pays where a round takes less than that: 1.4 at one row, 2.8 at two.
    assert batches["EAGLE"]["break_even_rows"] == 2
    assert batches["PosS-2"]["break_even_rows"] == 3  # tau 3.76; on the line 2.8, 4.2, 5.6


def test_what_is_not_predicted_is_told_and_measured():
    told = memory_predictions(make_plan(unpredictable="It is packed."))
    assert all(of == {"reason": "It is packed."} for of in told.values())
