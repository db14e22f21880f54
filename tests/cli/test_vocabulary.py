"""`hf-poss vocabulary` on tiny specialists: what is counted, what is written, what is refused."""

import json
from pathlib import Path

import pytest
import torch
from conftest import VOCAB_SIZE, make_poss, make_target
from test_checkpoints import VOCAB, published_weights, write_checkpoint
from tiny_chat import word_tokenizer

from hf_poss import PosSModel
from hf_poss.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """target/ with a tokenizer, poss/ made for it, and chats.jsonl, in which the assistant says w20, w21 and w22."""
    folder = tmp_path_factory.mktemp("vocabulary")
    target = make_target("llama")
    target.save_pretrained(folder / "target")
    word_tokenizer().save_pretrained(folder / "target")
    poss = make_poss(target)
    poss.config.target_name_or_path = str(folder / "target")
    poss.save_pretrained(folder / "poss")
    messages = [{"role": "user", "content": "w7 w8 w9"}, {"role": "assistant", "content": "w20 w20 w20 w21 w21 w22"}]
    (folder / "chats.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    return folder


def vocabulary(folder: Path, *arguments: str, source: str = "poss") -> int:
    options = ["--dataset", f"{folder}/chats.jsonl"]
    return main(["vocabulary", f"{folder}/{source}", f"{folder}/cut", *options, *arguments])


@pytest.mark.parametrize(
    ("extent", "tokens"),
    [(["--size", "3"], [2, 20, 21]), (["--coverage", "0.85"], [2, 20, 21]), (["--size", "4"], None)],
)
def test_the_assistants_tokens_are_drafted(folder, extent, tokens, capsys):
    assert vocabulary(folder, *extent) == 0
    tokens = tokens or [2, 20, 21, 22]
    poss = PosSModel.from_pretrained(folder / "cut")
    assert poss.draft_vocabulary.tolist() == tokens
    share = {3: "85.71%", 4: "100.00%"}[len(tokens)]  # of six words and the end of the turn
    told = capsys.readouterr().out.strip()
    assert told.endswith(
        f"drafts from {len(tokens)} of {VOCAB_SIZE} tokens, {share} of the 7 that count in {folder}/chats.jsonl"
    )
    before = PosSModel.from_pretrained(folder / "poss").state_dict()
    assert all(torch.equal(poss.state_dict()[name], weight) for name, weight in before.items())


def test_published_checkpoints_are_read(folder):
    write_checkpoint(folder / "PosS2-tiny", published_weights(2))
    (folder / "words.jsonl").write_text('{"input_ids": [3, 3, 4]}\n')
    arguments = ["--dataset", f"{folder}/words.jsonl", "--size", "5", "--tokenizer", f"{folder}/target"]
    assert vocabulary(folder, *arguments, source="PosS2-tiny") == 0
    poss = PosSModel.from_pretrained(folder / "cut")
    assert {3, 4} <= set(poss.draft_vocabulary.tolist()) and poss.config.vocab_size == VOCAB


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--size", "98"], "is 98; expected 1 to 97"),
        (["--coverage", "0"], "expected a share"),
        (["--size", "5", "--dataset", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_what_cannot_be_is_refused(folder, arguments, told, capsys):
    assert vocabulary(folder, *arguments) == 1
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("extent", [[], ["--size", "5", "--coverage", "0.5"]])
def test_one_extent_is_asked_for(folder, extent, capsys):
    with pytest.raises(SystemExit):
        vocabulary(folder, *extent)
    assert "--size" in capsys.readouterr().err


def test_specialists_of_an_unknown_target_need_a_tokenizer(folder, capsys):
    poss = PosSModel.from_pretrained(folder / "poss")
    poss.config.target_name_or_path = None
    poss.save_pretrained(folder / "unknown")
    assert vocabulary(folder, "--size", "5", source="unknown") == 1
    assert "--tokenizer TARGET" in capsys.readouterr().err
