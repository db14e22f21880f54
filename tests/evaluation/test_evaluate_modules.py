"""The modules for Hugging Face `evaluate`: loaded by path or imported, combined, on several processes."""

import doctest
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import drafter_for, left_padded, make_prompt, small_target

from hf_poss import collect_statistics
from hf_poss.evaluation.metric_inputs import record_inputs, statistics_inputs


pytest.importorskip("evaluate", reason="evaluate is not installed")

import evaluate  # noqa: E402

from hf_poss.evaluation.modules import (  # noqa: E402
    AcceptanceLength,
    OutputIdentity,
    PositionAcceptance,
    SpeculativeSpeedup,
    metric_path,
)


CLASSES = {
    "acceptance_length": AcceptanceLength,
    "output_identity": OutputIdentity,
    "position_acceptance": PositionAcceptance,
    "speculative_speedup": SpeculativeSpeedup,
}
# Two texts: 4 rounds of chains of 2 that emit 1, 3, 2 and 3 tokens; and a round of one node, which is accepted.
COUNTS = {
    "tokens": [9, 2],
    "rounds": [4, 1],
    "drafted": [[4, 4], [1]],
    "reached": [[4, 3], [1]],
    "accepted": [[3, 2], [1]],
}
TIMES = {
    "new_tokens": [10, 3],
    "seconds": [1.0, 0.5],
    "plain_new_tokens": [10, 3],
    "plain_seconds": [2.5, 0.5],
}
TEXTS = {"predictions": [[5, 6, 7], [5, 6]], "references": [[5, 6, 7], [5, 9]]}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "metrics"))


# ---- What they compute ----


def test_acceptance_length_by_hand():
    results = AcceptanceLength().compute(tokens=[9, 2], rounds=[4, 1])
    assert results == {"texts": 2, "tokens": 11, "rounds": 5, "tau": 2.2, "tau_macro": (2.25 + 2.0) / 2}


def test_texts_without_a_round_do_not_enter_the_mean():
    results = AcceptanceLength().compute(tokens=[9, 0], rounds=[4, 0])
    assert results["tau"] == results["tau_macro"] == 2.25 and results["texts"] == 2
    assert AcceptanceLength().compute(tokens=[], rounds=[])["tau"] == 0


def test_position_acceptance_by_hand():
    counts = {name: COUNTS[name] for name in ("drafted", "reached", "accepted")}
    results = PositionAcceptance().compute(**counts)
    assert results == {
        "drafted": [5, 4],
        "reached": [5, 3],
        "accepted": [4, 2],
        "pos_acc": [0.8, 2 / 3],
        "node_acceptance": [0.8, 0.5],
        "expected_tau": pytest.approx(1 + 0.8 + 0.8 * 2 / 3),
    }


def test_positions_beyond_the_last_span_are_the_last_specialists():
    counts = {"drafted": [[8, 6, 4, 2]], "reached": [[8, 6, 4, 2]], "accepted": [[6, 4, 2, 1]]}
    results = PositionAcceptance().compute(**counts, positions_per_specialist=1, num_specialists=2)
    assert (results["drafted_by_specialist"], results["accepted_by_specialist"]) == ([8, 12], [6, 7])
    assert results["acceptance_by_specialist"] == [0.75, 7 / 12]


def test_speed_up_is_the_ratio_of_all_rates_and_texts_are_told_apart():
    results = SpeculativeSpeedup().compute(**TIMES)
    assert results["speed_up"] == (13 / 1.5) / (13 / 3.0)
    # ratios 2.5 and 1: the quartiles lie a quarter and three quarters of the way between them
    assert (results["speed_up_median"], results["speed_up_quartiles"]) == (1.75, [1.375, 2.125])
    assert (results["new_tokens"], results["seconds"], results["plain_seconds"]) == (13, 1.5, 3.0)


