"""`hf-poss evaluate` on tiny models: records, settings, kills, processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_poss, make_target
from killing import kill_at, run_apart
from tiny_chat import word_tokenizer
from transformers import AutoConfig

from hf_poss import collect_statistics
from hf_poss.cli import evaluate, main
from hf_poss.demo import demo_prompts, load_demo_pair
from hf_poss.evaluation.records import EvaluationFolder, QuestionRecord
from hf_poss.evaluation.runner import EvaluationRun
from hf_poss.training.record_files import RecordFile


NEW_TOKENS = 6
QUESTIONS = (["w7 w8", "w9"], ["w10 w11 w12"], ["w13"], ["w14 w15", "w16"], ["w17 w18"])


def write_inputs(folder: Path) -> None:
    """target/, eagle/, poss0/, poss1/ and questions.jsonl."""
    target = make_target("llama", scale=3.0)
    target.save_pretrained(folder / "target")
    word_tokenizer().save_pretrained(folder / "target")
    for name, seed, specialist in (("eagle", 2, 4), ("poss0", 0, 2), ("poss1", 1, 2)):
        poss = make_poss(target, seed=seed, positions_per_specialist=specialist, num_draft_positions=4)
        poss.save_pretrained(folder / name)
    lines = [json.dumps({"turns": turns}) for turns in QUESTIONS]
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")


def command(folder: Path, output: Path, *more: str) -> list[str]:
    return [
        *("evaluate", "--target", f"{folder}/target", "--output", str(output), "--device", "cpu"),
        *("--poss", f"EAGLE={folder}/eagle", f"PosS-2={folder}/poss0,{folder}/poss1"),
        *("--benchmarks", f"mine={folder}/questions.jsonl", "--max_new_tokens", str(NEW_TOKENS), *more),
    ]


def records(output: Path) -> dict[tuple, QuestionRecord]:
    found = {record.key: record for record in EvaluationFolder(output).records()}
    lines = sum(path.read_bytes().count(b"\n") for path in output.glob("records-*.jsonl"))
    assert lines == len(found)  # nothing was written twice
    return found


def counts(output: Path) -> dict[tuple, list[tuple]]:
    """What does not depend on the clock."""
    names = ("prompt_tokens", "token_ids", "pieces", "authors", "rows", "rounds", "passes", "tokens", "accepted")
    return {
        key: [tuple(getattr(turn, name) for name in names) for turn in record.turns]
        for key, record in records(output).items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    write_inputs(folder)
    return folder


@pytest.fixture
def silent(monkeypatch) -> list[Path]:
    """Reports are made elsewhere; here it counts of which folders."""
    shown: list[Path] = []
    monkeypatch.setattr(evaluate, "_show", lambda folder: shown.append(folder.path))
    return shown


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    """What one process writes in one go."""
    output = folder / "whole"
    more = ("--temperature", "0", "1", "--seeds", "0", "1", "--batch_size", "2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "_show", lambda folder: None)
        assert main(command(folder, output, *more)) == 0
    return output


def test_every_drafter_and_checkpoint_answers_every_question(whole):
    expected = {
        ("mine", str(question), "", drafter, checkpoint, temperature, seed, 2)
        for question in range(1, len(QUESTIONS) + 1)
        for drafter, checkpoint in (("plain", 0), ("EAGLE", 0), ("PosS-2", 0), ("PosS-2", 1))
        for temperature, seed in ((0.0, 0), (1.0, 0), (1.0, 1))
    }
    found = records(whole)
    assert set(found) == expected
    assert {key: len(record.turns) for key, record in found.items()} == {
        key: len(QUESTIONS[int(key[1]) - 1]) for key in expected
    }


def test_greedy_texts_are_plain_generates(folder, whole):
    target, tokenizer = make_target("llama", scale=3.0), word_tokenizer()
    for (_, question, _, _, _, temperature, *_), record in records(whole).items():
        if temperature:
            continue
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": QUESTIONS[int(question) - 1][0]}],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        output = target.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        assert record.turns[0].token_ids == output[0, inputs["input_ids"].shape[1] :].tolist()


def test_what_was_evaluated_is_told(folder, whole):
    about = json.loads((whole / "evaluation.json").read_text())
    assert about["target"]["name"] == f"{folder}/target" and about["target"]["dtype"] == "float32"
    assert [(of["name"], of["kind"], len(of["checkpoints"])) for of in about["drafters"]] == [
        ("plain", "plain", 0),
        ("EAGLE", "poss", 1),
        ("PosS-2", "poss", 2),
    ]
    assert [of.get("num_specialists") for of in about["drafters"]] == [None, 1, 2]
    [mine] = about["benchmarks"]
    assert (mine["name"], mine["questions"], mine["turns"], mine["skipped"]) == ("mine", 5, 7, 0)
    assert (about["temperatures"], about["seeds"], about["batch_sizes"]) == ([0.0, 1.0], [0, 1], [2])
    assert about["chat"] is True and about["max_new_tokens"] == NEW_TOKENS and about["processes"] == 1
    assert about["command"].startswith("hf-poss") and about["versions"]["torch"] == torch.__version__


def test_the_same_command_again_runs_nothing_and_shows_it_again(folder, tmp_path, silent, monkeypatch):
    output = tmp_path / "out"
    assert main(command(folder, output, "--limit", "1")) == 0
    before = (output / "records-00000.jsonl").read_bytes()
    monkeypatch.setattr(EvaluationRun, "run", None)
    monkeypatch.setattr(EvaluationRun, "warm_up", None)
    assert main(command(folder, output, "--limit", "1")) == 0
    assert (output / "records-00000.jsonl").read_bytes() == before
    assert silent == [output, output]


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (("--temperature", "0.5"), "temperatures: [0.0] then, [0.5] now"),
        (("--max_new_tokens", "7"), "max_new_tokens: 6 then, 7 now"),
        (("--generate", "repetition_penalty=1.3"), "generate: {} then"),
        (("--system", "w50"), "system"),
        (("--limit", "2"), "benchmarks.mine.questions: 1 then, 2 now"),
        (("--depth", "2"), "drafters.EAGLE.depth: 4 then, 2 now"),
        (("--baselines", "prompt-lookup"), "drafters: plain, EAGLE, PosS-2 then, plain, prompt-lookup, EAGLE"),
    ],
)
def test_other_settings_are_refused(folder, tmp_path, silent, option, told, capsys):
    output = tmp_path / "out"
    first = ["--limit", "1", "--no-drift", "--breakdown_questions", "0"]
    assert main(command(folder, output, *first)) == 0
    before = records(output)
    assert main(command(folder, output, *first, *option)) == 1
    assert told in capsys.readouterr().err
    assert records(output) == before


def test_other_weights_under_the_same_name_are_refused_and_may_overwrite(folder, tmp_path, silent, capsys):
    """A drafter that was trained on in the same folder."""
    write_inputs(tmp_path)
    output, short = tmp_path / "out", ("--limit", "1", "--no-drift")
    assert main(command(tmp_path, output, *short)) == 0
    (output / "notes.txt").write_text("mine")
    make_poss(
        make_target("llama", scale=3.0), seed=9, positions_per_specialist=4, num_draft_positions=4
    ).save_pretrained(tmp_path / "eagle")
    assert main(command(tmp_path, output, *short)) == 1
    assert "drafters.EAGLE.weights" in capsys.readouterr().err
    before = records(output)
    assert main(command(tmp_path, output, *short, "--overwrite")) == 0
    assert records(output).keys() == before.keys() and records(output) != before
    assert (output / "notes.txt").read_text() == "mine"


def test_an_interrupted_run_leaves_whole_records_and_goes_on(folder, tmp_path, silent, capsys, monkeypatch):
    output, straight = tmp_path / "out", tmp_path / "straight"
    converse, calls = EvaluationRun._converse, iter(range(100))

    def interrupted(self, *args):
        if next(calls) == 6:
            raise KeyboardInterrupt
        return converse(self, *args)

    monkeypatch.setattr(EvaluationRun, "_converse", interrupted)
    assert main(command(folder, output)) == 130
    assert "interrupted" in capsys.readouterr().err and silent == [output]
    assert len(records(output)) == 6
    monkeypatch.setattr(EvaluationRun, "_converse", converse)
    assert main(command(folder, output)) == 0
    assert main(command(folder, straight)) == 0
    assert counts(output) == counts(straight)


def test_interrupted_before_the_first_record(folder, tmp_path, capsys, monkeypatch):
    def interrupted(self, *args):
        raise KeyboardInterrupt

    monkeypatch.setattr(EvaluationRun, "_converse", interrupted)
    assert main(command(folder, tmp_path / "out")) == 130
    assert "no complete record yet" in capsys.readouterr().out


def test_the_pair_that_ships_is_the_default(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    output = tmp_path / "demo"
    arguments = ["evaluate", "--limit", "2", "--max_new_tokens", "16", "--output", str(output)]
    assert main([*arguments, "--baselines", "prompt-lookup"]) == 0
    told = capsys.readouterr().out
    found = records(output)
    target, poss, tokenizer = load_demo_pair()
    for title, text in demo_prompts(2):
        inputs = tokenizer(text, return_tensors="pt")
        with collect_statistics() as stats:
            ids = target.generate(**inputs, assistant_model=poss, max_new_tokens=16, do_sample=False)
        [turn] = found["demo", title, "code", "poss", 0, 0.0, 0, 1].turns
        assert turn.token_ids == ids[0, inputs["input_ids"].shape[1] :].tolist()
        assert turn.rounds == stats.rounds and turn.accepted == stats.accepted
        assert turn.text == tokenizer.decode(turn.token_ids, skip_special_tokens=True)
    for name in ("results.json", "report.html", "evaluation.json"):
        assert (output / name).is_file(), name
    for name in ("prompt-lookup", "poss", "results.json", str(output)):
        assert name in told, name


def test_static_caches_write_the_same_texts(folder, tmp_path, silent):
    static, dynamic = tmp_path / "static", tmp_path / "dynamic"
    for output, more in ((static, ("--cache_implementation", "static")), (dynamic, ())):
        assert main(command(folder, output, "--limit", "2", "--no-drift", *more)) == 0
    texts = [
        {key: [turn.token_ids for turn in record.turns] for key, record in records(output).items()}
        for output in (static, dynamic)
    ]
    assert texts[0] == texts[1]


def test_several_batch_sizes_and_transformers_drafters_beside_them(folder, tmp_path, silent, monkeypatch):
    output = tmp_path / "out"
    more = ("--batch_sizes", "1", "2", "1", "--baselines", "prompt-lookup", "--limit", "3", "--no-drift")
    assert main(command(folder, output, *more)) == 0
    assert json.loads((output / "evaluation.json").read_text())["batch_sizes"] == [1, 2]
    texts: dict[tuple, dict[int, list]] = {}
    for record in records(output).values():
        place = record.drafter, record.checkpoint, record.question
        texts.setdefault(place, {})[record.batch_size] = [turn.token_ids for turn in record.turns]
    assert len(texts) == 5 * 3  # contestants, questions
    for (drafter, _, question), by_size in texts.items():
        assert set(by_size) == ({1} if drafter == "prompt-lookup" else {1, 2})
        assert all(of == texts["plain", 0, question][1] for of in by_size.values())
    monkeypatch.setattr(EvaluationRun, "run", None)
    assert main(command(folder, output, *more)) == 0  # nothing is missing


def test_any_knob_reaches_generate(folder, tmp_path, silent):
    output = tmp_path / "out"
    assert main(command(folder, output, "--generate", "suppress_tokens=[20, 21]", "min_new_tokens=6")) == 0
    written = [turn.token_ids for record in records(output).values() for turn in record.turns]
    assert all(len(token_ids) == NEW_TOKENS for token_ids in written)
    assert not {20, 21}.intersection(token for token_ids in written for token in token_ids)


def test_prompts_that_do_not_fit_are_left_out_and_counted(tmp_path, silent, warnings_seen, capsys):
    """Of prompts of 5, 6 and 4 tokens one leaves room for six more in ten positions."""
    write_inputs(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path / "target")
    config.max_position_embeddings = NEW_TOKENS + 4
    config.save_pretrained(tmp_path / "target")
    output = tmp_path / "out"
    assert main(command(tmp_path, output, "--limit", "3")) == 0
    [mine] = json.loads((output / "evaluation.json").read_text())["benchmarks"]
    assert (mine["questions"], mine["skipped"]) == (1, 2)
    assert {key[1] for key in records(output)} == {"3"}
    assert len([warning for warning in warnings_seen() if "2 questions are left out" in warning]) == 1
    assert main(command(tmp_path, tmp_path / "none", "--max_new_tokens", "9")) == 1
    assert "No question is left of mine" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (("--benchmarks", "mt_bensh"), "no prompt set 'mt_bensh'"),
        (("--poss", "PosS-2=/no/poss"), "would be called 'PosS-2'"),
        (("--poss", "A=/no/poss"), "There is no folder /no/poss"),
        (("--generate", "top_q=1"), "knows no `top_q`"),
        (("--baselines", "assistant"), "pass `--assistant`"),
        (("--baselines", "prompt-lookup", "--batch_size", "2"), "--batch_sizes 1 only"),
        (("--baselines", "prompt-lookup", "--cache_implementation", "static"), "dynamic caches only"),
        (("--temperature", "-1"), "`--temperature -1.0`"),
        (("--batch_size", "0"), "`--batch_sizes 0`; expected 1"),
        (("--batch_sizes", "2", "-1"), "`--batch_sizes -1`; expected 1"),
        (("--max_new_tokens", "1"), "`--max_new_tokens 1`; expected 2"),
        (("--limit", "0"), "`--limit 0`; expected 1"),
        (("--depth", "0"), "`--depth 0`; expected 1"),
        (("--demo",), "`--target` and `--demo` were given"),
        (("--dtype", "float33"), "`--dtype float33` is unknown"),
        (("--device", "tpu7"), "`--device tpu7`"),
    ],
)
def test_wrong_use_is_told_before_models_are_loaded(folder, tmp_path, option, told, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "load_target", None)
    assert main(command(folder, tmp_path / "out", *option)) == 1
    assert told in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_target_needs_who_drafts(folder, capsys):
    assert main(["evaluate", "--target", f"{folder}/target"]) == 1
    assert "--poss NAME=PATH" in capsys.readouterr().err
    assert main(["evaluate", "--poss", f"{folder}/eagle"]) == 1
    assert "`--poss` goes with `--target`" in capsys.readouterr().err


def test_launchers_may_name_the_module(folder):
    started = [sys.executable, "-m", "hf_poss.cli", *command(folder, folder / "nothing", "--limit", "0")]
    result = subprocess.run(started, capture_output=True, text=True, timeout=200, env=environment())
    assert result.returncode == 1 and "`--limit 0`; expected 1" in result.stderr


# ---- Apart: kills and processes ----


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.fixture(scope="module")
def apart(folder) -> Path:
    """Folder of runs that were killed, and of runs of two processes."""
    subprocess.run([sys.executable, __file__, "kill", str(folder)], check=True, env=environment())
    return folder


MORE = ("--limit", "4", "--temperature", "0", "1", "--batch_size", "2", "--no-drift", "--breakdown_questions", "0")


def drive(folder: Path) -> None:
    """Evaluates in one go, and with kills in between."""
    append = RecordFile.append
    evaluate._show = lambda folder: None

    def half(self, record):
        line = json.dumps(record).encode()
        self._file.write(line[: len(line) // 2])
        self._file.flush()

    def run(name: str, append=append) -> None:
        RecordFile.append = append
        assert main(command(folder, folder / name, *MORE)) == 0

    assert run_apart(run, "straight")
    for kill in (kill_at(append, 0, half), kill_at(append, 3, half), kill_at(append, 5, append)):
        assert not run_apart(run, "killed", append=kill)
    assert run_apart(run, "killed")


def test_a_killed_run_goes_on_where_it_was(apart):
    straight = counts(apart / "straight")
    assert len(straight) == 2 * 4 * 4  # temperatures, contestants, questions
    assert counts(apart / "killed") == straight


def test_two_processes_write_what_one_does_and_another_number_goes_on(apart, tmp_path, silent):
    output = tmp_path / "two"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, "launch"]
    arguments = command(apart, output, *MORE)
    result = subprocess.run([*launch, *arguments], capture_output=True, text=True, timeout=400, env=environment())
    assert result.returncode == 0, result.stderr[-6000:]
    assert counts(output) == counts(apart / "straight")
    parts = sorted(output.glob("records-*.jsonl"))
    sizes = [len(path.read_text().splitlines()) for path in parts]
    assert sizes == [16, 16]
    assert json.loads((output / "evaluation.json").read_text())["processes"] == 2
    assert result.stdout.count("shown") == 1

    parts[1].write_bytes(parts[1].read_bytes()[:-100])  # what a killed second process leaves
    with open(parts[0], "a") as file:
        file.write('{"benchmark": "mi')
    assert main(arguments) == 0
    found = {record.key for record in EvaluationFolder(output).records()}
    assert found == set(counts(apart / "straight"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "kill":
        drive(Path(sys.argv[2]))
    else:
        evaluate._show = lambda folder: print("shown")
        sys.exit(main(sys.argv[2:]))
