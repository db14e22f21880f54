"""Kinds of targets: adapters, dtypes, quantised weights, offloaded weights, vision-language wrappers. Each writes with
position specialists what it writes without, and lends them the embedding and head that it uses itself."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conftest import (
    TARGET_CONFIGS,
    drafter_for,
    left_padded,
    make_prompt,
    peft_for_add_adapter,
    small_target,
    widened,
    with_slips,
)
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    Idefics3Config,
    LlavaConfig,
    Mistral3Config,
    PaliGemmaConfig,
    PixtralVisionConfig,
    PreTrainedModel,
    QuantoConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    SiglipVisionConfig,
    SmolVLMConfig,
    TorchAoConfig,
    set_seed,
)

from hf_poss import PosSCandidateGenerator, PosSModel, collect_statistics
from hf_poss.compatibility import device_of
from hf_poss.modeling_poss import TargetReference


PROMPTS = [make_prompt(7, seed=1), make_prompt(3, seed=2)]


@pytest.fixture(params=[1, 2], ids=["one_row", "two_rows"])
def inputs(request) -> dict[str, torch.LongTensor]:
    """A prompt, or two of 7 and 3 tokens."""
    return left_padded(PROMPTS[: request.param])


def greedy(target: PreTrainedModel, inputs: dict[str, Any], **kwargs: Any) -> list[list[int]]:
    return target.generate(**inputs, max_new_tokens=24, do_sample=False, **kwargs).tolist()


@pytest.fixture
def same_text(scripted, monkeypatch):
    """Asserts that specialists leave the text as it is: with their own drafts, and with drafts that are mostly
    right, whose deep paths are accepted. Returns the text."""
    draft = PosSCandidateGenerator.draft

    def check(target: PreTrainedModel, poss: PosSModel, inputs: dict[str, Any]) -> list[list[int]]:
        plain = greedy(target, inputs)
        monkeypatch.setattr(PosSCandidateGenerator, "draft", draft)
        assert greedy(target, inputs, assistant_model=poss) == plain
        masks = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        padding = (masks == 0).sum(-1).tolist()
        scripted(*(with_slips(text[start:], every=5) for text, start in zip(plain, padding, strict=True)))
        with collect_statistics() as stats:
            assert greedy(target, inputs, assistant_model=poss) == plain
        assert sum(stats.accepted) > 0
        return plain

    return check


def assert_lends_its_own(target: PreTrainedModel, inputs: dict[str, Any]) -> None:
    """Specialists see the target's own embeddings, and its own logits of its own features."""
    poss = PosSModel.from_target(target)
    reference = TargetReference.from_target(target, poss.config)
    with torch.no_grad():
        outputs = target(**inputs, output_hidden_states=True)
    logits = reference.logits(outputs.hidden_states[-1])
    torch.testing.assert_close(logits, outputs.logits.float(), rtol=1e-4, atol=1e-4)
    first = outputs.hidden_states[0]
    torch.testing.assert_close(reference.embed(inputs["input_ids"], like=first), first, rtol=1e-4, atol=1e-4)


# ---- Adapters ----


ADAPTERS = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "head": {"target_modules": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "down_proj"]},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "new_tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4, 5, 6]},
}


def randomise(model: nn.Module) -> nn.Module:
    """Adapters begin as zeros; these change the text."""
    set_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name or "modules_to_save" in name:
                parameter.normal_(0, 0.5)
            elif "trainable_tokens" in name:
                parameter.normal_(0, 2.0)
    return model.eval()


def adapted(kind: str = "attention", **kwargs: Any):
    peft = pytest.importorskip("peft")
    return randomise(peft.get_peft_model(small_target(), peft.LoraConfig(**ADAPTERS[kind], **kwargs)))


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("state", ["on", "off", "merged"])
def test_adapters(kind, state, shape, inputs, same_text):
    model = adapted(kind, task_type="CAUSAL_LM")
    without_adapters = greedy(small_target(), inputs)
    poss = drafter_for(small_target(), shape)
    if state == "merged":
        model = model.merge_and_unload()
    with model.disable_adapter() if state == "off" else nullcontext():
        text = same_text(model, poss, inputs)
    assert (text == without_adapters) == (state == "off")


