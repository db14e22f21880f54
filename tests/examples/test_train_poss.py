"""The training script, as a user starts it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_target
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


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


def run(command: list[str], folder: Path, output: Path) -> str:
    options = ["--target", f"{folder}/target", "--dataset", f"{folder}/texts.jsonl", "--output_dir", str(output)]
    sizes = ["--num_draft_positions", "2", "--max_steps", "3", "--max_length", "16", "--learning_rate", "1e-2"]
    quiet = ["--device", "cpu", "--report_to", "none", "--save_strategy", "no", "--losses", "token=1.0"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, *options, *sizes, *quiet], capture_output=True, text=True, env=environment, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_script_and_command_train_the_same_weights(folder, tmp_path):
    command = [sys.executable, "-c", "import sys; from hf_poss.cli import main; sys.exit(main())", "train"]
    outputs = {"script": [sys.executable, str(EXAMPLE)], "command": command}
    for name, start in outputs.items():
        assert "tokens per epoch" in run(start, folder, tmp_path / name)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in outputs]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def test_script_says_what_is_wrong(folder, tmp_path):
    wrong = [sys.executable, str(EXAMPLE), "--target", f"{folder}/target", "--dataset", "nowhere.jsonl"]
    result = subprocess.run(
        [*wrong, "--output_dir", str(tmp_path), "--device", "cpu"], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 1
    assert "nowhere.jsonl" in result.stderr and "Traceback" not in result.stderr
