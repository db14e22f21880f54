"""`hf-poss regenerate` on tiny models: what is written, by whom, and what a kill leaves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import EOS, make_poss, make_target
from killing import kill_at, run_apart
from tiny_chat import word_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_poss.cli import main
from hf_poss.training import record_files
from hf_poss.training.data import prepare_dataset
from hf_poss.training.datasets import load_texts


TURNS = (1, 3, 2, 1, 2, 1, 1, 2)
NEW_TOKENS = 6
# Several tokens end a text, so that some answers end by themselves and some do not.
ENDS = [EOS, *range(30, 42)]


def write_inputs(folder: Path) -> None:
    """target/, poss/ and chats.jsonl."""
    target = make_target("llama", scale=3.0)
    target.generation_config.eos_token_id = ENDS
    target.save_pretrained(folder / "target")
    word_tokenizer().save_pretrained(folder / "target")
    make_poss(target, num_draft_positions=3).save_pretrained(folder / "poss")
    with open(folder / "chats.jsonl", "w") as file:
        for row, turns in enumerate(TURNS):
            messages = []
            for turn in range(turns):
                messages.append(
                    {"role": "user", "content": " ".join(f"w{20 + 3 * turn + row + i}" for i in range(row + 1))}
                )
                messages.append({"role": "assistant", "content": "w90 w91"})
            file.write(json.dumps({"messages": messages}) + "\n")


def command(folder: Path, output: Path, *more: str) -> list[str]:
    return [
        *("regenerate", "--target", f"{folder}/target", "--dataset", f"{folder}/chats.jsonl", "--output", str(output)),
        *("--device", "cpu", "--batch_size", "3", "--max_new_tokens", str(NEW_TOKENS), *more),
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("regenerate")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    """What one process writes in one go."""
    assert main(command(folder, folder / "whole.jsonl")) == 0
    return folder / "whole.jsonl"


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_answer_is_the_targets_and_train_reads_them(folder, whole):
    target, tokenizer = make_target("llama", scale=3.0), word_tokenizer()
    written = records(whole)
    assert [record["index"] for record in written] == list(range(len(TURNS)))
    finished = []
    for record, row in zip(written, records(folder / "chats.jsonl"), strict=True):
        ends = []
        for place, (message, source) in enumerate(zip(record["messages"], row["messages"], strict=True)):
            assert message["role"] == source["role"]
            if message["role"] == "user":
                assert message == source
                continue
            inputs = tokenizer.apply_chat_template(
                record["messages"][:place], add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
            start = inputs["input_ids"].shape[1]
            new = target.generate(
                inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=None,
            )[0, start:].tolist()
            end = next((place for place, token in enumerate(new) if token in ENDS), None)
            assert message["content"] == tokenizer.decode(new[:end], skip_special_tokens=True)
            ends.append(end is not None)
        assert record["finished"] == all(ends)
        finished.append(all(ends))
    assert {True, False} == set(finished)
    samples = prepare_dataset(load_texts(whole), tokenizer, max_length=200)
    assert len(samples) == len(TURNS)
    first = written[0]["messages"][-1]["content"]
    counted = [token for token in samples[0]["labels"] if token != -100]
    assert tokenizer.decode(counted, skip_special_tokens=True) == first


def test_how_it_was_written_is_told(folder, whole, capsys):
    told = json.loads(whole.with_suffix(".settings.json").read_text())
    expected = {
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "max_new_tokens": NEW_TOKENS,
        "seed": 0,
        "rows": len(TURNS),
    }
    assert told.items() >= expected.items()
    assert told["target"] == f"{folder}/target" and told["versions"].keys() >= {"torch", "transformers"}
    assert main(command(folder, whole)) == 0  # nothing is left to do
    assert "hf-poss train" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (("--temperature", "0.7"), "temperature: 0.0 then, 0.7 now"),
        (("--seed", "5"), "seed"),
        (("--max_rows", "3"), "rows"),
    ],
)
def test_other_settings_are_refused(folder, whole, option, told, capsys):
    before = whole.read_bytes()
    assert main(command(folder, whole, *option)) == 1
    assert told in capsys.readouterr().err
    assert whole.read_bytes() == before


@pytest.mark.parametrize("sampling", [(), ("--temperature", "1.3", "--top_k", "40", "--seed", "2")])
def test_processes_batches_and_drafts_change_nothing(folder, tmp_path, sampling, monkeypatch, capsys):
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    assert main(command(folder, one, *sampling)) == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    more = ("--batch_size", "2", "--poss", f"{folder}/poss")
    capsys.readouterr()
    assert main(command(folder, other, *sampling, *more)) == 0
    assert f"4 of {len(TURNS)} records" in capsys.readouterr().out and not other.exists()
    monkeypatch.setenv("RANK", "0")
    assert main(command(folder, other, *sampling, *more)) == 0
    assert other.read_bytes() == one.read_bytes()


def test_shards_are_merged_on_demand(folder, whole, tmp_path, capsys):
    """Three launches; the parts of one come from a machine of its own."""
    output = tmp_path / "all.jsonl"
    for shard in ("2", "0"):
        assert main(command(folder, output, "--shard", shard, "--num_shards", "3")) == 0
    assert main(command(folder, output, "--merge")) == 1
    assert f"5 of {len(TURNS)} records" in capsys.readouterr().err
    elsewhere = tmp_path / "elsewhere.jsonl"
    assert main(command(folder, elsewhere, "--shard", "1", "--num_shards", "3")) == 0
    [part] = elsewhere.with_suffix(".parts").iterdir()
    part.rename(output.with_suffix(".parts") / part.name)
    assert main(command(folder, output, "--merge")) == 0
    assert output.read_bytes() == whole.read_bytes()


def test_unfinished_answers_can_be_left_out(folder, whole, tmp_path):
    output = tmp_path / "finished.jsonl"
    assert main(command(folder, output, "--drop_unfinished")) == 0
    assert records(output) == [record for record in records(whole) if record["finished"]]


def test_plain_text_is_continued(folder, tmp_path):
    data, output = tmp_path / "texts.txt", tmp_path / "texts.jsonl"
    data.write_text("w7 w8 w9 w10 w11\nw12\n\n")
    arguments = command(folder, output, "--dataset", str(data), "--prompt_tokens", "3")
    assert main(arguments) == 0
    assert [record["prompt"] for record in records(output)] == ["w7 w8 w9", "w12"]
    assert load_texts(output).column_names == ["index", "prompt", "completion", "finished"]


def test_nothing_to_train_on_is_an_error(folder, tmp_path, capsys):
    assert main(command(folder, tmp_path / "none.jsonl", "--max_length", str(NEW_TOKENS + 1))) == 1
    told = capsys.readouterr()
    assert f"{len(TURNS)} rows could not be answered" in told.out and "nothing to train on" in told.err


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (("--max_length", "6"), "no room"),
        (("--temperature", "-1"), "temperature"),
        (("--batch_size", "0"), "batch_size"),
        (("--shard", "1"), "num_shards"),
        (("--shard", "2", "--num_shards", "2"), "Shard 2 of 2"),
        (("--max_rows", "0"), "max_rows"),
        (("--streaming",), "max_rows"),
        (("--dataset", "none.jsonl"), "none.jsonl"),
        (("--dataset_text_field", "body"), "body"),
    ],
)
def test_wrong_use_is_told_before_the_target_is_loaded(folder, tmp_path, option, told, capsys, monkeypatch):
    monkeypatch.setattr("hf_poss.cli.regenerate.load_target", None)
    assert main(command(folder, tmp_path / "out.jsonl", *option)) == 1
    assert told in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_the_revision_is_that_of_config_tokenizer_and_target(folder, tmp_path, revisions_asked):
    assert main(command(folder, tmp_path / "answers.jsonl", "--revision", "v2")) == 0
    assert revisions_asked == dict.fromkeys((AutoConfig, AutoTokenizer, AutoModelForCausalLM), {"v2"})


def test_a_file_that_is_something_else_is_kept(folder, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    output.write_text("mine\n")
    assert main(command(folder, output)) == 1
    assert "out.jsonl" in capsys.readouterr().err and output.read_text() == "mine\n"
    assert main(command(folder, tmp_path / "out.txt")) == 1
    assert ".jsonl" in capsys.readouterr().err


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    """Killed between records, within one, and around the files that get their names at the end: the same file."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, __file__, str(tmp_path)], check=True, env=environment)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    killed = sorted(tmp_path.glob("killed-*.jsonl"))
    assert len(whole.splitlines()) == len(TURNS) and len(killed) == 6
    for path in killed:
        assert path.read_bytes() == whole, path


