"""The drafter's keys and values, and a target's cache that keeps one path of a tree."""

import random

import pytest
import torch
from conftest import make_target
from transformers import DynamicCache, LlamaConfig, MistralConfig, StaticCache

from hf_poss.caches import SpecialistCache, holds_every_token, keep_path


def rows(count: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(1, 2, count, 4, generator=generator).to(dtype) for _ in range(2))


def concatenated(*parts: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.cat(tensors, dim=-2) for tensors in zip(*parts, strict=True))


def assert_holds(cache: SpecialistCache, expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    for states, expected_states in zip(cache.keys_values(), expected, strict=True):
        assert states.dtype == expected_states.dtype
        assert torch.equal(states, expected_states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [[1, 1, 1], [5, 250, 1, 1], [256, 1], [255, 1, 1], [300, 700, 5], [3, 2000]])
def test_context_grows_past_its_buffer(sizes, dtype):
    cache = SpecialistCache()
    parts = []
    for seed, size in enumerate(sizes):
        parts.append(rows(size, seed, dtype))
        cache.append_context(*parts[-1])
        assert_holds(cache, concatenated(*parts))
        assert (cache.context_length, cache.num_nodes) == (sum(sizes[: seed + 1]), 0)


def test_nodes_lie_behind_the_context_until_more_context_comes():
    cache = SpecialistCache()
    context, first, second, more = rows(5, 0), rows(3, 1), rows(4, 2), rows(2, 3)
    cache.append_context(*context)
    cache.append_nodes(*first)
    cache.append_nodes(*second)
    assert (cache.context_length, cache.num_nodes) == (5, 7)
    assert_holds(cache, concatenated(context, first, second))

    cache.append_context(*more)
    assert (cache.context_length, cache.num_nodes) == (7, 0)
    assert_holds(cache, concatenated(context, more))


@pytest.mark.parametrize("context_length", [253, 254, 256])
def test_nodes_that_outgrow_the_buffer_leave_the_context_whole(context_length):
    cache = SpecialistCache()
    context, first, second, more = rows(context_length, 0), rows(2, 1), rows(300, 2), rows(1, 3)
    cache.append_context(*context)
    cache.append_nodes(*first)
    cache.append_nodes(*second)
    assert_holds(cache, concatenated(context, first, second))
    cache.append_context(*more)
    assert_holds(cache, concatenated(context, more))


def test_dropped_nodes_are_overwritten():
    cache = SpecialistCache()
    context, first, second = rows(5, 0), rows(3, 1), rows(2, 2)
    cache.append_context(*context)
    cache.append_nodes(*first)
    cache.num_nodes = 0
    cache.append_nodes(*second)
    assert_holds(cache, concatenated(context, second))


def test_reading_copies_nothing():
    """A draft pass reads views; within its buffer the cache never moves."""
    cache = SpecialistCache()
    cache.append_context(*rows(10, 0))
    places = [states.data_ptr() for states in cache.keys_values()]
    for seed in range(1, 20):
        cache.append_nodes(*rows(3, seed))
        cache.append_context(*rows(2, seed))
        assert [states.data_ptr() for states in cache.keys_values()] == places


# ---- One path of a tree ----


def random_cache(length: int, layers: int = 3) -> DynamicCache:
    cache = DynamicCache()
    for layer in range(layers):
        cache.update(*rows(length, seed=layer), layer)
    return cache


def random_paths() -> list[list[int]]:
    generator = random.Random(0)
    return [sorted({0, *generator.sample(range(12), generator.randrange(0, 8))}) for _ in range(15)]


@pytest.mark.parametrize("start", [0, 1, 9])
@pytest.mark.parametrize("path", [[0], [0, 1, 2], list(range(12)), [0, 2, 6], [0, 11], *random_paths()])
def test_keep_path_keeps_the_context_and_the_path(start, path):
    cache = random_cache(start + 12)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    kept = torch.tensor([*range(start), *(start + node for node in path)])

    keep_path(cache, start, path)

    assert cache.get_seq_length() == start + len(path)
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys.index_select(-2, kept))
        assert torch.equal(layer.values, values.index_select(-2, kept))


@pytest.mark.parametrize("path", [[0], [0, 1], [0, 2, 5], [0, 2, 4, 6]])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_decoding_goes_on_as_after_a_prefill_of_the_path(family, path):
    """A tree is verified, one path kept, and the next tokens have the logits of a pass over the whole text."""
    target = make_target(family, scale=2.0)
    prompt = torch.tensor([[5, 9, 11, 30, 4]])
    #  0 -> 1, 2;  1 -> 3;  2 -> 4, 5;  4 -> 6
    tokens = [8, 20, 21, 22, 23, 24, 25]
    parents = [0, 0, 0, 1, 2, 2, 4]
    depths = [0, 1, 1, 2, 2, 2, 3]
    hidden = torch.finfo(torch.float32).min
    mask = torch.full((1, 1, 7, 12), hidden)
    mask[..., :5] = 0.0
    for node in range(7):
        ancestor = node
        while True:
            mask[0, 0, node, 5 + ancestor] = 0.0
            if ancestor == 0:
                break
            ancestor = parents[ancestor]

    with torch.no_grad():
        cache = target(prompt, use_cache=True).past_key_values
        target(
            torch.tensor([tokens]), attention_mask=mask, position_ids=torch.tensor([depths]) + 5, past_key_values=cache
        )
        keep_path(cache, 5, path)
        text = torch.cat((prompt, torch.tensor([[tokens[node] for node in path]])), dim=1)
        for token in (40, 41, 42):
            text = torch.cat((text, torch.tensor([[token]])), dim=1)
            logits = target(text[:, -1:], past_key_values=cache).logits[:, -1]
            torch.testing.assert_close(logits, target(text).logits[:, -1], rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == text.shape[1]


def test_which_caches_hold_every_token():
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    full, windowed = LlamaConfig(**sizes), MistralConfig(sliding_window=8, **sizes)
    assert holds_every_token(DynamicCache(config=full))
    assert holds_every_token(random_cache(3))
    assert not holds_every_token(DynamicCache(config=windowed))
    assert not holds_every_token(StaticCache(config=full, max_cache_len=16))
