"""Pairs in another dtype than they were loaded in."""

import pytest
import torch
from conftest import small_target
from torch import nn

from hf_poss.evaluation.check.precision import in_dtype, obstacle_to_dtype


@pytest.mark.parametrize("before", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inside", [torch.float32, torch.bfloat16])
def test_weights_come_back_bit_by_bit(before, inside):
    target = small_target(tie_word_embeddings=True).to(before)
    weights = {name: weight.clone() for name, weight in target.state_dict().items()}
    frequencies = target.model.rotary_emb.inv_freq  # computed, not saved
    with pytest.raises(KeyError), in_dtype(target, inside):
        assert target.dtype == inside
        assert target.lm_head.weight is target.model.embed_tokens.weight
        assert target.model.rotary_emb.inv_freq is frequencies
        target(torch.tensor([[3, 4]]))
        raise KeyError
    assert target.dtype == before
    assert all(torch.equal(weight, weights[name]) for name, weight in target.state_dict().items())


def test_what_cannot_be_cast_is_told(monkeypatch):
    target = small_target()
    assert obstacle_to_dtype(target, torch.bfloat16) is None
    monkeypatch.setattr("hf_poss.evaluation.check.precision.device_memory", lambda device: 1000)
    assert "bytes, cpu has 1.0e+03" in obstacle_to_dtype(target, torch.bfloat16)
    packed = nn.Linear(4, 4)
    packed.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    assert "packed" in obstacle_to_dtype(packed, torch.float32)
    assert "offloaded" in obstacle_to_dtype(nn.Linear(4, 4, device="meta"), torch.float32)
