"""Position specialists' configuration: types, values, and reading the configs of many families."""

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, LlamaConfig, T5Config

from hf_poss import PosSConfig, PosSModel
from hf_poss.modeling_poss import TargetReference


TINY = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GQA = {**TINY, "num_key_value_heads": 2}
MOE = {**GQA, "num_experts_per_tok": 1, "moe_intermediate_size": 24}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
WITHOUT_MLP = {key: value for key, value in TINY.items() if key != "intermediate_size"}
GPT_NAMES = {"vocab_size": 97, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 256}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# Class of the config, its arguments, and what a specialist for it must have.
FAMILIES = {
    "LlamaConfig": (GQA, {"num_key_value_heads": 2, "head_dim": 12}),
    "MistralConfig": (GQA, {"num_key_value_heads": 2, "head_dim": 12}),
    "Qwen2Config": (GQA, {"num_key_value_heads": 2, "head_dim": 12}),
    "Qwen3Config": ({**GQA, "head_dim": 16}, {"num_key_value_heads": 2, "head_dim": 16}),
    "Qwen3MoeConfig": ({**MOE, "num_experts": 2, "head_dim": 16}, {"head_dim": 16, "intermediate_size": 80}),
    "MixtralConfig": ({**GQA, "num_local_experts": 2}, {"num_key_value_heads": 2}),
    "GemmaConfig": ({**GQA, "head_dim": 8}, {"head_dim": 8, "hidden_act": "gelu_pytorch_tanh"}),
    "Gemma2Config": (
        {**GQA, "head_dim": 8, "final_logit_softcapping": 20.0},
        {"head_dim": 8, "final_logit_softcapping": 20.0, "hidden_act": "gelu_pytorch_tanh"},
    ),
    "Gemma3TextConfig": ({**GQA, "head_dim": 8}, {"head_dim": 8, "hidden_act": "gelu_pytorch_tanh"}),
    "PhiConfig": ({**GQA, "layer_norm_eps": 1e-4}, {"rms_norm_eps": 1e-4, "hidden_act": "gelu_new"}),
    "Phi3Config": (GQA, {"num_key_value_heads": 2}),
    "SmolLM3Config": (GQA, {"num_key_value_heads": 2}),
    "Olmo2Config": (GQA, {"num_key_value_heads": 2}),
    "GraniteConfig": ({**GQA, "logits_scaling": 8.0}, {"logit_scale": 0.125}),
    "StableLmConfig": (GQA, {"num_key_value_heads": 2}),
    "Starcoder2Config": ({**GQA, "norm_epsilon": 1e-4}, {"rms_norm_eps": 1e-4, "hidden_act": "gelu_pytorch_tanh"}),
    "CohereConfig": ({**GQA, "logit_scale": 0.25}, {"logit_scale": 0.25}),
    "Glm4Config": ({**GQA, "head_dim": 16}, {"head_dim": 16}),
    # Its keys and values are latent, so a specialist takes as many key-value heads as heads.
    "DeepseekV3Config": ({**MOE, **LATENT, "n_routed_experts": 2, "n_group": 1}, {"num_key_value_heads": 4}),
    "GptOssConfig": ({**GQA, "num_local_experts": 2, "head_dim": 16}, {"head_dim": 16}),
    "FalconConfig": (
        {**WITHOUT_MLP, "ffn_hidden_size": 80, "multi_query": True},
        {"num_key_value_heads": 1, "head_dim": 12, "intermediate_size": 80},
    ),
    "GPTNeoXConfig": (TINY, {"num_key_value_heads": 4, "hidden_act": "gelu"}),
    "GPT2Config": (
        {**GPT_NAMES, **TOKENS, "n_inner": 80},
        {"num_key_value_heads": 4, "hidden_act": "gelu_new", "rms_norm_eps": 1e-5, "intermediate_size": 80},
    ),
    "OPTConfig": (
        {**WITHOUT_MLP, "ffn_dim": 80, "word_embed_proj_dim": 48},
        {"num_key_value_heads": 4, "hidden_act": "relu", "intermediate_size": 80},
    ),
    # Multiplies its logits by what Granite divides by.
    "HyperCLOVAXConfig": ({**GQA, "logits_scaling": 8.0}, {"logit_scale": 8.0}),
    # Its layers differ; most of them are the sliding ones.
    "Gemma4TextConfig": ({**GQA, "head_dim": 8, "global_head_dim": 16}, {"head_dim": 8, "num_key_value_heads": 2}),
}


def family_config(name):
    arguments, expected = FAMILIES[name]
    return getattr(transformers, name)(**arguments), expected


# ---- Types and values ----


