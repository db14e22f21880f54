"""The command line on tiny models: what a user's own models go through."""

import json
import re

import pytest
import torch
from conftest import VOCAB_SIZE, make_poss, make_target
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_poss import PosSModel
from hf_poss.cli import COMMANDS, main


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {
        word: index for index, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCAB_SIZE))])
    }
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def pair(tokenizer, tmp_path_factory):
    """Folder with target/ and poss/, as the demo pair is laid out."""
    folder = tmp_path_factory.mktemp("pair")
    target = make_target("llama")
    target.save_pretrained(folder / "target")
    tokenizer.save_pretrained(folder / "target")
    make_poss(target, num_draft_positions=4).save_pretrained(folder / "poss")
    return folder


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    output = capsys.readouterr().out
    assert all(name in output for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert f"hf-poss {command}" in capsys.readouterr().out


def test_generate_writes_what_the_target_writes(pair, tokenizer, capsys):
    target = make_target("llama")
    prompt = "w5 w9 w40 w7"
    inputs = tokenizer(prompt, return_tensors="pt")
    wanted = target.generate(
        input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=12, do_sample=False
    )
    text = tokenizer.decode(wanted[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    knobs = ["--max_new_tokens", "12", "--device", "cpu", "--compare"]
    assert main(["generate", "--target", f"{pair}/target", "--poss", f"{pair}/poss", "--prompt", prompt, *knobs]) == 0
    output = capsys.readouterr().out
    assert output.startswith(prompt + text)
    assert "\033[" not in output  # no colours without a terminal
    assert "identical to plain generate: yes" in output
    for told in ("tau ", "pos-acc", "tokens/s", "speed-up"):
        assert told in output


@pytest.mark.parametrize(
    "knobs",
    [["--depth", "auto", "--total_tokens", "auto"], ["--depth", "3"], ["--cache_implementation", "static"]],
    ids=["auto", "fixed", "static"],
)
def test_generate_writes_the_same_whatever_is_drafted(pair, knobs, capsys):
    command = ["generate", "--target", f"{pair}/target", "--poss", f"{pair}/poss", "--prompt", "w5 w6"]
    command += ["--max_new_tokens", "12"]

    def text() -> str:
        return capsys.readouterr().out.split("\n\n")[0]

    assert main(command) == 0
    expected = text()
    assert main([*command, *knobs]) == 0
    assert text() == expected


def test_generate_takes_no_other_words_for_sizes(pair, capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--target", "a", "--poss", "b", "--prompt", "c", "--depth", "deep"])
    assert "'deep' is neither an integer nor auto" in capsys.readouterr().err


def test_generate_says_what_is_wrong(pair, tmp_path, capsys):
    other = make_target("llama")
    other.resize_token_embeddings(VOCAB_SIZE + 3)
    make_poss(other, num_draft_positions=2).save_pretrained(tmp_path)
    status = main(
        ["generate", "--target", f"{pair}/target", "--poss", str(tmp_path), "--prompt", "w5", "--device", "cpu"]
    )
    assert status == 1
    assert re.search(r"hf-poss generate: .*vocabulary of 100 tokens.*97", capsys.readouterr().err)


def test_demo_tells_all(pair, capsys):
    arguments = ["--folder", str(pair), "--prompts", "2", "--max_new_tokens", "8", "--repeats", "1"]
    assert main(["demo", *arguments]) == 0
    output = capsys.readouterr().out
    assert output.count("identical to the text without specialists") == 2
    assert "outputs identical: 2 of 2" in output
    assert "(14 tokens in " in output  # of both prompts, without the first of each
    assert re.search(r"speed-up: \d+\.\d\dx, median of 2 paired runs", output)
    for told in ("tau ", "pos-acc  1: ", "written by: target", "without specialists:", "with specialists:"):
        assert told in output


def test_demo_without_a_pair_says_where_it_comes_from(tmp_path, capsys):
    assert main(["demo", "--folder", str(tmp_path)]) == 1
    assert "build_demo_pair.py" in capsys.readouterr().err


def test_convert_keeps_the_weights(pair, tmp_path, capsys):
    """A published folder: the target's config, a flat file with the embedding in it."""
    source = tmp_path / "PosS2-tiny"
    source.mkdir()
    weights = load_file(pair / "poss" / "model.safetensors")
    save_file({**weights, "embed_tokens.weight": torch.zeros(VOCAB_SIZE, 32)}, source / "model.safetensors")
    config = json.loads((pair / "target" / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    assert main(["convert", str(source), str(tmp_path / "out")]) == 0
    poss = PosSModel.from_pretrained(tmp_path / "out")
    assert (poss.config.positions_per_specialist, poss.config.num_draft_positions) == (2, 4)
    assert poss.state_dict().keys() == weights.keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in poss.state_dict().items())
    assert "2 specialist(s)" in capsys.readouterr().out


def test_convert_makes_copies_of_an_eagle_layer(pair, tmp_path):
    make_poss(make_target("llama"), positions_per_specialist=1, num_draft_positions=1).save_pretrained(tmp_path / "in")
    positions = ["--copies", "--positions_per_specialist", "2", "--num_draft_positions", "5"]
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), *positions]) == 0
    layers = PosSModel.from_pretrained(tmp_path / "out").layers
    assert len(layers) == 3
    for layer in layers[1:]:
        for one, other in zip(layer.parameters(), layers[0].parameters(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_train_then_generate(pair, tmp_path, suffix, capsys):
    texts = [" ".join(f"w{(5 * i + j) % 90 + 3}" for j in range(12)) for i in range(20)]
    data = tmp_path / f"data.{suffix}"
    lines = texts if suffix == "txt" else [json.dumps({"text": text}) for text in texts]
    data.write_text("\n".join(lines))
    folder = tmp_path / "poss"
    arguments = ["--target", f"{pair}/target", "--dataset", str(data), "--output_dir", str(folder)]
    sizes = ["--num_draft_positions", "3", "--positions_per_specialist", "1", "--max_steps", "2", "--max_length", "16"]
    quiet = ["--device", "cpu", "--use_cpu", "--report_to", "none", "--eval_share", "0.2", "--packing"]
    assert main(["train", *arguments, *sizes, *quiet]) == 0
    poss = PosSModel.from_pretrained(folder)
    assert (poss.config.num_specialists, poss.config.num_draft_positions) == (3, 3)
    assert "eval_tau" in json.loads((folder / "eval_results.json").read_text())
    target = ["--target", f"{pair}/target", "--poss", str(folder), "--prompt", "w8 w3", "--device", "cpu"]
    assert main(["generate", *target, "--max_new_tokens", "6"]) == 0
    assert "rounds" in capsys.readouterr().out


def test_train_names_a_missing_file(pair, tmp_path, capsys):
    arguments = ["--target", f"{pair}/target", "--dataset", str(tmp_path / "none.txt")]
    assert main(["train", *arguments, "--output_dir", str(tmp_path / "out")]) == 1
    assert "none.txt" in capsys.readouterr().err
