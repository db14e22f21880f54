"""`hf-poss train`: from data to a card, and what is refused before the target is loaded."""

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import VOCAB_SIZE, make_poss, make_target
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_poss import PosSModel, PosSTrainingArguments
from hf_poss.cli import generate, main
from hf_poss.cli.train import make_parser


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """target/ with its tokenizer, an EAGLE layer, and texts."""
    folder = tmp_path_factory.mktemp("train")
    words = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, 97))])}
    assert len(words) == VOCAB_SIZE
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    target = make_target("llama")
    target.save_pretrained(folder / "target")
    fast.save_pretrained(folder / "target")
    make_poss(target, positions_per_specialist=1, num_draft_positions=1, seed=8).save_pretrained(folder / "eagle")
    texts = [" ".join(f"w{(5 * i + j) % 90 + 3}" for j in range(12)) for i in range(20)]
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return folder


def command(folder: Path, output: Path, *more: str, dataset: str | None = None) -> list[str]:
    """A short training; options in `more` win over those before."""
    data = dataset or str(folder / "texts.jsonl")
    sizes = ["--num_draft_positions", "3", "--positions_per_specialist", "1", "--max_steps", "2", "--max_length", "16"]
    quiet = ["--device", "cpu", "--report_to", "none", "--disable_tqdm", "true", "--learning_rate", "1e-2"]
    return ["--target", f"{folder}/target", "--dataset", data, "--output_dir", str(output), *sizes, *quiet, *more]


def train(*args, **kwargs) -> int:
    return main(["train", *command(*args, **kwargs)])


def test_parser_takes_every_training_argument(folder, tmp_path):
    args = make_parser().parse_args(
        command(folder, tmp_path, "--losses", "token=1.0", "--packing", "--feature_layers", "0", "2", "--bf16")
    )
    assert (args.losses, args.packing, args.feature_layers, args.bf16) == ("token=1.0", True, [0, 2], True)
    assert (args.resume, args.dataset, args.max_grad_value) == ("auto", [str(folder / "texts.jsonl")], 0.5)


def test_a_run_leaves_a_complete_folder(folder, tmp_path, capsys):
    assert train(folder, tmp_path, "--eval_share", "0.2", "--eval_generate_tokens", "6", "--losses", "token=1.0") == 0
    poss = PosSModel.from_pretrained(tmp_path)
    assert (poss.config.num_specialists, poss.config.num_draft_positions) == (3, 3)
    results = json.loads((tmp_path / "eval_results.json").read_text())
    assert {"eval_tau", "eval_generate_tau", "eval_pos_acc_3", "eval_loss_token_2"} <= results.keys()
    record = json.loads((tmp_path / "training_record.json").read_text())
    assert (record["files"], record["samples"], record["eval_samples"]) == (["texts.jsonl"], 16, 4)
    assert record["generate_tau"] == pytest.approx(results["eval_generate_tau"])
    assert "tau" in (tmp_path / "README.md").read_text()
    output = capsys.readouterr().out
    assert "Training " in output and "tokens per epoch: " in output and f"Saved to {tmp_path}" in output


