"""Documents into samples."""

import itertools

import pytest
import torch

from hf_poss.training.packing import best_fit_decreasing, document_starts, pieces


def test_every_document_once_and_no_sample_too_long():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 33, (300,), generator=generator).tolist()
    groups = best_fit_decreasing(lengths, 32)
    assert sorted(itertools.chain.from_iterable(groups)) == list(range(300))
    totals = [sum(lengths[index] for index in group) for group in groups]
    assert max(totals) <= 32
    # Best-fit decreasing needs at most 11/9 of the fewest possible, and one (Johnson 1973); in practice far less.
    assert len(groups) <= -(-sum(lengths) // 32) * 1.05


def test_a_document_goes_where_it_fits_tightest():
    # 9 and 8 open samples of 10; 2 fits only beside 8, 1 beside 9.
    assert best_fit_decreasing([1, 8, 2, 9], 10) == [[0, 3], [1, 2]]


@pytest.mark.parametrize("max_length", [2, 3, 5, 8])
def test_pieces_join_to_the_text(max_length):
    for length in range(1, 30):
        text = list(range(length))
        cut = [text[part] for part in pieces(length, max_length)]
        assert list(itertools.chain.from_iterable(cut)) == text
        assert all(len(part) <= max_length for part in cut)
        if length > 1 and max_length > 2:
            assert min(map(len, cut)) > 1


def test_starts_of_documents():
    assert document_starts(3).tolist() == [True, False, False]
    assert document_starts(5, torch.tensor([1, 1, 2, 3, 3])).tolist() == [True, False, True, True, False]