def test_speed_up_behind_the_prompt_is_tau_over_rho():
    columns = {"tokens": [9, 2], "prompt_seconds": [0.2, 0.3], "passes": [4, 1]}
    plain = {"plain_tokens": [9, 2], "plain_prompt_seconds": [0.3, 0.2], "plain_passes": [9, 2]}
    results = SpeculativeSpeedup("round_cost").compute(**TIMES, **columns, **plain)
    assert results["rho"] == pytest.approx((1.0 / 5) / (2.5 / 11))
    assert results["decoding_speed_up"] == pytest.approx(2.5)
    assert results["decoding_speed_up"] == pytest.approx(11 / 5 / results["rho"])


def test_a_single_text_has_no_spread():
    results = SpeculativeSpeedup().compute(**{name: values[:1] for name, values in TIMES.items()})
    assert (results["speed_up_median"], results["speed_up_quartiles"]) == (2.5, [2.5, 2.5])


@pytest.mark.parametrize(
    ("predictions", "references", "differences"),
    [
        ([[1, 2, 3], [1, 2]], [[1, 2, 3], [1, 2, 3]], [None, 2]),
        ([[], [4]], [[], [5]], [None, 0]),
        ([torch.tensor([1, 2]), torch.tensor([1])], [torch.tensor([1, 3]), torch.tensor([1])], [1, None]),
        (["12", "same"], ["123", "same"], [2, None]),
        (["12", "ab"], ["12", "ac"], [None, 1]),  # digits are text, not ids
    ],
)
def test_where_texts_part(predictions, references, differences):
    results = OutputIdentity().compute(predictions=predictions, references=references)
    assert results["first_difference"] == differences
    identical = differences.count(None)
    assert (results["compared"], results["identical"], results["identity"]) == (2, identical, identical / 2)


# ---- What they refuse ----


@pytest.mark.parametrize(
    ("module", "inputs", "problem"),
    [
        (AcceptanceLength, {"tokens": [3]}, "missing: rounds"),
        (AcceptanceLength, {"tokens": [4, 9], "rounds": [2, 0]}, "Text 1 has 9 tokens in 0 rounds"),
        (AcceptanceLength, {"tokens": [2], "rounds": [3]}, "Text 0 has 2 tokens in 3 rounds"),
        (AcceptanceLength, {"tokens": [-1], "rounds": [0]}, "`tokens` of text 0 is -1"),
        (PositionAcceptance, {**COUNTS, "accepted": [[3, 4], [1]]}, "Text 0, draft position 2.*3 reached, 4 accepted"),
        (PositionAcceptance, {**COUNTS, "drafted": [[4, 4], []]}, "Text 1, draft position 1: 0 drafted"),
        (PositionAcceptance, {**COUNTS, "num_specialists": 2}, "expected both or none"),
        (SpeculativeSpeedup, {**TIMES, "seconds": [1.0, 0.0]}, "`seconds` of text 1 is 0"),
        (SpeculativeSpeedup, {"new_tokens": [1], "seconds": [1.0]}, "missing: plain_new_tokens, plain_seconds"),
        (OutputIdentity, {"predictions": [[1]]}, "missing: references"),
    ],
)
def test_inputs_that_cannot_be_are_refused(module, inputs, problem):
    with pytest.raises(ValueError, match=problem):
        module().compute(**inputs)


def test_wrong_names_are_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match="no module 'acceptance'.*acceptance_length"):
        metric_path("acceptance")
    with pytest.raises(ValueError, match="no configuration 'rho'.*round_cost"):
        SpeculativeSpeedup("rho")


# ---- As `evaluate` has modules ----


@pytest.mark.parametrize("name", CLASSES)
def test_descriptions_and_cards_run(name):
    """The example of a module's inputs, and those of its card."""
    info = evaluate.load(metric_path(name)).info
    assert info.description.strip() and info.citation.strip().startswith("@")
    card = (Path(metric_path(name)) / "README.md").read_text()
    code = "".join(re.findall(r"```python\n(.*?)```", card, re.S))
    for text in (info.inputs_description, code):
        example = doctest.DocTestParser().get_doctest(text, {}, name, None, 0)
        assert example.examples
        assert doctest.DocTestRunner().run(example).failed == 0


BY_PATH = """
import json, sys, evaluate
for path, inputs in json.loads(sys.argv[1]):
    module = evaluate.load(path)
    assert type(module).__module__.startswith("evaluate_modules"), type(module).__module__  # a copy in the cache
    print(json.dumps(module.compute(**inputs)))
"""


