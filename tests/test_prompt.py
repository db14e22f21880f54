"""What a call begins with."""

import pytest
import torch
from conftest import small_target
from transformers import DynamicCache, GenerationConfig

from hf_poss.compatibility import CACHE
from hf_poss.prompt import Prompt, columns_of


def filled(tokens: int) -> DynamicCache:
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, tokens, 4), torch.zeros(1, 2, tokens, 4), 0)
    return cache


def make_prompt(tokens: int, cached: int, mask: int | None) -> Prompt:
    kwargs = {CACHE: filled(cached) if cached else DynamicCache()}
    if mask is not None:
        kwargs["attention_mask"] = torch.ones(1, mask, dtype=torch.long)
    return Prompt.of(small_target(), torch.full((1, tokens), 3), GenerationConfig(), kwargs)


@pytest.mark.parametrize(
    ("tokens", "cached", "mask", "hidden"),
    [(7, 0, 7, 0), (7, 0, None, 0), (7, 4, 7, 0), (7, 4, None, 0), (3, 4, 7, 4), (3, 4, None, 4)],
)
def test_the_whole_sequence_or_what_is_new_of_it(tokens, cached, mask, hidden):
    prompt = make_prompt(tokens, cached, mask)
    assert (prompt.cached, prompt.hidden, prompt.mask.shape[1]) == (cached, hidden, hidden + tokens)
    assert prompt.positions.tolist() == [hidden + tokens - 1]


@pytest.mark.parametrize(("tokens", "cached", "mask"), [(4, 4, 4), (3, 4, 3), (5, 4, 6)])
def test_a_prompt_that_does_not_go_with_its_cache_is_refused(tokens, cached, mask):
    with pytest.raises(ValueError, match=f"holds {cached} tokens, `input_ids` has {tokens}.*covers {mask}"):
        make_prompt(tokens, cached, mask)


def test_a_cache_that_leaves_its_device_is_refused():
    cache = DynamicCache()
    cache.offloading = True
    with pytest.raises(ValueError, match="DynamicCache with offloading"):
        Prompt.of(small_target(), torch.full((1, 3), 3), GenerationConfig(), {CACHE: cache})


def test_padding_is_counted_by_row():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    kwargs = {"attention_mask": mask, CACHE: DynamicCache()}
    prompt = Prompt.of(small_target(), torch.full((2, 4), 3), GenerationConfig(), kwargs)
    assert (prompt.lengths, prompt.shortest, prompt.longest) == ([2, 4], 2, 4)
    assert prompt.padding.tolist() == [2, 0]
    assert prompt.is_padded
    assert prompt.positions.tolist() == [1, 3]


def test_a_part_of_a_prompt_takes_its_part_of_every_argument():
    kwargs = {"attention_mask": torch.arange(6)[None], "position_ids": torch.arange(6)[None], "use_cache": True}
    part = columns_of(kwargs, 2, 4, total=6)
    assert part.keys() == {"attention_mask", "position_ids"}
    assert part["attention_mask"].tolist() == [[0, 1, 2, 3]]  # keys before the part are seen too
    assert part["position_ids"].tolist() == [[2, 3]]
    new_only = {"position_ids": torch.arange(4, 6)[None]}  # without the four cached columns
    assert columns_of(new_only, 4, 6, total=6)["position_ids"].tolist() == [[4, 5]]
