"""Losses by name, against sums element by element in float64, and in chunks against the whole."""

import math

import pytest
import torch
from torch import nn

from hf_poss import PosSConfig
from hf_poss import losses as losses_module
from hf_poss.draft_vocabulary import DraftHead
from hf_poss.losses import LOSSES, TargetRows, parse_losses, roll_out_losses, row_losses
from hf_poss.modeling_poss import TargetReference


VOCAB, HIDDEN = 11, 8


def softmax(logits: list[float]) -> list[float]:
    highest = max(logits)
    total = sum(math.exp(x - highest) for x in logits)
    return [math.exp(x - highest) / total for x in logits]


def slow_losses(predicted, target, logits, target_logits, top_k, vocabulary) -> dict[str, float]:
    """All losses of one row. `logits` are of the draft vocabulary, `target_logits` of the full one."""
    feature = 0.0
    for a, b in zip(predicted.tolist(), target.tolist(), strict=True):
        distance = abs(a - b)
        feature += 0.5 * distance**2 if distance < 1 else distance - 0.5
    full = softmax(target_logits.tolist())
    p, q = [full[token] for token in vocabulary], softmax(logits.tolist())
    parts = sorted(((x, -x * math.log(y)) for x, y in zip(p, q, strict=True)), reverse=True)
    return {
        "feature": feature / len(predicted),
        "token": sum(part for _, part in parts),
        "topk": sum(part for _, part in parts[:top_k]),
        "kl": sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)),
        "acceptance": 1 - sum(map(min, p, q)),
    }


def make_head(vocabulary=None, head=None) -> DraftHead:
    torch.manual_seed(1)
    config = PosSConfig(vocab_size=VOCAB, hidden_size=HIDDEN, num_attention_heads=2)
    head = head or nn.Linear(HIDDEN, VOCAB)
    return DraftHead(TargetReference(nn.Embedding(VOCAB, HIDDEN), head, config), vocabulary)


PAPER_LOSSES = {"feature": 1.0, "token": 0.1}
VOCABULARIES = {"all": None, "some": torch.tensor([7, 0, 3, 10])}


@pytest.mark.parametrize("vocabulary", VOCABULARIES.values(), ids=VOCABULARIES)
@pytest.mark.parametrize("top_k", [1, 3, 50])
def test_losses_of_a_row(top_k, vocabulary):
    head = make_head(vocabulary)
    torch.manual_seed(0)
    predicted, target = 2 * torch.randn(2, 5, HIDDEN)
    with torch.no_grad():
        rows, logits = TargetRows.of(head, target), head.logits(predicted)
        target_logits = head.reference.lm_head(target)
        found = row_losses(LOSSES, predicted, logits, rows, top_k)
    tokens = range(VOCAB) if vocabulary is None else vocabulary.tolist()
    slow = [
        slow_losses(predicted[row], target[row], logits[row], target_logits[row], min(top_k, len(tokens)), tokens)
        for row in range(5)
    ]
    expected = torch.tensor([[row[name] for row in slow] for name in LOSSES])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert rows.tokens.tolist() == [max(range(VOCAB), key=row.tolist().__getitem__) for row in target_logits]


def test_a_perfect_drafter_has_nothing_to_lose_but_the_targets_entropy():
    head = make_head()
    features = torch.randn(4, HIDDEN)
    with torch.no_grad():
        rows = TargetRows.of(head, features)
        found = dict(zip(LOSSES, row_losses(LOSSES, features, head.logits(features), rows), strict=True))
    for name in ("feature", "kl", "acceptance"):
        assert found[name].abs().max() < 1e-6
    assert found["token"].min() > 0.1


