"""The recursive training through `Trainer`."""

import copy
import functools
import json
import math

import pytest
import torch
from conftest import make_poss, make_target
from transformers import EarlyStoppingCallback, TrainingArguments

from hf_poss import PosSTrainer, PosSTrainingArguments, collect_statistics
from hf_poss.training.features import target_features


LENGTHS = (9, 24, 5, 17, 30, 12, 8, 21)


@pytest.fixture(scope="module")
def target():
    return make_target("llama", scale=3.0)


@pytest.fixture(scope="module")
def samples() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(3, 97, (length,), generator=generator).tolist()} for length in LENGTHS]


def arguments(folder, **kwargs) -> PosSTrainingArguments:
    defaults = {
        "output_dir": folder,
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_steps": 2,
        "feature_noise": 0.0,
        "learning_rate": 1e-2,
        "losses": "feature=1.0,token=0.1",  # two, so that sums over losses are seen
        "seed": 3,
    }
    return PosSTrainingArguments(**{**defaults, **kwargs})


def trained_weights(target, samples, args, positions: int = 3) -> dict[str, torch.Tensor]:
    poss = make_poss(target, positions_per_specialist=2, num_draft_positions=positions)
    PosSTrainer(poss, target, args, train_dataset=samples).train()
    return {name: weight.detach().clone() for name, weight in poss.state_dict().items()}


def test_accumulated_steps_equal_one_large_batch(target, samples, tmp_path):
    """Samples differ in length: averaging the means of small batches would weigh short ones too much."""
    sgd = {"optim": "sgd", "learning_rate": 0.3}
    one = trained_weights(target, samples, arguments(tmp_path / "one", per_device_train_batch_size=8, **sgd))
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    four = trained_weights(target, samples, arguments(tmp_path / "four", **split, **sgd))
    start = make_poss(target, positions_per_specialist=2, num_draft_positions=3).state_dict()
    moved = max((one[name] - start[name]).abs().max() for name in one)
    assert moved > 1e-3
    for name in one:
        torch.testing.assert_close(one[name], four[name], rtol=1e-4, atol=1e-6)


def test_target_stays_as_it_is(target, samples, tmp_path):
    before = copy.deepcopy(target.state_dict())
    trained_weights(target, samples, arguments(tmp_path))
    assert all(torch.equal(before[name], weight) for name, weight in target.state_dict().items())
    assert all(parameter.grad is None for parameter in target.parameters())


def test_gradient_entries_are_clipped(target, samples, tmp_path):
    """Plain SGD with rate 1 moves an entry by its gradient: with a huge loss, by the limit at most."""
    huge = {"losses": {"feature": 1e6}, "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant"}
    start = make_poss(target, positions_per_specialist=2, num_draft_positions=3).state_dict()
    steps = {}
    for limit in (0.5, None):
        args = arguments(
            tmp_path, max_steps=1, warmup_steps=0, per_device_train_batch_size=8, max_grad_value=limit, **huge
        )
        end = trained_weights(target, samples, args)
        steps[limit] = max((end[name] - start[name]).abs().max().item() for name in end)
    assert steps[0.5] == pytest.approx(0.5, rel=1e-4)
    assert steps[None] > 10


def test_noise_is_in_the_inputs_and_only_while_training(target, samples, tmp_path, monkeypatch):
    seen = []
    poss = make_poss(target, positions_per_specialist=2, num_draft_positions=3)
    forward = type(poss).forward

    @functools.wraps(forward)  # the trainer reads the names of labels off the signature
    def spy(self, **kwargs):
        noise = (kwargs["features"] - kwargs["target_features"]).abs().max().item()
        seen.append((self.training, noise, kwargs["input_ids"].shape[1]))
        return forward(self, **kwargs)

    monkeypatch.setattr(type(poss), "forward", spy)
    args = arguments(tmp_path, feature_noise=0.2, per_device_train_batch_size=8, per_device_eval_batch_size=8)
    trainer = PosSTrainer(poss, target, args, train_dataset=samples, eval_dataset=samples)
    trainer.train()
    trainer.evaluate()
    training = [(noise, length) for is_training, noise, length in seen if is_training]
    assert len(training) == 2
    for noise, length in training:
        widest = 0.2 * 512 / length / 2
        assert 0.9 * widest < noise <= widest * 1.001
    assert [noise for is_training, noise, _ in seen if not is_training] == [0.0]