def drive(root: Path) -> None:
    """Regenerates in one go, and with kills in between."""
    import datasets  # noqa: F401  # once, and not in every fork
    from transformers.models.llama import modeling_llama  # noqa: F401

    replace, append = os.replace, record_files.RecordFile.append

    def regenerate(name: str, replace=replace, append=append) -> None:
        os.replace, record_files.RecordFile.append = replace, append
        assert main(command(root, root / f"{name}.jsonl")) == 0

    def half(self, record):
        line = json.dumps(record).encode()
        self._file.write(line[: len(line) // 2])
        self._file.flush()

    write_inputs(root)
    assert run_apart(regenerate, "whole")
    kills = [
        {"replace": kill_at(replace, 0)},  # the first file that gets its name is that of the settings
        {"replace": kill_at(replace, 1)},  # the second is the result
        {"append": kill_at(append, 0, half)},
        {"append": kill_at(append, 3, append)},
        {"append": kill_at(append, len(TURNS) - 1, append)},
    ]
    for number, kill in enumerate(kills):
        assert not run_apart(regenerate, f"killed-{number}", **kill)
        assert run_apart(regenerate, f"killed-{number}")
    for _ in range(2):
        assert not run_apart(regenerate, "killed-again", append=kill_at(append, 2, half))
    assert run_apart(regenerate, "killed-again")


if __name__ == "__main__":
    drive(Path(sys.argv[1]))
