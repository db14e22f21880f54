"""Positions that a target has, memory that a machine has."""

import pytest
import torch
from conftest import TARGET_CONFIGS, make_target, small_target
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hf_poss import limits
from hf_poss.limits import check_memory, check_positions, last_position, rope_obstacle


@pytest.mark.parametrize("family", list(TARGET_CONFIGS))
def test_prompts_as_long_as_the_positions_are_taken(family):
    target = small_target(family, max_position_embeddings=40)
    check_positions(target, 40)
    with pytest.raises(ValueError, match="41 tokens.* 40 positions.*Shorten"):
        check_positions(target, 41)


@pytest.mark.parametrize("family", list(TARGET_CONFIGS))
def test_learned_positions_have_a_last_one(family):
    """The target itself says so: one further fails, where positions are looked up in a table."""
    target = make_target(family)
    last = last_position(target)
    assert (last is None) == (family in ("llama", "qwen3"))
    if last is None:
        return
    with torch.no_grad():
        target(torch.tensor([[5]]), position_ids=torch.tensor([[last]]))
        if family == "gpt2":  # an OPT has two spare rows in front
            with pytest.raises(IndexError):
                target(torch.tensor([[5]]), position_ids=torch.tensor([[last + 1]]))


def roped(**rope) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=12,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=40,
        rope_parameters={"rope_theta": 10000.0, **rope},
    )
    return LlamaForCausalLM(config)


ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": 10,
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
    },
}


@pytest.mark.parametrize("span", [(3, 9), (3, 10), (3, 11), (10, 30), (11, 39), (11, 40), (3, 41), (42, 50)], ids=str)
@pytest.mark.parametrize("rope", list(ROPES.values()), ids=list(ROPES))
def test_frequencies_that_change_inside_a_text_are_an_obstacle(rope, span):
    """The truth is transformers' own angle of one position, in texts of every length."""
    target = roped(**rope)
    angles = set()
    for length in range(span[0], span[1] + 1):
        cos, _ = LlamaRotaryEmbedding(target.config)(torch.zeros(1, length, 16), torch.arange(length)[None])
        angles.add(tuple(cos[0, 2].tolist()))
    obstacle = rope_obstacle(target, *span)
    assert (obstacle is not None) == (len(angles) > 1)
    if obstacle is not None:
        assert "LlamaForCausalLM" in obstacle and ("10 tokens" in obstacle or "40 tokens" in obstacle)


def test_frequencies_that_grow_with_the_text_have_no_last_position():
    check_positions(roped(**ROPES["dynamic"]), 400)


def test_frequencies_by_layer_type_are_read():
    target = small_target("gemma3", max_position_embeddings=40)
    target.config.rope_parameters["full_attention"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert "40 tokens" in rope_obstacle(target, 3, 41)
    assert rope_obstacle(target, 3, 40) is None


# ---- Memory ----


def test_drafts_that_fit_are_taken_and_others_refused(monkeypatch):
    """Logits of all nodes alone, vocabulary times nodes times rows, are more than there is."""
    target = small_target()
    monkeypatch.setattr(limits, "device_memory", lambda device: 2e6)
    check_memory(target, depth=4, top_k=4, total_tokens=20, rows=3, length=50)
    rows = int(2e6 / (20 * 12 * 4)) + 1
    with pytest.raises(ValueError, match=rf"20 nodes.*{rows} row.*2.0e\+06.*Lower `num_assistant_tokens`.*batch"):
        check_memory(target, depth=4, top_k=4, total_tokens=20, rows=rows, length=50)
    with pytest.raises(ValueError, match="4 draft positions"):  # a mask of nodes by tokens
        check_memory(target, depth=4, top_k=4, total_tokens=20, rows=1, length=100_000)


def test_more_nodes_than_can_be_drafted_cost_nothing(monkeypatch):
    """A tree of depth 2 and two branches has at most 1 + 2 + 4 nodes, whatever the knob says."""
    monkeypatch.setattr(limits, "device_memory", lambda device: 1e6)
    check_memory(small_target(), depth=2, top_k=2, total_tokens=10**9, rows=1, length=50)
    check_memory(small_target(), depth=1, top_k=10**9, total_tokens=10**9, rows=1, length=50)  # 12 tokens to draft


def test_unknown_memory_refuses_nothing(monkeypatch):
    monkeypatch.setattr(limits, "device_memory", lambda device: None)
    check_memory(small_target(), depth=4, top_k=4, total_tokens=20, rows=10**9, length=50)


def test_a_machine_has_memory():
    assert limits.device_memory(torch.device("cpu")) > 1e8
