"""Passes of a call one by one: those of the decoding loop, at lengths that are told."""

from contextlib import contextmanager

import pytest
import torch
from conftest import drafter_for, make_target

from hf_poss.candidate_generator import DraftSettings
from hf_poss.evaluation.rehearsal import PlainRehearsal, RoundRehearsal, rehearse


TREE, CHAIN = DraftSettings(4, 4, 12), DraftSettings(4, 1, 5)


def rehearsal(settings=TREE, rows=1, context=10, new_tokens=24, **kwargs) -> RoundRehearsal:
    target = make_target()
    return RoundRehearsal(target, drafter_for(target, "tree"), settings, rows, context, new_tokens, **kwargs)


@pytest.mark.parametrize("settings", [TREE, CHAIN])
@pytest.mark.parametrize("rows", [1, 3])
def test_rounds_stay_where_they_are(settings, rows):
    with rehearsal(settings, rows, accepted=2) as call:
        call.read_prompt()
        call.round()
        drafts = []
        for _ in range(2):
            assert call.cache.columns.lengths == [10 + 3] * rows  # the root and two drafted tokens
            assert call.drafter.columns.lengths == [10] * rows
            call.round()
            assert call.cache.columns.lengths == [10 + 6] * rows and call.drafter.columns.lengths == [13] * rows
            drafts.append(call.tree.tokens)
            call.rewind()
        assert drafts[0].shape == (rows, settings.total_tokens)


def test_the_target_says_at_a_node_what_it_says_on_the_nodes_own_path():
    with rehearsal() as call:
        call.read_prompt()
        call.extend()
        call.draft()
        drafted, target = call.tree, call.target
        call.verify()
        logits = call.outputs.logits
    # What the target says at every node, from its own path, without any cache.
    parents, tokens = drafted.parents[0].tolist(), drafted.tokens[0].tolist()
    for node in (0, len(tokens) - 1):
        path, place = [], node
        while place:
            path.insert(0, tokens[place])
            place = parents[place]
        text = torch.tensor([[0] * 10 + [tokens[0], *path]])
        with torch.no_grad():
            assert torch.allclose(target(text).logits[0, -1], logits[0, node], atol=1e-4)


def test_parts_come_in_the_order_of_a_round():
    seen = []

    @contextmanager
    def part(name):
        seen.append(name)
        yield

    rehearse(rehearsal(), part)
    one = ["context", "draft", "verification", "walk", "cache"]
    assert seen == ["prefill", *one * 3]
    seen.clear()
    rehearse(PlainRehearsal(make_target(), 2, 10, 8), part)
    assert seen == ["prefill", "step", "step"]


def test_the_last_round_fills_what_a_call_may_need():
    with rehearsal(context=10, new_tokens=300) as call:
        call.read_prompt()
        call.round()
        call.skip_to_end()
        call.round()
        most = max(length for length in call.cache.columns.lengths)
        assert 10 + 300 - TREE.depth - 2 < most < 10 + 300
        held = call.target_cache[0]
        # The buffer grew by the rules of the cache: no further than the longest text and a draft.
        assert 10 + 300 <= held.shape[-2] <= 10 + 300 + TREE.total_tokens


def test_plain_steps_are_the_targets_own():
    target = make_target()
    with PlainRehearsal(target, 1, 6, 12) as call, torch.no_grad():
        call.read_prompt()
        text = torch.zeros(1, 6, dtype=torch.long)
        for _ in range(3):
            logits = target(text).logits[:, -1]
            assert torch.allclose(call._next, logits, atol=1e-4)
            text = torch.cat((text, logits.argmax(-1)[:, None]), dim=1)
            call.step()
        call.skip_to_end()
        assert call.cache.get_seq_length() == 6 + 12 - 2
        call.step()


def test_drafts_get_no_deeper_than_there_is_room():
    with rehearsal(new_tokens=3) as call:
        assert call.settings.depth == 2


@pytest.mark.parametrize("sizes", [(0, 4, 8), (1, 0, 8), (1, 4, 1)])
def test_a_call_of_nothing_is_refused(sizes):
    with pytest.raises(ValueError, match="expected 1 row"):
        PlainRehearsal(make_target(), *sizes)
