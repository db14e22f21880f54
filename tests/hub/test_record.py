"""What a folder records of its training and its speed."""

import json

import numpy as np
import pytest
import torch

from hf_poss.hub import SpeedRecord, TrainingRecord, write_speed_record, write_training_record
from hf_poss.hub.provenance import command_line, dataset_fields, describe_hardware, package_versions
from hf_poss.hub.record import read_speed_record, read_training_record, update_training_record


def test_a_record_comes_back_as_it_was_written(tmp_path):
    record = TrainingRecord(
        base_model="me/target",
        datasets=["me/chats"],
        samples=12,
        tokens=3400,
        losses={"feature": 1.0, "token": 0.1},
        feature_layers=[1, 5, 9],
        specialist_adapter={"r": 8},
        hyperparameters={"learning_rate": 3e-5, "packing": True},
        metrics={"eval_tau": 2.5, "eval_pos_acc_1": 0.75},
        seconds=12.5,
    )
    assert write_training_record(tmp_path, record).name == "training_record.json"
    assert read_training_record(tmp_path) == record
    assert [file.name for file in tmp_path.iterdir()] == ["training_record.json"]


def test_what_is_not_known_is_not_in_the_file(tmp_path):
    path = write_training_record(tmp_path / "new" / "folder", {"samples": 3})
    assert json.loads(path.read_text()) == {"samples": 3}


def test_there_may_be_no_record(tmp_path):
    assert read_training_record(tmp_path) is None
    assert read_speed_record(tmp_path) is None


def test_numbers_of_torch_and_numpy_are_numbers(tmp_path):
    path = write_training_record(
        tmp_path,
        {"samples": np.int64(7), "seconds": torch.tensor(1.5), "metrics": {"eval_tau": np.float32(2.25)}},
    )
    assert json.loads(path.read_text()) == {"samples": 7, "seconds": 1.5, "metrics": {"eval_tau": 2.25}}


def test_what_is_not_finite_is_written_as_unknown(tmp_path):
    path = write_training_record(tmp_path, TrainingRecord(metrics={"eval_tau": float("nan"), "eval_pos_acc_1": 0.5}))
    assert json.loads(path.read_text())["metrics"] == {"eval_tau": None, "eval_pos_acc_1": 0.5}


def test_metrics_by_position_end_where_one_is_missing():
    metrics = {"eval_pos_acc_1": 0.9, "eval_pos_acc_2": 0.8, "eval_pos_acc_4": 0.7, "eval_accuracy_1": 0.6}
    record = TrainingRecord(metrics=metrics)
    assert record.by_position("pos_acc") == [0.9, 0.8]
    assert record.by_position("accuracy") == [0.6]
    assert TrainingRecord(metrics={"eval_pos_acc_1": None}).by_position("pos_acc") == []


def test_fields_that_do_not_exist_are_refused(tmp_path):
    with pytest.raises(ValueError, match="sampels.*samples"):
        write_training_record(tmp_path, {"sampels": 3})
    (tmp_path / "training_record.json").write_text('{"sampels": 3}')
    with pytest.raises(ValueError, match="training_record.json.*sampels"):
        read_training_record(tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]", '{"samples": "many"}', '{"datasets": "me/chats"}'])
def test_a_damaged_record_is_refused_by_its_name(tmp_path, content):
    (tmp_path / "training_record.json").write_text(content)
    with pytest.raises(ValueError, match="training_record.json"):
        read_training_record(tmp_path)


def test_values_of_another_type_are_refused():
    with pytest.raises(ValueError, match="`datasets` is 'me/chats' .*expected list"):
        TrainingRecord(datasets="me/chats")
    with pytest.raises(ValueError, match="`speedup` is '1.5x'.*expected float or int"):
        SpeedRecord(speedup="1.5x")


def test_updating_keeps_the_other_fields(tmp_path):
    update_training_record(tmp_path, samples=3)
    update_training_record(tmp_path, base_model="me/target")
    assert read_training_record(tmp_path) == TrainingRecord(base_model="me/target", samples=3)


def test_speed_comes_back_as_it_was_written(tmp_path):
    record = SpeedRecord(speedup=1.5, lowest=1.25, highest=2.0, runs=4, settings={"dtype": "float32"})
    assert write_speed_record(tmp_path, record).name == "speed.json"
    assert read_speed_record(tmp_path) == record


# ---- Where figures come from ----


@pytest.mark.parametrize(
    "words", [["--hub_token", "abc123"], ["--token=abc123"], ["--api-key", "abc123"], ["--x", "hf_abc123abc123"]]
)
def test_secrets_do_not_reach_a_record(tmp_path, words):
    line = command_line(["/usr/local/bin/hf-poss", "train", *words, "--output_dir", "out"])
    assert line.startswith("hf-poss train ") and line.endswith(" --output_dir out")
    assert "abc123" not in line
    path = write_training_record(tmp_path, TrainingRecord(command=" ".join(words)))
    assert "abc123" not in path.read_text()


def test_options_that_only_sound_like_secrets_stay():
    line = command_line(["hf-poss", "generate", "--max_new_tokens", "64", "--draft_total_tokens", "60"])
    assert line == "hf-poss generate --max_new_tokens 64 --draft_total_tokens 60"


def test_folders_of_a_machine_do_not_reach_a_record(tmp_path):
    (tmp_path / "chats").mkdir()
    given = ["me/chats", str(tmp_path / "chats"), "data/more.jsonl", "squad"]
    assert dataset_fields(given) == {"datasets": ["me/chats", "squad"], "files": ["chats", "more.jsonl"]}


def test_machine_and_versions_are_told():
    assert package_versions()["torch"] == torch.__version__
    assert package_versions().keys() >= {"python", "hf_poss", "transformers"}
    if not torch.accelerator.is_available():
        assert describe_hardware().startswith(f"{torch.get_num_threads()} thread")
