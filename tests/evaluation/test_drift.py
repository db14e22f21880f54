"""Feature drift against drafting itself, one round at a time."""

import pytest
import torch
from conftest import VOCAB_SIZE, make_target
from torch.nn import functional as F

from hf_poss import PosSModel
from hf_poss.evaluation.drift import feature_drift
from hf_poss.measures import DriftSums
from hf_poss.training.features import target_features


DEPTH = 4


@pytest.fixture
def pair():
    target = make_target(scale=3.0)
    torch.manual_seed(0)
    return target, PosSModel.from_target(target, positions_per_specialist=2, num_draft_positions=DEPTH).eval()


@torch.no_grad()
def by_hand(target, poss, ids, counted=None, begin=0) -> DriftSums:
    """Drift of one text [tokens] without padding: each round drafted alone, every token of the text accepted.

    A round that begins behind token r feeds position 1 the features of tokens 0..r and the tokens 1..r + 1, as one
    sequence, and each later position its predecessor's feature with the next token behind it.
    """
    features, _ = target_features(target, ids[None])
    features, sums = features[0], DriftSums()
    poss.attach(target)
    for r in range(begin, len(ids) - 1):
        rows = features[begin : r + 1]
        for k in range(1, DEPTH + 1):
            token = r + k  # whose feature position k predicts
            if token >= len(ids):
                break
            fused = poss.fuse(poss.reference.embed(ids[None, begin + 1 : token + 1], like=rows), rows[None])
            places = torch.arange(fused.shape[1])[None]
            layer = poss.specialist(k)
            rotary = poss.rotary(fused, places)
            keys, values = layer.keys_values(fused, rotary)
            heads = layer.queries(fused, rotary)
            groups = heads.shape[1] // keys.shape[1]
            attended = F.scaled_dot_product_attention(
                heads[:, :, -1:], keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
            )
            predicted = layer.complete(fused[:, -1:], attended)[0, 0]
            rows = torch.cat([rows, predicted[None]])
            if counted is None or counted[token]:
                cosine = F.cosine_similarity(predicted.double(), features[token].double(), dim=0)
                ratio = predicted.double().norm() / features[token].double().norm()
                empty = [0] * (k - 1)
                sums += DriftSums([*empty, 1], [*empty, cosine.item()], [*empty, ratio.item()])
    return sums


def assert_same(drift, expected):
    assert drift.rows == expected.rows
    assert drift.cosine == pytest.approx(expected.cosine, abs=1e-4)
    assert drift.norm_ratio == pytest.approx(expected.norm_ratio, abs=1e-4)


def test_drift_is_that_of_rounds_drafted_one_by_one(pair):
    ids = torch.randint(3, VOCAB_SIZE, (12,), generator=torch.Generator().manual_seed(1))
    assert_same(feature_drift(*pair, ids[None]), by_hand(*pair, ids))


def test_tokens_that_do_not_count_are_left_out(pair):
    ids = torch.randint(3, VOCAB_SIZE, (12,), generator=torch.Generator().manual_seed(1))
    counted = torch.arange(12) >= 7
    assert_same(feature_drift(*pair, ids[None], counted=counted[None]), by_hand(*pair, ids, counted))


def test_padding_on_either_side_changes_nothing(pair):
    generator = torch.Generator().manual_seed(2)
    long, short = (torch.randint(3, VOCAB_SIZE, (size,), generator=generator) for size in (12, 8))
    expected = by_hand(*pair, long) + by_hand(*pair, short)
    for left in (True, False):
        padding = (4, 0) if left else (0, 4)
        ids = torch.stack([long, F.pad(short, padding)])
        mask = torch.stack([torch.ones_like(long), F.pad(torch.ones_like(short), padding)])
        assert_same(feature_drift(*pair, ids, mask), expected)


def test_the_attached_target_stays(pair):
    target, poss = pair
    reference = poss.reference
    feature_drift(target, poss, torch.randint(3, VOCAB_SIZE, (1, 6)))
    assert poss.reference is reference


def test_a_drafter_that_returns_the_targets_features_does_not_drift(pair, monkeypatch):
    target, poss = pair
    ids = torch.randint(3, VOCAB_SIZE, (2, 9))
    wanted = target_features(target, ids)[1][:, 1:]
    monkeypatch.setattr(PosSModel, "roll_out", lambda *args, **kwargs: (wanted, 2 * wanted))
    drift = feature_drift(target, poss, ids)
    assert drift.mean_cosine == pytest.approx([1.0, 1.0], abs=1e-6)
    assert drift.mean_norm_ratio == pytest.approx([1.0, 2.0], abs=1e-6)
    assert drift.rows == [16, 14]
