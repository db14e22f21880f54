"""Records: whole lines only, each key once, and no other settings."""

import json

import pytest

from hf_poss.evaluation.records import EvaluationFolder, QuestionRecord, TurnRecord
from hf_poss.measures import DriftSums
from hf_poss.training.settings import deciding_versions


ABOUT = {
    "command": "hf-poss evaluate",
    "hardware": "machine A",
    "versions": {"python": "3.11", **deciding_versions()},
    "temperatures": [0.0, 1.0],
    "batch_size": 1,
    "processes": 1,
}


def record_of(question: str = "1", drafter: str = "plain") -> QuestionRecord:
    turn = TurnRecord(
        prompt_tokens=3,
        token_ids=[7, 8, 2],
        pieces=["a", " b", ""],
        authors=[0, 1, 0],
        seconds=0.5,
        prompt_seconds=0.1,
        rows=2,
        rounds=1,
        passes=0.5,
        tokens=2,
        drafted=[4, 2],
        reached=[1],
        accepted=[1],
        drift=DriftSums([2, 1], [1.5, 0.5], [2.0, 1.0]),
        parts={"passes": 0.2},
        pass_seconds=[0.1, 0.1],
    )
    return QuestionRecord("qa", question, "facts", drafter, 0, 0.0, 0, 2, 0, [turn])


def write(folder: EvaluationFolder, process: int, *records: QuestionRecord) -> None:
    folder.path.mkdir(exist_ok=True)
    with folder.writer(process) as output:
        for record in records:
            output.append(record.to_dict())


@pytest.fixture
def folder(tmp_path) -> EvaluationFolder:
    return EvaluationFolder(tmp_path / "evaluation")


def test_records_come_back_as_they_were(folder):
    write(folder, 0, record_of())
    assert list(folder.records()) == [record_of()]
    assert next(folder.records()).turns[0].text == "a b"


def test_a_half_written_line_is_no_record_and_the_next_one_takes_its_place(folder):
    write(folder, 0, record_of("1"), record_of("2"))
    [path] = folder.path.glob("records-*.jsonl")
    path.write_bytes(path.read_bytes()[:-30])
    assert [record.question for record in folder.records()] == ["1"]
    write(folder, 0, record_of("3"))
    assert [record.question for record in folder.records()] == ["1", "3"]


def test_the_files_of_all_processes_count_and_each_record_once(folder):
    write(folder, 0, record_of("1"))
    write(folder, 1, record_of("2"), record_of("1"), record_of("1", "poss"))
    assert [(record.question, record.drafter) for record in folder.records()] == [
        ("1", "plain"),
        ("2", "plain"),
        ("1", "poss"),
    ]


def test_a_line_that_is_damaged_is_named(folder):
    write(folder, 0, record_of("1"))
    with open(folder.path / "records-00000.jsonl", "ab") as file:
        file.write(b"{broken\n")
    with pytest.raises(ValueError, match="records-00000.jsonl is damaged"):
        list(folder.records())


def test_an_evaluation_goes_on_with_its_settings_only(folder):
    folder.begin(ABOUT)
    folder.check(ABOUT)
    folder.check({"batch_size": 1})  # what is known so far
    with pytest.raises(ValueError, match="batch_size: 1 then, 2 now"):
        folder.check({**ABOUT, "batch_size": 2})
    with pytest.raises(ValueError, match="versions"):
        folder.check({**ABOUT, "versions": {**ABOUT["versions"], "torch": "0.4"}})
    with pytest.raises(ValueError, match=r"temperatures: .*batch_size"):
        folder.begin({**ABOUT, "batch_size": 2, "temperatures": [0.0]})
    assert folder.about() == ABOUT


def test_another_machine_and_other_processes_go_on_and_are_told(folder):
    folder.begin(ABOUT)
    others = {"hardware": "machine B", "processes": 4, "command": "torchrun", "versions": {**ABOUT["versions"]}}
    others["versions"]["python"] = "3.12"
    for _ in range(2):
        folder.begin({**ABOUT, **others})
    about = folder.about()
    assert about["hardware"] == "machine A; machine B"
    assert about["command"] == "hf-poss evaluate" and about["processes"] == 4


def test_records_of_who_knows_what_are_kept(folder):
    write(folder, 0, record_of())
    with pytest.raises(ValueError, match="without an evaluation.json"):
        folder.begin(ABOUT)
    assert len(list(folder.records())) == 1


def test_clearing_removes_records_and_nothing_else(folder):
    folder.begin(ABOUT)
    write(folder, 1, record_of())
    (folder.path / "notes.txt").write_text("mine")
    folder.clear()
    assert [path.name for path in folder.path.iterdir()] == ["notes.txt"]


def test_a_folder_without_an_evaluation_is_told(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="hf-poss evaluate"):
        folder.about()
    folder.path.mkdir()
    folder.about_path.write_text("{")
    with pytest.raises(ValueError, match="evaluation.json is no JSON"):
        folder.about()


def test_every_line_is_json(folder):
    write(folder, 0, record_of("1"), record_of("2"))
    lines = (folder.path / "records-00000.jsonl").read_text().splitlines()
    assert [json.loads(line)["question"] for line in lines] == ["1", "2"]
