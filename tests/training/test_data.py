"""Text to samples, samples to batches."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_poss.training import PosSDataCollator, tokenize_texts


TEXTS = ["a b c d e f g", "b", "c a b", "g f e d"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: index for index, word in enumerate(["<pad>", "<eos>", *"abcdefg"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def ids(text: str) -> list[int]:
    return ["abcdefg".index(word) + 2 for word in text.split()] + [1]


def as_lists(dataset) -> list[list[int]]:
    return [list(sample["input_ids"]) for sample in dataset]


@pytest.mark.parametrize("kind", ["strings", "dicts", "dataset", "streamed"])
def test_texts_are_tokenized_ended_and_cut(tokenizer, kind):
    datasets = pytest.importorskip("datasets")
    rows = [{"text": text} for text in TEXTS]
    dataset = {
        "strings": TEXTS,
        "dicts": rows,
        "dataset": datasets.Dataset.from_list(rows),
        "streamed": datasets.Dataset.from_list(rows).to_iterable_dataset(),
    }[kind]
    assert as_lists(tokenize_texts(dataset, tokenizer, max_length=5)) == [ids(text)[:5] for text in TEXTS]


def test_packing_loses_no_token_but_a_lone_last_one(tokenizer):
    stream = [token for text in TEXTS for token in ids(text)]
    packed = as_lists(tokenize_texts(TEXTS, tokenizer, max_length=6, packing=True))
    assert all(len(sample) == 6 for sample in packed[:-1])
    flat = [token for sample in packed for token in sample]
    assert flat == stream[: len(flat)] and len(stream) - len(flat) <= 1


def test_samples_that_are_tokens_stay(tokenizer):
    samples = [{"input_ids": [3, 4, 5]}]
    assert tokenize_texts(samples, tokenizer, max_length=2) is samples


def test_missing_column_is_named_with_those_there(tokenizer):
    with pytest.raises(ValueError, match=r"no column 'body'.*\['text'\].*dataset_text_field"):
        tokenize_texts([{"text": "a b"}], tokenizer, max_length=8, text_field="body")


@pytest.mark.parametrize("nothing", [[], ["", ""]])
def test_nothing_to_learn_is_refused(tokenizer, nothing):
    with pytest.raises(ValueError, match="nothing to learn"):
        tokenize_texts(nothing, tokenizer, max_length=8)


def test_batches_are_padded_right_and_count_no_padding():
    batch = PosSDataCollator(pad_token_id=7)(
        [{"input_ids": [5, 6]}, {"input_ids": [1, 2, 3, 4], "labels": [1, -100, 3, 4]}]
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7, 7], [1, 2, 3, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    # The feature of the first token is not predicted by anything.
    assert batch["labels"].tolist() == [[-100, 6, -100, -100], [-100, -100, 3, 4]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
