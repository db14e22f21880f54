"""Who decodes: names and checkpoints, sizes of drafts, digests."""

import pytest
import torch
from conftest import make_poss

from hf_poss import PosSModel
from hf_poss.evaluation.drafters import (
    DrafterSpec,
    assistant_drafter,
    load_specialists,
    parse_drafters,
    plain_drafter,
    prompt_lookup_drafter,
    specialists_drafter,
    weights_digest,
)


CPU = torch.device("cpu")


def specialists(models: list[PosSModel], **knobs):
    spec = DrafterSpec("PosS-2", tuple(f"seed{index}" for index in range(len(models))))
    return specialists_drafter(spec, models, CPU, knobs)


def test_names_and_checkpoints():
    given = ["EAGLE=a/eagle", "PosS-2=a/s0,a/s1", "runs/poss3/", "owner/PosS1-Model"]
    assert parse_drafters(given) == [
        DrafterSpec("EAGLE", ("a/eagle",)),
        DrafterSpec("PosS-2", ("a/s0", "a/s1")),
        DrafterSpec("poss3", ("runs/poss3/",)),
        DrafterSpec("PosS1-Model", ("owner/PosS1-Model",)),
    ]
    assert parse_drafters(["runs/lr=1e-3/poss"]) == [DrafterSpec("poss", ("runs/lr=1e-3/poss",))]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["PosS="], "names no folder"),
        (["a/s0,a/s1"], "2 checkpoints and no name"),
        (["a/poss", "b/poss"], "Two drafters would be called 'poss'"),
        (["plain=a/b"], "would be called 'plain'"),
        (["assistant=a/b"], "would be called 'assistant'"),
    ],
)
def test_unclear_names_are_refused(given, told):
    with pytest.raises(ValueError, match=told):
        parse_drafters(given)


def test_specialists_say_what_they_are_and_how_they_draft(llama):
    poss = make_poss(llama, positions_per_specialist=2, num_draft_positions=3)
    poss.generation_config.draft_top_k = 3
    drafter = specialists([poss], num_assistant_tokens="auto", draft_total_tokens=9, draft_top_k=None)
    about = drafter.about()
    assert about["kind"] == "poss" and about["checkpoints"] == ["seed0"]
    assert (about["positions_per_specialist"], about["num_specialists"], about["num_draft_positions"]) == (2, 2, 3)
    assert (about["depth"], about["top_k"], about["total_tokens"]) == ("auto", 3, 9)
    assert about["parameters"] == sum(parameter.numel() for parameter in poss.parameters())
    [contestant] = drafter.contestants
    before = vars(poss.generation_config).copy()
    with contestant.set_up():
        knobs = poss.generation_config
        assert (knobs.num_assistant_tokens, knobs.draft_top_k, knobs.draft_total_tokens) == ("auto", 3, 9)
    assert vars(poss.generation_config) == before


def test_checkpoints_are_seeds_of_one_method(llama):
    seeds = [make_poss(llama, seed=seed, num_draft_positions=3) for seed in (0, 1)]
    drafter = specialists(seeds)
    assert [contestant.arguments["assistant_model"] for contestant in drafter.contestants] == seeds
    assert len(set(drafter.about()["weights"])) == 2
    with pytest.raises(ValueError, match="`num_draft_positions` is 3 in seed0 and 4 in seed1"):
        specialists([seeds[0], make_poss(llama, num_draft_positions=4)])


def test_an_impossible_size_is_refused(llama):
    with pytest.raises(ValueError, match="draft_top_k"):
        specialists([make_poss(llama)], draft_top_k=0)


def test_baselines_are_transformers_own(llama):
    assert plain_drafter().contestants[0].arguments == {}
    assert prompt_lookup_drafter(7).contestants[0].arguments == {"prompt_lookup_num_tokens": 7}
    drafter = assistant_drafter(llama, "small")
    assert drafter.contestants[0].arguments == {"assistant_model": llama}
    assert drafter.about()["parameters"] == llama.num_parameters()
    assert not any(of.contestants[0].has_specialists for of in (drafter, plain_drafter(), prompt_lookup_drafter()))


def test_specialists_are_loaded_in_the_targets_dtype(llama, tmp_path):
    make_poss(llama).to(torch.bfloat16).save_pretrained(tmp_path)
    poss = load_specialists(llama, str(tmp_path))
    assert poss.dtype == llama.dtype and not poss.training


def test_a_digest_tells_weights_apart(llama):
    poss, other = make_poss(llama, seed=0), make_poss(llama, seed=0)
    assert weights_digest(poss) == weights_digest(other)
    with torch.no_grad():
        other.layers[-1].mlp.down_proj.weight.mul_(1.001)
    assert weights_digest(poss) != weights_digest(other)
