"""The study's own parts: drafters, the leaky attention, the plan, resuming, and what tables are made of."""

import importlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import VOCAB_SIZE, make_target
from made_up_records import MadeUp, MadeUpEvaluation

from hf_poss import PosSModel
from hf_poss.demo import held_out_sources
from hf_poss.evaluation.results import compute_results
from hf_poss.roll_out import roll_out_attention


STUDY = Path(__file__).parents[2] / "examples" / "study"
MODULES = (
    "costs",
    "drafters",
    "drafting",
    "leaky_attention",
    "plan",
    "results",
    "run",
    "tables",
    "texts",
    "training",
    "analyse",
)


@pytest.fixture
def study(monkeypatch):
    """The study's modules, which import each other by name."""
    monkeypatch.syspath_prepend(str(STUDY))
    before = set(sys.modules)
    yield type("Study", (), {name: importlib.import_module(name) for name in MODULES})
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and Path(sys.modules[name].__file__).parent == STUDY:
            del sys.modules[name]


@pytest.fixture
def eagle(tmp_path):
    target = make_target(scale=3.0)
    torch.manual_seed(0)
    layer = PosSModel.from_target(target, positions_per_specialist=1, num_draft_positions=1)
    layer.save_pretrained(tmp_path / "eagle")
    return target, tmp_path / "eagle"


def streams(count, batch=2, heads=2, rows=9, width=4):
    draw = torch.Generator().manual_seed(0)
    return [tuple(torch.randn(batch, heads, rows, width, generator=draw) for _ in "kv") for _ in range(count)]


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("documents", [False, True])
def test_dense_attention_is_that_of_the_package(study, count, documents):
    query = torch.randn(2, 4, 9, 4, generator=torch.Generator().manual_seed(1))
    segments = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2, 2], [1, 1, 1, 1, 1, 1, 1, 1, 1]]) if documents else None
    dense = study.leaky_attention.dense_attention(query, streams(count), segments)
    torch.testing.assert_close(dense, roll_out_attention(query, streams(count), segments), atol=1e-5, rtol=1e-4)


def test_leaky_attention_gives_hidden_positions_the_score_zero(study):
    """Row by row, from the definition."""
    query = torch.randn(1, 2, 6, 4, generator=torch.Generator().manual_seed(1))
    ((keys, values), (own_keys, own_values)) = streams(2, batch=1, rows=6)
    leaky = study.leaky_attention.dense_attention(query, [(keys, values), (own_keys, own_values)], leaky=True)
    for head in range(2):
        for row in range(6):
            scores = [
                float(query[0, head, row] @ keys[0, head, column]) / 2.0 if column <= row - 1 else 0.0
                for column in range(6)
            ]
            scores.append(float(query[0, head, row] @ own_keys[0, head, row]) / 2.0)
            total = sum(math.exp(score) for score in scores)
            everything = torch.cat([values[0, head], own_values[0, head, row][None]])
            expected = sum(math.exp(score) / total * value for score, value in zip(scores, everything, strict=True))
            torch.testing.assert_close(leaky[0, head, row], expected, atol=1e-5, rtol=1e-4)


def test_leaky_attention_ends_with_its_block(study):
    from hf_poss import modeling_poss

    with study.leaky_attention.leaky_attention():
        assert modeling_poss.roll_out_attention is not roll_out_attention
    assert modeling_poss.roll_out_attention is roll_out_attention


