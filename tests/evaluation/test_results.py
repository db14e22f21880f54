"""Results against what the made-up records say, counted here anew."""

import json
import statistics

import pytest
from made_up_records import PROMPT, STEP, MadeUp, MadeUpEvaluation

from hf_poss.evaluation.results import compute_results
from hf_poss.evaluation.significance import compare
from hf_poss.evaluation.tables import comparison_of
from hf_poss.measures import DriftSums, mean_acceptance_length


EAGLE = MadeUp("EAGLE", [0.7, 0.5, 0.3, 0.2], n=4)
POSS = MadeUp("PosS-2", [0.8, 0.7, 0.6, 0.6], n=2)
LOOKUP = MadeUp("prompt-lookup", [0.2, 0.1], rho=1.2, kind="prompt-lookup")


@pytest.fixture(scope="module")
def evaluation() -> MadeUpEvaluation:
    return MadeUpEvaluation([LOOKUP, EAGLE, POSS], turns=2)


@pytest.fixture(scope="module")
def results(evaluation, tmp_path_factory) -> dict:
    return compute_results(evaluation.write(tmp_path_factory.mktemp("evaluation") / "run"))


@pytest.fixture(scope="module")
def at_zero(results) -> dict:
    return results["decodings"][0]


def turns(evaluation, drafter, benchmark=None) -> list:
    return [
        turn
        for record in evaluation.records()
        if record.drafter == drafter and benchmark in (None, record.benchmark)
        for turn in record.turns
    ]


def test_counts_are_those_of_the_records(evaluation, at_zero):
    of, own = at_zero["benchmarks"]["gsm8k"]["PosS-2"], turns(evaluation, "PosS-2", "gsm8k")
    assert (of["questions"], of["texts"]) == (4, 8)
    for name in ("tokens", "rounds", "passes"):
        assert of[name] == sum(getattr(turn, name) for turn in own)
    assert of["new_tokens"] == sum(len(turn.token_ids) for turn in own)
    assert of["seconds"] == pytest.approx(sum(turn.seconds for turn in own))
    for name in ("drafted", "reached", "accepted"):
        assert of[name] == [sum(getattr(turn, name)[k] for turn in own) for k in range(4)]
    assert of["written"]["target"] == sum(turn.authors.count(0) for turn in own)
    assert of["written"]["drafted"] == [sum(turn.authors.count(k) for turn in own) for k in range(1, 5)]


def test_ratios_by_hand(evaluation, at_zero):
    of = at_zero["benchmarks"]["mt_bench"]["EAGLE"]
    own, plain = turns(evaluation, "EAGLE", "mt_bench"), turns(evaluation, "plain", "mt_bench")
    assert of["tau"] == pytest.approx(sum(t.tokens for t in own) / sum(t.rounds for t in own))
    assert of["tau_macro"] == pytest.approx(statistics.mean(t.tokens / t.rounds for t in own))
    rate = sum(len(t.token_ids) for t in own) / sum(t.seconds for t in own)
    plain_rate = sum(len(t.token_ids) for t in plain) / sum(t.seconds for t in plain)
    assert of["speed_up"] == pytest.approx(rate / plain_rate)
    assert of["pos_acc"] == pytest.approx([a / r for a, r in zip(of["accepted"], of["reached"], strict=True)])
    assert of["node_acceptance"] == pytest.approx([a / d for a, d in zip(of["accepted"], of["drafted"], strict=True)])
    # Rounds were made to cost 1.5 plain steps, give or take; without the prompt, speed-up is tau / rho.
    assert of["rho"] == pytest.approx(1.5, rel=0.05)
    assert of["decoding_speed_up"] == pytest.approx(of["tau"] / of["rho"])


