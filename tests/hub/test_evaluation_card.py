"""Model cards of specialists that were evaluated: which figures they show, where from, and what they do not hide."""

import json
import re
from pathlib import Path
from statistics import mean, stdev

import pytest
from conftest import make_poss, make_target
from huggingface_hub import ModelCard

from hf_poss.cli import main
from hf_poss.hub import EvaluationRecord
from hf_poss.hub.card import write_card
from hf_poss.hub.folder import publishable_files
from hf_poss.hub.record import read_evaluation_record, write_evaluation_record


pytest.importorskip("accelerate", reason="evaluations need accelerate")
pytest.importorskip("scipy", reason="comparisons need scipy")

from made_up_records import MadeUp, MadeUpEvaluation  # noqa: E402

from hf_poss.evaluation.drafters import weights_digest  # noqa: E402
from hf_poss.evaluation.records import EvaluationFolder  # noqa: E402
from hf_poss.evaluation.results import compute_results  # noqa: E402


SETS = {"mt_bench": 6, "gsm8k": 4, "spec_bench": 5}


def poss_of(seed: int):
    return make_poss(make_target(), seed=seed, num_draft_positions=4)


@pytest.fixture
def folder(tmp_path):
    """Specialists under another name than they were evaluated by."""
    poss_of(seed=0).save_pretrained(tmp_path / "renamed")
    return tmp_path / "renamed"


def evaluation(path: Path, *drafters: tuple[MadeUp, list[int]], **kwargs) -> Path:
    """Made-up records of drafters with the weights of real ones, by seed; and their results."""
    MadeUpEvaluation([drafter for drafter, _ in drafters], **{"sets": SETS, "turns": 2, **kwargs}).write(path)
    about = json.loads((path / "evaluation.json").read_text())
    by_name = {entry["name"]: entry for entry in about["drafters"]}
    for drafter, seeds in drafters:
        weights = [weights_digest(poss_of(seed)) for seed in seeds]
        by_name[drafter.name] |= {"dtype": "float32", "weights": weights} if drafter.kind == "poss" else {}
    about["benchmarks"][0]["source"] = "https://example.org/mt"
    about["benchmarks"][1]["source"] = "hub:me/gsm8k:test"
    (path / "evaluation.json").write_text(json.dumps(about))
    (path / "results.json").write_text(json.dumps(compute_results(path)))
    return path


POSS = MadeUp("PosS-2", [0.8, 0.7, 0.6, 0.5], rho=4.0)  # accepts much, and is slow
EAGLE = MadeUp("EAGLE", [0.8, 0.5, 0.4, 0.3], n=4, rho=1.5)


@pytest.fixture
def evaluated(tmp_path):
    lookup = MadeUp("prompt-lookup", [0.2], rho=1.1, kind="prompt-lookup")
    return evaluation(tmp_path / "evaluation", (lookup, []), (POSS, [0]), (EAGLE, [7]), temperatures=(0.0, 1.0))


def answers(path: Path, drafter: str, temperature: float, benchmark: str, checkpoint: int = 0) -> dict[str, list]:
    return {
        record.question: record.turns
        for record in EvaluationFolder(path).records()
        if (record.drafter, record.temperature, record.benchmark, record.checkpoint)
        == (drafter, temperature, benchmark, checkpoint)
    }


def tau(path: Path, *of) -> float:
    return mean(turn.tokens / turn.rounds for turns in answers(path, *of).values() for turn in turns)


def speed_up(path: Path, drafter: str, *of) -> float:
    rates = []
    for name in (drafter, "plain"):
        turns = [turn for turns in answers(path, name, *of).values() for turn in turns]
        rates.append(sum(len(turn.token_ids) for turn in turns) / sum(turn.seconds for turn in turns))
    return rates[0] / rates[1]


