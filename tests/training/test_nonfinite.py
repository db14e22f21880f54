"""Words about a step that is not finite."""

import torch

from hf_poss.training.nonfinite import WatchedBatch, describe_features, describe_step, rows_not_finite


def batch(first_token: int, sums: torch.Tensor) -> WatchedBatch:
    return WatchedBatch(torch.arange(first_token, first_token + 8).view(2, 4), sums.sum(), sums)


def test_rows_with_one_bad_value():
    values = torch.zeros(3, 2, 2)
    values[1, 1, 0], values[2, 0, 1] = float("nan"), -float("inf")
    assert rows_not_finite(values).tolist() == [False, True, True]


def test_the_sample_and_its_loss_are_named():
    good, bad = torch.ones(2, 2, 3), torch.ones(2, 2, 3)
    bad[1, 1, 2] = float("nan")
    text = describe_step("Step 7", [batch(0, good), batch(40, bad)], ["feature", "token"])
    assert "Step 7" in text
    assert "batch 2 of 2, sample 2 of 2 (token loss of position 3): tokens [44, 45, 46, 47]" in text
    assert "[0, 1" not in text and "[40, 41" not in text


def test_gradients_alone_name_what_the_step_was_made_of():
    text = describe_step("Step 7", [batch(40, torch.ones(2, 2, 3))], ["feature", "token"])
    assert "gradients" in text and "[40, 41, 42, 43]" in text


def test_float16_features_are_advised_to_bfloat16():
    ids, bad = torch.arange(8).view(2, 4), torch.tensor([False, True])
    half = describe_features("Step 1", ids, bad, torch.float16)
    assert "sample 2 of 2: tokens [4, 5, 6, 7]" in half and "float16: load it in bfloat16" in half
    assert "range of float16" not in describe_features("Step 1", ids, bad, torch.float32)
