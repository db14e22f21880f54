"""Random weights at real sizes."""

import json

import pytest
import torch
from conftest import TARGET_CONFIGS, VOCAB_SIZE
from transformers import AutoModelForCausalLM

from hf_poss import PosSModel
from hf_poss.evaluation.shapes import SHAPES, random_poss, random_prompt, random_target, shape_config


CPU = torch.device("cpu")

# Parameters of the published models.
PUBLISHED = {
    "llama-3-8b": 8_030_261_248,
    "llama-2-13b": 13_015_864_320,
    "llama-3.2-1b": 1_235_814_400,
    "qwen3-8b": 8_190_735_360,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_those_of_the_published_models(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape_config(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("name", SHAPES)
def test_a_text_of_random_weights_has_no_end(name):
    assert shape_config(name).eos_token_id is None


def test_a_config_file_is_a_shape(tmp_path):
    TARGET_CONFIGS["qwen3"]().save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        read = shape_config(str(path))
        assert (read.model_type, read.vocab_size, read.hidden_size, read.head_dim) == ("qwen3", VOCAB_SIZE, 32, 16)
        assert read.eos_token_id is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "is no JSON"),
        (json.dumps({"hidden_size": 3}), "has no `model_type`"),
        ("[]", "has no `model_type`"),
        (json.dumps({"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}), "hidden size .30."),
        (json.dumps({"model_type": "no such"}), "no such"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path, text, told):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=told):
        shape_config(str(tmp_path))


def test_an_unknown_shape_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match="no shape 'llama-9'.*llama-3-8b"):
        shape_config("llama-9")


@pytest.mark.parametrize("tied", [False, True])
def test_random_weights_run_as_if_they_were_loaded(tied):
    """What is not saved with weights (frequencies of the rotary embedding, ties) is as in a model made as usual."""
    config = shape_config("tiny")
    config.tie_word_embeddings = tied
    target = random_target(config, CPU, torch.float32)
    usual = AutoModelForCausalLM.from_config(config).eval()
    usual.load_state_dict(target.state_dict())
    prompt = random_prompt(512, 2, 40, seed=0, device=CPU)
    assert torch.equal(target(**prompt).logits, usual(**prompt).logits)
    assert (target.lm_head.weight is target.model.embed_tokens.weight) == tied

    poss = random_poss(target, num_draft_positions=4, draft_vocab_size=30)
    twin = PosSModel(poss.config).eval()
    twin.load_state_dict(poss.state_dict())
    features = torch.randn(2, 40, 64)
    pairs = zip(*(each.attach(target).roll_out(features, prompt["input_ids"]) for each in (poss, twin)), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert poss.draft_vocabulary.tolist() == list(range(30))


def test_weights_take_the_dtype_and_frequencies_stay_exact():
    target = random_target(shape_config("tiny"), CPU, torch.bfloat16)
    poss = random_poss(target)
    for model in (target, poss):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_prompts_differ_by_seed():
    one, same, other = (random_prompt(100, 2, 30, seed, CPU)["input_ids"] for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert one.shape == (2, 30) and not torch.equal(one[0], one[1])
