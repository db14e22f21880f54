"""What the target has read and the specialists have not, against plain lists."""

import random

import pytest
import torch
from waits import counted_waits

from hf_poss.pending_context import PendingContext


def passed(generator: random.Random, slots: int, number: int) -> tuple[PendingContext, list[list[tuple[float, int]]]]:
    """A pass of a target: a slot's feature at a column is a number of its own, and so is the token behind it."""
    columns = generator.randrange(1, 6)
    features = 1000.0 * number + torch.arange(float(slots * columns)).view(slots, columns, 1)
    entries = [sorted(generator.sample(range(columns), generator.randrange(columns + 1))) for _ in range(slots)]
    following = [[generator.randrange(90) for _ in own] for own in entries]
    newest = [own[-1] if own else 99 for own in following]
    kept = [
        [(features[slot, entry, 0].item(), token) for entry, token in zip(own, tokens, strict=True)]
        for slot, (own, tokens) in enumerate(zip(entries, following, strict=True))
    ]
    return PendingContext(features, entries, following, newest), kept


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("seed", range(5))
def test_what_is_gathered_is_what_each_slot_accepted(seed, multiple):
    """Over passes that come together, while slots go and change places; nothing of it is read from the device."""
    generator = random.Random(seed)
    slots = 4
    pending, expected = passed(generator, slots, 1)
    for number in range(2, 12):
        if generator.random() < 0.4:
            slots = max(1, slots - 1)
            order = generator.sample(range(len(expected)), slots)
            pending.select(order)
            expected = [expected[slot] for slot in order]
        assert pending.most == max(map(len, expected))
        with counted_waits() as waits:
            features, tokens, counts = pending.gathered(multiple)
        assert waits.stretches == [[]]
        assert counts == [len(own) for own in expected]
        assert features.shape[:2] == tokens.shape and tokens.shape[1] % multiple == 0
        assert tokens.shape[1] - max(counts) < multiple
        for slot, own in enumerate(expected):
            found = list(zip(features[slot, : counts[slot], 0].tolist(), tokens[slot].tolist(), strict=False))
            assert found == own
        if generator.random() < 0.3:
            pending.clear()
            expected = [[] for _ in expected]
            assert pending.most == 0 and pending.features.shape[1] == 0
        more, kept = passed(generator, slots, number)
        newest = more.newest
        pending.add(more)
        assert pending.newest == newest
        expected = [own + new for own, new in zip(expected, kept, strict=True)]


def test_slots_that_all_go_on_cost_nothing():
    pending, _ = passed(random.Random(0), 3, 1)
    features = pending.features
    pending.select([0, 1, 2])
    assert pending.features is features


def test_a_pass_that_was_accepted_whole_is_not_copied():
    features = torch.randn(2, 3, 4)
    pending = PendingContext(features, [range(3)] * 2, [[1, 2, 3], [4, 5, 6]], [3, 6])
    gathered, tokens, counts = pending.gathered()
    assert gathered is features and tokens.tolist() == [[1, 2, 3], [4, 5, 6]] and counts == [3, 3]
