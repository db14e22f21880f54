"""The package as a whole: its names, what importing it costs, and what it asks of transformers."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hf_poss


ROOT = Path(__file__).parents[1]
PUBLIC = [
    "PosSCandidateGenerator",
    "PosSConfig",
    "PosSModel",
    "PosSPreTrainedModel",
    "PosSTrainer",
    "PosSTrainingArguments",
    "collect_statistics",
]
HEAVY = ["datasets", "evaluate", "peft", "matplotlib", "accelerate"]
HOOKS = ["_get_candidate_generator", "_assisted_decoding", "_validate_generation_mode"]


def run_python(code):
    """A fresh interpreter, which has imported nothing yet."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)


# ---- Names ----


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_there(name):
    assert name in hf_poss.__all__
    assert name in dir(hf_poss)
    assert getattr(hf_poss, name).__module__.startswith("hf_poss.")


def test_names_are_sorted_and_told_once():
    assert hf_poss.__all__ == sorted(set(hf_poss.__all__))


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="hf_poss.*PosSNothing"):
        hf_poss.PosSNothing  # noqa: B018


def test_the_version_is_that_of_the_distribution():
    assert hf_poss.__version__ == importlib.metadata.version("hf-poss")


# ---- Importing ----


def test_importing_is_light_and_registers_the_auto_classes():
    """Nothing heavy comes in that the parts of transformers we build on do not bring in themselves."""
    code = f"""
import sys
import torch, transformers
from transformers import AutoConfig, AutoModel, GenerationMixin, PreTrainedModel
import transformers.models.llama.modeling_llama
import transformers.generation.candidate_generator
heavy = set({HEAVY!r})
before = heavy & set(sys.modules)
import hf_poss
print("heavy:", *sorted(heavy & set(sys.modules) - before))
print("training:", *sorted(name for name in sys.modules if name.startswith("hf_poss.training")))
config = AutoConfig.for_model(
    "poss", vocab_size=11, hidden_size=8, intermediate_size=8, num_attention_heads=2, num_draft_positions=2
)
print(type(config).__name__, type(AutoModel.from_config(config)).__name__)
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["heavy:", "training:", "PosSConfig PosSModel"]


def test_transformers_without_a_hook_is_refused():
    """Each hook is taken away, then one of its arguments; the import fails and patches nothing."""
    code = f"""
import sys
from transformers import GenerationMixin
for name in {HOOKS!r}:
    original = getattr(GenerationMixin, name)
    for broken in (None, lambda self, *args, **kwargs: None):
        delattr(GenerationMixin, name)
        if broken is not None:
            setattr(GenerationMixin, name, broken)
        before = dict(vars(GenerationMixin))
        try:
            import hf_poss
        except ImportError as error:
            print(name, error)
        assert dict(vars(GenerationMixin)) == before
        setattr(GenerationMixin, name, original)
        for module in [module for module in sys.modules if module.startswith("hf_poss")]:
            del sys.modules[module]
import hf_poss
print("whole again")
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines.pop() == "whole again"
    installed = re.escape(importlib.metadata.version("transformers"))
    hooks = [name for name in HOOKS for _ in range(2)]
    assert len(lines) == len(hooks)
    for hook, line in zip(hooks, lines, strict=True):
        assert re.fullmatch(
            rf"{hook} transformers {installed} lacks .*{hook}.*pip install 'transformers>=5\.\d+'\.", line
        ), line


@pytest.mark.parametrize("method", ["_get_train_sampler", "_push_from_checkpoint", "_save_checkpoint"])
def test_a_trainer_without_what_ours_overrides_is_refused(method):
    from transformers import Trainer

    from hf_poss.compatibility import check_trainer

    check_trainer(Trainer)
    for broken in (None, lambda self: None):
        other = type("OtherTrainer", (Trainer,), {method: broken})
        with pytest.raises(ImportError, match=rf"lacks .*{method}.*pip install 'transformers>=5\.\d+'"):
            check_trainer(other)


# ---- What is declared ----


def test_requirements_have_a_floor_and_no_cap():
    metadata = importlib.metadata.metadata("hf-poss")
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    requirements = importlib.metadata.requires("hf-poss")
    core = {re.match(r"[\w.-]+", line)[0]: line for line in requirements if "extra ==" not in line}
    assert core.keys() == {"huggingface-hub", "safetensors", "torch", "transformers"}
    assert core["transformers"] == "transformers>=5.15"
    assert not any(re.search(r"<|==|~=", line.split(";")[0]) for line in requirements)
    assert {"training", "evaluation", "dev"} <= set(metadata.get_all("Provides-Extra"))


def test_the_metadata_is_that_of_the_project_file():
    text = (ROOT / "pyproject.toml").read_text()
    project = text.partition("[project]")[2]
    assert re.search(r'^requires-python = ">=3\.10"$', project, re.MULTILINE)
    assert re.search(r'^ *"transformers>=5\.15",?$', project, re.MULTILINE)


def test_the_version_that_works_is_the_version_that_is_required():
    from hf_poss import compatibility

    assert compatibility._WORKING_VERSIONS in importlib.metadata.requires("hf-poss")


def test_the_oldest_release_that_works_is_tested_and_told():
    required = re.search(r'"transformers>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    tested = re.search(r"^FLOOR \?= transformers==([\d.]+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert tested == f"{required}.0"
    assert f"transformers {tested}, the oldest that works" in (ROOT / "README.md").read_text()
    assert "make test-floor" in (ROOT / ".ci" / "run").read_text()