def test_rates_are_those_that_were_made_up(tmp_path):
    evaluation = MadeUpEvaluation([POSS], sets={"gsm8k": 150})
    of = compute_results(evaluation.write(tmp_path))["decodings"][0]["pooled"]["PosS-2"]
    for rate, reached, found, (low, high) in zip(
        POSS.rates, of["reached"], of["pos_acc"], of["intervals"]["pos_acc"], strict=True
    ):
        assert abs(found - rate) < 4 * (rate * (1 - rate) / reached) ** 0.5
        assert low < found < high


def test_plain_decoding_is_its_own_measure(at_zero):
    for of in (*(by["plain"] for by in at_zero["benchmarks"].values()), at_zero["mean"]["plain"]):
        assert of["tau"] == of["speed_up"] == of["decoding_speed_up"] == 1


def test_the_mean_gives_every_set_the_same_weight(at_zero):
    for label in ("plain", "EAGLE", "PosS-2"):
        for ratio in ("tau", "tau_macro", "speed_up", "decoding_speed_up"):
            by_set = [by_label[label][ratio] for by_label in at_zero["benchmarks"].values()]
            assert at_zero["mean"][label][ratio] == pytest.approx(statistics.mean(by_set))
    low, high = at_zero["mean"]["PosS-2"]["intervals"]["tau_macro"]
    assert low < at_zero["mean"]["PosS-2"]["tau_macro"] < high


def test_specialists_share_the_counts_of_their_positions(at_zero):
    of = at_zero["pooled"]["PosS-2"]
    assert of["specialists"]["accepted"] == [sum(of["accepted"][:2]), sum(of["accepted"][2:])]
    assert of["specialists"]["acceptance"][1] == pytest.approx(sum(of["accepted"][2:]) / sum(of["reached"][2:]))
    assert sum(of["specialists"]["written"]) == sum(of["written"]["drafted"])
    assert len(at_zero["pooled"]["EAGLE"]["specialists"]["acceptance"]) == 1
    assert at_zero["pooled"]["prompt-lookup"]["specialists"] is None


def test_drift_adds_up_over_texts(evaluation, at_zero):
    sums = sum((turn.drift for turn in turns(evaluation, "PosS-2")), DriftSums())
    of = at_zero["pooled"]["PosS-2"]["drift"]
    assert of["rows"] == sums.rows and of["mean_cosine"] == pytest.approx(sums.mean_cosine)
    assert at_zero["pooled"]["plain"]["drift"] is None


def test_a_rounds_time_is_without_the_prompt(at_zero):
    parts = at_zero["pooled"]["PosS-2"]["parts"]
    assert "prompt" not in parts["seconds"]
    assert parts["seconds"]["passes"] / parts["passes"] == pytest.approx(0.3 * 1.5 * STEP)
    assert len(parts["draft_pass_seconds"]) == 4


def test_texts_are_compared_with_those_of_plain_decoding(evaluation, tmp_path):
    records = evaluation.records()
    changed = next(record for record in records if record.drafter == "EAGLE" and record.question == "1")
    changed.turns[1].token_ids[3] += 1
    changed.turns[1].token_ids.append(0)
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation.about()))
    lines = [json.dumps(record.to_dict()) for record in records]
    (tmp_path / "records-00000.jsonl").write_text("\n".join(lines) + "\n")
    pooled = compute_results(tmp_path)["decodings"][0]["pooled"]
    assert (pooled["EAGLE"]["identical"]["texts"], pooled["EAGLE"]["identical"]["of"]) == (19, 20)
    assert pooled["EAGLE"]["identical"]["differences"] == [
        {"benchmark": "mt_bench", "question": "1", "turn": 1, "checkpoint": 0, "token": 3}
    ]
    assert pooled["PosS-2"]["identical"]["texts"] == 20


def test_texts_that_are_drawn_are_not_compared(tmp_path):
    results = compute_results(MadeUpEvaluation([POSS], temperatures=(1.0,)).write(tmp_path))
    assert results["decodings"][0]["pooled"]["PosS-2"]["identical"] is None


