"""`specialist_adapter` of a config: what it may say, and what is filled in."""

import sys

import pytest

from hf_poss import PosSConfig, PosSModel
from hf_poss.adapter_settings import PROJECTIONS, complete_adapter


def test_what_is_left_out_is_filled_in():
    assert complete_adapter({"r": 4}) == {
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "target_modules": list(PROJECTIONS),
    }


def test_a_config_completes_keeps_and_saves_it(tmp_path):
    given = {"r": 8, "lora_alpha": 3, "target_modules": ["up_proj", "q_proj"]}
    config = PosSConfig(specialist_adapter=given)
    assert config.specialist_adapter["target_modules"] == ["q_proj", "up_proj"]
    assert given == {"r": 8, "lora_alpha": 3, "target_modules": ["up_proj", "q_proj"]}
    config.save_pretrained(tmp_path)
    assert PosSConfig.from_pretrained(tmp_path).specialist_adapter == config.specialist_adapter
    assert PosSConfig().specialist_adapter is None


def test_peft_s_word_for_all_projections():
    for modules in ("all-linear", ["all-linear"], PROJECTIONS):
        assert complete_adapter({"target_modules": modules})["target_modules"] == list(PROJECTIONS)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"rank": 4, "alpha": 1}, ["alpha", "rank", "lora_alpha", "target_modules"]),
        ({"r": 0}, ["'r'", "0", "1 or more"]),
        ({"r": -3}, ["'r'", "-3"]),
        ({"r": 2.5}, ["'r'", "2.5"]),
        ({"r": True}, ["'r'", "True"]),
        ({"lora_alpha": 0}, ["lora_alpha", "above 0"]),
        ({"lora_alpha": "16"}, ["lora_alpha", "'16'"]),
        ({"lora_dropout": 1.0}, ["lora_dropout", "1.0", "below 1"]),
        ({"use_rslora": "yes"}, ["use_rslora", "yes"]),
        ({"target_modules": ["q_proj", "query", "fc"]}, ["fc, query", "k_proj", "down_proj"]),
        ({"target_modules": []}, ["target_modules", "q_proj"]),
        ({"target_modules": 3}, ["target_modules", "3"]),
    ],
)
def test_wrong_settings_are_refused_by_name(given, named):
    with pytest.raises(ValueError) as error:
        PosSConfig(specialist_adapter=given)
    for name in ("specialist_adapter", *named):
        assert name in str(error.value)


def test_peft_is_asked_for_when_it_is_needed_and_not_before(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "hf_poss.specialist_adapters", raising=False)
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    PosSModel(PosSConfig(**sizes))
    with pytest.raises(ImportError, match=r"specialist_adapter.*pip install 'peft>="):
        PosSModel(PosSConfig(**sizes, specialist_adapter={"r": 2}))
