"""What a target can verify, and what it is given for a pass."""

import pytest
import torch
from conftest import small_target
from families import FAMILIES
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from hf_poss.caches import TargetCache
from hf_poss.candidate_generator import DraftSettings
from hf_poss.compatibility import CACHE
from hf_poss.draft_tree import DraftTree
from hf_poss.prompt import Prompt
from hf_poss.verifier import Verifier


TREES, CHAINS = DraftSettings(4, 4, 20), DraftSettings(4, 1, 5)


def make_verifier(target: PreTrainedModel, rows: int = 1, settings: DraftSettings = TREES, **config) -> Verifier:
    return Verifier.of(target, settings, GenerationConfig(**config), rows)


@pytest.mark.parametrize(
    ("key", "takes_trees", "in_step"),
    [("llama", True, False), ("gemma_2", True, False), ("mistral", True, False), ("bloom", False, True)],
)
def test_a_target_that_tells_places_by_columns_verifies_chains_in_step(key, takes_trees, in_step):
    (family,) = (family for family in FAMILIES if family.key == key)
    target = family.make_target("eager")
    assert make_verifier(target, rows=3).takes_trees is takes_trees
    assert make_verifier(target, rows=3).in_step is in_step
    assert make_verifier(target, rows=1).in_step is False


def test_attentions_of_a_tree_are_refused_and_those_of_a_chain_are_not():
    target = small_target(attention="eager")
    asked = {"return_dict_in_generate": True, "output_attentions": True}
    with pytest.raises(ValueError, match="draft_top_k = 1"):
        make_verifier(target, **asked)
    assert make_verifier(target, settings=CHAINS, **asked).takes_trees


def test_a_pass_puts_nodes_of_a_depth_at_one_position_behind_their_row():
    """Row 0 has 2 columns of padding and 3 tokens; row 1 has 5, and has kept one node more."""
    target = small_target()
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    input_ids = torch.full((2, 5), 3)
    cache = TargetCache(DynamicCache(), rows=2)
    prompt = Prompt.of(target, input_ids, GenerationConfig(), {"attention_mask": mask, CACHE: cache.cache})
    cache.columns.lengths = [5, 6]
    tree = DraftTree(
        tokens=torch.tensor([[7, 4, 5, 6]] * 2),
        parents=torch.tensor([[0, 0, 0, 1]] * 2),
        depths=torch.tensor([[0, 1, 1, 2]] * 2),
        max_depth=2,
    )
    inputs = make_verifier(target, rows=2).inputs(tree, cache, prompt)
    assert inputs["position_ids"].tolist() == [[3, 4, 4, 5], [6, 7, 7, 8]]
    seen = inputs["attention_mask"][:, 0] == 0
    assert seen[0, 3].tolist() == [False, False, True, True, True, False] + [True, True, False, True]
    assert seen[1, 2].tolist() == [True] * 6 + [True, False, True, False]


def test_learned_positions_run_out_and_rotary_ones_do_not():
    mask = {"attention_mask": torch.ones(1, 10, dtype=torch.long)}
    for family, left in (("gpt2", 21), ("llama", None)):
        target = small_target(family, max_position_embeddings=32)
        cache = TargetCache(DynamicCache(), rows=1)
        prompt = Prompt.of(target, torch.full((1, 10), 3), GenerationConfig(), {**mask, CACHE: cache.cache})
        cache.columns.lengths = [10]
        assert make_verifier(target).positions_left(cache, prompt) == left