def test_all_drafters_begin_as_the_eagle_layer(study, eagle):
    target, folder = eagle
    features = torch.randn(1, 10, 32, generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(3, VOCAB_SIZE, (1, 10), generator=torch.Generator().manual_seed(0))
    layer = PosSModel.from_eagle(str(folder), positions_per_specialist=8, num_draft_positions=8).attach(target)
    expected = layer.roll_out(features, tokens)
    for name, method in study.drafters.METHODS.items():
        poss = method.build(folder, 8, target)
        for position, predicted in enumerate(poss.roll_out(features, tokens)):
            torch.testing.assert_close(predicted, expected[position], atol=1e-5, rtol=1e-4, msg=f"{name}, {position}")
    assert study.drafters.METHODS["eagle"].build(folder, 8, target).config.num_draft_positions == 1


def test_the_wide_layer_has_the_parameters_of_poss_2(study, eagle):
    target, folder = eagle
    sizes = {
        name: sum(
            parameter.numel() for parameter in study.drafters.METHODS[name].build(folder, 8, target).parameters()
        )
        for name in ("wide", "poss2", "hass")
    }
    assert sizes["wide"] == pytest.approx(sizes["poss2"], abs=3 * 32)  # an MLP unit has 3 * hidden_size
    assert sizes["wide"] > 2 * sizes["hass"]


@pytest.mark.parametrize("plan", ["stories", "demo", "family"])
def test_every_run_begins_from_a_run_before_it(study, plan):
    seen = set()
    for run in study.plan.PLANS[plan]():
        assert run.folder not in seen
        assert run.start is None or run.start_folder in seen, run.name
        seen.add(run.folder)


def test_all_conditions_that_tables_name_are_planned(study):
    """A table of a condition that is never run would be short of a row in silence."""
    planned = {run.name for run in study.plan.stories_runs()}

    class Everything:
        asked = set()

        def seeds(self, name):
            self.asked.add(name)
            return {}

        def measured(self, name, suite):
            return self.seeds(name)

        tau_by_seed = pos_acc_by_seed = measured

        def has(self, name, suite):
            return False

    for make in study.analyse.blocks(Everything(), Everything(), Everything()).values():
        make()
    demo = {run.name for run in study.plan.demo_runs()}
    assert Everything.asked - planned - demo == set()
    assert len(Everything.asked) > 30


class FixedTexts:
    """Texts without a tokenizer or a corpus."""

    home = "stories"

    def __init__(self, target):
        self.target, self.calls = target, 0

    def own(self, domain, count, seed):
        self.calls += 1
        draw = torch.Generator().manual_seed(seed)
        return torch.randint(3, VOCAB_SIZE, (count, 12), generator=draw).tolist()

    def prompts(self, domain, count, length):
        return self.own(domain, count, 2)


@pytest.fixture
def small(study, monkeypatch):
    """Two runs, one of which begins from the other, measured by one suite."""
    monkeypatch.setattr(study.run, "SAMPLES", 16)
    monkeypatch.setattr(study.run, "HELD_OUT", 8)
    suite = study.drafting.Suite(depth=3, total_tokens=4, prompt_length=12, new_tokens=8, prompts=4)
    monkeypatch.setattr(study.run, "suites", lambda run, plan: {"chain": suite})
    start, hass = (
        replace(run, steps=6, positions=min(run.positions, 3))
        for run in study.plan.stories_runs()
        if run.folder in ("start/seed0", "token-hass/seed0")
    )
    return [start, hass]


def test_a_study_goes_on_where_it_stopped(study, small, tmp_path, monkeypatch):
    texts = FixedTexts(make_target(scale=3.0))
    study.run.Study("stories", tmp_path, texts).work(small)
    assert texts.calls == 3  # training, held-out and prompts, once for both runs
    measured = tmp_path / "token-hass" / "seed0" / "measured.json"
    counts = json.loads(measured.read_text())["chain"]
    assert len(counts["tokens"]) == 4
    assert sum(counts["tokens"]) == sum(counts["rounds"]) + sum(counts["accepted"])

    monkeypatch.setattr(study.run, "train", lambda *_: pytest.fail("trains what is trained"))
    measured.unlink()
    (measured.parent / "run.json").unlink()
    study.run.Study("stories", tmp_path, texts).work(small)
    assert json.loads(measured.read_text())["chain"] == counts


def test_collected_results_hold_every_run(study, small, tmp_path):
    collect = importlib.import_module("collect")
    study.run.Study("stories", tmp_path, FixedTexts(make_target(scale=3.0))).work(small)
    (tmp_path / "all.json").write_text(json.dumps(collect.collect(tmp_path)))
    results = study.results.Results.read(tmp_path / "all.json")
    assert set(results.conditions) == {"start", "token/hass"}
    assert results.parameters("token/hass") > 0
    assert list(results.tau_by_seed("token/hass", "chain")) == ["0"]


def test_recorded_runs_are_made_again_only_where_others_begin_from_them(study, small, tmp_path):
    start, hass = small
    other = replace(hass, name="other", seed=1)  # begins from another seed's start
    counts = {"tokens": [1], "rounds": [1]}
    record = {"seeds": {"0": {"measured": {"chain": counts}}}}

    def recorded_by(*names):
        return study.results.Results(dict.fromkeys(names, record), "", {})

    def left(*names, runs=(start, hass, other)):
        recorded = study.run.recorded_folders(recorded_by(*names), "stories", list(runs))
        return [run.folder for run in study.run.still_to_make(list(runs), recorded)]

    assert left() == ["start/seed0", "token-hass/seed0", "other/seed1"]
    assert left("start", "token/hass") == ["other/seed1"]
    assert left("start") == ["start/seed0", "token-hass/seed0", "other/seed1"]
    assert left("start", "token/hass", "other") == ["other/seed1"]  # recorded for another seed

    del record["seeds"]["0"]["measured"]["chain"]
    assert study.run.recorded_folders(recorded_by("start"), "stories", [start]) == set()


def test_of_a_recorded_run_only_greedy_chains_are_measured(study, small, tmp_path, monkeypatch):
    suites = study.run.suites(small[0], "stories")
    monkeypatch.setattr(study.run, "suites", lambda run, plan: {"chain": suites["chain"], "tree": suites["chain"]})
    monkeypatch.setattr(study.run, "CHAIN", suites["chain"])
    made = study.run.Study("stories", tmp_path, FixedTexts(make_target(scale=3.0)), {small[0].folder})
    made.work(small)
    measured = {run.folder: json.loads((tmp_path / run.folder / "measured.json").read_text()) for run in small}
    assert [set(of) for of in measured.values()] == [{"chain"}, {"chain", "tree"}]


def test_collected_results_are_added_to_those_before(study):
    collect = importlib.import_module("collect")
    counts = [{"tokens": [n]} for n in range(5)]

    def run(**suites):
        return {"training": {"parameters": 1}, "measured": suites}

    old = {
        "hardware": "old",
        "conditions": {"a": {"settings": {}, "seeds": {"0": run(chain=counts[0], tree=counts[1])}}},
    }
    new = {
        "hardware": "new",
        "conditions": {
            "a": {"settings": {}, "seeds": {"0": run(chain=counts[0], code=counts[2]), "1": run(chain=counts[3])}},
            "b": {"settings": {}, "seeds": {"0": run(chain=counts[4])}},
        },
    }
    together = collect.merged(old, new)
    assert together["conditions"]["a"]["seeds"] == {
        "0": run(chain=counts[0], tree=counts[1], code=counts[2]),
        "1": run(chain=counts[3]),
    }
    assert set(together["conditions"]) == {"a", "b"}
    assert collect.repeated(old, new) == [True]
    new["conditions"]["a"]["seeds"]["0"]["measured"]["chain"] = counts[4]
    assert collect.repeated(old, new) == [False]
    assert collect.merged(old, new)["conditions"]["a"]["seeds"]["0"]["measured"]["chain"] == counts[0]


def made_up(study, taus: dict[str, list[float]]):
    """Results with two prompts of 100 rounds, whose taus are those of the condition and seed."""
    conditions = {
        name: {
            "settings": {},
            "seeds": {
                str(seed): {
                    "training": {"seconds": 1.0, "parameters": 10},
                    "measured": {
                        "chain": {
                            "tokens": [round(100 * tau) - 5, round(100 * tau) + 5],
                            "rounds": [100, 100],
                            "drafted": [100],
                            "reached": [100],
                            "accepted": [50],
                        }
                    },
                }
                for seed, tau in enumerate(by_seed)
            },
        }
        for name, by_seed in taus.items()
    }
    return study.results.Results(conditions, "", {})


def test_differences_are_paired_by_seed(study):
    """Seeds differ more than conditions do: only pairs show that one is better."""
    base = [2.0, 2.5, 3.0, 3.5, 4.0]
    better = [tau + change for tau, change in zip(base, (0.09, 0.1, 0.11, 0.1, 0.1), strict=True)]
    (found,) = study.results.differences(made_up(study, {"a": better, "b": base}), [("a", "b")], "chain")
    assert found.by_seed.n == 5
    assert found.by_seed.difference == pytest.approx(0.1)
    assert found.by_seed.p_value < 1e-4
    assert found.by_prompt.n == 2
    table = study.tables.difference_table([found])
    assert "+0.100 (+3.3%)" in table


def test_positions_are_compared_seed_by_seed(study):
    results = made_up(study, {"a": [2.0, 2.0, 2.0], "b": [2.0, 2.0, 2.0]})
    for name, by_seed in (("a", (60, 70, 80)), ("b", (58, 67, 78))):
        for seed, accepted in enumerate(by_seed):
            results.conditions[name]["seeds"][str(seed)]["measured"]["chain"]["accepted"] = [accepted]
    # Differences of 2, 3 and 2 points: Student's interval with 2 degrees of freedom, t = 4.303.
    half = 4.303 * 0.57735 / 3**0.5
    (row,) = cells(study.tables.position_differences(results, [("a", "b"), ("a", "missing")], (1,)))
    assert row == ["a – b", f"+2.3 ({7 / 3 - half:+.1f} to {7 / 3 + half:+.1f})", "3"]


def test_conditions_without_a_common_seed_are_not_compared(study):
    results = made_up(study, {"a": [2.0], "b": [2.0]})
    results.conditions["b"]["seeds"] = {"7": results.conditions["b"]["seeds"]["0"]}
    assert study.results.differences(results, [("a", "b"), ("a", "missing")], "chain") == []


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_speed_is_that_of_the_evaluation(study, tmp_path):
    drafters = [MadeUp("HASS", [0.6, 0.3], checkpoints=3), MadeUp("PosS-2", [0.9, 0.9], checkpoints=3)]
    results = compute_results(MadeUpEvaluation(drafters, {"python": 8}, batch_sizes=(1, 4)).write(tmp_path))
    figures = results["decodings"][0]["benchmarks"]["python"]
    plain, hass, poss = cells(study.costs.speed_table(results))
    assert plain[:7] == ["plain", "8", "1", "1.00", "1.00", "1.00", "1.00x"]
    runs = figures["PosS-2"]["runs"]
    assert poss[:3] == ["PosS-2", "8", "3"]
    assert poss[4] == f"{figures['PosS-2']['tau']:.2f}"
    assert poss[5] == f"{figures['PosS-2']['rho']:.2f}"
    assert poss[6] == f"{runs['mean']['speed_up']:.2f}x ± {runs['deviation']['speed_up']:.2f}"

    pairs = [("PosS-2", "HASS"), ("HASS", "nobody")]
    (row,) = cells(study.costs.speed_comparisons(results, pairs))
    (wanted,) = (of for of in results["decodings"][0]["comparisons_over_checkpoints"] if of["measure"] == "speed-up")
    # Student's interval of three differences, t = 4.303, from their mean and mean over deviation.
    half = 4.303 * wanted["difference"] / wanted["effect_size"] / 3**0.5
    assert row[2] == f"{wanted['difference'] - half:+.3f} to {wanted['difference'] + half:+.3f}"
    assert row[4] == f"{study.tables.p_text(wanted['p_value'])} (n = 3)"  # the only pair: nothing to correct

    _, _, poss = cells(study.costs.speed_table(results, 4))
    of_four = results["decodings"][1]["benchmarks"]["python"]["PosS-2"]
    assert (poss[1], poss[5]) == ("2", f"{of_four['rho']:.2f}")  # calls
    (row,) = cells(study.costs.speed_comparisons(results, pairs, 4))
    assert row[4].endswith("(n = 3)") and row[6].endswith("(n = 2)")
    assert study.costs.speed_table(results, 3) == study.tables.NOT_MEASURED
    assert study.costs.speed_table(None) == study.costs.speed_comparisons(None, []) == study.tables.NOT_MEASURED


def test_memory_is_predicted_and_measured_where_it_was(study):
    parts = {"drafter_weights": 1, "copies": 2, "specialist_caches": 3, "target_cache": 4, "peak": 9}
    predicted = {name: value * 2**20 for name, value in parts.items()}
    profile = {
        "planned": [{"context": 16, "rows": 1}, {"context": 16, "rows": 4}],
        "predictions": {"PosS-2": [predicted, predicted]},
        "cases": [{"context": 16, "rows": 1, "memory": {"PosS-2": {"peak": 9.25 * 2**20}}}],
    }
    assert cells(study.costs.memory_table(profile)) == [
        ["16 tokens, 1 row", "PosS-2", "1.00", "2.00", "3.00", "4.00", "9.00", "9.25"],
        ["16 tokens, 4 rows", "PosS-2", "1.00", "2.00", "3.00", "4.00", "9.00", "–"],
    ]
    assert study.costs.memory_table(None) == study.tables.NOT_MEASURED


def test_python_prompts_are_whole_lines_of_held_out_modules(study):
    prompts = list(importlib.import_module("python_prompts").prompts())
    assert len({prompt["id"] for prompt in prompts}) == len(prompts) == 2 * len(held_out_sources())
    for prompt in prompts:
        source = held_out_sources()[prompt["id"].split()[0]]
        assert f"\n{prompt['prompt']}" in source and prompt["prompt"].endswith("\n")
        assert 300 < len(prompt["prompt"]) < 600


def test_tables_in_a_page_are_replaced(study):
    page = "before\n<!-- study:one -->\nold\n<!-- end -->\nbetween\n<!-- study:two --><!-- end -->"
    with pytest.raises(KeyError):
        study.analyse.replaced(page.replace("two --><!--", "two -->\n<!--"), {"one": lambda: "new"})
    made = study.analyse.replaced(
        page.replace("two --><!--", "two -->\n<!--"), {"one": lambda: "1", "two": lambda: "2"}
    )
    assert "old" not in made
    assert made.count("<!-- study:one -->\n1\n<!-- end -->") == 1
    assert made.startswith("before\n") and made.endswith("<!-- study:two -->\n2\n<!-- end -->")


def test_windows_are_of_one_length_and_the_same_for_a_seed(study):
    class Characters:
        def __call__(self, text, add_special_tokens):
            return type("Encoding", (), {"input_ids": [ord(character) for character in text]})

    texts = ["abcdefgh", "ijklmnop", "xyz"]
    drawn = study.texts.windows(texts, Characters(), 4, 3, seed=0)
    assert drawn == study.texts.windows(texts, Characters(), 4, 3, seed=0)
    assert {"".join(map(chr, window)) for window in drawn} <= {"abcd", "efgh", "ijkl", "mnop"}
    with pytest.raises(ValueError, match="4 windows of 4 tokens"):
        study.texts.windows(texts, Characters(), 4, 5, seed=0)


def test_training_and_held_out_documents_do_not_meet(study):
    items = list(range(95))
    kept, held_out = study.texts.split(items, False), study.texts.split(items, True)
    assert sorted(kept + held_out) == items
    assert len(held_out) == 10


def test_sampled_text_is_not_a_batch_of_one_text(study):
    target = make_target(scale=1.0)
    texts = study.texts.continued(target, [[1]] * 4, 12, seed=0)
    assert {len(text) for text in texts} == {12}
    assert len({tuple(text) for text in texts}) == 4