def test_modules_load_by_path_without_a_network(tmp_path):
    """In a process of its own, with empty caches: the file's path, and each folder's."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    inputs = {
        "acceptance_length": {name: COUNTS[name] for name in ("tokens", "rounds")},
        "output_identity": TEXTS,
        "position_acceptance": COUNTS,
        "speculative_speedup": TIMES,
    }
    jobs = [(metric_path(name), values) for name, values in inputs.items()]
    jobs.append((str(Path(metric_path("output_identity"), "output_identity.py")), TEXTS))
    result = subprocess.run(
        [sys.executable, "-c", BY_PATH, json.dumps(jobs)],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert found == [*(CLASSES[name]().compute(**values) for name, values in inputs.items()), found[1]]


def test_batches_and_single_texts_add_up():
    by_batch, by_text = AcceptanceLength(), AcceptanceLength()
    by_batch.add_batch(tokens=[9], rounds=[4])
    by_batch.add_batch(tokens=[2, 6], rounds=[1, 2])
    for tokens, rounds in ((9, 4), (2, 1), (6, 2)):
        by_text.add(tokens=tokens, rounds=rounds)
    assert by_batch.compute() == by_text.compute() == AcceptanceLength().compute(tokens=[9, 2, 6], rounds=[4, 1, 2])


def test_combined_they_take_one_call_and_no_result_hides_another():
    combined = evaluate.combine([metric_path(name) for name in CLASSES])
    inputs = {**COUNTS, **TIMES, **TEXTS}
    options = {"positions_per_specialist": 1, "num_specialists": 2}
    results = combined.compute(**inputs, **options)
    apart = [AcceptanceLength().compute(tokens=COUNTS["tokens"], rounds=COUNTS["rounds"])]
    apart += [OutputIdentity().compute(**TEXTS), SpeculativeSpeedup().compute(**TIMES)]
    apart += [PositionAcceptance().compute(**COUNTS, **options)]
    assert results == {name: value for part in apart for name, value in part.items()}
    assert len(results) == sum(map(len, apart))  # evaluate puts the module's name before what two of them return

    combined.add_batch(**{name: values[:1] for name, values in inputs.items()})
    second = {name: values[1] for name, values in inputs.items()}
    combined.add(prediction=second.pop("predictions"), reference=second.pop("references"), **second)
    assert combined.compute(**options) == results


def test_results_are_saved_as_json(tmp_path):
    results = evaluate.combine([AcceptanceLength(), PositionAcceptance(), SpeculativeSpeedup()]).compute(
        **COUNTS, **TIMES
    )
    path = evaluate.save(tmp_path / "results.json", **results, drafter="PosS-2")
    saved = json.loads(path.read_text())
    assert {name: saved[name] for name in results} == results and saved["drafter"] == "PosS-2"


PROCESS = """
import sys
from hf_poss.evaluation.modules import PositionAcceptance
process = int(sys.argv[1])
module = PositionAcceptance(num_process=2, process_id=process, experiment_id="two", cache_dir=sys.argv[2], timeout=60)
if process == 0:
    module.add_batch(drafted=[[4, 4]], reached=[[4, 3]], accepted=[[3, 2]])
else:
    module.add(drafted=[1], reached=[1], accepted=[1])
