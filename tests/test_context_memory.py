"""Features that are kept for as long as a caller's cache lives."""

import gc
import weakref

import pytest
import torch
from conftest import SHAPES, drafter_for, left_padded, make_prompt, small_target
from transformers import DynamicCache

from hf_poss.context_memory import FeatureHistory, recall


TOKENS = torch.tensor([[0, 5, 6, 7], [8, 9, 3, 0]])
MASK = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]]).bool()


@pytest.fixture(scope="module")
def target():
    return small_target()


@pytest.fixture
def kept(target):
    """A cache of 4 and 3 columns whose features are remembered: a prompt of 2 columns, then 3 and 1 more."""
    cache, features = DynamicCache(), torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    history = FeatureHistory(features[:, :2])
    history.add(0, features[0, 2:4])
    history.add(1, features[1, 2:3])
    history.add(0, features[0, 4:])  # beyond what the cache holds in the end
    history.remember(cache, target, TOKENS, [4, 3])
    return cache, features


def test_features_come_back_in_the_order_of_the_columns(kept, target):
    cache, features = kept
    for tokens in (TOKENS, None):
        known = recall(cache, target, MASK, tokens)
        assert torch.equal(known.tokens, TOKENS)
        assert torch.equal(known.features[0], features[0, :4])
        assert torch.equal(known.features[1, :3], features[1, :3]) and not known.features[1, 3].any()


def test_a_cache_that_was_cut_is_still_known_by_its_tokens(kept, target):
    cache, features = kept
    assert torch.equal(recall(cache, target, MASK[:, :3], TOKENS[:, :3]).features, features[:, :3])
    assert recall(cache, target, MASK[:, :3], None) is None, "nobody said what was cut"


def test_padding_may_be_any_token(kept, target):
    other = TOKENS.masked_fill(~MASK, 11)
    assert recall(kept[0], target, MASK, other) is not None


@pytest.mark.parametrize("other", ["token", "rows", "longer", "cache", "target"])
def test_what_is_not_all_known_is_not_recalled(other, kept, target):
    cache, mask, tokens = kept[0], MASK, TOKENS.clone()
    if other == "token":
        tokens[1, 2] = 4
    elif other == "rows":
        mask, tokens = mask[:1], tokens[:1]
    elif other == "longer":
        mask, tokens = (torch.cat((value, value[:, :1]), dim=1) for value in (mask, tokens))
    elif other == "cache":
        cache = DynamicCache()
    else:
        target = small_target()
    assert recall(cache, target, mask, tokens) is None


def test_features_live_as_long_as_the_cache(target):
    cache, features = DynamicCache(), torch.randn(1, 2, 3)
    FeatureHistory(features).remember(cache, target, torch.tensor([[5, 6]]), [2])
    held = weakref.ref(recall(cache, target, torch.ones(1, 2).bool(), None).features._base)
    assert held() is not None
    del cache
    gc.collect()
    assert held() is None


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", [[7], [7, 3, 11]], ids=str)
def test_a_second_turn_reads_its_new_tokens_only(lengths, shape, target):
    """Where the first turn was drafted; else the target reads once more what the cache holds."""
    poss = drafter_for(target, shape)
    inputs = left_padded([make_prompt(length, seed=length) for length in lengths])
    for drafted in (True, False):
        cache = DynamicCache(config=target.config)
        kwargs = {"past_key_values": cache, "do_sample": False}
        said = target.generate(**inputs, assistant_model=poss if drafted else None, max_new_tokens=6, **kwargs)
        turn = torch.cat((said, said[:, -4:]), dim=1)
        mask = torch.cat((inputs["attention_mask"], torch.ones(len(lengths), 10, dtype=torch.long)), dim=1)
        read = []
        hook = target.register_forward_pre_hook(
            lambda module, args, kwargs, read=read: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        target.generate(turn, attention_mask=mask, assistant_model=poss, max_new_tokens=1, **kwargs)
        hook.remove()
        # The last token of the first turn is not in the cache yet.
        assert read == ([5] if drafted else [said.shape[1] - 1, 5])