@pytest.mark.parametrize("kind", ADAPTERS)
def test_specialists_read_through_adapters(kind):
    assert_lends_its_own(adapted(kind).get_base_model(), {"input_ids": PROMPTS[0]})


def test_an_adapter_that_transformers_added(shape, inputs, same_text):
    peft = peft_for_add_adapter()
    target = small_target()
    before = greedy(target, inputs)
    target.add_adapter(peft.LoraConfig(target_modules=["q_proj", "lm_head"]))
    randomise(target)
    assert same_text(target, drafter_for(small_target(), shape), inputs) != before
    target.disable_adapters()
    assert same_text(target, drafter_for(small_target(), shape), inputs) == before


@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig", "PromptEncoderConfig"])
def test_virtual_tokens_are_refused(kind, inputs, same_text):
    peft = pytest.importorskip("peft")
    config = getattr(peft, kind)(num_virtual_tokens=4, task_type="CAUSAL_LM")
    model = peft.get_peft_model(small_target(), config).eval()
    poss = drafter_for(small_target(), "tree")
    before = greedy(model, inputs)
    with pytest.raises(ValueError, match="virtual tokens"):
        greedy(model, inputs, assistant_model=poss)
    assert greedy(model, inputs) == before
    with model.disable_adapter():
        same_text(model, poss, inputs)


def test_adapters_by_row_decode_without_drafts(shape, same_text):
    model, inputs = adapted(task_type="CAUSAL_LM"), left_padded(PROMPTS)
    poss = drafter_for(small_target(), shape)
    names = {"adapter_names": ["default", "__base__"]}
    plain = greedy(model, inputs, **names)
    assert plain not in (greedy(model, inputs), greedy(model.get_base_model(), inputs))
    assert greedy(model, inputs, assistant_model=poss, **names) == plain
    same_text(model, poss, inputs)


def test_an_activated_lora_decodes_without_drafts(shape, same_text):
    prompt = PROMPTS[0]
    model = adapted(alora_invocation_tokens=prompt[0, -2:].tolist(), task_type="CAUSAL_LM")
    poss = drafter_for(small_target(), shape)
    plain = greedy(model, {"input_ids": prompt})
    assert plain != greedy(small_target(), {"input_ids": prompt})
    assert greedy(model, {"input_ids": prompt}, assistant_model=poss) == plain
    same_text(model, poss, {"input_ids": PROMPTS[1]})  # does not invoke it


# ---- Dtypes ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_drafter_in_half_precision(dtype, shape, inputs, same_text):
    target = small_target()
    same_text(target, drafter_for(target, shape).to(dtype), inputs)


