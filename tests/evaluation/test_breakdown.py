"""The parts of a round, from records whose times are known."""

import warnings

import pytest
import torch

from hf_poss.evaluation import breakdown
from hf_poss.statistics import CallRecord, GenerationStatistics


def test_parts_are_by_round_without_the_prompt():
    seconds = {
        "prompt": 100.0,
        "context": 3.0,  # one of them for the prompt
        "passes": 4.0,
        "tree": 1.0,
        "verification": 10.0,
        "walk": 1.0,
        "cache": 1.0,
        "other": 1.0,
    }
    records = [CallRecord([], torch.device("cpu"), dict(seconds), [1.0, 3.0], rounds=5) for _ in range(2)]
    told = breakdown.round_parts(GenerationStatistics(records), prompt_fill=2.0)
    assert told["rounds"] == 10
    assert told["round_milliseconds"] == pytest.approx(4000.0)  # 40 seconds in 10 rounds
    assert told["parts"]["context fill"] == pytest.approx({"milliseconds": 400.0, "share": 0.1})
    assert told["parts"]["verification forward"] == pytest.approx({"milliseconds": 2000.0, "share": 0.5})
    assert told["draft_pass_milliseconds"] == pytest.approx([200.0, 600.0])
    assert told["prompt_milliseconds"] == pytest.approx(100_000.0)
    assert told["prompt_context_fill_milliseconds"] == pytest.approx(1000.0)


def test_every_part_of_a_call_has_a_name():
    """A part that the loop tells and the breakdown does not show would be lost."""
    parts = CallRecord([], torch.device("cpu")).seconds
    named = {"prompt": 0.0, **dict.fromkeys(breakdown._PARTS, 0.0)}
    assert parts.keys() == named.keys()


def test_waits_are_the_warnings_of_torch(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def run() -> None:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    assert breakdown.count_waits(run) == 3
    assert modes == ["warn", 0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_kernels_and_waits_of_a_known_run():
    values = torch.ones(10, device="cuda")

    def run() -> None:
        for _ in range(4):
            values.add_(1)
        values.sum().item()

    counts = breakdown.count_kernels(run)
    assert counts["kernels"] >= 5 and counts["launches"] >= 5
    assert breakdown.count_waits(run) == 1
