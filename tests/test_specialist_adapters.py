"""LoRA specialists: one full layer, an adapter for each specialist, and nothing else different."""

import copy
import pickle

import pytest
import torch
from conftest import TOP_K, VOCAB_SIZE, drafter_for, left_padded, make_poss, make_prompt, make_target, small_target
from safetensors.torch import load_file, save_file
from test_remote_code import run_script
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModel, set_seed

from hf_poss import PosSModel, limits
from hf_poss.demo import demo_folder, load_demo_pair


peft = pytest.importorskip("peft")

RANK = 4
ADAPTER = {"r": RANK, "lora_alpha": 6}
ROWS = 12


@pytest.fixture(scope="module")
def target():
    return make_target("llama", scale=3.0)


def adapted(target, specialist_adapter=ADAPTER, **kwargs) -> PosSModel:
    """LoRA specialists that differ: adapters start at zero, and these are somewhere else."""
    settings = {"positions_per_specialist": 2, "num_draft_positions": 6, **kwargs}
    return moved(make_poss(target, specialist_adapter=specialist_adapter, **settings))


def moved(poss: PosSModel) -> PosSModel:
    set_seed(1)
    with torch.no_grad():
        for name, parameter in poss.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    return poss


def inputs() -> tuple[torch.Tensor, torch.LongTensor]:
    """Features [2, rows, hidden] and next tokens [2, rows]."""
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(2, ROWS, 32, generator=generator)
    return features, torch.randint(0, VOCAB_SIZE, (2, ROWS), generator=generator)


@torch.no_grad()
def predictions(poss: PosSModel) -> torch.Tensor:
    """[positions, 2, rows, hidden]"""
    return torch.stack(poss.roll_out(*inputs()))


def full_layers(poss: PosSModel, target) -> PosSModel:
    """Specialists of full layers with the weights that LoRA stands for: W + scaling * B A."""
    adapter = poss.config.specialist_adapter
    root = adapter["r"] ** 0.5 if adapter["use_rslora"] else adapter["r"]
    config = {"positions_per_specialist": 2, "num_draft_positions": poss.config.num_draft_positions}
    full = make_poss(target, **config)
    full.fc.load_state_dict(poss.fc.state_dict())
    state = poss.state_dict()
    for index, layer in enumerate(full.layers):
        weights = {name: weight.clone() for name, weight in poss.shared_layer.state_dict().items()}
        for name in adapter["target_modules"]:
            part = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            key = f"layers.{index}.{part}.{name}"
            a, b = (state[f"{key}.lora_{part}.specialist.weight"] for part in "AB")
            weights[f"{part}.{name}.weight"] += adapter["lora_alpha"] / root * b @ a
        layer.load_state_dict(weights)
    return full


# ---- What they compute ----


def test_specialists_start_equal_to_the_layer_that_they_share(target):
    poss = make_poss(target, positions_per_specialist=2, num_draft_positions=6, specialist_adapter=ADAPTER)
    assert all(parameter.any() != ("lora_B" in name or "bias" in name) for name, parameter in poss.named_parameters())
    torch.testing.assert_close(predictions(poss), predictions(full_layers(poss, target)))


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"target_modules": ["q_proj", "down_proj"]}], ids=["all", "rslora", "two"]
)
def test_predictions_are_those_of_full_layers_with_the_sums(target, settings):
    poss = adapted(target, {**ADAPTER, **settings})
    full = full_layers(poss, target)
    layers = [layer.self_attn.q_proj.weight for layer in full.layers]
    assert not torch.equal(layers[0], layers[1]) and not torch.equal(layers[1], layers[2])
    torch.testing.assert_close(predictions(poss), predictions(full), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", TOP_K)
def test_drafts_are_lossless(shape):
    target = small_target()
    poss = moved(drafter_for(target, shape, specialist_adapter=ADAPTER))
    rows = left_padded([make_prompt(7), make_prompt(12, seed=2)])
    plain = target.generate(**rows, max_new_tokens=24, do_sample=False)
    assert torch.equal(target.generate(**rows, max_new_tokens=24, do_sample=False, assistant_model=poss), plain)


def test_no_projection_is_merged_or_switched_on_the_way():
    target = small_target()
    poss = moved(drafter_for(target, "tree", specialist_adapter=ADAPTER))
    before = copy.deepcopy(poss.state_dict())
    projections = [module for module in poss.modules() if isinstance(module, peft.tuners.lora.Linear)]
    assert len(projections) == 7 * poss.config.num_specialists
    target.generate(make_prompt(7), max_new_tokens=24, do_sample=False, assistant_model=poss)
    for projection in projections:
        assert not projection.merged and not projection.disable_adapters
        assert projection.active_adapters == list(projection.lora_A)
    assert all(torch.equal(weight, before[name]) for name, weight in poss.state_dict().items())


# ---- What they weigh ----


def test_only_adapters_grow_with_the_number_of_specialists(target):
    poss = [adapted(target, positions_per_specialist=n, num_draft_positions=6) for n in (6, 3, 1)]
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in poss]
    hidden, intermediate, queries, keys = 32, 64, 32, 16
    adapter = RANK * (7 * hidden + 2 * queries + 2 * keys + 3 * intermediate)
    layer = 2 * hidden * (queries + keys) + 3 * hidden * intermediate + hidden
    assert counts == [2 * hidden**2 + hidden + layer + specialists * adapter for specialists in (1, 2, 6)]
    assert [model.num_parameters() for model in poss] == counts
    assert [len(model.layers) for model in poss] == [1, 2, 6]


