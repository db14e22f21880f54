"""The pair that ships, and what it was kept from."""

import pytest
import torch
from safetensors import safe_open

from hf_poss import collect_statistics
from hf_poss.demo import (
    HELD_OUT_MODULES,
    demo_folder,
    demo_prompts,
    held_out_sources,
    load_demo_pair,
    training_sources,
)


@pytest.fixture(scope="module")
def demo_pair():
    return load_demo_pair()


def test_no_held_out_line_block_is_trained_on():
    """Not only the files: no other file repeats 400 characters of them either."""
    training = "\n".join(training_sources().values())
    for source in held_out_sources().values():
        for start in range(0, len(source) - 400, 400):
            assert source[start : start + 400] not in training


def test_prompts_come_from_held_out_modules():
    prompts = demo_prompts(8)
    assert len(prompts) >= 4
    sources = held_out_sources()
    for title, prompt in prompts:
        name = title.split(".py")[0]
        assert name in HELD_OUT_MODULES and prompt in sources[name] and prompt.endswith("\n")
    with pytest.raises(ValueError, match="1 or more"):
        demo_prompts(0)


def test_pair_is_small_and_complete():
    files = [path for path in demo_folder().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    with safe_open(demo_folder() / "poss" / "model.safetensors", "pt") as file:
        assert {key.split(".")[0] for key in file.keys()} == {"fc", "layers"}


def test_target_is_deep_and_drafter_thin(demo_pair):
    target, poss, tokenizer = demo_pair
    assert 20 <= target.config.num_hidden_layers <= 32
    assert poss.config.hidden_size == target.config.hidden_size
    assert len(tokenizer) == target.config.vocab_size


def test_target_has_learnt_python(demo_pair):
    """Far below the loss of a uniform guess on code that it has never seen."""
    target, _, tokenizer = demo_pair
    ids = tokenizer(held_out_sources()["heapq"], return_tensors="pt").input_ids[:, :384]
    with torch.no_grad():
        loss = target(ids, labels=ids).loss.item()
    assert loss < 0.6 * torch.log(torch.tensor(float(len(tokenizer)))).item()


@pytest.mark.parametrize("top_k", [1, None], ids=["chain", "tree"])
def test_same_code_with_drafts_that_are_accepted(demo_pair, top_k):
    target, poss, tokenizer = demo_pair
    poss.generation_config.draft_top_k = top_k
    try:
        with collect_statistics() as stats:
            for _, prompt in demo_prompts(2):
                inputs = tokenizer(prompt, return_tensors="pt")
                plain = target.generate(**inputs, max_new_tokens=60, do_sample=False)
                drafted = target.generate(**inputs, max_new_tokens=60, do_sample=False, assistant_model=poss)
                assert torch.equal(plain, drafted)
    finally:
        poss.generation_config.draft_top_k = None
    assert stats.tau > 2.0