def table(text: str, first: str) -> list[list[str]]:
    """Rows of the table whose head begins with `first`."""
    lines = text[text.index(f"| {first}") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def test_a_card_tells_tau_and_speed_up_by_prompts_and_temperature(folder, evaluated, capsys):
    assert main(["card", str(folder), "--evaluation", str(evaluated)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "README.md")
    text = ModelCard.load(folder / "README.md").text
    rows = table(text, "Temperature | Prompts")
    assert [row[0] for row in rows] == ["0"] * 4 + ["1"] * 4
    for row, temperature, name in zip(rows, [0.0] * 3, SETS, strict=False):
        assert name in row[1] and int(row[2]) == SETS[name]
        assert row[3].startswith(f"{tau(evaluated, 'PosS-2', temperature, name):.2f} (")
        assert row[5].startswith(f"{speed_up(evaluated, 'PosS-2', temperature, name):.2f}x (")
        assert row[6] == f"{2 * SETS[name]} of {2 * SETS[name]}"
    over = ("mt_bench", "gsm8k")
    assert rows[3][:3] == ["0", "mean", "10"]
    assert rows[3][3].startswith(f"{mean(tau(evaluated, 'PosS-2', 0.0, name) for name in over):.2f} (")
    assert "mt_bench, gsm8k; spec_bench is left out, since it holds prompts of theirs." in text
    assert "(https://example.org/mt)" in rows[0][1] and "(https://huggingface.co/datasets/me/gsm8k)" in rows[1][1]
    assert "1 thread on a made-up processor" in text and "torch 2.13.0" in text
    assert "hf-poss evaluate --target target" in text and "Not measured." not in text
    assert "| pos-acc (evaluation, temperature 0, 10 questions) |" in text


def test_a_card_of_several_batch_sizes_is_of_the_smallest(folder, tmp_path):
    alone = evaluation(tmp_path / "alone", (POSS, [0]), batch_sizes=(2,))
    several = evaluation(tmp_path / "several", (POSS, [0]), batch_sizes=(4, 2))
    texts = []
    for path in (alone, several):
        main(["card", str(folder), "--evaluation", str(path)])
        texts.append(ModelCard.load(folder / "README.md").text)
    assert texts[0] == texts[1]
    assert "batch size 2" in texts[0] and "2 questions share a call and its time" in texts[0]


def test_a_card_tells_what_was_lost(folder, evaluated):
    """A drafter slower than plain decoding: every comparison that it took part in stands there."""
    main(["card", str(folder), "--evaluation", str(evaluated / "results.json")])
    text = ModelCard.load(folder / "README.md").text
    sentences = {
        entry["sentence"]
        for of in json.loads((evaluated / "results.json").read_text())["decodings"]
        for entry in of["comparisons"]
        if "PosS-2" in (entry["a"], entry["b"])
    }
    assert any("PosS-2's speed-up is" in sentence and "below plain's" in sentence for sentence in sentences)
    told = set(re.findall(r"^- (.* n = \d+ questions\).)$", text, re.MULTILINE))
    assert told == sentences
    assert {row[1] for row in table(text, "Temperature | Drafter")} == {"EAGLE", "prompt-lookup"}
    assert float(table(text, "Temperature | Prompts")[0][5].split("x")[0]) < 1


def test_the_model_index_has_the_figures(folder, evaluated):
    main(["card", str(folder), "--evaluation", str(evaluated)])
    results = ModelCard.load(folder / "README.md").data.eval_results
    found = {(result.dataset_config, result.metric_type, result.metric_name): result for result in results}
    assert len(found) == len(results)
    place = "gsm8k, temperature 1"
    length = found[place, "acceptance_length", "tau, macro average"]
    assert length.metric_value == round(tau(evaluated, "PosS-2", 1.0, "gsm8k"), 4)
    assert length.metric_args == {"temperature": 1.0, "questions": 4}
    assert (length.dataset_type, length.dataset_name) == ("me/gsm8k", "gsm8k")
    speed = found[place, "speculative_speedup", "speed-up over plain decoding"]
    assert speed.metric_value == round(speed_up(evaluated, "PosS-2", 1.0, "gsm8k"), 4)
    assert found["mt_bench, temperature 0", "output_identity", "identical texts"].metric_value == 1
    assert not [key for key in found if key[1] == "output_identity" and "temperature 1" in key[0]]
    assert found["mean, temperature 0", "acceptance_length", "tau, macro average"].dataset_type == "custom"


def test_what_was_recorded_once_is_picked_up(folder, evaluated, tmp_path):
    main(["card", str(folder), "--evaluation", str(evaluated)])
    first = (folder / "README.md").read_text()
    assert "evaluation_record.json" in publishable_files(folder)
    assert str(tmp_path) not in first + (folder / "evaluation_record.json").read_text()
    (folder / "README.md").unlink()
    assert write_card(folder).read_text() == first
    record = read_evaluation_record(folder)
    write_evaluation_record(folder, record)
    assert read_evaluation_record(folder) == record


def test_a_push_records_it_too(folder, evaluated, capsys):
    assert main(["push", str(folder), "me/x", "--evaluation", str(evaluated), "--dry_run"]) == 0
    assert "evaluation_record.json" in capsys.readouterr().out
    assert "## Evaluation" in (folder / "README.md").read_text()


def test_one_of_several_checkpoints_tells_its_own_figures(folder, tmp_path):
    poss = MadeUp("PosS-2", POSS.rates, checkpoints=3)
    path = evaluation(tmp_path / "seeds", (poss, [5, 0, 6]), sets={"gsm8k": 6, "qa": 5})
    main(["card", str(folder), "--evaluation", str(path)])
    text = ModelCard.load(folder / "README.md").text
    rows = table(text, "Temperature | Prompts")
    assert [row[3] for row in rows[:2]] == [f"{tau(path, 'PosS-2', 0.0, name, 1):.2f}" for name in ("gsm8k", "qa")]
    assert "one of 3 checkpoints of PosS-2" in text
    taus = [mean(tau(path, "PosS-2", 0.0, name, index) for name in ("gsm8k", "qa")) for index in range(3)]
    assert f"tau {mean(taus):.2f} ± {stdev(taus):.2f}" in text
    assert rows[2][3] == f"{taus[1]:.2f}"
    assert "pos-acc (evaluation" not in text  # which was counted over all of them


def test_what_is_missing_is_told(folder, tmp_path):
    path = evaluation(tmp_path / "part", (POSS, [0]))
    lines = (path / "records-00000.jsonl").read_text().splitlines()
    kept = [
        line
        for line in lines
        if not (json.loads(line)["drafter"] == "PosS-2" and json.loads(line)["benchmark"] == "gsm8k")
    ]
    kept += [line for line in lines if line not in kept][:1]
    (path / "records-00000.jsonl").write_text("\n".join(kept) + "\n")
    (path / "results.json").write_text(json.dumps(compute_results(path)))
    main(["card", str(folder), "--evaluation", str(path)])
    assert "- Not complete: gsm8k at temperature 0: 1 of 4 questions." in (folder / "README.md").read_text()


def test_other_weights_are_refused(folder, evaluated, tmp_path, capsys):
    poss_of(seed=1).save_pretrained(tmp_path / "other")
    assert main(["card", str(tmp_path / "other"), "--evaluation", str(evaluated)]) == 1
    assert "is of other specialists" in (told := capsys.readouterr().err) and "['PosS-2', 'EAGLE']" in told
    assert not (tmp_path / "other" / "README.md").exists()
    assert main(["card", str(folder), "--evaluation", str(evaluated), "--drafter", "EAGLE"]) == 1
    assert "took part as PosS-2" in capsys.readouterr().err
    assert main(["card", str(folder), "--evaluation", str(evaluated), "--drafter", "HASS"]) == 1
    assert "'HASS'" in capsys.readouterr().err


def test_weights_under_two_labels_need_one(folder, tmp_path, capsys):
    path = evaluation(tmp_path / "twice", (EAGLE, [0]), (POSS, [0]))
    assert main(["card", str(folder), "--evaluation", str(path)]) == 1
    assert "--drafter" in capsys.readouterr().err
    assert main(["card", str(folder), "--evaluation", str(path), "--drafter", "EAGLE"]) == 0
    assert read_evaluation_record(folder).drafter == "EAGLE"


@pytest.mark.parametrize(("content", "problem"), [(None, "hf-poss report"), ("{", "no JSON"), ("{}", "no results")])
def test_what_is_no_evaluation_is_refused(folder, tmp_path, capsys, content, problem):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    before = sorted(folder.iterdir())
    assert main(["card", str(folder), "--evaluation", str(path)]) == 1
    assert problem in capsys.readouterr().err and sorted(folder.iterdir()) == before


def test_a_label_without_an_evaluation_is_refused(folder, capsys):
    assert main(["card", str(folder), "--drafter", "PosS-2"]) == 1
    assert "--evaluation" in capsys.readouterr().err


def test_rows_that_say_not_what_they_are_of_are_refused(folder):
    with pytest.raises(ValueError, match="`results` holds .*expected rows with benchmark, questions, temperature"):
        EvaluationRecord(results=[{"tau": 3.0}])
    (folder / "evaluation_record.json").write_text('{"results": [{"tau": 3.0}]}')
    with pytest.raises(ValueError, match="evaluation_record.json"):
        write_card(folder)


def test_text_of_an_evaluation_does_not_break_the_tables(folder):
    rows = [{"temperature": 0.0, "benchmark": "a|b", "questions": 3, "tau_macro": 2.0}]
    record = EvaluationRecord(drafter="x|y\nz", results=rows, compared=[{"temperature": 0.0, "drafter": "p|q"}])
    write_evaluation_record(folder, record)
    text = write_card(folder).read_text()
    assert table(text, "Temperature | Prompts") == [["0", r"a\|b", "3", "2.00", "–", "–", ""]]
    assert table(text, "Temperature | Drafter") == [["0", r"p\|q", "–", "–"]]


def test_a_card_without_an_evaluation_does_not_speak_of_one(folder):
    assert "valuation" not in write_card(folder).read_text().split("## Limits")[0].split("## Acceptance")[1]
