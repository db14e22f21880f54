"""Spreads of measurements, and how many tokens a text gained."""

import pytest
import torch

from hf_poss.evaluation.timing import Spread, new_token_counts, timed_generate


def test_a_spread_has_median_quartiles_and_ends():
    spread = Spread.of([5.0, 1.0, 2.0, 3.0, 4.0])
    assert (spread.lowest, spread.lower_quartile, spread.median) == (1.0, 2.0, 3.0)
    assert (spread.upper_quartile, spread.highest, spread.count) == (4.0, 5.0, 5)


def test_one_measurement_is_its_own_spread_and_none_has_none():
    spread = Spread.of([7.0])
    assert spread.to_dict() == {
        "median": 7.0,
        "lowest": 7.0,
        "lower_quartile": 7.0,
        "upper_quartile": 7.0,
        "highest": 7.0,
        "count": 1,
    }
    assert Spread.of([]) is None


@pytest.mark.parametrize(
    ("eos", "counts"),
    [
        ([], [4, 4, 4]),
        ([2], [2, 4, 1]),  # the end counts, what pads the row behind it does not
        ([2, 9], [2, 3, 1]),
    ],
)
def test_new_tokens_end_with_the_end_of_a_row(eos, counts):
    output = torch.tensor([[2, 5, 6, 2, 0, 0], [2, 5, 6, 7, 9, 8], [2, 5, 2, 2, 2, 2]])
    assert new_token_counts(output, 2, eos) == counts


def test_a_call_is_timed_with_its_output(llama, monkeypatch):
    ticks = iter([10.0, 12.5])
    monkeypatch.setattr("hf_poss.evaluation.timing.time.perf_counter", lambda: next(ticks))
    ids = torch.tensor([[5, 9, 3]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    monkeypatch.setattr(llama, "generate", lambda **given: torch.cat((given["input_ids"], ids), dim=1))
    output, seconds = timed_generate(llama, inputs)
    assert seconds == 2.5
    assert output.tolist() == [[5, 9, 3, 5, 9, 3]]
