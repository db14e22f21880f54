"""The table of results: which cell says what."""

import re

import pytest
from made_up_records import MadeUp, MadeUpEvaluation

from hf_poss.evaluation.headline import headline, identity_sentence
from hf_poss.evaluation.results import compute_results
from hf_poss.evaluation.tables import comparison_of, paper_table, results_tables


GOOD = MadeUp("PosS-2", [0.9, 0.9, 0.9, 0.9], rho=1.4)
WEAK = MadeUp("EAGLE", [0.6, 0.3, 0.2, 0.1], n=4, rho=1.4)
SLOW = MadeUp("slow", [0.2, 0.1], rho=2.5)


def results_of(folder, *drafters, **kwargs) -> dict:
    return compute_results(MadeUpEvaluation(list(drafters), **kwargs).write(folder))


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    """Two temperatures; a drafter that is clearly best, and one that loses against plain decoding."""
    return results_of(tmp_path_factory.mktemp("two"), WEAK, SLOW, GOOD, temperatures=(0.0, 1.0))


def cells(markdown: str) -> dict[str, list[str]]:
    """Cells by first column of the first table."""
    block = markdown.split("\n\n")[1]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in block.splitlines()]
    return {row[0].strip(): row[1:] for row in rows}


def test_there_is_a_block_a_temperature_and_a_column_a_set(results):
    text = paper_table(results)
    assert re.findall(r"### (.*)", text) == ["Temperature 0", "Temperature 1"]
    header = cells(text)["drafter"]
    assert header == [f"{of} {measure}" for of in ("mt_bench", "gsm8k", "mean") for measure in ("tau", "speed-up")]
    assert list(cells(text))[2:] == ["plain", "EAGLE", "slow", "PosS-2"]
    widths = {len(line) for line in text.split("\n\n")[1].splitlines() if "---" not in line}
    assert len(widths) == 1  # columns line up


def test_cells_are_the_results(results):
    row = cells(paper_table(results))["EAGLE"]
    of = results["decodings"][0]
    figures = [of["benchmarks"]["mt_bench"]["EAGLE"], of["benchmarks"]["gsm8k"]["EAGLE"], of["mean"]["EAGLE"]]
    assert row == [text for each in figures for text in (f"{each['tau_macro']:.2f}", f"{each['speed_up']:.2f}x")]


def test_the_best_is_bold_and_starred_where_it_leads_significantly(results):
    rows = cells(paper_table(results))
    assert all(re.fullmatch(r"\*\*[\d.]+x?\*\*\\\*", cell) for cell in rows["PosS-2"][-2:])  # n = 10
    assert not any("*" in cell for cell in rows["EAGLE"] + rows["slow"] + rows["plain"])
    table = results_tables(results)[0]
    assert {label for label, pairs in table.rows.items() if pairs[-1][0].best} == {"PosS-2"}


def test_a_lead_by_chance_has_no_star(tmp_path):
    twin = MadeUp("twin", GOOD.rates, rho=1.4)
    results = results_of(tmp_path, GOOD, twin)
    table = results_tables(results)[0]
    assert not any(cell.leads for pairs in table.rows.values() for pair in pairs for cell in pair)
    assert sum(pairs[-1][0].best for pairs in table.rows.values()) == 1
    assert "not significantly ahead of" in headline(results)


def test_seeds_have_mean_and_deviation(tmp_path):
    results = results_of(tmp_path, MadeUp("HASS", [0.7, 0.5], checkpoints=3), WEAK)
    runs = results["decodings"][0]["benchmarks"]["gsm8k"]["HASS"]["runs"]
    text = paper_table(results)
    shown = cells(text)["HASS"][2].strip("*\\")
    assert shown == f"{runs['mean']['tau_macro']:.2f} ± {runs['deviation']['tau_macro']:.2f}"
    assert "±" not in "".join(cells(text)["EAGLE"]) and "over 3 checkpoints" in text


