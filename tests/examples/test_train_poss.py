"""The training script; `test_accelerate_configs.py` starts it in processes of its own."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_target
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_poss.cli import main


EXAMPLE = Path(__file__).parents[2] / "examples" / "train_poss.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("example")
    words = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, 97))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    target = make_target("llama")
    target.save_pretrained(folder / "target")
    fast.save_pretrained(folder / "target")
    texts = [" ".join(f"w{(5 * i + j) % 90 + 3}" for j in range(12)) for i in range(12)]
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return folder


def run_script(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The script as `python` would start it, in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    return end.value.code


def test_script_and_command_train_the_same_weights(folder, tmp_path, monkeypatch, capsys):
    sizes = ["--num_draft_positions", "2", "--max_steps", "3", "--max_length", "16", "--learning_rate", "1e-2"]
    quiet = ["--device", "cpu", "--report_to", "none", "--save_strategy", "no", "--losses", "token=1.0"]
    options = ["--target", f"{folder}/target", "--dataset", f"{folder}/texts.jsonl", *sizes, *quiet]
    assert run_script([*options, "--output_dir", f"{tmp_path}/script"], monkeypatch) == 0
    assert "tokens per epoch" in capsys.readouterr().out
    assert main(["train", *options, "--output_dir", f"{tmp_path}/command"]) == 0
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("script", "command")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def test_script_says_what_is_wrong(folder, tmp_path, monkeypatch, capsys):
    wrong = ["--target", f"{folder}/target", "--dataset", "nowhere.jsonl", "--output_dir", str(tmp_path)]
    assert run_script([*wrong, "--device", "cpu"], monkeypatch) == 1
    error = capsys.readouterr().err
    assert "nowhere.jsonl" in error and "Traceback" not in error