@pytest.mark.parametrize(
    ("field", "value", "type_name"),
    [
        ("hidden_size", "32", "int"),
        ("num_draft_positions", "6", "int"),
        ("positions_per_specialist", 2.0, "int"),
        ("positions_per_specialist", True, "int"),
        ("num_attention_heads", None, "int"),
        ("fc_bias", "yes", "bool"),
        ("rms_norm_eps", "1e-6", "float"),
        ("rope_parameters", "default", "dict"),
        ("hidden_act", 3, "str"),
        ("final_logit_softcapping", "30", "float"),
        ("target_name_or_path", 7, "str"),
    ],
)
def test_another_type_is_refused(field, value, type_name):
    with pytest.raises(StrictDataclassError, match=f"(?s){field}.*{type_name}"):
        PosSConfig(**{field: value})


def test_a_field_keeps_its_type_after_construction():
    config = PosSConfig()
    with pytest.raises(StrictDataclassError, match="num_draft_positions"):
        config.num_draft_positions = "6"


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize(
    "field",
    [
        "positions_per_specialist",
        "num_draft_positions",
        "hidden_size",
        "vocab_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
    ],
)
def test_a_count_below_one_is_refused(field, value):
    with pytest.raises(ValueError, match=f"`{field}` is {value}; expected 1 or more"):
        PosSConfig(**{field: value})


def test_heads_that_do_not_divide_are_refused_with_those_that_would():
    with pytest.raises(ValueError, match=r"`num_key_value_heads` is 4;.*6.*one of \[1, 2, 3, 6\]"):
        PosSConfig(hidden_size=48, num_attention_heads=6, num_key_value_heads=4)


@pytest.mark.parametrize("geometry", [{"head_dim": 7}, {"hidden_size": 33, "num_attention_heads": 3}])
def test_heads_of_odd_width_are_refused(geometry):
    with pytest.raises(ValueError, match="`head_dim` is .*even number"):
        PosSConfig(**geometry)


def test_an_unknown_activation_is_refused_with_the_known():
    with pytest.raises(ValueError, match="'swoosh'.*'gelu_new'.*'silu'"):
        PosSConfig(hidden_act="swoosh")


def test_what_is_not_given_follows_from_the_rest():
    config = PosSConfig(hidden_size=96, num_attention_heads=6)
    assert (config.num_key_value_heads, config.head_dim) == (6, 96 // 6)
    assert config.rope_parameters["rope_type"] == "default"


# ---- Who serves which position ----


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 6, 7, 8, 12])
def test_positions_are_dealt_in_spans_of_n(n, k):
    config = PosSConfig(positions_per_specialist=n, num_draft_positions=k)
    # Deal the positions out one by one; whatever lies beyond K is the last specialist's.
    dealt, specialist = [], -1
    for position in range(k):
        specialist += position % n == 0
        dealt.append(specialist)
    dealt += [specialist] * 5
    assert [config.specialist_index(position) for position in range(1, k + 6)] == dealt
    assert config.num_specialists == len(set(dealt))


@pytest.mark.parametrize("position", [0, -3])
def test_positions_count_from_one(position):
    with pytest.raises(ValueError, match=f"{position} does not exist.*count from 1"):
        PosSConfig().specialist_index(position)


# ---- Targets ----


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_a_config_whose_model_rolls_out(family):
    target_config, expected = family_config(family)
    before = target_config.to_dict()
    config = PosSConfig.from_target_config(target_config, positions_per_specialist=1, num_draft_positions=2)
    common = {
        key: TINY[key]
        for key in ("vocab_size", "hidden_size", "num_attention_heads", "bos_token_id", "eos_token_id", "pad_token_id")
    }
    found = config.to_dict()
    assert {key: found[key] for key in {**common, **expected}} == {**common, **expected}
    assert target_config.to_dict() == before
    assert config.max_position_embeddings == getattr(target_config, "max_position_embeddings", 2048)

    torch.manual_seed(0)
    poss = PosSModel(config)
    head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    poss.reference = TargetReference(nn.Embedding(config.vocab_size, config.hidden_size), head, config)
    with torch.no_grad():
        predictions = poss.roll_out(torch.randn(2, 9, 48), torch.randint(config.vocab_size, (2, 9)))
    assert [tuple(prediction.shape) for prediction in predictions] == [(2, 9, 48)] * 2
    assert all(prediction.isfinite().all() for prediction in predictions)
    assert poss.rotary_emb.inv_freq.shape == (config.head_dim // 2,)


@pytest.mark.parametrize("name", ["GPT2Config", "CodeGenConfig"])
def test_an_mlp_of_unknown_width_is_four_times_as_wide_as_the_target(name):
    target_config = getattr(transformers, name)(**GPT_NAMES)
    assert PosSConfig.from_target_config(target_config).intermediate_size == 4 * 48


def test_a_vision_language_target_gives_its_text_models_geometry():
    text = LlamaConfig(**{**GQA, "rms_norm_eps": 1e-3})
    vision = transformers.CLIPVisionConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    config = PosSConfig.from_target_config(transformers.LlavaConfig(text_config=text, vision_config=vision))
    assert (config.hidden_size, config.vocab_size, config.num_key_value_heads) == (48, 97, 2)
    assert config.rms_norm_eps == 1e-3


def test_the_rotary_embedding_is_the_targets():
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    target_config = LlamaConfig(**{**GQA, "rope_parameters": dict(rope)})
    poss = PosSModel(PosSConfig.from_target_config(target_config))
    target = transformers.LlamaModel(target_config)
    assert torch.equal(poss.rotary_emb.inv_freq, target.rotary_emb.inv_freq)
    plain = transformers.LlamaModel(LlamaConfig(**GQA))
    assert not torch.equal(poss.rotary_emb.inv_freq, plain.rotary_emb.inv_freq)


def test_a_target_of_two_rotary_embeddings_gives_the_one_of_its_full_attention():
    target_config = transformers.Gemma3TextConfig(
        **GQA,
        head_dim=8,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1234.0},
            "full_attention": {"rope_type": "default", "rope_theta": 5e6},
        },
    )
    assert PosSConfig.from_target_config(target_config).rope_parameters["rope_theta"] == 5e6


