"""Memory told from configs, against the allocator while the call runs."""

import resource

import pytest
import torch
from conftest import SIZES, WINDOW_CONFIGS
from transformers import GPT2Config, LlamaConfig, MixtralConfig, PreTrainedConfig, Qwen3Config

from hf_poss.candidate_generator import DraftSettings
from hf_poss.configuration_poss import PosSConfig
from hf_poss.evaluation.acceptance import Acceptance, AcceptanceScript
from hf_poss.evaluation.memory import CallMemory, measured_memory, peak_bytes, weight_bytes
from hf_poss.evaluation.memory_prediction import predicted_memory
from hf_poss.evaluation.rehearsal import PlainRehearsal, RoundRehearsal
from hf_poss.evaluation.shapes import random_poss, random_target
from hf_poss.verification import scripted_picks


CPU = torch.device("cpu")
CHAIN, TREE = DraftSettings(6, 1, 7), DraftSettings(6, 6, 20)
NEW_TOKENS = 40
MIDDLE = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
TINY = {**SIZES, "vocab_size": 1000}
CONFIGS = {
    "llama": lambda: LlamaConfig(**TINY),
    "tied": lambda: LlamaConfig(**TINY, tie_word_embeddings=True),
    "middle": lambda: LlamaConfig(**MIDDLE),
    "wide heads": lambda: Qwen3Config(**TINY, head_dim=32),
    "every layer has a window": WINDOW_CONFIGS["mistral"],
    "every other layer has one": WINDOW_CONFIGS["gemma3"],
    "learned positions": lambda: GPT2Config(vocab_size=1000, n_embd=64, n_layer=2, n_head=4, n_positions=256),
}


def settled(config: PreTrainedConfig) -> PreTrainedConfig:
    config.eos_token_id = None  # texts end at their length
    return config


def close(predicted: CallMemory, measured: CallMemory) -> None:
    """Every part within 5%."""
    for name in ("target_weights", "drafter_weights", "copies", "target_cache", "specialist_caches", "peak"):
        assert getattr(predicted, name) == pytest.approx(getattr(measured, name), rel=0.05), name
    assert predicted.activations == pytest.approx(measured.activations, rel=0.05)


@pytest.mark.parametrize(
    ("name", "settings", "rows", "dtype"),
    [
        ("llama", CHAIN, 1, torch.float32),
        ("llama", TREE, 4, torch.bfloat16),
        ("tied", TREE, 1, torch.float32),
        ("middle", TREE, 1, torch.float32),
        ("middle", CHAIN, 4, torch.bfloat16),
        ("wide heads", TREE, 4, torch.float32),
        ("every layer has a window", TREE, 1, torch.float32),
        ("every other layer has one", CHAIN, 4, torch.float32),
        ("learned positions", TREE, 1, torch.float32),
    ],
)
def test_predictions_are_within_5_percent_of_the_allocator(name, settings, rows, dtype):
    config, context = settled(CONFIGS[name]()), 96
    sizes = {"positions_per_specialist": 2, "num_draft_positions": 6}
    poss_config = PosSConfig.from_target_config(config, **sizes)
    [predicted] = predicted_memory(config, poss_config, settings, [(rows, context)], NEW_TOKENS, CPU, dtype)
    [plain] = predicted_memory(config, None, None, [(rows, context)], NEW_TOKENS, CPU, dtype)

    target = random_target(config, CPU, dtype)
    poss = random_poss(target, **sizes)
    weights = weight_bytes(target, poss)
    close(
        predicted,
        measured_memory(lambda: RoundRehearsal(target, poss, settings, rows, context, NEW_TOKENS), weights, CPU),
    )
    close(plain, measured_memory(lambda: PlainRehearsal(target, rows, context, NEW_TOKENS), weight_bytes(target), CPU))

    # And of calls of `generate` itself, in which every draft is accepted.
    knobs = poss.generation_config
    knobs.num_assistant_tokens, knobs.draft_top_k, knobs.draft_total_tokens = 6, settings.top_k, settings.total_tokens
    input_ids = torch.randint(config.vocab_size, (rows, context))
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}

    def write(**arguments) -> None:
        with scripted_picks(AcceptanceScript(Acceptance([1.0], 6), CPU)):
            target.generate(**inputs, **arguments, do_sample=False, max_new_tokens=NEW_TOKENS)

    assert predicted.peak == pytest.approx(
        sum(weights) + peak_bytes(CPU, lambda: write(assistant_model=poss)), rel=0.05
    )
    assert plain.peak == pytest.approx(weights[0] + peak_bytes(CPU, write), rel=0.05)


def test_copies_of_a_draft_vocabulary_and_several_calls():
    config = settled(CONFIGS["llama"]())
    sizes = {"positions_per_specialist": 1, "num_draft_positions": 3, "draft_vocab_size": 200}
    poss_config = PosSConfig.from_target_config(config, **sizes)
    calls = [(1, 24), (2, 300)]
    predictions = predicted_memory(config, poss_config, TREE, calls, NEW_TOKENS, CPU, torch.float32)
    target = random_target(config, CPU, torch.float32)
    poss = random_poss(target, **sizes)
    poss.register_buffer("draft_vocabulary", poss.draft_vocabulary.clone())  # as one that was loaded
    for (rows, context), predicted in zip(calls, predictions, strict=True):
        measured = measured_memory(
            lambda rows=rows, context=context: RoundRehearsal(target, poss, TREE, rows, context, NEW_TOKENS),
            weight_bytes(target, poss),
            CPU,
        )
        close(predicted, measured)
    joined = 3 * 2 * poss.config.num_key_value_heads * poss.config.head_dim * poss.config.hidden_size * 4
    assert predictions[0].copies == joined + 200 * poss.config.hidden_size * 4
    assert predictions[0].specialist_caches < predictions[1].specialist_caches


def test_nothing_is_held_by_a_prediction():
    """Layers that would fill gigabytes are told of within little memory."""
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 8}
    config = settled(LlamaConfig(**{**MIDDLE, **sizes}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    [predicted] = predicted_memory(config, None, None, [(1, 8)], 4, CPU, torch.float32)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert predicted.target_weights > 7e9 and grown < predicted.target_weights / 10


def test_specialists_may_have_a_dtype_of_their_own():
    config = settled(CONFIGS["llama"]())
    poss_config = PosSConfig.from_target_config(config, num_draft_positions=2)
    calls = [(1, 16)]
    same, narrow = (
        predicted_memory(config, poss_config, CHAIN, calls, 8, CPU, torch.float32, poss_dtype=dtype)[0]
        for dtype in (None, torch.bfloat16)
    )
    assert same.drafter_weights > 1.9 * narrow.drafter_weights and same.target_weights == narrow.target_weights


def test_packed_weights_are_not_predicted():
    config = CONFIGS["llama"]()
    config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ValueError, match="not predicted"):
        predicted_memory(config, None, None, [(1, 8)], 4, CPU, torch.float32)


def test_passes_that_depend_on_values_are_not_predicted():
    config = settled(MixtralConfig(**TINY, num_local_experts=4))
    config._experts_implementation = "eager"
    with pytest.raises(ValueError, match="MixtralForCausalLM cannot run without values"):
        predicted_memory(config, None, None, [(1, 8)], 4, CPU, torch.float32)