def test_evaluation_counts_what_a_slow_simulation_counts(target, samples, tmp_path):
    poss = make_poss(target, positions_per_specialist=2, num_draft_positions=3, seed=5)
    args = arguments(tmp_path, per_device_eval_batch_size=3)
    metrics = PosSTrainer(poss, target, args, eval_dataset=samples).evaluate()

    hits, rows = [0] * 3, 0
    reached, accepted = [0] * 3, [0] * 3
    for sample in samples:
        ids = torch.tensor([sample["input_ids"]])
        features, _ = target_features(target, ids)
        with torch.no_grad():
            predictions = poss.roll_out(features[:, :-1], ids[:, 1:])
        wanted = target.lm_head(features[0, 1:]).argmax(-1).tolist()
        drafted = [target.lm_head(prediction[0]).argmax(-1).tolist() for prediction in predictions]
        rows += len(wanted)
        for k in range(3):
            hits[k] += sum(a == b for a, b in zip(drafted[k], wanted, strict=True))
        for first in range(len(wanted)):
            for k in range(3):
                if first + k >= len(wanted):
                    break
                reached[k] += 1
                if drafted[k][first + k] != wanted[first + k]:
                    break
                accepted[k] += 1
    assert sum(accepted) > 0
    tau, chain = 1.0, 1.0
    for k in range(3):
        assert metrics[f"eval_accuracy_{k + 1}"] == pytest.approx(hits[k] / rows)
        rate = accepted[k] / max(reached[k], 1)
        assert metrics[f"eval_pos_acc_{k + 1}"] == pytest.approx(rate)
        chain *= rate
        tau += chain
    assert metrics["eval_tau"] == pytest.approx(tau)
    assert math.isfinite(metrics["eval_loss"])


def test_checkpoints_resume(target, samples, tmp_path):
    """Half of the way, then the rest from the checkpoint: the same weights as in one go, noise included."""
    noisy = {"feature_noise": 0.2, "max_steps": 6, "per_device_train_batch_size": 2}
    straight = trained_weights(target, samples, arguments(tmp_path / "straight", **noisy))
    stops = arguments(tmp_path / "stops", save_strategy="steps", save_steps=3, **noisy)
    trained_weights(target, samples, stops)
    poss = make_poss(target, seed=99, positions_per_specialist=2, num_draft_positions=3)
    trainer = PosSTrainer(poss, target, stops, train_dataset=samples)
    trainer.train(resume_from_checkpoint=str(tmp_path / "stops" / "checkpoint-3"))
    for name, weight in poss.state_dict().items():
        torch.testing.assert_close(weight, straight[name], rtol=1e-5, atol=1e-7)


def test_overfitting_one_text_makes_generate_accept_all(tmp_path):
    target = make_target("llama")
    knobs = {"max_new_tokens": 56, "do_sample": False, "eos_token_id": None}
    prompt = torch.tensor([[11, 5, 60, 33, 8, 71, 29, 4]])
    wanted = target.generate(prompt, **knobs)
    poss = make_poss(target, positions_per_specialist=2, num_draft_positions=4)
    args = arguments(tmp_path, max_steps=180, learning_rate=1e-2, losses="feature=0.2,token=1.0")
    PosSTrainer(poss, target, args, train_dataset=[{"input_ids": wanted[0].tolist()}]).train()
    poss.eval().generation_config.draft_top_k = 1
    with collect_statistics() as stats:
        output = target.generate(prompt, assistant_model=poss, **knobs)
    assert torch.equal(output, wanted)
    assert stats.tau > 0.9 * (4 + 1)


def test_other_target_is_refused(samples, tmp_path):
    poss = make_poss(make_target("llama"), num_draft_positions=3)
    other = make_target("llama")
    other.config.vocab_size = 12
    with pytest.raises(ValueError, match="vocabulary of 97 tokens"):
        PosSTrainer(poss, other, arguments(tmp_path), train_dataset=samples)


