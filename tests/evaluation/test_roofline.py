"""Bytes that must move, and the speed at which they can."""

import pytest
import torch
from conftest import make_poss, make_target

from hf_poss.evaluation import roofline


# Sizes of the tiny Llama of the tests, a float32 each.
HIDDEN, MLP, VOCAB, LAYERS, QUERY, KEY_VALUE = 32, 64, 97, 2, 32, 16
ATTENTION = 2 * HIDDEN * QUERY + 2 * HIDDEN * KEY_VALUE
LAYER = ATTENTION + 3 * HIDDEN * MLP + 2 * HIDDEN  # with two norms
HEAD = VOCAB * HIDDEN


def test_a_plain_step_reads_all_weights_and_one_row_of_the_embedding(llama):
    moved = roofline.plain_step_bytes(llama, cache_bytes=1000)
    assert moved == {"target weights": 4 * (LAYERS * LAYER + HIDDEN + HEAD + HIDDEN), "target cache": 1000}


def test_an_embedding_that_is_the_head_is_read_once():
    target = make_target()
    target.lm_head.weight = target.model.embed_tokens.weight
    assert roofline.plain_step_bytes(target, 0)["target weights"] == 4 * (LAYERS * LAYER + HIDDEN + HEAD)


@pytest.mark.parametrize("draft_vocab_size", [None, 10])
def test_a_round_reads_the_drafter_once_a_pass(llama, draft_vocab_size):
    poss = make_poss(llama, positions_per_specialist=2, num_draft_positions=4, draft_vocab_size=draft_vocab_size)
    moved = roofline.round_bytes(llama, poss, depth=5, nodes=7, cache_bytes=1000, entries=30)
    specialist = ATTENTION + 3 * HIDDEN * MLP + HIDDEN  # with one norm
    assert moved == {
        "target weights": 4 * (LAYERS * LAYER + HIDDEN + HEAD + 7 * HIDDEN),
        "target cache": 1000,
        "specialists": 4 * 5 * specialist,
        "fc": 4 * 5 * (2 * HIDDEN + 1) * HIDDEN,
        "draft head": pytest.approx(4 * 5 * (draft_vocab_size or VOCAB) * HIDDEN),
        "specialist caches": 4 * 5 * 30 * 2 * KEY_VALUE,
    }


def test_bandwidth_counts_what_is_read_and_what_is_written(monkeypatch):
    now = iter(range(100))  # every copy takes a second
    monkeypatch.setattr(roofline.time, "perf_counter", lambda: next(now))
    assert roofline.copy_bandwidth(torch.device("cpu"), size=1000, repeats=3) == 2000