def test_comparisons_are_paired_over_questions(evaluation, at_zero):
    def by_question(label):
        return {
            (record.benchmark, record.question): statistics.mean(t.tokens / t.rounds for t in record.turns)
            for record in evaluation.records()
            if record.drafter == label
        }

    wanted = compare(by_question("PosS-2"), by_question("EAGLE"))
    found = next(
        each
        for each in at_zero["comparisons"]
        if (each["a"], each["b"], each["measure"]) == ("PosS-2", "EAGLE", "tau")
    )
    assert (found["n"], found["family"]) == (10, 3)
    assert found["difference"] == pytest.approx(wanted.difference)
    assert found["p_value"] == pytest.approx(wanted.p_value)
    assert found["effect_size"] == pytest.approx(wanted.effect_size)


def test_every_pair_is_compared_and_speed_with_plain_decoding_too(at_zero):
    pairs = {(each["measure"], frozenset((each["a"], each["b"]))) for each in at_zero["comparisons"]}
    assert len(pairs) == len(at_zero["comparisons"]) == 3 + 6
    assert ("speed-up", frozenset(("plain", "PosS-2"))) in pairs
    assert ("tau", frozenset(("plain", "PosS-2"))) not in pairs
    families = {each["family"] for of in at_zero["comparisons_by_benchmark"].values() for each in of}
    assert families == {2 * 3, 2 * 6}  # of one measure, over both sets


def test_speed_by_question_is_over_plain_decoding_of_that_question(evaluation, at_zero):
    records = {(r.drafter, r.benchmark, r.question): r for r in evaluation.records()}
    ratios = []
    for (drafter, *question), record in records.items():
        if drafter == "PosS-2":
            plain = records[("plain", *question)]
            seconds, plain_seconds = (sum(t.seconds for t in of.turns) for of in (record, plain))
            ratios.append(plain_seconds / seconds)  # the texts are the same
    found = comparison_of(at_zero["comparisons"], "PosS-2", "plain", "speed-up")
    assert found["mean_a"] == pytest.approx(statistics.mean(ratios)) and found["mean_b"] == pytest.approx(1)


def test_checkpoints_and_seeds_have_mean_and_deviation(tmp_path):
    drafters = [MadeUp("HASS", [0.7, 0.5], checkpoints=3), MadeUp("PosS-1", [0.8, 0.8], n=1, checkpoints=3), EAGLE]
    evaluation = MadeUpEvaluation(drafters, temperatures=(0.0, 1.0), seeds=(0, 1))
    zero, one = compute_results(evaluation.write(tmp_path))["decodings"]
    runs = zero["benchmarks"]["gsm8k"]["HASS"]["runs"]
    taus = []
    for checkpoint in range(3):
        own = [
            turn
            for r in evaluation.records()
            if (r.drafter, r.checkpoint, r.benchmark, r.temperature) == ("HASS", checkpoint, "gsm8k", 0.0)
            for turn in r.turns
        ]
        taus.append(mean_acceptance_length(sum(t.tokens for t in own), sum(t.rounds for t in own)))
    assert (runs["over"], runs["indices"]) == ("checkpoint", [0, 1, 2])
    assert runs["values"]["tau"] == pytest.approx(taus)
    assert runs["mean"]["tau"] == pytest.approx(statistics.mean(taus))
    assert runs["deviation"]["tau"] == pytest.approx(statistics.stdev(taus))
    by_set = [of["HASS"]["runs"]["values"]["tau"] for of in zero["benchmarks"].values()]
    assert zero["mean"]["HASS"]["runs"]["values"]["tau"] == pytest.approx(
        [statistics.mean(run) for run in zip(*by_set, strict=True)]
    )
    assert one["pooled"]["EAGLE"]["runs"]["over"] == "seed"  # one checkpoint, two seeds of the draws
    over_checkpoints = zero["comparisons_over_checkpoints"]
    assert [(each["a"], each["b"], each["n"], each["unit"]) for each in over_checkpoints] == [
        ("PosS-1", "HASS", 3, "training seeds")
    ] * 2