def test_the_same_command_goes_on(folder, tmp_path):
    """Stopped after 2 of 4 steps, then called again: as in one go."""
    assert train(folder, tmp_path / "straight", "--max_steps", "4") == 0
    steps = ["--max_steps", "4", "--save_steps", "2"]
    assert train(folder, tmp_path / "stops", *steps) == 0
    shutil.rmtree(tmp_path / "stops" / "checkpoint-4")
    (tmp_path / "stops" / "model.safetensors").unlink()
    assert train(folder, tmp_path / "stops", *steps) == 0
    weights = load_file(tmp_path / "stops" / "model.safetensors")
    for name, weight in load_file(tmp_path / "straight" / "model.safetensors").items():
        assert torch.equal(weight, weights[name])
    state = json.loads((tmp_path / "stops" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["global_step"] == 4


def test_a_new_run_beside_checkpoints_is_refused_early(folder, tmp_path, capsys, no_target_later):
    """Later they would be taken for its own."""
    assert train(folder, tmp_path, "--save_steps", "1", "--resume", "never") == 0
    no_target_later()
    assert train(folder, tmp_path, "--resume", "never") == 1
    assert f"{tmp_path}/checkpoint-2 is of an earlier run" in capsys.readouterr().err


def test_finished_specialists_of_another_make_are_refused_early(folder, tmp_path, capsys, no_target_later):
    assert train(folder, tmp_path, "--save_strategy", "no") == 0
    no_target_later()
    assert train(folder, tmp_path, "--num_draft_positions", "2") == 1
    assert "(K) was 3 and is now 2" in capsys.readouterr().err


def test_options_reach_the_specialists(folder, tmp_path):
    options = ["--feature_layers", "0", "1", "2", "--draft_vocab_size", "30", "--packing"]
    assert train(folder, tmp_path, *options) == 0
    poss = PosSModel.from_pretrained(tmp_path)
    assert poss.config.feature_layers == [0, 1, 2]
    assert poss.draft_vocabulary.shape == (30,) and (poss.draft_vocabulary >= 0).all()
    assert poss.config.target_name_or_path == f"{folder}/target"


def test_warm_start_from_an_eagle_layer(folder, tmp_path):
    """With a rate of zero the specialists are still its copies."""
    options = ["--init_from_eagle", f"{folder}/eagle", "--learning_rate", "0", "--draft_vocab_size", "30"]
    assert train(folder, tmp_path, *options) == 0
    poss, eagle = PosSModel.from_pretrained(tmp_path), PosSModel.from_pretrained(folder / "eagle")
    assert len(poss.layers) == 3 and poss.config.draft_vocab_size == 30
    for layer in poss.layers:
        for one, other in zip(layer.parameters(), eagle.layers[0].parameters(), strict=True):
            assert torch.equal(one, other)
    assert json.loads((tmp_path / "training_record.json").read_text())["init_from"] == f"{folder}/eagle"


def test_bfloat16_needs_no_accelerator(folder, tmp_path):
    options = command(folder, tmp_path, "--bf16", "--losses", "token=1.0")
    at = options.index("--device")
    assert main(["train", *options[:at], *options[at + 2 :]]) == 0
    assert PosSModel.from_pretrained(tmp_path).dtype == torch.float32


@pytest.mark.parametrize("start", ["random", "EAGLE"])
def test_the_papers_learning_rate_is_for_a_warm_start(folder, tmp_path, warnings_seen, start):
    options = ["--init_from_eagle", f"{folder}/eagle"] if start == "EAGLE" else []
    assert train(folder, tmp_path, "--learning_rate", "3e-5", "--max_steps", "1", *options) == 0
    assert any("random weights" in text for text in warnings_seen()) == (start == "random")


def test_adapters_come_from_json(folder, tmp_path):
    pytest.importorskip("peft")
    assert train(folder, tmp_path, "--specialist_adapter", '{"r": 2}') == 0
    assert PosSModel.from_pretrained(tmp_path).config.specialist_adapter["r"] == 2


def test_several_datasets_are_joined_and_streamed(folder, tmp_path):
    more = tmp_path / "more.txt"
    more.write_text("\n".join("w5 w6 w7 w8 w9" for _ in range(4)))
    both = ["--dataset", f"{folder}/texts.jsonl", str(more)]
    assert train(folder, tmp_path / "joined", *both) == 0
    assert json.loads((tmp_path / "joined" / "training_record.json").read_text())["samples"] == 24
    evaluation = ["--eval_dataset", f"{folder}/texts.jsonl", "--eval_generate_prompts", "2"]
    assert train(folder, tmp_path / "stream", *both, "--streaming", *evaluation) == 0
    assert "eval_generate_tau" in json.loads((tmp_path / "stream" / "eval_results.json").read_text())


def test_preview_prints_and_trains_nothing(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("loaded"))
    assert train(folder, tmp_path / "out", "--preview", "2") == 0
    assert "w8" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.fixture
def no_target_later(monkeypatch) -> Callable[[], None]:
    """From the call on, to load the target is a failure."""
    loaded = partial(monkeypatch.setattr, AutoModelForCausalLM, "from_pretrained")
    return lambda: loaded(lambda *args, **kwargs: pytest.fail("loaded"))


@pytest.fixture
def no_target(no_target_later):
    """Whatever is refused must be refused before the target is loaded."""
    no_target_later()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--losses", "token=1,tokn=2"], "no loss 'tokn'"),
        (["--position_weights", "1", "1"], "2 entries"),
        (["--feature_layers", "0", "7"], r"hidden states 0 .* to 2"),
        (["--draft_vocab_size", "98"], "draft_vocab_size"),
        (["--num_draft_positions", "0"], "num_draft_positions"),
        (["--num_draft_positions", "40"], "40"),
        (["--dataset", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--dataset_text_field", "story"], "story|text"),
        (["--streaming", "--max_steps", "-1"], "--max_steps"),
        (["--streaming", "--eval_share", "0.5"], "--eval_dataset"),
        (["--eval_share", "1.5"], "eval_share"),
        (["--load_in_4bit"], "bitsandbytes"),
        (["--dtype", "float7"], "--dtype float7"),
        (["--device", "gpu"], "--device gpu"),
        (["--device", "meta"], "--device meta"),
        (["--device_map", "{cpu}"], "--device_map.* JSON"),
        (["--target", "/nowhere"], "no folder /nowhere"),
        (["--init_from_eagle", "/nowhere"], "no folder /nowhere"),
        (["--report_to", "clearml"], "clearml"),
        (["--report_to", "nothing"], "nothing"),
        (["--eval_strategy", "steps", "--eval_steps", "1"], "--eval_dataset"),
        (["--eval_share", "0.2", "--metric_for_best_model", "eval_tua"], "'tua'.* tau"),
        (["--resume", "nowhere"], "nowhere"),
        (["--feature_layers", "0", "--init_from_eagle", "EAGLE"], "EAGLE layer"),
    ],
)
def test_wrong_options_are_refused_early(folder, tmp_path, no_target, options, told, capsys, monkeypatch):
    monkeypatch.setattr("transformers.utils.is_bitsandbytes_available", lambda *args: False)
    assert train(folder, tmp_path / "out", *options) == 1
    error = capsys.readouterr().err
    assert error.startswith("hf-poss train: ")
    assert re.search(told, error)


def test_other_specialists_than_the_run_are_refused_early(folder, tmp_path, capsys, monkeypatch):
    assert train(folder, tmp_path, "--save_steps", "1") == 0
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("loaded"))
    for option, name in (("--num_draft_positions", "(K)"), ("--positions_per_specialist", "(n)")):
        capsys.readouterr()
        assert train(folder, tmp_path, option, "2") == 1
        assert name in capsys.readouterr().err


def test_a_folder_of_something_else_is_refused_early(folder, tmp_path, no_target, capsys):
    (tmp_path / "thesis.tex").write_text("\\begin{document}")
    assert train(folder, tmp_path) == 1
    assert "thesis.tex" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_tokenizer_of_another_target_is_refused_early(folder, tmp_path, no_target, capsys):
    """Its tokens go beyond the target's vocabulary."""
    mixed = tmp_path / "mixed"
    shutil.copytree(folder / "target", mixed)
    config = json.loads((mixed / "config.json").read_text())
    (mixed / "config.json").write_text(json.dumps({**config, "vocab_size": 50}))
    assert train(folder, tmp_path / "out", "--target", str(mixed)) == 1
    error = capsys.readouterr().err
    assert "97" in error and "50" in error


def test_an_eagle_layer_of_another_target_is_refused_early(folder, tmp_path, no_target, capsys):
    other = make_target("llama")
    other.resize_token_embeddings(VOCAB_SIZE + 3)
    make_poss(other, positions_per_specialist=1, num_draft_positions=1).save_pretrained(tmp_path / "other")
    assert train(folder, tmp_path / "out", "--init_from_eagle", f"{tmp_path}/other") == 1
    assert "vocab_size" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "told"),
    [({"text": ""}, "nothing to learn"), ({"story": "w5 w6"}, "story"), ({"text": "w5 w6"}, "3 draft")],
)
def test_data_with_nothing_to_learn_is_refused_early(folder, tmp_path, no_target, row, told, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join([json.dumps(row)] * 3))
    assert train(folder, tmp_path / "out", dataset=str(data)) == 1
    assert re.search(f"hf-poss train: .*{told}", capsys.readouterr().err)


