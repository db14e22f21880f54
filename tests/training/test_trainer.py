"""The recursive training through `Trainer`."""

import copy
import functools
import math

import pytest
import torch
from conftest import make_poss, make_target

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
        "seed": 3,
    }
    return PosSTrainingArguments(**{**defaults, **kwargs})


def trained_weights(target, samples, args) -> dict[str, torch.Tensor]:
    poss = make_poss(target, positions_per_specialist=2, num_draft_positions=3)
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


def test_defaults_are_those_of_the_public_code(tmp_path):
    args = PosSTrainingArguments(tmp_path)
    assert (args.learning_rate, args.adam_beta1, args.adam_beta2) == (3e-5, 0.9, 0.95)
    assert (args.feature_loss_weight, args.token_loss_weight, args.topk_loss_weight, args.loss_top_k) == (
        1,
        0.1,
        0,
        10,
    )
    assert (args.max_grad_value, args.feature_noise, args.warmup_steps) == (0.5, 0.2, 0.01)
    assert args.lr_scheduler_type == "linear"


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"max_length": 1}, "max_length"),
        ({"token_loss_weight": -1.0}, "token_loss_weight"),
        ({"feature_loss_weight": 0.0, "token_loss_weight": 0.0}, "All loss weights"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, wrong, told):
    with pytest.raises(ValueError, match=told):
        PosSTrainingArguments(tmp_path, **wrong)


def test_gradient_entries_are_clipped(target, samples, tmp_path):
    """Plain SGD with rate 1 moves an entry by its gradient: with a huge loss, by the limit at most."""
    huge = {"feature_loss_weight": 1e6, "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant"}
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
        features = target_features(target, ids)
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
    args = arguments(tmp_path, max_steps=600, learning_rate=3e-3, feature_loss_weight=0.2, token_loss_weight=1.0)
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
