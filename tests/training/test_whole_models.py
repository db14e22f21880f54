"""Loading models beside DeepSpeed."""

from types import SimpleNamespace

import pytest
from transformers.integrations import (
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from hf_poss import PosSTrainingArguments
from hf_poss.training.whole_models import whole_models


class ZeRO3:
    """What transformers keeps of DeepSpeed's configuration."""

    def is_zero3(self) -> bool:
        return True


@pytest.fixture
def zero3():
    config = ZeRO3()
    set_hf_deepspeed_config(config)
    yield config
    unset_hf_deepspeed_config()


def test_models_load_whole_beside_zero3(zero3):
    args = SimpleNamespace(deepspeed_plugin=SimpleNamespace(dschf=zero3))
    assert is_deepspeed_zero3_enabled()
    with whole_models(args):
        assert not is_deepspeed_zero3_enabled()
    assert is_deepspeed_zero3_enabled()
    with pytest.raises(OSError), whole_models(args):
        raise OSError("no such target")
    assert is_deepspeed_zero3_enabled()


def test_nothing_changes_without_deepspeed(tmp_path):
    with whole_models(PosSTrainingArguments(tmp_path, use_cpu=True)):
        assert not is_deepspeed_zero3_enabled()
