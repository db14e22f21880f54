"""Tiny models that every test shares. All of them are made here from seeds; pretrained ones are optional."""

import os
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen3Config,
    set_seed,
)

from hf_poss import PosSModel


VOCAB_SIZE = 97
EOS = 2

# A GPT-2 has learned absolute positions and no RoPE; Qwen3 has heads of its own width and norms on queries and keys.
TARGET_CONFIGS = {
    "llama": lambda: LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=0,
    ),
    "qwen3": lambda: Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=0,
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=512,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=0,
    ),
    "opt": lambda: OPTConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=0,
    ),
}


def make_target(family: str = "llama", attention: str = "sdpa", seed: int = 0, scale: float = 6.0) -> PreTrainedModel:
    """A random target. `scale` widens its weights: distributions get peaks and text varies, so drafts are both
    accepted and rejected."""
    set_seed(seed)
    target = AutoModelForCausalLM.from_config(TARGET_CONFIGS[family](), attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in target.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return target


def make_poss(target: PreTrainedModel, seed: int = 0, **kwargs) -> PosSModel:
    """Random specialists for `target`."""
    set_seed(seed)
    return PosSModel.from_target(target, **kwargs).eval()


def pretrained_folder(name: str) -> Path:
    """Folder of a real model under `HF_POSS_TEST_MODELS`, else beside the checkout; skips where there is none."""
    root = os.environ.get("HF_POSS_TEST_MODELS", Path(__file__).parents[2] / "shared" / "models")
    folder = Path(root) / name
    if not folder.is_dir():
        pytest.skip(f"no {folder}: set HF_POSS_TEST_MODELS to a folder with {name}")
    return folder


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    return make_target("llama")


@pytest.fixture
def poss(llama) -> PosSModel:
    return make_poss(llama, positions_per_specialist=2, num_draft_positions=4)


@pytest.fixture(scope="session")
def stories() -> tuple[PreTrainedModel, object]:
    """A pretrained Llama that tells little stories, with its tokenizer."""
    folder = pretrained_folder("stories260k")
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
