"""Targets that a device would not hold otherwise: packed into few bits, or spread over devices."""

from collections.abc import Callable

import pytest
import torch
from conftest import make_poss, make_target
from transformers import AutoModelForCausalLM, PreTrainedModel, QuantoConfig

from hf_poss import PosSTrainer, PosSTrainingArguments


@pytest.fixture
def load(tmp_path) -> Callable[..., PreTrainedModel]:
    """Loads one random target in different ways."""
    make_target("llama", scale=3.0).save_pretrained(tmp_path / "target")
    return lambda **kwargs: AutoModelForCausalLM.from_pretrained(tmp_path / "target", **kwargs)


def train(target: PreTrainedModel, folder) -> dict[str, torch.Tensor]:
    poss = make_poss(target, positions_per_specialist=2, num_draft_positions=3)
    generator = torch.Generator().manual_seed(1)
    samples = [{"input_ids": torch.randint(3, 97, (length,), generator=generator).tolist()} for length in (9, 24, 17)]
    args = PosSTrainingArguments(
        folder, max_steps=3, per_device_train_batch_size=3, learning_rate=1e-2, use_cpu=True, disable_tqdm=True
    )
    PosSTrainer(poss, target, args, train_dataset=samples).train()
    return poss.state_dict()


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantised_targets(load, weights, tmp_path):
    """They teach nearly what the whole target does; the specialists are in full precision."""
    pytest.importorskip("optimum.quanto")
    target = load(quantization_config=QuantoConfig(weights=weights))
    packed = sum(type(parameter) is not torch.nn.Parameter for parameter in target.parameters())
    assert packed > 0
    start = make_poss(target, positions_per_specialist=2, num_draft_positions=3).state_dict()
    whole, found = train(load(), tmp_path), train(target, tmp_path)
    assert all(weight.dtype == torch.float32 for weight in found.values())
    moved = torch.cat([(found[name] - start[name]).flatten() for name in found])
    wanted = torch.cat([(whole[name] - start[name]).flatten() for name in found])
    assert moved.norm() > 0.1
    assert torch.cosine_similarity(moved, wanted, dim=0) > (0.95 if weights == "int8" else 0.5)


def test_targets_with_a_device_map(load, tmp_path):
    """Part of the layers on disk: accelerate brings them in for each pass."""
    spread = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    spread |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    target = load(device_map=spread, offload_folder=tmp_path / "offload")
    assert any(parameter.is_meta for parameter in target.parameters())
    whole, found = train(load(), tmp_path), train(target, tmp_path)
    for name, weight in whole.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6)
