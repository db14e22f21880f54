"""Memory that is watched: what the allocator and the storages of tensors say of allocations that are known."""

import pytest
import torch
from conftest import make_poss, make_target

from hf_poss.evaluation.memory import (
    CallMemory,
    PartPeak,
    StorageWatch,
    WatchedCall,
    call_memory,
    memory_watch,
    peak_bytes,
    storage_bytes,
    weight_bytes,
)


CPU = torch.device("cpu")
KIB = 1024


@pytest.fixture(params=["allocator", "storages"])
def watch(request):
    return memory_watch(CPU) if request.param == "allocator" else StorageWatch()


def kibibytes(count: int) -> torch.Tensor:
    return torch.empty(count * KIB, dtype=torch.uint8)


def test_parts_are_told_by_what_they_hold_at_most(watch):
    before = kibibytes(100)
    with watch:
        with watch.part("first"):
            kept = kibibytes(8)
            passing = kibibytes(32)
            del passing
        with watch.part("second"):
            more = kibibytes(16)
            view = more[:KIB].view(-1)  # takes nothing
        del before, view
        with watch.part("third"):
            del more
    assert watch.peaks == [
        PartPeak("first", 0, 40 * KIB),
        PartPeak("second", 8 * KIB, 24 * KIB),
        PartPeak("third", 24 * KIB, 24 * KIB),
    ]
    assert kept.numel() == 8 * KIB


def test_what_another_watch_saw_is_not_given_back_twice():
    with memory_watch(CPU):
        earlier = kibibytes(64)
    with memory_watch(CPU) as watch:
        with watch.part("all"):
            del earlier
            kibibytes(8)
    assert watch.peaks[0].most == 8 * KIB


def test_buffers_inside_of_kernels_count_with_the_allocator():
    values = torch.randn(64 * KIB)
    result = values.sort().values  # as much as its result holds, and indices
    assert peak_bytes(CPU, lambda: values.sort()) >= result.nbytes + 8 * len(values)


def test_storages_come_in_whole_blocks():
    watch = StorageWatch(granularity=512)
    with watch, watch.part("all"):
        tensor = torch.empty(513, dtype=torch.uint8)
    assert watch.peaks[0].most == 1024 and tensor.nbytes == 513


def test_what_was_there_before_can_be_left_out():
    weight = torch.ones(KIB)
    watch = StorageWatch()
    watch.ignore([weight])
    with watch, watch.part("all"):
        weight.t()
        weight.view(2, -1)
    assert watch.peaks[0].most == 0


def test_an_answer_takes_the_place_of_an_operation():
    ones = torch.ones(2)
    watch = StorageWatch(answer=lambda operation, arguments: ones if "zeros" in str(operation) else None)
    with watch:
        assert torch.zeros(2) is ones or torch.equal(torch.zeros(2), ones)


def test_shared_storages_count_once():
    whole = torch.zeros(10, dtype=torch.float64)
    assert storage_bytes([whole, whole[:2], whole.view(5, 2)]) == 80
    assert storage_bytes([]) == 0


def test_weights_count_tied_heads_once_and_leave_the_targets_to_the_target():
    target = make_target()
    poss = make_poss(target, num_draft_positions=4)
    head = target.lm_head.weight.nbytes
    of_target, of_poss = weight_bytes(target, poss)
    assert of_target == sum(t.nbytes for t in (*target.parameters(), *target.buffers()))
    assert of_poss == sum(t.nbytes for t in (*poss.parameters(), *poss.buffers()))
    assert weight_bytes(target) == (of_target, 0)
    target.lm_head.weight = target.get_input_embeddings().weight
    assert weight_bytes(target)[0] == of_target - head


@pytest.mark.parametrize("seen", [0, 5])
def test_a_calls_memory_is_put_together_from_its_parts(seen):
    """Copies of 5 bytes are kept from call to call: made while the watch runs, or there before."""
    bytes_of_parts = [("set-up", 0, 3), ("prefill", 3, 50), ("draft", 20, 30), ("draft", 20, 44)]
    peaks = [PartPeak(name, seen + before, seen + most) for name, before, most in bytes_of_parts]
    held = [(8, 10, 0), (8, 12, 5), (8, 20, 7)]
    memory = call_memory(peaks, WatchedCall(held, kept=5), (1000, 100))
    assert memory == CallMemory(1000, 100, 8, 20, 7, {"prefill": 37, "draft": 14}, 1155)
    assert memory.weights == 1100 and memory.caches == 27
    assert memory.to_dict()["caches"] == 27 and memory.to_dict()["peak"] == 1155