def logits_of(target: PreTrainedModel, sequences: torch.LongTensor, mask: torch.LongTensor, new: int) -> torch.Tensor:
    """Float32 [rows, new, vocab] of the last tokens of sequences, all in one pass."""
    mask = nn.functional.pad(mask, (0, new), value=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = target(input_ids=sequences, attention_mask=mask, position_ids=positions).logits
    return logits[:, -new - 1 : -1].float()


@pytest.mark.parametrize("drafter_dtype", [torch.float32, None], ids=["float32_drafter", "same_drafter"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_target_in_half_precision(dtype, drafter_dtype, shape, inputs):
    """Passes of other lengths round differently, so near ties may fall the other way; every token is the target's
    argmax as exactly as those that plain decoding picks, whose rounding is measured beside it."""
    target = small_target().to(dtype)
    poss = drafter_for(target, shape).to(drafter_dtype or dtype)
    settings = {"max_new_tokens": 24, "do_sample": False}
    mask, start = inputs["attention_mask"], inputs["input_ids"].shape[1]

    plain = target.generate(**inputs, **settings, output_logits=True, return_dict_in_generate=True)
    in_one_pass = logits_of(target, plain.sequences, mask, 24)
    rounding = (torch.stack(plain.logits, 1).float() - in_one_pass).abs().max()
    assert rounding < 0.02 * in_one_pass.abs().max()

    with collect_statistics() as stats:
        sequences = target.generate(**inputs, **settings, assistant_model=poss)
    assert sum(stats.accepted) > 0
    logits = logits_of(target, sequences, mask, 24)
    picked = logits.gather(-1, sequences[:, start:, None])[..., 0]
    assert (logits.max(-1).values - picked).max() <= 2 * rounding


# ---- Quantised weights ----


def quanto(**kwargs: Any) -> QuantoConfig:
    pytest.importorskip("optimum.quanto")
    return QuantoConfig(weights="int8", **kwargs)


def torchao(**kwargs: Any) -> TorchAoConfig:
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig(), **kwargs)


QUANTISED = {
    "quanto": quanto,
    "quanto_with_head": lambda: quanto(modules_to_not_convert=[]),
    "torchao": torchao,
    "torchao_with_head": lambda: torchao(include_input_output_embeddings=True),
}


@pytest.fixture(params=QUANTISED)
def quantised(request, tmp_path) -> PreTrainedModel:
    config = QUANTISED[request.param]()
    small_target().save_pretrained(tmp_path)
    target = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32).eval()
    for name in ["model.layers.0.self_attn.q_proj"] + ["lm_head"] * ("with_head" in request.param):
        assert type(target.get_submodule(name).weight) not in (nn.Parameter, torch.Tensor)
    return target


def test_quantised_targets(quantised, shape, inputs, same_text):
    same_text(quantised, drafter_for(small_target(), shape), inputs)


def test_specialists_read_through_quantised_weights(quantised):
    assert_lends_its_own(quantised, {"input_ids": PROMPTS[0]})


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_packed_heads_are_given_features_as_they_are(dtype):
    class PackedHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(12, 32).to(dtype), requires_grad=False)

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            assert features.dtype == torch.bfloat16
            return features @ self.weight.to(features.dtype).T

    target = small_target()
    reference = TargetReference(target.get_input_embeddings(), PackedHead(), PosSModel.from_target(target).config)
    logits = reference.logits(torch.ones(1, 2, 32, dtype=torch.bfloat16))
    assert logits.dtype == torch.float32 and logits.tolist() == [[[32.0] * 12] * 2]


# ---- Targets that are split and offloaded ----


IN_MEMORY = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
DEVICE_MAPS = {
    "a_layer": {**IN_MEMORY, "model.layers.0": "cpu", "model.layers.1": "disk", "lm_head": "cpu"},
    "head": {**IN_MEMORY, "lm_head": "disk"},
    "embedding": {**IN_MEMORY, "model.embed_tokens": "disk", "lm_head": "cpu"},
    "all": {"model": "disk", "lm_head": "disk"},
}
DEVICE_MAPS["a_layer"].pop("model.layers")


@pytest.fixture
def offloaded(tmp_path) -> Callable[[str], PreTrainedModel]:
    pytest.importorskip("accelerate")

    def load(kind: str) -> PreTrainedModel:
        small_target().save_pretrained(tmp_path / "target")
        target = AutoModelForCausalLM.from_pretrained(
            tmp_path / "target", device_map=DEVICE_MAPS[kind], offload_folder=tmp_path / "offload"
        ).eval()
        assert any(parameter.is_meta for parameter in target.parameters())
        return target

    return load


@pytest.mark.parametrize("kind", DEVICE_MAPS)
def test_offloaded_targets(kind, offloaded, shape, inputs, same_text):
    target, whole = offloaded(kind), small_target()
    assert same_text(target, drafter_for(whole, shape), inputs) == greedy(whole, inputs)


@pytest.mark.parametrize("kind", DEVICE_MAPS)
def test_specialists_read_through_offloading(kind, offloaded):
    target = offloaded(kind)
    assert_lends_its_own(target, {"input_ids": PROMPTS[0]})
    assert all(parameter.device.type == "cpu" for parameter in PosSModel.from_target(target).parameters())