@pytest.mark.parametrize("family", ["GPT2Config", "OPTConfig"])
def test_a_target_without_rotary_embedding_gives_the_default_one(family):
    config = PosSConfig.from_target_config(family_config(family)[0])
    assert config.rope_parameters == PosSConfig().rope_parameters


def test_heads_of_odd_width_are_rounded_up_where_the_target_turns_none():
    target_config = transformers.GPT2Config(n_embd=21, n_head=3, n_layer=1, vocab_size=11)
    config = PosSConfig.from_target_config(target_config)
    assert (config.hidden_size, config.num_attention_heads, config.head_dim) == (21, 3, 8)


def test_arguments_come_before_what_is_read():
    config = PosSConfig.from_target_config(
        LlamaConfig(**GQA), intermediate_size=12, num_draft_positions=5, positions_per_specialist=4, fc_bias=False
    )
    assert (config.intermediate_size, config.num_draft_positions, config.positions_per_specialist) == (12, 5, 4)
    assert config.fc_bias is False


@pytest.mark.parametrize("field", ["num_draft_positions", "positions_per_specialist"])
def test_a_target_does_not_hide_bad_counts(field):
    with pytest.raises(ValueError, match=f"`{field}` is 0; expected 1 or more"):
        PosSConfig.from_target_config(LlamaConfig(**GQA), **{field: 0})


def test_the_target_is_remembered_by_name(tmp_path):
    LlamaConfig(**GQA).save_pretrained(tmp_path)
    config = PosSConfig.from_target_config(AutoConfig.from_pretrained(tmp_path))
    assert config.target_name_or_path == str(tmp_path)


def test_an_encoder_decoder_is_refused():
    with pytest.raises(ValueError, match=r"encoder-decoder \(t5\).*decoder-only"):
        PosSConfig.from_target_config(T5Config(d_model=16, num_heads=2, num_layers=1, vocab_size=11))


def test_a_config_without_text_is_refused():
    vision = transformers.CLIPVisionConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    with pytest.raises(ValueError, match="`vocab_size`.*decoder-only language model"):
        PosSConfig.from_target_config(vision)


# ---- Saving ----


@pytest.mark.parametrize("load", [PosSConfig.from_pretrained, AutoConfig.from_pretrained])
def test_a_saved_config_comes_back_whole(tmp_path, load):
    fields = {
        "vocab_size": 101,
        "hidden_size": 64,
        "intermediate_size": 99,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 10,
        "hidden_act": "gelu",
        "max_position_embeddings": 333,
        "rms_norm_eps": 3e-5,
        "initializer_range": 0.5,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 77.0, "factor": 2.0},
        "attention_bias": True,
        "mlp_bias": True,
        "fc_bias": False,
        "positions_per_specialist": 3,
        "num_draft_positions": 8,
        "logit_scale": 0.5,
        "final_logit_softcapping": 12.0,
        "target_name_or_path": "somebody/model",
        "pad_token_id": 5,
        "bos_token_id": 6,
        "eos_token_id": [7, 8],
    }
    PosSConfig(**fields).save_pretrained(tmp_path)
    config = load(tmp_path)
    assert type(config) is PosSConfig
    assert {name: getattr(config, name) for name in fields} == fields
