"""How often tokens count."""

import pytest

from hf_poss.training.token_counts import token_counts


datasets = pytest.importorskip("datasets")

SAMPLES = [{"input_ids": [1, 2, 2], "labels": [-100, 2, 2]}, {"input_ids": [4, 1], "labels": [4, 1]}]


@pytest.mark.parametrize("kind", ["list", "dataset", "streamed"])
def test_tokens_that_count(kind):
    dataset = datasets.Dataset.from_list(SAMPLES)
    given = {"list": SAMPLES, "dataset": dataset, "streamed": dataset.to_iterable_dataset()}[kind]
    assert token_counts(given, 6).tolist() == [0, 1, 2, 0, 1, 0]
    assert token_counts(given, 6, max_samples=1).tolist() == [0, 0, 2, 0, 0, 0]
    with pytest.raises(ValueError, match="tokens 1 to 4; expected 0 to 3"):
        token_counts(given, 4)


def test_all_count_without_labels():
    assert token_counts([{"input_ids": [1, 1, 0]}], 2).tolist() == [1, 2]


def test_a_stream_is_counted_in_part_and_says_so(warnings_seen):
    stream = datasets.Dataset.from_list(SAMPLES).to_iterable_dataset()
    token_counts(stream, 6)
    [warning] = warnings_seen()
    assert "first 10,000 samples" in warning