def test_of_several_runs_a_question_is_one_unit(tmp_path):
    """Three checkpoints of one method are no three times as many questions."""
    drafters = [MadeUp("HASS", [0.7, 0.5], checkpoints=3), MadeUp("PosS-1", [0.7, 0.6], n=1, checkpoints=3)]
    of = compute_results(MadeUpEvaluation(drafters).write(tmp_path))["decodings"][0]
    assert {each["n"] for each in of["comparisons"]} == {10}
    assert (of["pooled"]["HASS"]["questions"], of["pooled"]["HASS"]["texts"]) == (10, 30)


@pytest.mark.parametrize(
    ("sets", "over", "left_out"),
    [
        (("mt_bench", "spec_bench"), ["mt_bench"], ["spec_bench"]),
        (("gsm8k", "spec_bench"), ["gsm8k", "spec_bench"], []),  # Spec-Bench's gsm8k is not that of the paper
        (("spec_bench",), ["spec_bench"], []),
    ],
)
def test_no_question_counts_twice_in_a_mean(tmp_path, sets, over, left_out):
    results = compute_results(MadeUpEvaluation([POSS], dict.fromkeys(sets, 2)).write(tmp_path))
    assert (results["mean_over"], results["mean_leaves_out"]) == (over, left_out)
    assert list(results["decodings"][0]["benchmarks"]) == list(sets)
    assert results["decodings"][0]["pooled"]["PosS-2"]["questions"] == 2 * len(over)


def test_categories_share_the_counts_of_their_set(tmp_path):
    made = MadeUpEvaluation([MadeUp("PosS-2", [0.7, 0.5])], {"own": 7}, categories=("short", "long", "long"))
    (of,) = compute_results(made.write(tmp_path))["decodings"]
    by_category = of["categories"]["own"]
    assert {name: by_label["PosS-2"]["questions"] for name, by_label in by_category.items()} == {"long": 4, "short": 3}
    assert list(by_category) == ["long", "short"]  # the largest first
    whole = of["benchmarks"]["own"]
    for label in ("plain", "PosS-2"):
        for count in ("texts", "tokens", "rounds", "new_tokens"):
            assert sum(by_label[label][count] for by_label in by_category.values()) == whole[label][count]
    mine = [record for record in made.records() if record.category == "short" and record.drafter == "PosS-2"]
    taus = [turn.tokens / turn.rounds for record in mine for turn in record.turns]
    assert by_category["short"]["PosS-2"]["tau_macro"] == pytest.approx(sum(taus) / len(taus))


def test_categories_of_mt_bench_are_one(tmp_path):
    """As the papers and Spec-Bench report them; sets with one category, or none, have nothing to break down."""
    sets = {"mt_bench": 4, "spec_bench": 6}
    made = MadeUpEvaluation([MadeUp("PosS-2", [0.7])], sets, categories=("writing", "math", "rag"))
    (of,) = compute_results(made.write(tmp_path / "a"))["decodings"]
    assert {name: list(found) for name, found in of["categories"].items()} == {
        "mt_bench": ["mt_bench", "rag"],
        "spec_bench": ["mt_bench", "rag"],
    }
    made = MadeUpEvaluation([MadeUp("PosS-2", [0.7])], sets, categories=("writing", "math"))
    assert compute_results(made.write(tmp_path / "b"))["decodings"][0]["categories"] == {}
    made = MadeUpEvaluation([MadeUp("PosS-2", [0.7])], {"own": 4}, categories=("",))
    assert compute_results(made.write(tmp_path / "c"))["decodings"][0]["categories"] == {}


def test_which_process_wrote_what_changes_nothing(evaluation, results, tmp_path):
    assert compute_results(evaluation.write(tmp_path, files=3)) == results