def test_device_map_is_for_one_process(folder, tmp_path, no_target, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    args = make_parser().parse_args(command(folder, tmp_path, "--device_map", "auto"))
    with pytest.raises(ValueError, match="2 processes"):
        generate.check_loading(args)


def test_saving_memory_in_fsdp_is_refused_early(folder, tmp_path, no_target, capsys, monkeypatch):
    """In all processes but the first the target would have no weights."""
    from hf_poss.training.preflight import check_launch

    args = PosSTrainingArguments(tmp_path, use_cpu=True)
    check_launch(args)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(ValueError, match="fsdp_cpu_ram_efficient_loading: false"):
        check_launch(args)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    check_launch(args)


def test_clipping_entries_under_deepspeed_is_refused_early():
    from hf_poss.training.preflight import check_launch

    check_launch(SimpleNamespace(max_grad_value=0.0, deepspeed_plugin=object()))
    with pytest.raises(ValueError, match="--max_grad_value 0 --max_grad_norm 0.5"):
        check_launch(SimpleNamespace(max_grad_value=0.5, deepspeed_plugin=object()))


def test_target_options_reach_transformers(folder, tmp_path, monkeypatch):
    loaded = []
    from_pretrained = AutoModelForCausalLM.from_pretrained

    def spy(*args, **kwargs):
        loaded.append(kwargs)
        return from_pretrained(*args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spy)
    options = ["--attn_implementation", "eager", "--dtype", "bfloat16", "--device_map", '{"": "cpu"}']
    args = make_parser().parse_args(command(folder, tmp_path, *options))
    target, tokenizer = generate.load_target(args)
    assert (target.config._attn_implementation, target.dtype) == ("eager", torch.bfloat16)
    assert loaded[0]["device_map"] == {"": "cpu"}
    assert len(tokenizer) == VOCAB_SIZE