print(module.compute())
"""


def test_two_processes_gather_their_texts(tmp_path):
    processes = [
        subprocess.Popen([sys.executable, "-c", PROCESS, str(index), str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for index in range(2)
    ]
    first, second = (process.communicate(timeout=120)[0].strip() for process in processes)
    counts = {name: COUNTS[name] for name in ("drafted", "reached", "accepted")}
    assert first == str(PositionAcceptance().compute(**counts)) and second == "None"


# ---- From what was run ----


def test_statistics_of_calls_are_inputs(shape):
    """A batch and a text alone, with chains and trees, against the sums that the statistics give."""
    target = small_target()
    poss = drafter_for(target, shape, num_draft_positions=3)
    with collect_statistics(timed=False) as stats:
        for inputs in (left_padded([make_prompt(5), make_prompt(9, seed=2)]), {"input_ids": make_prompt(7, seed=3)}):
            target.generate(**inputs, assistant_model=poss, max_new_tokens=24, do_sample=False)
    modules = [AcceptanceLength(), PositionAcceptance()]
    results = evaluate.combine(modules).compute(**statistics_inputs(stats))
    assert results["texts"] == 3 and results["tokens"] == 3 * 23
    assert (results["tau"], results["tau_macro"]) == (stats.tau, stats.tau_macro)
    assert (results["pos_acc"], results["drafted"]) == (stats.pos_acc, stats.drafted)
    assert results["accepted_by_specialist"] == stats.accepted_by_specialist
    # Whatever the drafts were: a round emits what it accepts and one token more, but for the last of a text.
    assert 0 <= results["rounds"] + sum(results["accepted"]) - results["tokens"] <= results["texts"]


def test_calls_of_different_drafters_are_not_dealt_to_specialists():
    target = small_target()
    with collect_statistics(timed=False) as stats:
        for n in (1, 2):
            poss = drafter_for(target, "chain", positions_per_specialist=n)
            target.generate(make_prompt(5), assistant_model=poss, max_new_tokens=6, do_sample=False)
    inputs = statistics_inputs(stats)
    assert "positions_per_specialist" not in inputs and len(inputs["rounds"]) == 2


def records(drafter: str, answers: dict[str, list[list[int]]], **turn) -> list:
    pytest.importorskip("accelerate", reason="records of an evaluation need accelerate")
    from hf_poss.evaluation.records import QuestionRecord, TurnRecord

    fields = {"prompt_tokens": 4, "pieces": [], "authors": [], "prompt_seconds": 0.5, "rows": 1, **turn}
    return [
        QuestionRecord(
            benchmark="qa",
            question=question,
            category="",
            drafter=drafter,
            checkpoint=0,
            temperature=0.0,
            seed=0,
            batch_size=1,
            batch=0,
            turns=[TurnRecord(token_ids=ids, tokens=len(ids) - 1, **fields) for ids in turns],
        )
        for question, turns in answers.items()
    ]


def test_records_of_an_evaluation_are_inputs():
    drafted = records(
        "PosS",
        {"b": [[7, 8, 9, 4, 5]], "a": [[1, 2, 3], [1, 9, 3]]},
        **{"seconds": 1.5, "rounds": 2, "passes": 2.0, "drafted": [2, 2], "reached": [2, 1], "accepted": [1, 1]},
    )
    plain = records(
        "plain",
        {"a": [[1, 2, 3], [1, 2, 3]], "b": [[7, 8, 9, 4, 5]], "c": [[6, 6]]},
        **{"seconds": 2.5, "rounds": 2, "passes": 2.0},
    )
    inputs = record_inputs(drafted, plain)
    modules = [OutputIdentity(), SpeculativeSpeedup("round_cost"), AcceptanceLength(), PositionAcceptance()]
    results = evaluate.combine(modules).compute(**inputs)
    assert results["first_difference"] == [None, None, 1]  # each answer beside that of its own question
    assert (results["texts"], results["tokens"], results["tau"]) == (3, 8, 8 / 6)
    assert (results["new_tokens"], results["plain_new_tokens"]) == (11, 11)
    assert results["speed_up"] == pytest.approx(2.5 / 1.5)
    assert results["rho"] == 0.5  # 1 s over 2 passes, against 2 s over 2 steps
    assert results["pos_acc"] == [0.5, 1.0]
    assert set(record_inputs(drafted)) == {"tokens", "rounds", "drafted", "reached", "accepted"}
    slower = [replace(turn, seconds=9.0) for record in plain for turn in record.turns]
    of_four = [replace(record, batch_size=4, turns=slower[: len(record.turns)]) for record in plain]
    assert record_inputs(drafted, [*plain, *of_four]) == inputs  # plain decoding of as many rows
    with pytest.raises(ValueError, match="no answer to 1 of 2 questions.*'a'"):
        record_inputs(drafted, [record for record in plain if record.question != "a"])