def test_results_are_json_and_finite(results):
    assert json.loads(json.dumps(results, allow_nan=False)) == results


def cut_short(folder, evaluation, keep) -> dict:
    evaluation.write(folder)
    lines = [json.dumps(record.to_dict()) for record in evaluation.records() if keep(record)]
    (folder / "records-00000.jsonl").write_text("\n".join(lines) + "\n" + '{"benchmark": "gs')
    return compute_results(folder)


def test_an_interrupted_evaluation_has_results_that_say_so(evaluation, tmp_path):
    results = cut_short(
        tmp_path, evaluation, lambda r: r.benchmark == "mt_bench" and (r.drafter, r.question) != ("EAGLE", "5")
    )
    of = results["decodings"][0]
    assert results["missing"] == [
        {"temperature": 0.0, "batch_size": 1, "benchmark": "mt_bench", "drafter": "EAGLE", "questions": 5, "of": 6}
    ]
    found = comparison_of(of["comparisons"], "PosS-2", "EAGLE", "tau")
    assert (found["n"], found["left_out"]) == (5, 1)


def test_batch_sizes_are_results_of_their_own(tmp_path):
    """Speed-up is over plain decoding of as many rows: made up so that a round of 4 costs 1.3 times a round of 1."""
    lookup = MadeUp("prompt-lookup", [0.2], rho=1.2, kind="prompt-lookup")
    evaluation = MadeUpEvaluation([lookup, POSS], temperatures=(0.0, 1.0), batch_sizes=(4, 1))
    results = compute_results(evaluation.write(tmp_path))
    decodings = results["decodings"]
    assert [(of["temperature"], of["batch_size"]) for of in decodings] == [(0.0, 1), (0.0, 4), (1.0, 1), (1.0, 4)]
    one, four, *_ = (of["pooled"]["PosS-2"] for of in decodings)
    assert one["texts"] == four["texts"] == one["paired"]["texts"] == four["paired"]["texts"] == 10
    assert four["rho"] / one["rho"] == pytest.approx(1.3, rel=0.05)
    assert one["speed_up"] / four["speed_up"] == pytest.approx(1.3, rel=0.1)
    apart = MadeUpEvaluation([lookup, POSS], batch_sizes=(4,)).write(tmp_path / "apart")
    assert compute_results(apart)["decodings"] == [decodings[1]]
    # transformers drafts for one row only: of more nothing is missing.
    assert set(decodings[0]["pooled"]) == {"plain", "prompt-lookup", "PosS-2"}
    assert set(decodings[1]["pooled"]) == {"plain", "PosS-2"}
    assert results["missing"] == []


def test_what_is_timed_varies_by_batch(tmp_path):
    """Four questions a call share its time: of 8 questions there are 2 times, not 8."""
    evaluation = MadeUpEvaluation([EAGLE, POSS], {"gsm8k": 8}, batch_sizes=(1, 4))
    records = evaluation.records()
    for record in records:
        if record.batch_size == 4:
            record.turns[0].seconds = (1 if record.drafter == "plain" else 2) * (1 + record.batch)
            record.turns[0].token_ids = record.turns[0].token_ids[:20]
    evaluation.write(tmp_path)
    lines = [json.dumps(record.to_dict()) for record in records]
    (tmp_path / "records-00000.jsonl").write_text("\n".join(lines) + "\n")
    one, four = compute_results(tmp_path)["decodings"]
    for of, timed in ((one, 8), (four, 2)):
        found = {each["measure"]: (each["unit"], each["n"]) for each in of["comparisons"]}
        assert found == {"tau": ("questions", 8), "speed-up": ("questions" if timed == 8 else "batches", timed)}
        for figures in (of["pooled"]["PosS-2"], of["mean"]["PosS-2"], of["benchmarks"]["gsm8k"]["PosS-2"]):
            assert (figures["questions"], figures["batches"]) == (8, timed)
    # Twice as slow in each of the two batches: by batches nothing varies, whatever the number of questions.
    assert four["pooled"]["PosS-2"]["intervals"]["speed_up"] == pytest.approx([0.5, 0.5])
    low, high = four["pooled"]["PosS-2"]["intervals"]["tau"]
    assert low < four["pooled"]["PosS-2"]["tau"] < high


