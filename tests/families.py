"""Tiny members of the families of targets: what the family suite runs, and what the table in the README lists."""

import zlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from conftest import PAD, SMALL_VOCAB
from transformers import PreTrainedModel


__all__ = ["FAMILIES", "LOOK_BACK", "REFUSED", "SIZES", "WINDOW", "Family", "merged", "randomise"]

WINDOW = 8
LOOK_BACK = ("sliding_window", "attention_chunk_size", "window_size")  # names that families give it

# Few tokens make random drafts right now and then. No text ends by itself: the suite says what ends it.
TOKENS = {"vocab_size": SMALL_VOCAB, "bos_token_id": None, "eos_token_id": None, "pad_token_id": PAD}
DENSE = TOKENS | {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
SIZES = DENSE | {"intermediate_size": 48, "num_key_value_heads": 2}
GPT_SIZES = TOKENS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
HEADS = {"head_dim": 8}  # for families whose default is the width of a large model's heads
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FINE_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
WINDOWS = {"sliding_window": WINDOW}
ALTERNATING = WINDOWS | {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
UPPER_WINDOWS = WINDOWS | {"num_hidden_layers": 4, "use_sliding_window": True, "max_window_layers": 2}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
}
# Tied embeddings would outweigh what the layers add: Gemma multiplies them, and ALiBi looks at few tokens.
UNTIED = {"tie_word_embeddings": False}


def merged(*parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {name: value for part in (*parts, more) for name, value in part.items()}


@dataclass(frozen=True, eq=False)
class Family:
    """A family of targets, with the smallest member that behaves like the large ones.

    Args:
        name: row in the table.
        target: class of the model.
        config: arguments of its config.
        chains: a word of the reason why it verifies chains only; empty if it takes trees.
        windows: how far its layers look back, for the table.
        note: for the table.
        bends_logits: the target scales or caps what its head returns.
        seed, gain: of the random weights, such that a text has many different tokens.
    """

    name: str
    target: str
    config: dict[str, Any]
    chains: str = ""
    windows: str = ""
    note: str = ""
    bends_logits: bool = False
    seed: int = 0
    gain: float = 3.0

    @property
    def key(self) -> str:
        """Name in test ids."""
        return self.name.lower().replace(",", "").replace(" ", "_")

    def has(self, attention: str) -> bool:
        """Whether the installed transformers has the family with this attention."""
        target_class = getattr(transformers, self.target, None)
        return target_class is not None and (attention == "eager" or target_class._supports_sdpa)

    def make_target(self, attention: str = "eager", **config: Any) -> PreTrainedModel:
        """The member, with random weights.

        Skips the test where there is none.

        Args:
            config: overrides the family's.
        """
        if not self.has(attention):
            pytest.skip(f"transformers {transformers.__version__} has no {self.target} with {attention} attention")
        target_class = getattr(transformers, self.target)
        settings = target_class.config_class(**self.config | config)
        target = target_class._from_config(settings, attn_implementation=attention).eval()
        randomise(target, self.seed, self.gain)
        return target


def randomise(model: PreTrainedModel, seed: int, gain: float) -> None:
    """Gives a model random weights that are the same in every release: each parameter's depend on its name.

    Args:
        gain: how much wider a layer's outputs are than its inputs; wide ones make distributions with peaks.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * gain / parameter.shape[-1] ** 0.5)
            else:  # norms, biases, attention sinks
                parameter.add_(noise * 0.1)


FAMILIES = [
    Family("Llama", "LlamaForCausalLM", SIZES, seed=1),
    Family(
        "Llama 4 text",
        "Llama4ForCausalLM",
        merged(
            SIZES,
            HEADS,
            EXPERTS,
            num_hidden_layers=4,
            attention_chunk_size=WINDOW,
            no_rope_layers=[1, 0, 1, 0],
            interleave_moe_layer_step=2,
            intermediate_size_mlp=48,
        ),
        windows="chunks, alternating",
        seed=1,
    ),
    Family("Mistral", "MistralForCausalLM", merged(SIZES, WINDOWS), windows="every layer"),
    Family("Ministral", "MinistralForCausalLM", merged(SIZES, HEADS, ALTERNATING), windows="alternating", seed=1),
    Family("Mixtral", "MixtralForCausalLM", merged(SIZES, EXPERTS, WINDOWS), windows="every layer", note="experts"),
    Family("Qwen2", "Qwen2ForCausalLM", SIZES, seed=1),
    Family("Qwen2, windowed", "Qwen2ForCausalLM", merged(SIZES, UPPER_WINDOWS), windows="upper layers", seed=2),
    Family(
        "Qwen2-MoE",
        "Qwen2MoeForCausalLM",
        merged(SIZES, FINE_EXPERTS, shared_expert_intermediate_size=16),
        note="experts",
        seed=2,
    ),
    Family("Qwen3", "Qwen3ForCausalLM", merged(SIZES, head_dim=16), seed=9),
    Family("Qwen3, windowed", "Qwen3ForCausalLM", merged(SIZES, HEADS, UPPER_WINDOWS), windows="upper layers"),
    Family("Qwen3-MoE", "Qwen3MoeForCausalLM", merged(SIZES, HEADS, FINE_EXPERTS), note="experts", seed=8),
    Family("Gemma", "GemmaForCausalLM", merged(SIZES, HEADS)),
    Family(
        "Gemma 2",
        "Gemma2ForCausalLM",
        merged(SIZES, HEADS, ALTERNATING, UNTIED, query_pre_attn_scalar=8, final_logit_softcapping=4.0),
        windows="alternating",
        note="capped logits",
        bends_logits=True,
        seed=9,
    ),
    Family(
        "Gemma 3 text",
        "Gemma3ForCausalLM",
        merged(SIZES, HEADS, ALTERNATING, UNTIED, query_pre_attn_scalar=8),
        windows="alternating",
        seed=5,
    ),
    Family(
        "Gemma 4 text",
        "Gemma4ForCausalLM",
        merged(
            SIZES,
            HEADS,
            ALTERNATING,
            UNTIED,
            num_hidden_layers=6,
            layer_types=ALTERNATING["layer_types"][:2] * 3,
            num_kv_shared_layers=2,
            global_head_dim=16,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=SMALL_VOCAB,
            final_logit_softcapping=4.0,
        ),
        windows="alternating",
        note="capped logits, layers that share keys",
        bends_logits=True,
        seed=1,
    ),
    Family("Phi", "PhiForCausalLM", SIZES, seed=10),
    Family("Phi-3", "Phi3ForCausalLM", merged(SIZES, WINDOWS), windows="every layer"),
    Family("SmolLM3", "SmolLM3ForCausalLM", merged(SIZES, num_hidden_layers=4), note="layers without positions"),
    Family("OLMo 2", "Olmo2ForCausalLM", SIZES),
    Family("OLMo 3", "Olmo3ForCausalLM", merged(SIZES, ALTERNATING), windows="alternating", seed=1, gain=5.0),
    Family(
        "Granite",
        "GraniteForCausalLM",
        merged(SIZES, logits_scaling=4.0, embedding_multiplier=2.0, attention_multiplier=0.3, residual_multiplier=0.7),
        note="scaled logits",
        bends_logits=True,
    ),
    Family("StableLM", "StableLmForCausalLM", SIZES),
    Family("Starcoder2", "Starcoder2ForCausalLM", merged(SIZES, WINDOWS), windows="every layer", seed=3),
    Family(
        "Cohere",
        "CohereForCausalLM",
        merged(SIZES, logit_scale=0.25),
        note="scaled logits",
        bends_logits=True,
        seed=20,
    ),
    Family(
        "Cohere 2",
        "Cohere2ForCausalLM",
        merged(SIZES, ALTERNATING, logit_scale=0.25),
        windows="alternating",
        note="scaled logits",
        bends_logits=True,
    ),
    Family("GLM-4", "Glm4ForCausalLM", merged(SIZES, HEADS), seed=2),
    Family(
        "DeepSeek-V3",
        "DeepseekV3ForCausalLM",
        merged(SIZES, LATENT, FINE_EXPERTS, n_routed_experts=4, n_group=2, topk_group=1, first_k_dense_replace=1),
        note="latent attention, experts",
        seed=1,
    ),
    Family(
        "GPT-OSS",
        "GptOssForCausalLM",
        merged(SIZES, HEADS, EXPERTS, ALTERNATING),
        windows="alternating",
        note="attention sinks, experts",
    ),
    Family("EXAONE 4", "Exaone4ForCausalLM", merged(SIZES, ALTERNATING), windows="alternating", seed=7),
    Family("HunYuan", "HunYuanDenseV1ForCausalLM", merged(SIZES, HEADS), seed=6),
    Family("Falcon", "FalconForCausalLM", merged(DENSE, num_kv_heads=1), seed=14),
    Family(
        "Falcon, ALiBi",
        "FalconForCausalLM",
        merged(DENSE, UNTIED, alibi=True, multi_query=False, parallel_attn=False, bias=True),
        chains="ALiBi",
        note="ALiBi",
        seed=16,
    ),
    Family("GPT-NeoX", "GPTNeoXForCausalLM", merged(DENSE, intermediate_size=48), seed=13),
    Family("GPT-J", "GPTJForCausalLM", merged(GPT_SIZES, rotary_dim=4), seed=2),
    Family("GPT-2", "GPT2LMHeadModel", GPT_SIZES, seed=16),
    Family("GPT-BigCode", "GPTBigCodeForCausalLM", GPT_SIZES),
    Family(
        "GPT-Neo",
        "GPTNeoForCausalLM",
        merged(
            TOKENS,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            max_position_embeddings=128,
            attention_types=[[["global", "local"], 1]],
            window_size=WINDOW,
        ),
        chains="window",
        windows="alternating",
        note="masks of its own",
        seed=3,
    ),
    Family("OPT", "OPTForCausalLM", merged(DENSE, word_embed_proj_dim=32, ffn_dim=48), seed=3),
    Family(
        "Bloom",
        "BloomForCausalLM",
        merged(TOKENS, UNTIED, hidden_size=32, n_layer=2, n_head=4),
        chains="ALiBi",
        note="ALiBi",
        seed=9,
    ),
    Family(
        "MPT",
        "MptForCausalLM",
        merged(TOKENS, UNTIED, d_model=32, n_layers=2, n_heads=4, max_seq_len=128, use_cache=True, logit_scale=0.5),
        chains="ALiBi",
        note="ALiBi",
        seed=10,
    ),
]

# A state that runs along the text cannot go back to where a draft was rejected; an encoder-decoder is not drafted for.
REFUSED = [
    Family("Mamba", "MambaForCausalLM", merged(TOKENS, hidden_size=32, state_size=4, num_hidden_layers=2)),
    Family(
        "RecurrentGemma",
        "RecurrentGemmaForCausalLM",
        merged(SIZES, num_hidden_layers=3, lru_width=32, attention_window_size=WINDOW),
    ),
    Family(
        "Jamba",
        "JambaForCausalLM",
        merged(
            SIZES,
            attn_layer_period=2,
            attn_layer_offset=1,
            num_experts=2,
            mamba_d_state=4,
            mamba_expand=1,
            mamba_dt_rank=4,
            use_mamba_kernels=False,
        ),
    ),
    Family(
        "Qwen3-Next",
        "Qwen3NextForCausalLM",
        merged(
            SIZES,
            HEADS,
            FINE_EXPERTS,
            layer_types=["linear_attention", "full_attention"],
            shared_expert_intermediate_size=16,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
        ),
    ),
    Family("LFM2", "Lfm2ForCausalLM", merged(SIZES, layer_types=["conv", "full_attention"])),
    Family(
        "MiniMax",
        "MiniMaxForCausalLM",
        merged(SIZES, HEADS, EXPERTS, layer_types=["linear_attention", "full_attention"], block_size=4),
    ),
    Family(
        "T5",
        "T5ForConditionalGeneration",
        merged(TOKENS, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, decoder_start_token_id=PAD),
    ),
]