def test_gradients_reach_features_through_an_offloaded_head(offloaded):
    gradients = []
    for target in (offloaded("head"), small_target()):
        reference = TargetReference.from_target(target, PosSModel.from_target(target).config)
        features = torch.linspace(-1, 1, 64).view(1, 2, 32).requires_grad_()
        reference.logits(features).square().sum().backward()
        assert all(parameter.grad is None for parameter in target.parameters())
        gradients.append(features.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("kind", "warns"), [("head", True), ("all", True), ("a_layer", False)])
def test_an_offloaded_head_warns_once(kind, warns, offloaded, warnings_seen):
    target, config = offloaded(kind), PosSModel.from_target(small_target()).config
    for _ in range(2):
        TargetReference.from_target(target, config)
    assert len(warnings_seen()) == warns and all("`lm_head`" in warning for warning in warnings_seen())


def test_the_device_that_a_module_computes_on(offloaded):
    target = offloaded("all")
    assert target.lm_head.weight.device.type == "meta"
    assert device_of(target.lm_head) == device_of(target.get_input_embeddings()) == torch.device("cpu")
    assert device_of(nn.Linear(2, 2, device="meta")) == torch.device("meta")


@pytest.mark.skipif(torch.accelerator.device_count() < 2, reason="needs two accelerators")
def test_a_target_on_two_accelerators(tmp_path, shape, inputs, same_text):
    small_target().save_pretrained(tmp_path)
    device_map = {**IN_MEMORY, "model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "lm_head": 1}
    device_map.pop("model.layers")
    target = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map | {"model.norm": 1}).eval()
    poss = drafter_for(target, shape)
    assert poss.device == target.lm_head.weight.device
    same_text(target, poss, {name: value.to(target.device) for name, value in inputs.items()})


# ---- Vision-language wrappers ----