def test_what_a_batch_size_lacks_is_told(tmp_path):
    evaluation = MadeUpEvaluation([POSS], {"gsm8k": 3}, batch_sizes=(1, 4))
    results = cut_short(tmp_path, evaluation, lambda r: (r.batch_size, r.question, r.drafter) != (4, "2", "PosS-2"))
    assert results["missing"] == [
        {"temperature": 0.0, "batch_size": 4, "benchmark": "gsm8k", "drafter": "PosS-2", "questions": 2, "of": 3}
    ]


def test_without_plain_decoding_there_is_no_speed_up(evaluation, tmp_path):
    of = cut_short(tmp_path, evaluation, lambda r: r.drafter != "plain")["decodings"][0]
    assert of["pooled"]["PosS-2"]["speed_up"] is None and of["pooled"]["PosS-2"]["rho"] is None
    assert of["pooled"]["PosS-2"]["tau"] > 1
    assert {each["measure"] for each in of["comparisons"]} == {"tau"}


def test_speed_is_of_the_texts_that_plain_decoding_wrote_too(evaluation, tmp_path):
    of = cut_short(tmp_path, evaluation, lambda r: r.drafter != "plain" or r.question == "0")["decodings"][0]
    paired = of["pooled"]["PosS-2"]["paired"]
    assert (paired["texts"], of["pooled"]["PosS-2"]["texts"]) == (4, 20)
    assert of["pooled"]["PosS-2"]["speed_up"] == pytest.approx(
        paired["new_tokens"] / paired["seconds"] / (paired["plain_new_tokens"] / paired["plain_seconds"])
    )


def test_a_drafter_that_lacks_a_set_has_no_mean(evaluation, tmp_path):
    of = cut_short(tmp_path, evaluation, lambda r: (r.drafter, r.benchmark) != ("EAGLE", "gsm8k"))["decodings"][0]
    assert set(of["mean"]) == {"plain", "prompt-lookup", "PosS-2"}
    assert of["pooled"]["EAGLE"]["questions"] == 6


def test_texts_of_one_token_have_no_rounds(tmp_path):
    evaluation = MadeUpEvaluation([POSS], {"gsm8k": 3}, tokens=2)
    of = cut_short(tmp_path, evaluation, lambda r: True)["decodings"][0]["pooled"]["PosS-2"]
    assert (of["texts"], of["tau"]) == (3, 1.0)
    for record in (records := evaluation.records()):
        turn = record.turns[0]
        turn.token_ids, turn.tokens, turn.rounds, turn.passes, turn.seconds = [1], 0, 0, 0.0, PROMPT
        turn.pieces, turn.authors, turn.drafted, turn.reached, turn.accepted = [" a"], [0], [], [], []
    lines = [json.dumps(record.to_dict()) for record in records]
    (tmp_path / "records-00000.jsonl").write_text("\n".join(lines) + "\n")
    of = compute_results(tmp_path)["decodings"][0]
    assert of["pooled"]["PosS-2"]["tau"] is None and of["pooled"]["PosS-2"]["decoding_speed_up"] is None
    assert of["pooled"]["PosS-2"]["speed_up"] == 1.0


def test_folders_without_records_are_refused(evaluation, tmp_path):
    with pytest.raises(FileNotFoundError, match="hf-poss evaluate"):
        compute_results(tmp_path)
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation.about()))
    with pytest.raises(ValueError, match="no complete record"):
        compute_results(tmp_path)
