"""The example that retrains a drafter on an adapted target, as a user runs it."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from conftest import SIZES
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

from hf_poss import PosSModel
from hf_poss.demo import demo_folder


peft = pytest.importorskip("peft")

EXAMPLE = Path(__file__).parents[2] / "examples" / "adapt_lora_target.py"
SENTENCE = "while the drafter guesses several tokens, the target checks them all at once and keeps what is right. "


@pytest.fixture
def tiny(tmp_path) -> dict[str, str]:
    """A random target with the demo's tokenizer, random specialists for it, and texts that are easy to learn."""
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(demo_folder() / "target")
    config = LlamaConfig(**{**SIZES, "vocab_size": len(tokenizer), "hidden_size": 64, "eos_token_id": 0})
    target = LlamaForCausalLM(config)
    target.lm_head.weight.data.mul_(10)
    target.save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    PosSModel.from_target(target, positions_per_specialist=2, num_draft_positions=4).save_pretrained(tmp_path / "poss")
    lines = [json.dumps({"text": f"{number}. {6 * SENTENCE}"}) for number in range(24)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    return {name: str(tmp_path / name) for name in ("target", "poss")} | {"texts": str(tmp_path / "texts.jsonl")}


def test_retraining_brings_the_drafts_back(tiny, tmp_path, monkeypatch, capsys):
    steps = ["--adapter_steps", "40", "--poss_steps", "40", "--learning_rate", "3e-3", "--block_length", "64"]
    sizes = ["--batch_size", "4", "--prompts", "2", "--max_new_tokens", "40"]
    named = [part for name, value in tiny.items() for part in (f"--{name}", value)]
    output = tmp_path / "output"
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--output", str(output), *named, *steps, *sizes])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    taus = {name: float(tau) for name, tau in re.findall(r"^(.+): tau (\d\.\d\d)$", printed, re.MULTILINE)}
    assert taus["adapted target, drafter retrained"] > 1.5 * taus["adapted target, drafter as it was"]
    assert peft.PeftConfig.from_pretrained(output / "adapter").peft_type == "LORA"
    assert PosSModel.from_pretrained(output / "poss").config.num_draft_positions == 4
