"""The configurations for `accelerate launch`: read as accelerate reads them, and one of them run."""

import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin, launch
from conftest import make_target
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_poss import PosSModel
from hf_poss.modeling_poss import PosSSpecialist


EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIGS = EXAMPLES / "accelerate_configs"
NAMES = sorted(path.name for path in CONFIGS.glob("*.yaml"))


def launch_arguments(name: str, *given: str) -> Namespace:
    """What `accelerate launch --config_file` makes of a configuration."""
    arguments = launch_command_parser().parse_args(["--config_file", str(CONFIGS / name), *given, "train_poss.py"])
    return _validate_launch_command(arguments)[0]


@pytest.fixture
def launched(monkeypatch) -> Callable[[str], Namespace]:
    """Puts the environment in place that the processes of a launch find."""

    def start(name: str) -> Namespace:
        arguments = launch_arguments(name)
        for variable, value in launch.prepare_multi_gpu_env(arguments).items():
            monkeypatch.setenv(variable, value)
        return arguments

    return start


def test_there_is_one_for_each_engine():
    assert {"ddp.yaml", "fsdp2.yaml", "deepspeed_zero2.yaml", "deepspeed_zero3.yaml", "multi_node.yaml"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_knows_every_key(name):
    """It refuses others itself, except in the sections of the engines."""
    content = yaml.safe_load((CONFIGS / name).read_text())
    config = load_config_from_file(str(CONFIGS / name))
    assert isinstance(config, ClusterConfig)
    options = {action.dest for action in launch_command_parser()._actions}
    assert set(content.get("fsdp_config", {})) <= options
    assert set(content.get("deepspeed_config", {})) <= options
    assert config.mixed_precision == "bf16"


def test_fsdp2_shards_every_specialist(launched):
    assert launched("fsdp2.yaml").use_fsdp
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert "FULL_STATE_DICT" in str(plugin.state_dict_type)
    poss = PosSModel.from_target(make_target("llama"), positions_per_specialist=2, num_draft_positions=4)
    plugin.set_auto_wrap_policy(poss)
    assert plugin.auto_wrap_policy.keywords["transformer_layer_cls"] == {PosSSpecialist}


def test_fsdp2_leaves_the_target_whole_in_every_process(launched):
    """transformers loads nothing into the other processes where accelerate says that FSDP will."""
    launched("fsdp2.yaml")
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_stages(stage):
    arguments = launch_arguments(f"deepspeed_zero{stage}.yaml")
    assert arguments.use_deepspeed
    assert arguments.zero_stage == stage
    assert str(arguments.zero3_init_flag).lower() == "false"
    # The whole weights of a stage that splits them come together for saving.
    assert stage == 2 or str(arguments.zero3_save_16bit_model).lower() == "true"


def test_multi_node_counts_the_processes_of_all_machines():
    """With the arguments that the head of the file gives for the second machine."""
    given = ["--machine_rank", "1", "--main_process_ip", "10.0.0.7", "--main_process_port", "29511"]
    arguments = launch_arguments("multi_node.yaml", *given)
    assert (arguments.num_machines, arguments.num_processes, arguments.machine_rank) == (2, 16, 1)
    assert (arguments.main_process_ip, arguments.main_process_port) == ("10.0.0.7", 29511)
    assert all(option in (CONFIGS / "multi_node.yaml").read_text() for option in given[::2])


def test_the_example_runs_in_two_processes(tmp_path):
    words = {f"w{number}": number for number in range(97)}
    plain = Tokenizer(models.WordLevel(words, unk_token="w3"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="w2", pad_token="w0", unk_token="w3")
    target = make_target("llama")
    target.save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    generator = torch.Generator().manual_seed(0)
    lines = [" ".join(f"w{t}" for t in torch.randint(4, 97, (20,), generator=generator).tolist()) for _ in range(8)]
    (tmp_path / "texts.txt").write_text("\n".join(lines))

    where = ["--config_file", str(CONFIGS / "ddp.yaml"), "--num_processes", "2", "--mixed_precision", "no"]
    arguments = {
        "target": tmp_path / "target",
        "dataset": tmp_path / "texts.txt",
        "output_dir": tmp_path / "poss",
        "positions_per_specialist": 1,
        "num_draft_positions": 2,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    command = [sys.executable, "-m", "accelerate.commands.launch", *where, str(EXAMPLES / "train_poss.py")]
    for name, value in arguments.items():
        command += [f"--{name}", str(value)]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert PosSModel.from_pretrained(tmp_path / "poss").config.num_specialists == 2
    # Two processes with random numbers of their own took part; the console shows what one of them says.
    states = {path.name for path in (tmp_path / "poss" / "checkpoint-2").glob("rng_state*")}
    assert states == {"rng_state_0.pth", "rng_state_1.pth"}
    assert result.stdout.count("'train_loss'") == 1
