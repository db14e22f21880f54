"""Whether tokenizer, samples and target fit."""

import chat_templates
import pytest
from transformers import LlamaConfig

from hf_poss.training import prepare_dataset
from hf_poss.training.checks import check_samples, check_tokenizer


datasets = pytest.importorskip("datasets")


def config(vocab_size: int, eos_token_id: int | list[int] | None, name: str = "") -> LlamaConfig:
    made = LlamaConfig(vocab_size=vocab_size, eos_token_id=eos_token_id)
    made.name_or_path = name
    return made


@pytest.fixture
def tokenizer():
    return chat_templates.make_tokenizer()  # 261 tokens of its own, 8 added


def test_a_tokenizer_that_fits(tokenizer, warnings_seen):
    assert len(tokenizer) == 269
    end = tokenizer.eos_token_id
    for fitting in (config(269, end), config(320, [7, end]), config(269, None)):
        check_tokenizer(tokenizer, fitting)
    assert not warnings_seen()


@pytest.mark.parametrize("size", [97, 260, 262])
def test_tokens_beyond_the_vocabulary(tokenizer, size):
    with pytest.raises(ValueError, match=f"269 tokens.*'me/target'.*{size}.*up to 268.*own tokenizer"):
        check_tokenizer(tokenizer, config(size, 1, "me/target"))


def test_added_tokens_that_the_target_does_not_know(tokenizer, warnings_seen):
    check_tokenizer(tokenizer, config(267, tokenizer.eos_token_id))
    [warning] = warnings_seen()
    assert "does not know" in warning and "<|eot_id|>" in warning


def test_another_models_tokenizer(tokenizer, warnings_seen):
    other = config(1000, 3, "org/target")
    tokenizer.name_or_path = "org/other"
    with pytest.raises(ValueError, match=r"'org/other' has 269 tokens.*'org/target'.*1000.*\[3\]"):
        check_tokenizer(tokenizer, other)
    tokenizer.name_or_path = "copies/target"  # of the same name: an odd one, but the target's
    check_tokenizer(tokenizer, other)
    check_tokenizer(tokenizer, config(300, 3, "org/target"))
    small, end = warnings_seen()
    assert "1000" in small and "[3]" in end


def samples(*lengths: int, **kwargs):
    rows = [{"input_ids": list(range(length))} for length in lengths]
    return prepare_dataset(rows, chat_templates.make_tokenizer(), 100, **kwargs)


@pytest.mark.parametrize("kind", ["dataset", "list", "streamed"])
def test_draft_positions_beyond_all_samples(kind, warnings_seen):
    def as_kind(dataset):
        made = {"dataset": lambda: dataset, "list": lambda: list(dataset), "streamed": dataset.to_iterable_dataset}
        return made[kind]()

    with pytest.raises(ValueError, match=r"longest text.* 7 tokens; 6 draft positions \(K\)"):
        check_samples(as_kind(samples(3, 7, 5)), 6)
    check_samples(as_kind(samples(8, 9)), 6)
    assert not warnings_seen()
    for _ in range(2):
        check_samples(as_kind(samples(3, 8, 7)), 6)
    check_samples(as_kind(samples(8, 20, 9)), 6, positions=20)
    with pytest.raises(ValueError, match=r"20 tokens; the target learned 19.*--max_length 19"):
        check_samples(as_kind(samples(8, 20, 9)), 6, positions=19)
    [warning] = warnings_seen()
    assert "2 of 3 texts" in warning


def test_documents_are_measured_in_packed_samples():
    packed = samples(5, 6, 7, packing=True)
    assert len(packed) == 1
    with pytest.raises(ValueError, match="7 tokens"):
        check_samples(packed, 6)
    check_samples(packed, 5)