def test_a_saved_folder_holds_every_weight_once(target, tmp_path):
    poss = adapted(target)
    poss.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert sum(weight.numel() for weight in saved.values()) == poss.num_parameters()


def test_the_check_of_memory_counts_what_is_made(target, monkeypatch):
    poss = adapted(target)
    monkeypatch.setattr(limits, "device_memory", lambda device: int(4.1 * poss.num_parameters()))
    limits.check_size(poss.config)
    with pytest.raises(ValueError, match="need about"):
        limits.check_size(make_poss(target, positions_per_specialist=2, num_draft_positions=6).config)
    monkeypatch.setattr(limits, "device_memory", lambda device: int(3.5 * poss.num_parameters()))
    with pytest.raises(ValueError, match="need about"):
        limits.check_size(poss.config)


# ---- Learning ----


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_one_backward_reaches_the_shared_layer_and_every_adapter(target, checkpointing):
    poss = adapted(target)
    if checkpointing:
        poss.gradient_checkpointing_enable()
    features, tokens = inputs()
    poss.train()(input_ids=tokens, features=features).loss.backward()
    assert [name for name, p in poss.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_shared_layer_learns_from_all_specialists(target):
    """Its gradient is the sum of those of the full layers that it stands for."""
    poss = adapted(target).train()
    full = full_layers(poss, target).train()
    features, tokens = inputs()
    for model in (poss, full):
        model(input_ids=tokens, features=features).loss.backward()
    of_layers = sum(layer.mlp.up_proj.weight.grad for layer in full.layers)
    torch.testing.assert_close(poss.shared_layer.mlp.up_proj.weight.grad, of_layers, rtol=1e-3, atol=1e-6)


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_sharding_a_specialist_leaves_what_it_shares_to_the_model(target, process_group):
    """FSDP gathers the weights of a specialist while it runs; the shared layer is needed by all of them."""
    poss = adapted(target).train()
    features, tokens = inputs()
    poss(input_ids=tokens, features=features).loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in poss.named_parameters()}
    poss.zero_grad()
    mesh = init_device_mesh("cpu", (1,))
    units = [module for module in poss.modules() if type(module).__name__ in poss._no_split_modules]
    assert len(units) == poss.config.num_specialists
    for module in (*units, poss):
        fully_shard(module, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in poss.parameters())
    poss(input_ids=tokens, features=features).loss.backward()
    for name, parameter in poss.named_parameters():
        torch.testing.assert_close(parameter.grad.full_tensor(), gradients[name])


# ---- Copies, dtypes, files ----


