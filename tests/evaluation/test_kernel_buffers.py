"""Buffers of kernels, against the allocator while they run."""

import torch

from hf_poss.compatibility import operations_through
from hf_poss.evaluation.kernel_buffers import Kernel, kernel_buffers, takes_buffers
from hf_poss.evaluation.memory import peak_bytes


CPU = torch.device("cpu")


def kernels_of(run) -> list[Kernel]:
    found = []

    def note(operation, arguments, keyword_arguments):
        if takes_buffers(operation):
            found.append(Kernel.of(operation, arguments, keyword_arguments))
        return operation(*arguments, **keyword_arguments)

    with operations_through(note):
        run()
    return found


def test_a_product_takes_what_it_takes_beside_its_result():
    first, second = torch.randn(2, 8, 64), torch.randn(2, 64, 16)
    run = lambda: torch.bmm(first, second)  # noqa: E731
    [kernel] = kernels_of(run)
    run()
    assert kernel_buffers([kernel], CPU)[kernel] == peak_bytes(CPU, run) - run().nbytes


def test_a_shared_matrix_that_is_copied_counts():
    """In half precision kernels of batches may copy it; whatever they do here, the buffer is told."""
    matrix = torch.randn(64, 512, dtype=torch.bfloat16)
    rows = torch.randn(4, 3, 64, dtype=torch.bfloat16)[:, -1:]
    run = lambda: torch.bmm(rows, matrix.expand(4, 64, 512))  # noqa: E731
    [kernel] = kernels_of(run)
    run()
    assert kernel_buffers([kernel], CPU)[kernel] == peak_bytes(CPU, run) - run().nbytes


def test_large_kernels_are_cut_or_left_out(monkeypatch):
    operands = torch.randn(2, 8, 64), torch.randn(2, 64, 160)
    run = lambda: (torch.bmm(*operands), operands[0][0] @ operands[1][0])  # noqa: E731
    product, matrices = kernels_of(run)
    whole = kernel_buffers([product, matrices], CPU)
    monkeypatch.setattr("hf_poss.evaluation.kernel_buffers._MOST_PRODUCTS", 2**14)
    cut = kernel_buffers([product, matrices], CPU)
    assert set(whole) == set(cut) == {product, matrices}
    assert cut[matrices] == 0 and cut[product] >= 0


def test_sums_take_nothing_of_note():
    assert kernels_of(lambda: torch.ones(3) + torch.ones(3)) == []
    assert kernel_buffers([], CPU) == {}
