"""Contestants: their arguments and knobs."""

import pytest
import torch
from conftest import make_poss

from hf_poss.candidate_generator import DraftSettings
from hf_poss.evaluation.contestants import CONTESTANTS, fixed_settings, make_contestants


CPU, GPU = torch.device("cpu"), torch.device("cuda")
KNOBS = ("num_assistant_tokens", "draft_top_k", "draft_total_tokens")


def made(poss, *names, device=CPU, **kwargs):
    settings = DraftSettings(3, 4, 12)
    return {each.name: each for each in make_contestants(names, poss, settings, device, **kwargs)}


def knobs_of(poss) -> list:
    return [getattr(poss.generation_config, name) for name in KNOBS]


def test_what_others_are_measured_by_is_always_there(poss):
    assert list(made(poss, "poss-tree")) == ["plain", "poss-tree"]
    assert list(made(poss, "poss-compiled", "plain")) == ["plain", "plain-compiled", "poss-compiled"]


@pytest.mark.parametrize(("device", "mode"), [(CPU, "default"), (GPU, "reduce-overhead")])
def test_compiled_contestants_share_one_static_configuration(poss, device, mode):
    contestants = made(poss, "plain-compiled", "poss-compiled", device=device)
    plain, drafted = (contestants[name].arguments for name in ("plain-compiled", "poss-compiled"))
    assert plain["cache_implementation"] == drafted["cache_implementation"] == "static"
    assert plain["compile_config"] is drafted["compile_config"]
    assert plain["compile_config"].mode == mode
    assert "assistant_model" not in plain and drafted["assistant_model"] is poss
    assert contestants["poss-compiled"].baseline == "plain-compiled"


def test_a_cpu_compiles_because_it_is_told_to(poss, llama, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **settings: compiled.append(settings) or function)
    ids = torch.tensor([[5, 9, 3]])
    arguments = made(poss, "plain-compiled")["plain-compiled"].arguments
    llama.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, **arguments)
    assert [settings["mode"] for settings in compiled] == ["default"]
    del llama._compiled_call


@pytest.mark.parametrize(
    ("name", "knobs"),
    [("poss-chain", [3, 1, 4]), ("poss-tree", [3, 4, 12]), ("poss-auto", ["auto", 4, "auto"])],
)
def test_knobs_are_set_while_a_contestant_runs_and_then_as_before(poss, name, knobs):
    contestant = made(poss, name)[name]
    before = knobs_of(poss)
    with pytest.raises(RuntimeError), contestant.set_up():
        assert knobs_of(poss) == knobs
        raise RuntimeError
    assert knobs_of(poss) == before


def test_chains_and_trees_say_their_size_and_auto_has_none(poss):
    contestants = made(poss, "poss-chain", "poss-tree", "poss-auto")
    assert contestants["poss-chain"].settings == DraftSettings(3, 1, 4)
    assert contestants["poss-tree"].settings == DraftSettings(3, 4, 12)
    assert contestants["poss-auto"].settings is None


@pytest.mark.parametrize(
    ("names", "told"), [(["poss-tre"], "poss-tre; expected some of plain"), (["assistant"], "--assistant")]
)
def test_what_there_is_not_is_refused(poss, names, told):
    with pytest.raises(ValueError, match=told):
        made(poss, *names)


def test_every_name_can_be_made(poss, llama):
    assert set(made(poss, *CONTESTANTS, assistant=llama)) == set(CONTESTANTS)


def test_a_fixed_size_is_what_is_given_else_the_knobs_else_the_defaults(llama):
    poss = make_poss(llama, num_draft_positions=4)
    poss.generation_config.draft_top_k, poss.generation_config.draft_total_tokens = 3, "auto"
    settings = fixed_settings(poss, CPU, depth=2)
    assert (settings.depth, settings.top_k) == (2, 3)
    assert isinstance(settings.total_tokens, int)
    assert knobs_of(poss) == [4, 3, "auto"]
    with pytest.raises(ValueError, match="draft_top_k"):
        fixed_settings(poss, CPU, top_k=0)
    assert knobs_of(poss) == [4, 3, "auto"]