@pytest.mark.parametrize("dataset", [["some text"], [{"text": "some text"}]])
def test_text_without_a_tokenizer_is_refused(target, dataset, tmp_path):
    poss = make_poss(target, num_draft_positions=3)
    with pytest.raises(ValueError, match="processing_class"):
        PosSTrainer(poss, target, arguments(tmp_path), train_dataset=dataset)


# ---- Watching ----


def by_position(metrics: dict[str, float], prefix: str = "") -> dict[str, float]:
    """Of a log what belongs to draft positions, and tau."""
    kinds = ("loss_feature_", "loss_token_", "accuracy_", "pos_acc_", "tau")
    return {
        name.removeprefix(prefix): value
        for name, value in metrics.items()
        if name.startswith(prefix) and name.removeprefix(prefix).startswith(kinds)
    }


def test_logs_sum_over_the_steps_since_the_last_log(target, samples, tmp_path):
    """With weights that stand still, a log of one epoch says what an evaluation of the same samples says."""
    poss = make_poss(target, positions_per_specialist=2, num_draft_positions=3, seed=5)
    args = arguments(
        tmp_path,
        learning_rate=0.0,
        per_device_train_batch_size=2,
        max_steps=8,
        logging_steps=4,
        eval_generate_prompts=0,
    )
    trainer = PosSTrainer(poss, target, args, train_dataset=samples, eval_dataset=samples)
    trainer.train()
    expected = by_position(trainer.evaluate(), "eval_")
    assert len(expected) == 4 * 3 + 1
    logs = [by_position(log) for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2
    for log in logs:
        assert log == pytest.approx(expected, rel=1e-5)


def test_evaluation_loss_weighs_rows(target, samples, tmp_path):
    """Whatever the batches: a mean over rows, not over batches of samples that differ in length."""
    poss = make_poss(target, positions_per_specialist=2, num_draft_positions=3, seed=5)
    losses = []
    for size in (1, 3, 8):
        args = arguments(
            tmp_path, per_device_eval_batch_size=size, position_weights=[1.0, 0.5, 0.25], eval_generate_prompts=0
        )
        losses.append(PosSTrainer(poss, target, args, eval_dataset=samples).evaluate()["eval_loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_evaluation_drafts_for_real(target, samples, tmp_path):
    poss = make_poss(target, positions_per_specialist=2, num_draft_positions=3, seed=5)
    args = arguments(tmp_path, eval_generate_prompts=3, eval_generate_tokens=20, per_device_eval_batch_size=2)
    metrics = PosSTrainer(poss, target, args, eval_dataset=samples).evaluate()
    with collect_statistics() as expected:
        for sample in samples[:3]:
            prompt = torch.tensor([sample["input_ids"][: len(sample["input_ids"]) // 2]])
            target.generate(prompt, assistant_model=poss.eval(), max_new_tokens=20, do_sample=False)
    assert metrics["eval_generate_tau"] == pytest.approx(expected.tau)
    assert metrics["eval_generate_pos_acc_1"] == pytest.approx(expected.pos_acc[0])
    none = arguments(tmp_path, eval_generate_prompts=0)
    assert "eval_generate_tau" not in PosSTrainer(poss, target, none, eval_dataset=samples).evaluate()


def test_the_best_checkpoint_by_real_drafts(target, samples, tmp_path):
    """Weights that stand still do not get better: stops after two evaluations more, with those of the first."""
    poss = make_poss(target, positions_per_specialist=2, num_draft_positions=3, seed=5)
    args = arguments(
        tmp_path,
        max_steps=9,
        learning_rate=0.0,
        eval_generate_tokens=8,
        load_best_model_at_end=True,
        metric_for_best_model="generate_tau",
        save_total_limit=1,
        **dict.fromkeys(("eval_strategy", "save_strategy"), "steps"),
        **dict.fromkeys(("eval_steps", "save_steps"), 1),
    )
    stop = EarlyStoppingCallback(early_stopping_patience=2)
    trainer = PosSTrainer(poss, target, args, train_dataset=samples, eval_dataset=samples, callbacks=[stop])
    trainer.train()
    assert trainer.state.global_step == 3
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    assert trainer.state.best_metric == pytest.approx(trainer.evaluate()["eval_generate_tau"])


def test_evaluations_of_several_sets(target, samples, tmp_path):
    poss = make_poss(target, num_draft_positions=3)
    args = arguments(tmp_path, eval_do_concat_batches=False, per_device_eval_batch_size=3, eval_generate_tokens=8)
    trainer = PosSTrainer(poss, target, args, eval_dataset={"a": samples, "b": samples[:3]})
    metrics = trainer.evaluate()
    assert {"eval_a_tau", "eval_b_tau", "eval_a_generate_tau", "eval_b_generate_tau"} <= metrics.keys()
    assert trainer.training_record().eval_samples is None
    assert trainer.predict(samples).metrics["test_tau"] == pytest.approx(metrics["eval_a_tau"])


def test_learned_positions_are_not_left(samples, tmp_path):
    """An OPT knows 512 positions: a prompt of 500 tokens leaves no room for 64 more, longer samples cannot be read."""
    target = make_target("opt", scale=3.0)
    poss = make_poss(target, num_draft_positions=3)
    tokens = [token for sample in samples for token in sample["input_ids"]] * 5
    sample = {"input_ids": tokens[:500], "labels": [-100] * 490 + tokens[490:500]}
    metrics = PosSTrainer(poss, target, arguments(tmp_path), eval_dataset=[sample]).evaluate()
    assert metrics["eval_generate_tau"] >= 1
    with pytest.raises(ValueError, match="513 tokens; the target learned 512 positions"):
        PosSTrainer(poss, target, arguments(tmp_path), train_dataset=[{"input_ids": tokens[:513]}])


def test_evaluation_changes_nothing(target, samples, tmp_path):
    """The same weights as without evaluations: neither noise nor order of the data take notice."""
    noisy = {"feature_noise": 0.2, "max_steps": 5, "per_device_train_batch_size": 2}
    without = trained_weights(target, samples, arguments(tmp_path / "without", **noisy))
    poss = make_poss(target, positions_per_specialist=2, num_draft_positions=3)
    args = arguments(tmp_path / "with", eval_strategy="steps", eval_steps=1, eval_generate_tokens=8, **noisy)
    trainer = PosSTrainer(poss, target, args, train_dataset=samples, eval_dataset=samples)
    trainer.train()
    assert sum("eval_tau" in log for log in trainer.state.log_history) == 5
    for name, weight in poss.state_dict().items():
        assert torch.equal(weight, without[name])
    poss.train()
    trainer.evaluate()
    assert poss.training


def test_a_drop_at_a_boundary_is_warned_about(target, samples, tmp_path, monkeypatch, warnings_seen):
    """Counts of a second specialist that cannot read the first: pos-acc 0.9, 0.8, then 0.4."""
    poss = make_poss(target, positions_per_specialist=2, num_draft_positions=4)
    forward = type(poss).forward
    reached = torch.tensor([100, 100, 100, 100])

    @functools.wraps(forward)
    def scripted_counts(self, **kwargs):
        output = forward(self, **kwargs)
        accepted = torch.tensor([90, 80, third, third])
        output.counts = torch.stack([reached, accepted, reached, accepted]).expand(len(kwargs["input_ids"]), 4, 4)
        return output

    monkeypatch.setattr(type(poss), "forward", scripted_counts)
    trainer = PosSTrainer(poss, target, arguments(tmp_path, eval_generate_prompts=0), eval_dataset=samples)
    third = 75
    trainer.evaluate()
    assert not any("pos-acc" in warning for warning in warnings_seen())
    third = 40
    assert trainer.evaluate()["eval_pos_acc_3"] == pytest.approx(0.4)
    (warning,) = (warning for warning in warnings_seen() if "pos-acc" in warning)
    assert "0.80 at draft position 2 to 0.40 at 3" in warning


POISON = 96


@pytest.fixture
def poisoned(samples) -> list[dict[str, list[int]]]:
    """Samples in their order, the sixth of which has a token that the others lack."""
    clean = [{"input_ids": [3 if token == POISON else token for token in s["input_ids"]]} for s in samples]
    return [*clean[:5], {"input_ids": [7, 8, POISON, 9, 10]}, *clean[6:]]


def in_order(folder, **kwargs) -> PosSTrainingArguments:
    return arguments(
        folder, train_sampling_strategy="sequential", per_device_train_batch_size=2, max_steps=4, **kwargs
    )


def train_until_it_stops(poss, target, samples, args) -> tuple[str, PosSTrainer]:
    """The error, after a check that the weights are those of the last sound step."""
    trainer = PosSTrainer(poss, target, args, train_dataset=samples)
    with pytest.raises(ValueError) as error:
        trainer.train()
    assert all(torch.isfinite(weight).all() for weight in poss.parameters())
    return str(error.value), trainer


def test_features_that_are_not_finite_stop_the_run(poisoned, tmp_path):
    target = make_target("llama")
    with torch.no_grad():
        target.get_input_embeddings().weight[POISON] = float("inf")
    poss = make_poss(target, num_draft_positions=3)
    text, trainer = train_until_it_stops(poss, target, poisoned, in_order(tmp_path))
    assert trainer.state.global_step == 2
    assert "Step 3: the target's features" in text and "sample 2 of 2: tokens [7, 8, 96, 9, 10" in text
    with pytest.raises(ValueError, match=r"Evaluation: the target's features(.|\n)*\[7, 8, 96"):
        trainer.evaluate(poisoned)


def test_features_beyond_float16_ask_for_bfloat16(poisoned, tmp_path):
    """Finite in float32, infinite in float16."""
    target = make_target("llama")
    with torch.no_grad():
        target.model.norm.weight.fill_(6e4)
    samples = [{"input_ids": sample["input_ids"]} for sample in poisoned]
    text, _ = train_until_it_stops(
        make_poss(target, num_draft_positions=3), target.half(), samples, in_order(tmp_path)
    )
    assert "range of float16: load it in bfloat16" in text


def test_a_loss_that_is_not_finite_names_its_batch(target, poisoned, tmp_path):
    """Accumulated over two batches, the second of which goes wrong."""
    poss = make_poss(target, num_draft_positions=3)
    spoilt = []

    def look(module, args, kwargs):
        spoilt.append(kwargs["input_ids"][:, 1:, None] == POISON)

    poss.register_forward_pre_hook(look, with_kwargs=True)
    poss.fc.register_forward_hook(lambda module, args, output: output.masked_fill(spoilt[-1], float("nan")))
    args = in_order(tmp_path, gradient_accumulation_steps=2)
    text, trainer = train_until_it_stops(poss, target, poisoned, args)
    assert trainer.state.global_step == 1
    assert "Step 2: the loss is NaN" in text
    assert "batch 1 of 2, sample 2 of 2" in text and "tokens [7, 8, 96, 9, 10" in text
    assert "feature loss of position 1" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_stop_the_run(target, poisoned, tmp_path, value):
    """An infinite one would be clipped to an innocent size."""
    poss = make_poss(target, num_draft_positions=3)
    calls = []

    def spoil(gradient):
        calls.append(1)
        return gradient if len(calls) < 3 else gradient.index_fill(0, torch.tensor([0]), value)

    poss.fc.bias.register_hook(spoil)
    text, trainer = train_until_it_stops(poss, target, poisoned, in_order(tmp_path))
    assert trainer.state.global_step == 2
    assert "Step 3: gradients" in text and str(poisoned[4]["input_ids"][:4])[1:-1] in text


@pytest.mark.parametrize(("scale", "step"), [(0.5, 1), (4.0, 4)])
def test_a_loss_scaler_that_cannot_help_is_not_waited_for(target, poisoned, tmp_path, scale, step):
    """It skips the steps and halves its scale: 4, 2, 1; by less than 1 the gradients would be finite."""
    poss = make_poss(target, num_draft_positions=3)
    poss.fc.bias.register_hook(lambda gradient: gradient * float("inf"))
    trainer = PosSTrainer(poss, target, in_order(tmp_path), train_dataset=poisoned)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    with pytest.raises(ValueError, match=f"Step {step}: gradients are NaN"):
        trainer.train()


# ---- Losses and inputs ----


def test_weights_of_positions_reach_their_specialists(target, samples, tmp_path):
    poss = make_poss(target, positions_per_specialist=1, num_draft_positions=3)
    start = copy.deepcopy(poss.state_dict())
    args = arguments(tmp_path, optim="sgd", position_weights=[1.0, 0.0, 1.0], losses="token=1.0")
    PosSTrainer(poss, target, args, train_dataset=samples).train()
    moved = {name for name, weight in poss.state_dict().items() if not torch.equal(weight, start[name])}
    assert {name.split(".")[1] for name in moved if name.startswith("layers.")} == {"0", "2"}


def test_decay_is_a_weight(target, samples, tmp_path):
    sgd = {"optim": "sgd", "learning_rate": 0.3}
    one = trained_weights(target, samples, arguments(tmp_path, loss_decay=0.5, **sgd))
    other = trained_weights(target, samples, arguments(tmp_path, position_weights=[1.0, 0.5, 0.25], **sgd))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_position_weights_of_another_depth_are_refused(target, samples, tmp_path):
    poss = make_poss(target, num_draft_positions=3)
    with pytest.raises(ValueError, match="2 entries.*3 draft positions"):
        PosSTrainer(poss, target, arguments(tmp_path, position_weights=[1.0, 1.0]), train_dataset=samples)


@pytest.mark.parametrize("layers", [None, [0, 1, 2]])
def test_stored_features_train_as_online_ones(target, samples, tmp_path, layers):
    weights = []
    for stored in (False, True):
        poss = make_poss(target, positions_per_specialist=2, num_draft_positions=3, feature_layers=layers)
        dataset = samples
        if stored:
            dataset = []
            for sample in samples:
                features, last = target_features(target, torch.tensor([sample["input_ids"]]), feature_layers=layers)
                parts = {"features": features[0]} | ({} if layers is None else {"target_features": last[0]})
                dataset.append({**sample, **parts})
        args = arguments(tmp_path, optim="sgd", learning_rate=0.3, per_device_train_batch_size=4)
        PosSTrainer(poss, target, args, train_dataset=dataset).train()
        weights.append(poss.state_dict())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-4, atol=1e-6)


def test_draft_vocabulary_comes_from_the_data(target, tmp_path):
    samples = [{"input_ids": [5, 6, 6, 7, 7, 7, 8, 8, 8, 8] * 2}] * 8
    poss = make_poss(target, num_draft_positions=2, draft_vocab_size=4)
    trainer = PosSTrainer(poss, target, arguments(tmp_path, losses="token=1.0"), train_dataset=samples)
    assert set(poss.draft_vocabulary.tolist()) == {2, 8, 7, 6}  # the end of a sequence always
    trainer.train()
    chosen = poss.draft_vocabulary.clone()
    other = [{"input_ids": [20, 21, 22, 23] * 5}] * 8
    PosSTrainer(poss, target, arguments(tmp_path), train_dataset=other)
    assert torch.equal(poss.draft_vocabulary, chosen)  # learnt with, so kept


@pytest.mark.parametrize(
    "settings",
    [{"gradient_checkpointing": True}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}],
    ids=["checkpointed", "compiled"],
)
def test_same_weights_in_other_ways(target, tmp_path, settings):
    samples = [{"input_ids": list(range(first, first + 12))} for first in (3, 20, 40, 60)]
    sgd = {"optim": "sgd", "learning_rate": 0.3, "max_steps": 2, "per_device_train_batch_size": 2}
    plain = trained_weights(target, samples, arguments(tmp_path / "plain", **sgd), positions=2)
    other = trained_weights(target, samples, arguments(tmp_path / "other", **sgd, **settings), positions=2)
    for name, weight in plain.items():
        torch.testing.assert_close(other[name], weight, rtol=1e-4, atol=1e-5)


def test_half_precision_keeps_full_weights(samples, tmp_path):
    target = make_target("llama", scale=3.0).bfloat16()
    poss = make_poss(target, num_draft_positions=3).float()
    args = arguments(tmp_path, bf16=True, logging_steps=1, max_steps=20, per_device_train_batch_size=8)
    trainer = PosSTrainer(poss, target, args, train_dataset=samples, eval_dataset=samples)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < 0.9 * losses[0]
    assert {parameter.dtype for parameter in poss.parameters()} == {torch.float32}
    assert math.isfinite(trainer.evaluate()["eval_generate_tau"])


def test_a_peft_model_trains_its_adapter(target, samples, tmp_path):
    peft = pytest.importorskip("peft")
    poss = make_poss(target, positions_per_specialist=2, num_draft_positions=3)
    before = {name: weight.clone() for name, weight in poss.named_parameters()}
    torch.manual_seed(0)
    model = peft.get_peft_model(poss, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    args = arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=4)
    trainer = PosSTrainer(model, target, args, train_dataset=samples, eval_dataset=samples)
    trainer.train()
    for name, weight in poss.named_parameters():
        if "lora_" not in name:
            assert torch.equal(weight, before[name.replace(".base_layer", "")])
    assert trainer.estimate.trained == sum(p.numel() for name, p in poss.named_parameters() if "lora_" in name)
    assert any(weight.abs().max() > 0 for name, weight in poss.named_parameters() if "lora_B" in name)
    assert "eval_generate_tau" in trainer.evaluate()
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").is_file()


def test_a_stream_trains(target, samples, tmp_path):
    from datasets import IterableDataset

    stream = IterableDataset.from_generator(lambda: iter(samples))
    poss = make_poss(target, num_draft_positions=2, draft_vocab_size=20)
    trainer = PosSTrainer(poss, target, arguments(tmp_path), train_dataset=stream, eval_dataset=stream)
    trainer.train()
    assert trainer.state.global_step == 2 and trainer.estimate.tokens_per_epoch is None
    assert (poss.draft_vocabulary >= 0).all()
    assert "eval_generate_tau" in trainer.evaluate()


def test_other_arguments_are_refused(target, samples, tmp_path):
    poss = make_poss(target, num_draft_positions=3)
    with pytest.raises(ValueError, match="TrainingArguments; expected PosSTrainingArguments"):
        PosSTrainer(poss, target, TrainingArguments(tmp_path, use_cpu=True), train_dataset=samples)


def test_other_models_are_refused(target, samples, tmp_path):
    with pytest.raises(ValueError, match="LlamaForCausalLM; expected a PosSModel"):
        PosSTrainer(target, target, arguments(tmp_path), train_dataset=samples)


# ---- What is kept of a run ----


def test_a_run_leaves_a_record_and_a_card(target, samples, tmp_path):
    poss = make_poss(target, positions_per_specialist=2, num_draft_positions=3, target_name_or_path="me/target")
    args = arguments(tmp_path, losses="token=1.0", eval_generate_tokens=8)
    trainer = PosSTrainer(poss, target, args, train_dataset=samples, eval_dataset=samples[:3])
    trainer.provenance = {"datasets": ["me/data"], "init_from": "me/eagle"}
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card()
    record = json.loads((tmp_path / "training_record.json").read_text())
    assert (record["samples"], record["tokens"], record["eval_samples"]) == (8, sum(LENGTHS), 3)
    assert (record["losses"], record["num_draft_positions"], record["positions_per_specialist"]) == (
        {"token": 1},
        3,
        2,
    )
    assert (record["datasets"], record["init_from"]) == (["me/data"], "me/eagle")
    assert record["metrics"]["eval_tau"] == pytest.approx(metrics["eval_tau"])
    assert record["generate_tau"] == pytest.approx(metrics["eval_generate_tau"])
    assert record["hyperparameters"]["steps"] == 2
    assert (tmp_path / "README.md").is_file() and (tmp_path / "model.safetensors").is_file()


def test_resuming_other_specialists_is_refused(target, samples, tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=2)
    trained_weights(target, samples, args)
    other = make_poss(target, positions_per_specialist=1, num_draft_positions=3)
    trainer = PosSTrainer(other, target, args, train_dataset=samples)
    with pytest.raises(ValueError, match="positions_per_specialist"):
        trainer.train(resume_from_checkpoint=True)