def test_notes_name_what_the_mean_leaves_out_and_what_is_missing(tmp_path):
    evaluation = MadeUpEvaluation([GOOD], {"qa": 3, "gsm8k": 2, "spec_bench": 2})
    evaluation.write(tmp_path)
    lines = (tmp_path / "records-00000.jsonl").read_text().splitlines()
    (tmp_path / "records-00000.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    text = paper_table(compute_results(tmp_path))
    assert "over qa, gsm8k, each with the same weight; spec_bench repeats" in text
    assert "Not complete: PosS-2 on spec_bench 1 of 2." in text


def test_a_set_with_categories_has_a_table_of_them(tmp_path):
    made = MadeUpEvaluation([WEAK, GOOD], {"gsm8k": 4, "spec_bench": 6}, categories=("rag", "qa"))
    results = compute_results(made.write(tmp_path))
    of = results["decodings"][0]["categories"]["spec_bench"]
    titles = [table.title for table in results_tables(results)]
    assert titles == [
        "Temperature 0",
        "gsm8k by category, temperature 0",
        "spec_bench by category, temperature 0",
    ]
    table = results_tables(results)[2]
    assert table.columns == ["qa", "rag"]
    assert [cell.text for pair in table.rows["EAGLE"] for cell in pair] == [
        text
        for category in ("qa", "rag")
        for text in (f"{of[category]['EAGLE']['tau_macro']:.2f}", f"{of[category]['EAGLE']['speed_up']:.2f}x")
    ]
    assert table.notes[0] == "n: qa 3, rag 3 questions."
    assert not any(cell.leads for pairs in table.rows.values() for pair in pairs for cell in pair)  # not compared
    assert "### spec_bench by category, temperature 0" in paper_table(results)


def test_one_set_needs_no_mean(tmp_path):
    results = results_of(tmp_path, GOOD, sets={"gsm8k": 3})
    assert "mean" not in cells(paper_table(results))["drafter"][-1]


def test_names_cannot_break_the_table(tmp_path):
    text = paper_table(results_of(tmp_path, MadeUp("a|b*<i>", [0.5, 0.5])))
    assert r"| a\|b\*\<i>" in text


def test_a_comparison_is_found_whichever_way_round(results):
    comparisons = results["decodings"][0]["comparisons"]
    one = comparison_of(comparisons, "EAGLE", "PosS-2", "tau")
    assert one is not None and one is comparison_of(comparisons, "PosS-2", "EAGLE", "tau")
    assert comparison_of(comparisons, "PosS-2", "nobody", "tau") is None


def test_the_headline_follows_from_the_numbers(results):
    of = results["decodings"][0]
    sentence = headline(results)
    assert sentence.startswith(
        f"PosS-2 decodes {of['mean']['PosS-2']['speed_up']:.2f}x as fast as plain decoding at temperature 0 (95% "
    )
    assert "n = 10 questions" in sentence and "significantly ahead of EAGLE" in sentence
    assert "not significant" not in sentence
    assert f"slow ({of['mean']['slow']['speed_up']:.2f}x) is slower than plain decoding" in sentence


def test_the_headline_says_when_nobody_wins(tmp_path):
    results = results_of(tmp_path, SLOW)
    assert headline(results).startswith("No drafter is faster than plain decoding at temperature 0: the best, slow, ")


def test_the_headline_says_when_drafting_may_not_pay(tmp_path):
    results = results_of(tmp_path, MadeUp("even", [0.5, 0.1], rho=1.55), sets={"gsm8k": 5})
    assert results["decodings"][0]["pooled"]["even"]["speed_up"] == pytest.approx(1, abs=0.12)
    assert "not significant" in headline(results) or headline(results).startswith("No drafter is faster")


def test_the_headline_says_when_questions_are_too_few(tmp_path):
    assert "too few questions for a test" in headline(results_of(tmp_path, GOOD, sets={"gsm8k": 1}))


def test_batch_sizes_are_set_side_by_side(tmp_path):
    results = results_of(tmp_path, GOOD, WEAK, batch_sizes=(1, 4))
    *apart, across = results_tables(results)
    assert [table.title for table in apart] == ["Temperature 0, batch size 1", "Temperature 0, batch size 4"]
    assert across.title == "By batch size, temperature 0" and across.columns == ["batch size 1", "batch size 4"]
    for index, of in enumerate(results["decodings"]):
        for label, figures in of["mean"].items():
            tau, speed = across.rows[label][index]
            assert (tau.text, speed.text) == (f"{figures['tau_macro']:.2f}", f"{figures['speed_up']:.2f}x")
    assert "By batch size" in paper_table(results) and not any("one row a call" in note for note in across.notes)
    assert any("tests of speed-up are over batches (mt_bench 2, gsm8k 1)" in of for of in apart[1].notes)
    assert not any("batches" in note for note in apart[0].notes)
    sentence = headline(results)
    best = results["decodings"][1]["mean"]["PosS-2"]["speed_up"]
    assert "at temperature 0, batch size 1 (" in sentence
    assert f"at batch size 4 PosS-2 is the fastest with {best:.2f}x" in sentence
    assert identity_sentence(results).startswith("All 40 texts")


def test_who_decodes_one_row_only_is_told(tmp_path):
    lookup = MadeUp("prompt-lookup", [0.2], kind="prompt-lookup")
    across = results_tables(results_of(tmp_path, lookup, GOOD, batch_sizes=(1, 4)))[-1]
    assert [tau.text for tau, _ in across.rows["prompt-lookup"]][1] == "–"
    assert across.notes[-1] == "transformers runs prompt-lookup with one row a call only."


def test_one_batch_size_is_not_told_in_titles(results):
    assert not any("batch size" in table.title for table in results_tables(results))
    assert "batch size" not in headline(results)


def test_a_gain_at_another_batch_size_that_is_not_significant_is_called_so(tmp_path):
    even = MadeUp("even", [0.6, 0.4], rho=1.0)
    results = results_of(tmp_path, even, sets={"gsm8k": 1}, batch_sizes=(1, 2))
    assert "at batch size 2 even is the fastest with" in headline(results)
    assert "not significantly faster than plain decoding" in headline(results)


def test_batch_sizes_at_which_drafts_do_not_pay_are_told(tmp_path):
    results = results_of(tmp_path, SLOW, batch_sizes=(1, 4))
    speed = results["decodings"][1]["mean"]["slow"]["speed_up"]
    assert f"at batch size 4 no drafter is faster than plain decoding: the best, slow, reaches {speed:.2f}x." in (
        headline(results)
    )


def test_the_headline_without_drafters(tmp_path):
    assert "no speed-up to report" in headline(results_of(tmp_path))


def test_identity_is_told(results, tmp_path):
    assert identity_sentence(results) == (
        "All 30 texts of greedy search are, token for token, those of plain decoding."
    )
    assert identity_sentence(results_of(tmp_path, GOOD, temperatures=(1.0,))) is None


def test_texts_that_differ_are_told(tmp_path):
    results = results_of(tmp_path, GOOD, WEAK)
    results["decodings"][0]["pooled"]["EAGLE"]["identical"]["texts"] -= 3
    results["evaluation"]["target"]["dtype"] = "bfloat16"
    sentence = identity_sentence(results)
    assert sentence.startswith("Of 20 texts of greedy search, these differ from plain decoding's: EAGLE 3 of 10.")
    assert "bfloat16" in sentence
