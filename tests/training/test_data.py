"""Datasets to samples."""

import json
import os

import chat_templates as templates
import pytest
from chat_templates import make_tokenizer, marked
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_poss.training import load_texts, prepare_dataset


datasets = pytest.importorskip("datasets")

TEXTS = ["a b c d e f g", "b", "c a b", "g f e d"]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: index for index, word in enumerate(["<pad>", "<eos>", *"abcdefg"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(scope="module")
def chatty() -> PreTrainedTokenizerFast:
    return make_tokenizer(templates.CHATML)


def ids(text: str) -> list[int]:
    return ["abcdefg".index(word) + 2 for word in text.split()] + [1]


def as_lists(dataset, name: str = "input_ids") -> list[list[int]]:
    return [list(sample[name]) for sample in dataset]


def as_kind(rows: list[dict], kind: str):
    return {
        "dicts": lambda: rows,
        "dataset": lambda: datasets.Dataset.from_list(rows),
        "streamed": lambda: datasets.Dataset.from_list(rows).to_iterable_dataset(),
    }[kind]()


@pytest.mark.parametrize("kind", ["strings", "dicts", "dataset", "streamed"])
def test_texts_are_tokenized_ended_and_cut(tokenizer, kind):
    dataset = TEXTS if kind == "strings" else as_kind([{"text": text} for text in TEXTS], kind)
    samples = list(prepare_dataset(dataset, tokenizer, max_length=5))
    assert as_lists(samples) == as_lists(samples, "labels") == [ids(text)[:5] for text in TEXTS]
    assert [sample["length"] for sample in samples] == [5, 2, 4, 5]


def test_an_end_that_the_tokenizer_adds_is_not_doubled(tokenizer):
    from tokenizers.processors import TemplateProcessing

    ending = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    ending.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    ending.eos_token = "<eos>"
    assert as_lists(prepare_dataset(["a b"], ending, max_length=9)) == [ids("a b")]


@pytest.mark.parametrize("kind", ["dicts", "streamed"])
def test_packing_keeps_documents_whole_and_loses_nothing(tokenizer, kind):
    texts = [*TEXTS, "e e e e e e e e e e e"]
    samples = list(prepare_dataset(as_kind([{"text": text} for text in texts], kind), tokenizer, 6, packing=True))
    documents = []
    for sample in samples:
        assert len(sample["input_ids"]) == len(sample["labels"]) == len(sample["segment_ids"]) == sample["length"] <= 6
        assert sorted(set(sample["segment_ids"])) == list(range(1, max(sample["segment_ids"]) + 1))
        assert sample["segment_ids"] == sorted(sample["segment_ids"])
        for number in range(1, max(sample["segment_ids"]) + 1):
            tokens = zip(sample["input_ids"], sample["segment_ids"], strict=True)
            documents.append([token for token, segment in tokens if segment == number])
    # The first text has 8 tokens, the last 12: both go on in a second piece.
    pieces = [ids(texts[0])[:6], ids(texts[0])[6:], *map(ids, texts[1:4]), ids(texts[4])[:6], ids(texts[4])[6:]]
    assert sorted(documents) == sorted(pieces)
    assert len(samples) == 6  # 31 tokens cannot be in 5 samples of 6; documents need no more


def test_chats_are_cut_where_texts_go_on(chatty):
    long = [CHAT[0], {"role": "assistant", "content": "yes" * 10}]
    samples = prepare_dataset([{"messages": long}], chatty, max_length=40, packing=True)
    assert [sample["length"] for sample in samples] == [40]
    # 21 tokens come before the answer.
    assert marked(chatty, samples[0]) == f"<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦{'yes' * 6}y⟧"


def test_completions_count_with_the_end(chatty):
    [sample] = prepare_dataset([{"prompt": "say ", "completion": "so"}], chatty, max_length=50)
    assert marked(chatty, sample) == "say ⟦so</s>⟧"


@pytest.mark.parametrize(
    ("row", "chat", "plain"),
    [
        ({"instruction": "a", "input": "", "output": "b"}, "a", "a\n⟦b</s>⟧"),
        ({"instruction": "a", "input": "c", "response": "b"}, "a\n\nc", "a\n\nc\n⟦b</s>⟧"),
        ({"question": "a", "answer": "b"}, "a", "a\n⟦b</s>⟧"),
    ],
)
def test_pairs_are_chats_where_there_is_a_template(chatty, row, chat, plain):
    [sample] = prepare_dataset([row], chatty, max_length=100)
    expected = f"<|im_start|>user\n{chat}<|im_end|>\n<|im_start|>assistant\n⟦b<|im_end|>⟧\n"
    assert marked(chatty, sample) == expected
    [sample] = prepare_dataset([row], make_tokenizer(), max_length=100)
    assert marked(make_tokenizer(), sample) == plain


def test_ready_samples_are_cut_and_get_labels(tokenizer):
    samples = [{"input_ids": [3, 4, 5]}, {"input_ids": [5, 6], "labels": [-100, 6]}]
    for dataset in (samples, datasets.Dataset.from_list(samples[::-1])):
        cut = sorted(prepare_dataset(dataset, tokenizer, max_length=2), key=lambda sample: sample["input_ids"])
        assert as_lists(cut) == [[3, 4], [5, 6]]
        assert as_lists(cut, "labels") == [[3, 4], [-100, 6]]
    [packed] = prepare_dataset(samples, tokenizer, max_length=9, packing=True)
    assert (packed["input_ids"], packed["segment_ids"]) == ([3, 4, 5, 5, 6], [1, 1, 1, 2, 2])
    with pytest.raises(ValueError, match="'input_ids': 2, 'labels': 1"):
        prepare_dataset([{"input_ids": [3, 4], "labels": [3]}], tokenizer, max_length=9)


def test_prepared_samples_are_not_prepared_again(tokenizer):
    for packing in (False, True):
        samples = prepare_dataset(TEXTS, tokenizer, max_length=8, packing=packing)
        assert prepare_dataset(samples, tokenizer, max_length=8, packing=packing) is samples
        assert max(prepare_dataset(samples, tokenizer, max_length=5, packing=packing)["length"]) == 5


def test_samples_with_features_come_back_as_they_are(tokenizer):
    samples = [{"input_ids": [3, 4, 5], "features": [[0.0]] * 3}]
    assert prepare_dataset(samples, tokenizer, max_length=2) is samples
    dataset = datasets.Dataset.from_list(samples)
    assert prepare_dataset(dataset, tokenizer, max_length=2) is dataset


@pytest.mark.parametrize("kind", ["dicts", "dataset", "streamed"])
def test_columns_that_are_not_understood_are_named(tokenizer, kind):
    with pytest.raises(ValueError, match=r"\['body', 'title'\].*`messages`.*`text`.*dataset_text_field"):
        prepare_dataset(as_kind([{"body": "a b", "title": "c"}], kind), tokenizer, max_length=8)
    assert as_lists(prepare_dataset(as_kind([{"body": "a b"}], kind), tokenizer, 8, text_field="body")) == [ids("a b")]


def test_missing_column_is_named_with_those_there(tokenizer):
    with pytest.raises(ValueError, match=r"no column 'body'.*\['text'\].*dataset_text_field"):
        prepare_dataset([{"text": "a b"}], tokenizer, max_length=8, text_field="body")


@pytest.mark.parametrize("nothing", [[], ["", ""]])
def test_nothing_to_learn_is_refused(tokenizer, nothing):
    with pytest.raises(ValueError, match="nothing to learn"):
        prepare_dataset(nothing, tokenizer, max_length=8)


@pytest.mark.parametrize("kind", ["dataset", "streamed"])
def test_a_dataset_without_rows_is_refused(tokenizer, kind):
    empty = {
        "dataset": datasets.Dataset.from_dict({"text": []}),
        "streamed": datasets.IterableDataset.from_generator(lambda: iter(())),
    }[kind]
    with pytest.raises(ValueError, match="empty"):
        prepare_dataset(empty, tokenizer, max_length=8)


@pytest.mark.parametrize("kind", ["dicts", "streamed"])
def test_a_mask_of_zeros_shows_the_text(kind):
    """Tags that mark nothing, no turn of the assistant, turns beyond the length."""
    broken = make_tokenizer(templates.TAGGED_NOTHING)
    text = r"<\|im_start\|>user.nhi<\|im_end\|>"
    rows = [{"messages": CHAT}] * 3
    with pytest.raises(ValueError, match=f"nothing to learn: 3 .*marks nothing.*{text}.*assistant"):
        prepare_dataset(as_kind(rows, kind), broken, max_length=100)
    whole = make_tokenizer(templates.CHATML)
    with pytest.raises(ValueError, match=f"3 without a token that counts.*{text}.*assistant"):
        prepare_dataset(as_kind(rows, kind), whole, max_length=10)
    with pytest.raises(ValueError, match=f"1 without a message of the assistant.*{text}"):
        prepare_dataset(as_kind([{"messages": CHAT[:1]}], kind), whole, max_length=100)


def test_a_template_that_refuses_all_is_quoted():
    rows = [{"messages": [{"role": "system", "content": "S"}, *CHAT]}]
    with pytest.raises(ValueError, match="System role not supported"):
        prepare_dataset(rows, make_tokenizer(templates.STRICT), max_length=100)


@pytest.mark.parametrize("kind", ["dicts", "streamed"])
def test_some_rows_without_anything_are_left_out_with_a_warning(chatty, kind, warnings_seen):
    rows = [{"messages": messages} for messages in (CHAT[:1], CHAT, CHAT[:1], CHAT, [])]
    assert len(list(prepare_dataset(as_kind(rows, kind), chatty, max_length=100))) == 2
    [warning, *more] = warnings_seen()
    assert "without a message of the assistant" in warning and not more
    assert kind == "streamed" or "Of 5 rows" in warning and ": 3 without" in warning


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"text": None}, {"text": "hi"}], "without text"),
        ([{"prompt": "hi", "completion": None}, {"prompt": "hi", "completion": "yes"}], "without a completion"),
        ([{"prompt": None, "completion": None}, {"prompt": CHAT[:1], "completion": CHAT[1:]}], "without text"),
        ([{"question": "hi", "answer": None}, {"question": "hi", "answer": "yes"}], "without a message of"),
        ([{"messages": None}, {"messages": CHAT}], "without a message of"),
        ([{"input_ids": None}, {"input_ids": [1, 2, 3]}], "of fewer than two tokens"),
    ],
)
def test_rows_with_gaps_are_left_out(chatty, rows, reason, warnings_seen):
    assert len(prepare_dataset(datasets.Dataset.from_list(rows), chatty, max_length=100)) == 1
    [warning] = warnings_seen()
    assert f"Of 2 rows these are left out: 1 {reason}" in warning


