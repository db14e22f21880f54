"""The test of sampled tokens: how often it fails a sound sampler, and how surely it finds others."""

import pytest
import torch
from scipy.stats import binom, chi2

from hf_poss.evaluation.check.distribution import RankCounts, Sampling


RUNS = 400
CHANCE = 1e-4  # that a test of this file fails by bad luck, were its seeds free


def distributions(draws: int, vocab: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2.5 * torch.randn(draws, vocab, generator=generator)).softmax(-1)


def drafts_of(probabilities: torch.Tensor) -> torch.LongTensor:
    """A drafter that proposes the second most likely token, and nothing at every fourth place."""
    drafts = probabilities.topk(2, dim=-1).indices[:, 1]
    drafts[::4] = -1
    return drafts


def p_values(vocab: int, sampler, draws: int = 300) -> list[float]:
    generator = torch.Generator().manual_seed(vocab)
    found = []
    for run in range(RUNS):
        probabilities = distributions(draws, vocab, run)
        counts = RankCounts()
        tokens = torch.multinomial(sampler(probabilities), 1, generator=generator)[:, 0]
        counts.add(probabilities, tokens, drafts_of(probabilities))
        found.append(counts.p_value())
    return found


@pytest.mark.parametrize("vocab", [2, 3, 12, 100])
def test_a_sound_sampler_fails_as_often_as_is_said(vocab):
    """Every token from another distribution, as in texts."""
    found = p_values(vocab, lambda probabilities: probabilities)
    for rate in (0.5, 0.1, 0.02):
        low, high = binom.ppf([CHANCE / 6, 1 - CHANCE / 6], RUNS, rate)
        assert low <= sum(p < rate for p in found) <= high


@pytest.mark.parametrize(
    "sampler",
    [
        lambda p: 0.75 * p + 0.25 * torch.nn.functional.one_hot(p.argmax(-1), p.shape[-1]),
        lambda p: 0.85 * p + 0.15 * torch.nn.functional.one_hot(drafts_of(p).clamp(min=0), p.shape[-1]),
        lambda p: 0.8 * p + 0.2 / p.shape[-1],
        lambda p: (p**1.6) / (p**1.6).sum(-1, keepdim=True),
    ],
    ids=["favours the most likely", "favours drafts", "lets any token in", "too cold"],
)
def test_other_samplers_are_found(sampler):
    found = sum(p < 2.5e-4 for p in p_values(12, sampler, draws=1000))
    assert found / RUNS > 0.9


def test_a_shift_that_is_called_detectable_is_found_in_most_runs():
    """The share of the drafted tokens raised by that much, at the expense of all others alike."""
    rate, draws = 2.5e-4, 1000
    counts = RankCounts()
    probabilities = distributions(draws, 12, 0)
    counts.add(probabilities, torch.zeros(draws, dtype=torch.long), drafts_of(probabilities))
    shift = counts.detectable(rate)

    def shifted(p):
        drafts = drafts_of(p)
        drafted = torch.nn.functional.one_hot(drafts.clamp(min=0), p.shape[-1]) * (drafts >= 0)[:, None]
        others = (drafted.sum(-1, keepdim=True) - (drafted * p).sum(-1, keepdim=True)).mean()
        return p + shift / others * (drafted - p) * drafted.sum(-1, keepdim=True)  # adds `shift` in the mean

    found = sum(p < rate for p in p_values(12, shifted, draws)) / RUNS
    assert 0.5 < found < 0.95


def test_one_distribution_is_pearsons_chi_square():
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04]).expand(500, -1)
    tokens = torch.tensor([0] * 180 + [1] * 160 + [2] * 120 + [3] * 25 + [4] * 15)
    counts = RankCounts()
    counts.add(probabilities, tokens, torch.full((500,), 1))
    observed, expected = [160, 180, 120, 25, 15], [150, 200, 100, 30, 20]  # the drafted one first
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    assert counts.p_value() == pytest.approx(chi2.sf(statistic, 4), rel=1e-5)


def test_rare_classes_are_merged_and_certainty_tells_nothing():
    counts = RankCounts()
    counts.add(
        torch.tensor([[0.97, 0.02, 0.009, 0.001]]).expand(100, -1),
        torch.tensor([0] * 95 + [1] * 4 + [2]),
        torch.full((100,), -1),
    )
    assert counts.p_value() is None, "3 expected tokens in all other classes"
    counts.add(
        torch.tensor([[0.97, 0.02, 0.009, 0.001]]).expand(200, -1),
        torch.tensor([0] * 190 + [1] * 9 + [3]),
        torch.full((200,), -1),
    )
    statistic = (285 - 291) ** 2 / 291 + (15 - 9) ** 2 / 9
    assert counts.p_value() == pytest.approx(chi2.sf(statistic, 1), rel=1e-4)
    certain = RankCounts()
    certain.add(
        torch.eye(4)[torch.zeros(50, dtype=torch.long)], torch.zeros(50, dtype=torch.long), torch.full((50,), 0)
    )
    assert certain.p_value() is None and certain.impossible == 0


def test_tokens_of_no_probability_are_counted():
    sampling = Sampling(temperature=0.5, top_p=0.8)
    logits = torch.tensor([[2.0, 1.0, 0.0, -3.0]]).expand(3, -1)
    probabilities = sampling.probabilities(logits)
    assert probabilities[0].tolist() == [pytest.approx(1.0), 0.0, 0.0, 0.0]  # the first alone has 0.87
    counts = RankCounts()
    counts.add(probabilities, torch.tensor([0, 1, 3]), torch.tensor([0, 1, -1]))
    assert counts.impossible == 2
