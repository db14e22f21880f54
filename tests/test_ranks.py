"""One process decides; two of them are tried in test_tensor_parallel.py."""

import pytest
import torch
from torch import distributed

from hf_poss.draft_tree import DraftTree
from hf_poss.ranks import Ranks


@pytest.fixture
def group(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield distributed.group.WORLD
    distributed.destroy_process_group()


def make_tree() -> DraftTree:
    return DraftTree(torch.tensor([[7, 3, 5]]), torch.tensor([[0, 0, 1]]), torch.tensor([[0, 1, 2]]), max_depth=2)


def test_the_first_process_keeps_its_word(group):
    ranks, tree = Ranks(group), make_tree()
    assert ranks.agree([3, 1, 2]) == [3, 1, 2]
    agreed = ranks.agree_on_tree(tree)
    for name in ("tokens", "parents", "depths"):
        assert torch.equal(getattr(agreed, name), getattr(tree, name))
    assert agreed.max_depth == 2


def test_picks_stay_what_and_where_they_are(group):
    picks = torch.tensor([[4, 2, 9], [1, 1, 3]])
    agreed = Ranks(group).agree_on_picks(picks)
    assert agreed.tolist() == [[4, 2, 9], [1, 1, 3]] and agreed.device == picks.device


def test_without_a_group_nothing_is_sent():
    ranks, values, tree = Ranks(None), [1], make_tree()
    assert ranks.agree(values) is values
    assert ranks.agree_on_tree(tree) is tree
    picks = torch.tensor([[4]])
    assert ranks.agree_on_picks(picks) is picks