def test_a_length_that_holds_nothing_is_refused(tokenizer):
    with pytest.raises(ValueError, match="`max_length` is 1; expected 2 or more"):
        prepare_dataset(["a b"], tokenizer, max_length=1)


def test_processes_share_the_work(chatty):
    rows = [{"messages": [CHAT[0], {"role": "assistant", "content": "yes" * number}]} for number in range(1, 21)]
    alone = prepare_dataset(rows, chatty, max_length=60)
    assert as_lists(prepare_dataset(rows, chatty, max_length=60, num_proc=2)) == as_lists(alone)


def test_work_done_is_found_again(tmp_path, monkeypatch):
    """By a tokenizer that was loaded anew, and by one that has been in use."""
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(json.dumps({"messages": CHAT}) for _ in range(3)))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    used = make_tokenizer(templates.CHATML)
    used("some text", truncation=True, max_length=3)
    tokenizers = [make_tokenizer(templates.CHATML), make_tokenizer(templates.CHATML), used]
    packed = [prepare_dataset(load_texts(file), tokenizer, 100, packing=True) for tokenizer in tokenizers]
    [made] = {samples.cache_files[0]["filename"] for samples in packed}
    assert os.path.exists(made)
    other = prepare_dataset(load_texts(file), make_tokenizer(templates.LLAMA3), 100, packing=True)
    assert other.cache_files[0]["filename"] != made
