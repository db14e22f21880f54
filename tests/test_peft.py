"""peft around specialists, and around the target that they learn from."""

import copy
import json

import pytest
import torch
from conftest import TOP_K, VOCAB_SIZE, drafter_for, left_padded, make_poss, make_prompt, make_target, small_target
from transformers import set_seed

from hf_poss import PosSModel, PosSTrainer, PosSTrainingArguments, collect_statistics
from hf_poss.modeling_poss import is_poss, poss_of
from hf_poss.peft_models import without_peft
from hf_poss.pipelines import _load_assistant_model
from hf_poss.training.features import target_features


peft = pytest.importorskip("peft")

# Methods that change weights, each with the names of its parameters left to peft.
METHODS = {
    "lora": lambda: peft.LoraConfig(target_modules=["q_proj", "down_proj", "fc"]),
    "all-linear": lambda: peft.LoraConfig(target_modules="all-linear"),
    "causal_lm": lambda: peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    "one_specialist": lambda: peft.LoraConfig(target_modules=r"layers\.1\..*_proj"),
    "modules_to_save": lambda: peft.LoraConfig(target_modules=["v_proj"], modules_to_save=["fc"]),
    "dora": lambda: peft.LoraConfig(target_modules=["k_proj", "up_proj"], use_dora=True),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": lambda: peft.VeraConfig(target_modules=["q_proj", "o_proj"], r=4),
}
FEW = ["lora", "causal_lm", "dora", "ia3"]
ROWS = 10


@pytest.fixture(scope="module")
def target():
    return make_target("llama", scale=3.0)


@pytest.fixture
def poss(target) -> PosSModel:
    return make_poss(target, positions_per_specialist=2, num_draft_positions=4)


@pytest.fixture(scope="module")
def samples() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist()} for n in (9, 24, 17, 30)]


def moved(model):
    """Adapters begin without effect; these have one."""
    set_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def wrapped(poss: PosSModel, method: str = "lora"):
    return moved(peft.get_peft_model(poss, METHODS[method]()))


@torch.no_grad()
def predictions(model) -> torch.Tensor:
    """[positions, 2, rows, hidden]"""
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(2, ROWS, 32, generator=generator)
    tokens = torch.randint(0, VOCAB_SIZE, (2, ROWS), generator=generator)
    return torch.stack(poss_of(model).roll_out(features, tokens))


# ---- What is inside ----


def test_the_specialists_in_a_wrapper(poss, target):
    model = peft.get_peft_model(poss, METHODS["lora"]())
    mixed = peft.get_peft_model(make_poss(target), METHODS["lora"](), mixed=True)
    assert poss_of(poss) is poss_of(model) is poss
    assert isinstance(poss_of(mixed), PosSModel)
    assert is_poss(model) and is_poss(mixed)
    of_target = peft.get_peft_model(make_target("llama"), METHODS["lora"]())
    for other in (None, target, of_target, "me/PosS2", torch.nn.Linear(2, 2)):
        assert poss_of(other) is None and not is_poss(other)


# ---- Merging, saving, loading ----