@pytest.mark.parametrize("kind", ["matrix", "another class"])
@pytest.mark.parametrize("vocabulary", VOCABULARIES.values(), ids=VOCABULARIES)
@pytest.mark.parametrize("entries", [1, 3 * VOCAB, 10**6])
def test_chunks_add_up_to_the_whole(entries, vocabulary, kind, monkeypatch):
    """Values and gradients are those of autograd over all rows at once."""

    class OtherLinear(nn.Linear):
        pass

    head = make_head(vocabulary, OtherLinear(HIDDEN, VOCAB) if kind == "another class" else None)
    monkeypatch.setattr(losses_module, "CHUNK_ENTRIES", entries)
    torch.manual_seed(0)
    batch, rows, weights = 3, 5, [1.0, 0.5]
    losses = {name: 0.3 + index for index, name in enumerate(LOSSES)}
    target = torch.randn(batch, rows, HIDDEN)
    predictions = [torch.randn(batch, rows, HIDDEN, requires_grad=True) for _ in weights]
    counted = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()

    found = roll_out_losses(predictions, target, counted, head, losses, weights, top_k=2)
    (3 * found.total).backward()
    gradients = [prediction.grad.clone() for prediction in predictions]

    expected = 0
    for position, (prediction, weight) in enumerate(zip(predictions, weights, strict=True)):
        prediction.grad = None
        logits = head.logits(prediction)
        by_row = row_losses(
            list(losses), prediction.flatten(0, 1), logits.flatten(0, 1), TargetRows.of(head, target.flatten(0, 1)), 2
        ).view(-1, batch, rows)
        by_row = by_row * counted
        torch.testing.assert_close(found.sums[:, :, position], by_row.sum(-1).T, rtol=1e-5, atol=1e-5)
        expected = expected + (by_row.sum((1, 2)) * torch.tensor(list(losses.values()))).sum() * weight
        drafted = logits.argmax(-1) if vocabulary is None else vocabulary[logits.argmax(-1)]
        assert torch.equal(found.tokens[:, position][counted], drafted[counted])
    (3 * expected).backward()
    torch.testing.assert_close(found.total, expected)
    for gradient, prediction in zip(gradients, predictions, strict=True):
        torch.testing.assert_close(gradient, prediction.grad, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.target_tokens[counted], head.reference.logits(target).argmax(-1)[counted])
    assert head.reference.lm_head.weight.grad is None


def test_without_gradients_nothing_asks_for_them():
    head = make_head()
    features = torch.randn(1, 3, HIDDEN)
    found = roll_out_losses([features], features, torch.ones(1, 3).bool(), head, PAPER_LOSSES, [1.0])
    assert not found.total.requires_grad
    assert found.sums[0, 0, 0] == 0


def test_no_row_that_counts_is_no_loss():
    features = torch.randn(2, 3, HIDDEN, requires_grad=True)
    found = roll_out_losses([features], features.detach(), torch.zeros(2, 3).bool(), make_head(), PAPER_LOSSES, [1.0])
    found.total.backward()
    assert found.total == 0 and not features.grad.any()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, {"token": 1.0}),
        ("token=1.0", {"token": 1.0}),
        ("token", {"token": 1.0}),
        (" feature=1 , topk = 0.5 ", {"feature": 1.0, "topk": 0.5}),
        ('{"kl": 1, "acceptance": 0.5}', {"kl": 1.0, "acceptance": 0.5}),
        ({"token": 1, "feature": 0}, {"token": 1.0}),
    ],
)
def test_losses_are_read_from_text_and_mappings(given, expected):
    assert parse_losses(given) == expected


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("hidden=1", "no loss 'hidden'; expected some of feature, token, topk, kl, acceptance"),
        ("token=much", "'token' is 'much'; expected a number"),
        ({"token": None}, "'token' is None; expected a number"),
        ("token=-1", "expected 0 or more"),
        ("token=nan", "expected 0 or more"),
        ("token=0", "No loss has a weight"),
        ("", "No loss has a weight"),
        ({}, "No loss has a weight"),
        ("token=1,token=2", "name one twice"),
        ("{token}", "no JSON"),
    ],
)
def test_losses_that_mean_nothing_are_refused(given, told):
    with pytest.raises(ValueError, match=told):
        parse_losses(given)