IMAGE, VIDEO, IMAGE_START, IMAGE_END = 12, 13, 14, 15
TEXT = {
    **{name: getattr(TARGET_CONFIGS["llama"](), name) for name in ("hidden_size", "intermediate_size")},
    "vocab_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
QWEN_VISION = {
    "depth": 2,
    "num_heads": 2,
    "in_channels": 3,
    "patch_size": 2,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
QWEN_TEXT = {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": IMAGE_START,
    "vision_end_token_id": IMAGE_END,
}
PIXELS = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
IDEFICS_INPUTS = {"pixel_values": PIXELS[None], "pixel_attention_mask": torch.ones(1, 1, 8, 8, dtype=torch.long)}
QWEN_INPUTS = {"pixel_values": PIXELS.view(8, 24).repeat(2, 1), "image_grid_thw": torch.tensor([[1, 4, 4]])}

# Config, seed and width whose text varies, what an image is to the model, and its inputs besides tokens.
WRAPPERS: dict[str, tuple[Callable[[], Any], tuple[int, float], dict[str, torch.Tensor]]] = {
    "llava": (
        lambda: LlavaConfig(
            text_config={"model_type": "llama", **TEXT},
            vision_config=CLIPVisionConfig(**VISION, image_size=8, patch_size=4, projection_dim=16),
            image_token_index=IMAGE,
            image_seq_length=4,
        ),
        (2, 16.0),
        {"pixel_values": PIXELS},
    ),
    "gemma3": (
        lambda: Gemma3Config(
            text_config={
                **TEXT,
                "sliding_window": 6,
                "layer_types": ["sliding_attention", "full_attention"],
                "query_pre_attn_scalar": 8,
            },
            vision_config=SiglipVisionConfig(**VISION, image_size=8, patch_size=4),
            image_token_index=IMAGE,
            boi_token_index=IMAGE_START,
            eoi_token_index=IMAGE_END,
            mm_tokens_per_image=4,
            tie_word_embeddings=False,
        ),
        (3, 10.0),
        {"pixel_values": PIXELS},
    ),
    "idefics3": (
        lambda: Idefics3Config(
            text_config={"model_type": "llama", **TEXT},
            vision_config={**VISION, "image_size": 8, "patch_size": 2},
            image_token_id=IMAGE,
            scale_factor=2,
        ),
        (3, 16.0),
        IDEFICS_INPUTS,
    ),
    "smolvlm": (
        lambda: SmolVLMConfig(
            text_config={"model_type": "llama", **TEXT},
            vision_config={**VISION, "image_size": 8, "patch_size": 2},
            image_token_id=IMAGE,
            scale_factor=2,
        ),
        (3, 16.0),
        IDEFICS_INPUTS,
    ),
    "mistral3": (
        lambda: Mistral3Config(
            text_config={"model_type": "mistral", **TEXT, "sliding_window": 6},
            vision_config=PixtralVisionConfig(**VISION, image_size=8, patch_size=2),
            image_token_index=IMAGE,
            spatial_merge_size=2,
            tie_word_embeddings=False,
        ),
        (6, 16.0),
        {"pixel_values": PIXELS, "image_sizes": torch.tensor([[8, 8]])},
    ),
    "paligemma": (  # whose positions count from 1
        lambda: PaliGemmaConfig(
            text_config={"model_type": "gemma", **TEXT},
            vision_config=SiglipVisionConfig(**VISION, image_size=8, patch_size=4, projection_dim=32),
            image_token_index=IMAGE,
            hidden_size=32,
            projection_dim=32,
            tie_word_embeddings=False,
        ),
        (3, 16.0),
        {"pixel_values": PIXELS},
    ),
    "qwen2_vl": (
        lambda: Qwen2VLConfig(
            text_config=QWEN_TEXT,
            vision_config={**QWEN_VISION, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
            **QWEN_TOKENS,
        ),
        (5, 16.0),
        QWEN_INPUTS,
    ),
    "qwen2_5_vl": (
        lambda: Qwen2_5_VLConfig(
            text_config=QWEN_TEXT,
            vision_config={
                **QWEN_VISION,
                "hidden_size": 16,
                "out_hidden_size": 32,
                "intermediate_size": 32,
                "window_size": 8,
                "fullatt_block_indexes": [1],
            },
            **QWEN_TOKENS,
        ),
        (0, 16.0),
        QWEN_INPUTS,
    ),
}


@pytest.fixture(params=WRAPPERS)
def wrapper(request) -> str:
    return request.param


def make_wrapper(name: str) -> PreTrainedModel:
    make_config, (seed, scale), _ = WRAPPERS[name]
    set_seed(seed)
    target = AutoModelForImageTextToText.from_config(make_config()).eval()
    target.generation_config.eos_token_id = None
    with torch.no_grad():
        for parameter in target.parameters():
            if parameter.dim() > 1 and not parameter.any():  # Gemma's projector
                parameter.normal_(0, 0.02)
    widened(target.get_decoder(), scale)
    widened(target.lm_head, scale)
    return target


def image_inputs(name: str, rows: int) -> dict[str, torch.Tensor]:
    """A prompt with an image of four tokens; in a batch a second one, longer and with the image elsewhere."""
    image = torch.tensor([[IMAGE_START, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE_END]])
    first, second = (make_prompt(length, seed=length) for length in (5, 9))
    prompts = [torch.cat((first[:, :2], image, first[:, 2:]), 1), torch.cat((second[:, :5], image, second[:, 5:]), 1)]
    inputs = left_padded(prompts[:rows])
    is_image = (inputs["input_ids"] == IMAGE).long()
    if name in ("gemma3", "paligemma"):
        inputs["token_type_ids"] = is_image
    elif name.startswith("qwen"):
        inputs["mm_token_type_ids"] = is_image
    return inputs | {key: torch.cat([value] * rows) for key, value in WRAPPERS[name][2].items()}


def test_wrappers_with_text(wrapper, shape, inputs, same_text):
    target = make_wrapper(wrapper)
    same_text(target, drafter_for(target, shape), inputs)


@pytest.mark.parametrize("rows", [1, 2])
def test_wrappers_with_images(wrapper, shape, rows, same_text):
    target, inputs = make_wrapper(wrapper), image_inputs(wrapper, rows)
    text = same_text(target, drafter_for(target, shape), inputs)
    inputs["pixel_values"] = -inputs["pixel_values"]
    assert greedy(target, inputs) != text, "the image makes no difference, so the text shows nothing"
    assert len(set(text[0][-24:])) > 5, "the text repeats itself, so it shows little"