@pytest.mark.parametrize("method", METHODS)
def test_merging_saving_and_loading(poss, target, method, tmp_path):
    fresh, base = copy.deepcopy(poss), predictions(poss)
    model = wrapped(poss, method)
    adapted = predictions(model)
    assert (adapted - base).abs().max() > 1e-4
    with model.disable_adapter():
        assert torch.equal(predictions(model), base)

    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    torch.testing.assert_close(predictions(again), adapted)

    merged = model.merge_and_unload()
    assert type(merged) is PosSModel
    torch.testing.assert_close(predictions(merged), adapted, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    loaded = PosSModel.from_pretrained(tmp_path / "merged").attach(target)
    assert torch.equal(predictions(loaded), predictions(merged))


def test_an_adapter_s_file_holds_the_adapter_alone(poss, tmp_path):
    wrapped(poss).save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    state = peft.load_peft_weights(str(tmp_path), device="cpu")
    assert len(state) == 2 * (1 + 2 * poss.config.num_specialists) and all("lora_" in name for name in state)


def test_without_target_modules_peft_asks_for_them(poss):
    with pytest.raises(ValueError, match="target_modules"):
        peft.get_peft_model(poss, peft.LoraConfig())


# ---- Drafting ----


def accepted(target, rows, model) -> tuple[torch.Tensor, list[int]]:
    with collect_statistics() as stats:
        text = target.generate(**rows, max_new_tokens=24, do_sample=False, assistant_model=model)
    return text, stats.accepted


@pytest.mark.parametrize("shape", TOP_K)
@pytest.mark.parametrize("method", FEW)
def test_a_wrapper_drafts_what_its_merged_specialists_draft(method, shape):
    target = small_target()
    rows = left_padded([make_prompt(7), make_prompt(12, seed=2)])
    plain = target.generate(**rows, max_new_tokens=24, do_sample=False)
    base = drafter_for(target, shape)
    _, of_base = accepted(target, rows, base)
    model = wrapped(base, method)
    text, of_wrapper = accepted(target, rows, model)
    assert torch.equal(text, plain)
    with model.disable_adapter():
        text, of_disabled = accepted(target, rows, model)
    assert torch.equal(text, plain) and of_disabled == of_base
    text, of_merged = accepted(target, rows, model.merge_and_unload())
    assert torch.equal(text, plain) and of_merged == of_wrapper


def test_the_active_adapter_drafts():
    target = small_target()
    rows = {"input_ids": make_prompt(9)}
    model = wrapped(drafter_for(target, "tree"))
    _, first = accepted(target, rows, model)
    model.add_adapter("second", METHODS["lora"]())
    model.set_adapter("second")  # which has no effect yet
    _, second = accepted(target, rows, model)
    assert second == accepted(target, rows, drafter_for(target, "tree"))[1] != first
    model.set_adapter("default")
    assert accepted(target, rows, model)[1] == first


def test_mixed_adapters_draft():
    target = small_target()
    plain = target.generate(make_prompt(9), max_new_tokens=24, do_sample=False)
    model = peft.get_peft_model(drafter_for(target, "tree"), METHODS["lora"](), mixed=True)
    model.add_adapter("second", peft.LoHaConfig(target_modules=["k_proj"], r=2))
    model.set_adapter(["default", "second"])
    text, _ = accepted(target, {"input_ids": make_prompt(9)}, moved(model))
    assert torch.equal(text, plain)


def test_dropout_while_drafting_is_told(warnings_seen):
    target = small_target()
    model = peft.get_peft_model(drafter_for(target, "chain"), peft.LoraConfig(target_modules=["fc"], lora_dropout=0.5))
    for mode, warnings in (("eval", 0), ("train", 1), ("train", 1)):
        getattr(model, mode)()
        target.generate(make_prompt(9), max_new_tokens=4, do_sample=False, assistant_model=model)
        assert sum("poss.eval()" in warning for warning in warnings_seen()) == warnings


def test_a_pipeline_takes_a_wrapper(target, poss):
    model = wrapped(poss)
    assert _load_assistant_model(target, model, None) == (model, None)


# ---- Training ----


def trained(model, target, samples, folder, **kwargs) -> PosSTrainer:
    settings = {"max_steps": 3, "learning_rate": 1e-2, "feature_noise": 0.0, "use_cpu": True, "disable_tqdm": True}
    args = PosSTrainingArguments(folder, **{**settings, "save_strategy": "no", "seed": 3, **kwargs})
    trainer = PosSTrainer(model, target, args, train_dataset=samples)
    trainer.train()
    return trainer


@pytest.mark.parametrize("method", ["lora", "causal_lm", "ia3"])
def test_the_trainer_moves_adapters_and_nothing_else(poss, target, samples, method, tmp_path):
    model = peft.get_peft_model(poss, METHODS[method]())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    trained(model, target, samples, tmp_path)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == trainable


def test_checkpoints_hold_the_adapter_and_resume_from_it(poss, target, samples, tmp_path):
    start = copy.deepcopy(poss)
    whole = trained(
        peft.get_peft_model(poss, METHODS["lora"]()), target, samples, tmp_path, save_strategy="steps", save_steps=2
    )
    checkpoint = tmp_path / "checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").is_file()
    assert not (checkpoint / "model.safetensors").exists()
    again = peft.get_peft_model(start, METHODS["lora"]())
    args = copy.copy(whole.args)
    trainer = PosSTrainer(again, target, args, train_dataset=samples)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(predictions(again), predictions(whole.model))


