"""Records of several processes, whole or torn."""

import pytest

from hf_poss.training.record_files import RecordFiles


def test_half_written_records_are_cut_and_never_read(tmp_path):
    files = RecordFiles(tmp_path)
    with files.of_process(0) as output:
        output.append({"index": 4})
        output.append({"index": 2})
    path = tmp_path / "process-00000.jsonl"
    whole = path.read_bytes()
    for torn in (b'{"index": 3', b'{"index": 3}', b"\0\0\0"):  # the second lacks the end of its line
        path.write_bytes(whole + torn)
        assert files.finished() == {2, 4}
        with files.of_process(0) as output:
            output.append({"index": 0})
        assert path.read_bytes() == whole + b'{"index": 0}\n'


def test_records_of_all_processes_are_joined_once_and_in_order(tmp_path):
    files = RecordFiles(tmp_path / "parts")
    for process, numbers in enumerate([[3, 0], [2, 3], [1]]):
        with files.of_process(process) as output:
            for number in numbers:
                output.append({"index": number, "text": "ü"})
    assert files.join(tmp_path / "all.jsonl", keep=lambda record: record["index"] != 2) == 3
    lines = (tmp_path / "all.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines == [f'{{"index": {number}, "text": "ü"}}' for number in (0, 1, 3)]


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "process-00000.jsonl").write_bytes(b'{"index": 0}\n{"ind\n{"index": 1}\n')
    with pytest.raises(ValueError, match=r"process-00000.jsonl.*byte 13"):
        RecordFiles(tmp_path).finished()