def test_a_copy_shares_with_itself_alone(target):
    poss = adapted(target)
    before = predictions(poss)
    clone = copy.deepcopy(poss)
    assert torch.equal(predictions(clone), before)
    with torch.no_grad():
        clone.shared_layer.mlp.up_proj.weight.zero_()
    assert not torch.equal(predictions(clone), before)
    assert torch.equal(predictions(poss), before)
    poss.reference = None
    again = pickle.loads(pickle.dumps(poss)).attach(target)
    assert torch.equal(predictions(again), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_cast_reaches_what_is_shared(target, dtype):
    poss = adapted(target)
    exact = predictions(poss)
    poss.to(dtype)
    assert {parameter.dtype for parameter in poss.parameters()} == {dtype}
    assert predictions(poss).dtype == dtype
    torch.testing.assert_close(predictions(poss).float(), exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("auto", [PosSModel, AutoModel], ids=["class", "auto"])
def test_saving_and_loading(target, tmp_path, auto):
    poss = adapted(target, {**ADAPTER, "target_modules": ["v_proj", "gate_proj"]})
    poss.save_pretrained(tmp_path)
    again, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(predictions(again.attach(target)), predictions(poss))
    half = auto.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_a_checkpoint_that_lacks_an_adapter_is_refused(target, tmp_path):
    adapted(target).save_pretrained(tmp_path)
    file, key = tmp_path / "model.safetensors", "layers.1.mlp.up_proj.lora_B.specialist.weight"
    state = load_file(file)
    del state[key]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"missing: {key}"):
        PosSModel.from_pretrained(tmp_path)


def test_a_checkpoint_of_full_layers_is_not_taken_for_adapters(target, tmp_path):
    make_poss(target).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"missing: .*lora_A.*unexpected: layers\.0"):
        PosSModel.from_pretrained(tmp_path, specialist_adapter={"r": 2})


def test_weights_made_on_meta_start_as_they_should(target):
    config = adapted(target).config
    with torch.device("meta"):
        poss = PosSModel(config)
    assert {parameter.device.type for parameter in poss.parameters()} == {"meta"}
    poss.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in poss.parameters():
            parameter.fill_(7.0)
    for module in poss.modules():
        module._is_hf_initialized = False
    poss.init_weights()
    for name, parameter in poss.named_parameters():
        assert parameter.abs().max() < (1e-9 if "lora_B" in name else 1.1)
        assert "lora_A" not in name or parameter.std() > 1e-3


# ---- Starting from an EAGLE layer ----


def test_an_eagle_layer_becomes_the_shared_one(target, tmp_path):
    eagle = make_poss(target, positions_per_specialist=1, num_draft_positions=1)
    eagle.save_pretrained(tmp_path)
    poss = PosSModel.from_eagle(tmp_path, 2, 6, specialist_adapter={"r": 3})
    assert poss.config.specialist_adapter["r"] == 3 and len(poss.layers) == 3
    copies = PosSModel.from_eagle(tmp_path, 2, 6)
    torch.testing.assert_close(predictions(poss.attach(target)), predictions(copies.attach(target)))


def test_an_eagle_checkpoint_with_an_adapter_is_refused(target, tmp_path):
    adapted(target, positions_per_specialist=1, num_draft_positions=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="one full layer.*from_pretrained"):
        PosSModel.from_eagle(tmp_path)


# ---- Another adapter around them ----


def test_peft_around_lora_specialists_is_refused():
    target = small_target()
    poss = drafter_for(target, "tree", specialist_adapter=ADAPTER)
    with pytest.warns(UserWarning, match="second time"):
        model = peft.get_peft_model(poss, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="LoRA adapters already"):
        target.generate(make_prompt(5), max_new_tokens=4, assistant_model=model)


# ---- Without the package ----


WITHOUT_PACKAGE = """
poss = AutoModel.from_pretrained(tree_folder, trust_remote_code=True)
report["module"] = type(poss).__module__
report["adapter"] = type(poss.layers[1].mlp.up_proj).__module__
report["shared"] = poss.layers[1].mlp.up_proj.base_layer is poss.layers[0].mlp.up_proj.base_layer
report["plain"] = run(inputs)[0]
report["drafted"] = run(inputs, custom_generate=tree_folder, trust_remote_code=True)[0]
poss.save_pretrained(sys.argv[4])
again = AutoModel.from_pretrained(sys.argv[4], trust_remote_code=True).state_dict()
report["resaved"] = all(torch.equal(weight, again[name]) for name, weight in poss.state_dict().items())
print(json.dumps(report))
"""


def test_a_saved_folder_works_without_the_package(tmp_path):
    demo_target = load_demo_pair()[0]
    moved(make_poss(demo_target, specialist_adapter=ADAPTER)).save_pretrained(tmp_path / "poss-lora")
    folder = str(tmp_path / "poss-lora")
    report = run_script(
        WITHOUT_PACKAGE, tmp_path, False, str(demo_folder() / "target"), folder, folder, str(tmp_path / "again")
    )
    assert not report["package"] and report["module"].startswith("transformers_modules.")
    assert report["adapter"].startswith("peft.tuners.lora") and report["shared"]
    assert report["drafted"] == report["plain"]
    assert report["resaved"]
