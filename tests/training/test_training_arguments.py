"""Training arguments: where their defaults come from, and the ways in and out of them."""

import dataclasses
import json

import pytest
from transformers import HfArgumentParser

from hf_poss import PosSTrainingArguments


def test_defaults_are_those_of_the_public_code_but_for_the_loss(tmp_path):
    args = PosSTrainingArguments(tmp_path)
    assert (args.learning_rate, args.adam_beta1, args.adam_beta2) == (3e-5, 0.9, 0.95)
    assert args.losses == {"token": 1.0}
    assert args.weights_of_positions(6) is None
    assert (args.max_grad_value, args.feature_noise, args.warmup_steps) == (0.5, 0.2, 0.01)
    assert args.lr_scheduler_type == "linear"


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"max_length": 1}, "max_length"),
        ({"losses": "token=1,tokn=1"}, "'tokn'"),
        ({"losses": {"feature": 0.0}}, "above 0"),
        ({"losses": "token=-1"}, "token"),
        ({"loss_decay": -0.5}, "loss_decay"),
        ({"loss_top_k": 0}, "loss_top_k"),
        ({"position_weights": [1.0, -1.0]}, "position_weights"),
        ({"position_weights": [0.0, 0.0]}, "position_weights"),
        ({"feature_noise": float("nan")}, "feature_noise"),
        ({"eval_generate_tokens": 0}, "eval_generate_tokens"),
        ({"neftune_noise_alpha": 5.0}, "feature_noise"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor.*losses"),
        ({"use_liger_kernel": True}, "use_liger_kernel"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, wrong, told):
    with pytest.raises(ValueError, match=told):
        PosSTrainingArguments(tmp_path, **wrong)


@pytest.mark.parametrize(
    ("given", "losses"),
    [
        ([], {"token": 1.0}),
        (["--losses", "feature=1.0,token=0.1"], {"feature": 1.0, "token": 0.1}),
        (["--losses", '{"kl": 1, "acceptance": 0.5}'], {"kl": 1.0, "acceptance": 0.5}),
    ],
)
def test_losses_come_from_the_command_line_and_through_json(tmp_path, given, losses):
    parser = HfArgumentParser(PosSTrainingArguments)
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), *given])
    assert args.losses == losses
    saved = json.loads(args.to_json_string())
    (again,) = parser.parse_dict({name: saved[name] for name in ("output_dir", "losses", "position_weights")})
    assert again.losses == losses
    assert dataclasses.replace(args, seed=1).losses == losses
    assert dataclasses.asdict(args)["losses"] == losses
    assert all(isinstance(value, (bool, int, float, str)) for value in args.to_sanitized_dict().values())


def test_decay_and_weights_multiply(tmp_path):
    (args,) = HfArgumentParser(PosSTrainingArguments).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--loss_decay", "0.5", "--position_weights", "1", "3", "2"]
    )
    assert args.weights_of_positions(3) == [1.0, 1.5, 0.5]
    with pytest.raises(ValueError, match="3 entries.*4 draft positions"):
        args.weights_of_positions(4)
    assert PosSTrainingArguments(tmp_path, loss_decay=0.8).weights_of_positions(3) == pytest.approx([1, 0.8, 0.64])
