"""Samples to batches."""

import pytest
import torch

from hf_poss.training import PosSDataCollator


def test_batches_are_padded_right_and_count_no_padding():
    batch = PosSDataCollator(pad_token_id=7)(
        [{"input_ids": [5, 6]}, {"input_ids": [1, 2, 3, 4], "labels": [1, -100, 3, 4], "length": 4}]
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7, 7], [1, 2, 3, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    # The feature of the first token is not predicted by anything.
    assert batch["labels"].tolist() == [[-100, 6, -100, -100], [-100, -100, 3, 4]]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_a_batch_of_single_tokens_counts_nothing():
    batch = PosSDataCollator(pad_token_id=7)([{"input_ids": [5]}, {"input_ids": [6]}])
    assert batch["input_ids"].tolist() == [[5, 7], [6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 0]]
    assert batch["labels"].tolist() == [[-100, -100]] * 2


def test_packed_samples():
    packed = {"input_ids": [1, 2, 3, 4, 5], "labels": [1, 2, 3, -100, 5], "segment_ids": [1, 1, 2, 2, 2]}
    batch = PosSDataCollator()([packed, {"input_ids": [8, 9, 8]}])
    assert batch["segment_ids"].tolist() == [[1, 1, 2, 2, 2], [1, 1, 1, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, -100, -100, 5], [-100, 9, 8, -100, -100]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_stored_features():
    features = [torch.randn(2, 6, dtype=torch.bfloat16), torch.randn(3, 6, dtype=torch.bfloat16)]
    last = [torch.randn(2, 4), torch.randn(3, 4)]
    samples = [
        {"input_ids": list(range(1, len(feature) + 1)), "features": feature, "target_features": target}
        for feature, target in zip(features, last, strict=True)
    ]
    batch = PosSDataCollator()(samples)
    assert batch["features"].shape == (2, 3, 6) and batch["features"].dtype == torch.bfloat16
    assert batch["target_features"].shape == (2, 3, 4)
    for index, sample in enumerate(samples):
        length = len(sample["input_ids"])
        for name in ("features", "target_features"):
            assert torch.equal(batch[name][index, :length], sample[name])
            assert not batch[name][index, length:].any()


@pytest.mark.parametrize(
    ("samples", "told"),
    [
        ([{"input_ids": [1, 2], "labels": [1]}], "2 `input_ids` and 1 `labels`"),
        ([{"input_ids": [1, 2], "segment_ids": [1, 1, 1]}], "2 `input_ids` and 3 `segment_ids`"),
        ([{"input_ids": [1, 2], "features": torch.zeros(3, 4)}], "2 `input_ids` and 3 `features`"),
        ([{"input_ids": [1, 2], "features": torch.zeros(2, 4)}, {"input_ids": [1, 2]}], "1 of 2 samples"),
    ],
)
def test_parts_that_do_not_fit(samples, told):
    with pytest.raises(ValueError, match=told):
        PosSDataCollator()(samples)
