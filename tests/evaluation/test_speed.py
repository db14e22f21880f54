"""Paired timing."""

import pytest
import torch

from hf_poss.evaluation import SpeedComparison, compare_speed
from hf_poss.statistics import GenerationStatistics


def test_rates_and_ratios_are_of_new_tokens_pair_by_pair():
    comparison = SpeedComparison(
        prompt_length=10,
        plain_output=torch.zeros(30),
        poss_output=torch.zeros(30),
        statistics=GenerationStatistics(),
        plain_seconds=[4.0, 2.0, 10.0],
        poss_seconds=[2.0, 2.0, 2.0],
    )
    assert comparison.plain_rate == 20 / 4.0  # the median run's
    assert comparison.poss_rate == 20 / 2.0
    assert comparison.ratios == pytest.approx([2.0, 1.0, 5.0])
    assert comparison.identical


def test_texts_of_different_lengths_compare_by_rate():
    comparison = SpeedComparison(0, torch.zeros(10), torch.zeros(20), GenerationStatistics(), [1.0], [1.0])
    assert comparison.ratios == [2.0]
    assert not comparison.identical


def test_runs_are_paired_and_counted_once(llama, poss):
    inputs = {"input_ids": torch.tensor([[5, 9, 3]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    runs = []
    comparison = compare_speed(
        llama,
        poss,
        inputs,
        repeats=2,
        on_run=lambda: runs.append(1),
        max_new_tokens=9,
        min_new_tokens=9,
        do_sample=False,
    )
    assert len(runs) == 2 + 2 * 2
    assert len(comparison.plain_seconds) == len(comparison.poss_seconds) == 2
    assert comparison.identical and len(comparison.plain_output) == 3 + 9
    assert len(comparison.statistics.calls) == 1 and len(comparison.statistics.calls[0].authors) == 9
