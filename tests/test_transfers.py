"""What goes from the host to a device."""

import pytest
import torch
from waits import counted_waits

from hf_poss.transfers import read_together, upload


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3, 1, 2], [3, 1, 2]),
        ([[1, 2], [3, 4]], [[1, 2], [3, 4]]),
        ([(1, 2), (3, 4)], [[1, 2], [3, 4]]),
        ([True, False], [1, 0]),
        ([], []),
        (range(3), [0, 1, 2]),
    ],
    ids=str,
)
def test_integers_arrive_as_they_are(values, expected):
    sent = upload(values, torch.device("cpu"))
    assert sent.dtype == torch.long and sent.device.type == "cpu"
    assert sent.tolist() == expected


def test_they_arrive_where_they_are_sent():
    assert upload([[1, 2]], torch.device("meta")).shape == (1, 2)
    assert upload([1], torch.device("meta")).device.type == "meta"


INTEGERS = {
    "tokens": torch.tensor([[3, 262143], [0, 7]]),
    "none": torch.zeros(2, 0, dtype=torch.long),
    "counts": torch.tensor([[5], [1]]),
}


def test_tensors_are_read_in_one_go():
    with counted_waits() as waits:
        read = read_together(INTEGERS)
    assert len(waits.stretches[0]) == 1
    assert read == {"tokens": [[3, 262143], [0, 7]], "none": [[], []], "counts": [[5], [1]]}


def test_integers_beside_floats_stay_integers():
    scores = torch.tensor([[0.1, -torch.inf, -1e-30], [2.5, 3.0, -7.25]])
    with counted_waits() as waits:
        read = read_together({**INTEGERS, "scores": scores})
    assert len(waits.stretches[0]) == 1
    assert read == {**read_together(INTEGERS), "scores": scores.tolist()}
    assert all(type(value) is int for name in INTEGERS for row in read[name] for value in row)
    assert all(type(value) is float for row in read["scores"] for value in row)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a device that works by itself")
def test_nobody_waits_for_a_gpu():
    device = torch.device("cuda")
    torch.ones(1, device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sent = upload([[1, 2], [3, 4]], device)
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.tensor([[1, 2], [3, 4]]).to(device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sent.device.type == "cuda" and sent.tolist() == [[1, 2], [3, 4]]