def test_a_draft_vocabulary_that_an_adapter_does_not_hold_is_told(target, samples, tmp_path, warnings_seen):
    poss = make_poss(target, num_draft_positions=2, draft_vocab_size=8)
    args = PosSTrainingArguments(tmp_path, use_cpu=True, report_to="none")
    PosSTrainer(peft.get_peft_model(poss, METHODS["lora"]()), target, args, train_dataset=samples)
    assert (poss.draft_vocabulary >= 0).all()
    assert any("an adapter do not hold it" in warning for warning in warnings_seen())


def test_lora_specialists_train(target, samples, tmp_path):
    poss = make_poss(target, positions_per_specialist=2, num_draft_positions=4, specialist_adapter={"r": 4})
    before = copy.deepcopy(poss.state_dict())
    trained(poss, target, samples, tmp_path)
    assert all(not torch.equal(weight, before[name]) for name, weight in poss.state_dict().items())


# ---- An adapted target ----


def adapted_target(**kwargs):
    return moved(peft.get_peft_model(make_target("llama", scale=3.0), peft.LoraConfig(**kwargs)))


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_training_reads_the_target_through_its_adapter(task, poss, samples, tmp_path):
    """The same steps as with the merged target, and not those of the target without."""
    merged = adapted_target(target_modules=["q_proj", "down_proj"]).merge_and_unload()
    weights = {}
    for name, target in {
        "adapted": adapted_target(target_modules=["q_proj", "down_proj"], task_type=task),
        "merged": merged,
        "base": make_target("llama", scale=3.0),
    }.items():
        model = copy.deepcopy(poss)
        trained(
            model, target, samples, tmp_path / name, optim="sgd", losses="feature=1.0,token=0.1", learning_rate=0.1
        )
        weights[name] = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    torch.testing.assert_close(weights["adapted"], weights["merged"], rtol=1e-3, atol=1e-5)
    assert (weights["adapted"] - weights["base"]).abs().max() > 1e-3


def test_features_follow_the_adapter():
    target = adapted_target(target_modules="all-linear", task_type="CAUSAL_LM")
    inside, tokens = without_peft(target), make_prompt(8, vocab=VOCAB_SIZE)
    on = target_features(inside, tokens)[0]
    torch.testing.assert_close(on, target(input_ids=tokens, output_hidden_states=True).hidden_states[-1])
    with target.disable_adapter():
        assert not torch.allclose(target_features(inside, tokens)[0], on, atol=1e-3)


def test_specialists_read_head_and_embedding_of_an_adapted_target():
    target = adapted_target(target_modules=["lm_head", "embed_tokens"], task_type="CAUSAL_LM")
    for poss in (PosSModel.from_target(target), make_poss(make_target("llama")).attach(target)):
        assert poss.reference.lm_head is target.get_output_embeddings()
        assert poss.reference.embed_tokens is target.get_input_embeddings()
        assert isinstance(poss.reference.lm_head, peft.tuners.lora.LoraLayer)


def test_virtual_tokens_are_refused(poss, samples, tmp_path):
    config = peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    target = peft.get_peft_model(make_target("llama"), config)
    for use in (
        lambda: poss.attach(target),
        lambda: PosSModel.from_target(target),
        lambda: PosSTrainer(poss, target, PosSTrainingArguments(tmp_path, use_cpu=True), train_dataset=samples),
    ):
        with pytest.raises(ValueError, match="virtual tokens"):
            use()
