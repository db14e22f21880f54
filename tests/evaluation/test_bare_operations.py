"""The bare operations of a draft: the same products as drafting itself."""

import pytest
import torch
from conftest import drafter_for, make_prompt, small_target
from torch.utils.flop_counter import FlopCounterMode

from hf_poss import PosSCandidateGenerator
from hf_poss.candidate_generator import DraftSettings
from hf_poss.evaluation import bare_operations
from hf_poss.modeling_poss import TargetReference


@pytest.mark.parametrize("shape", ["chain", "tree"])
@pytest.mark.parametrize("rows", [1, 2])
def test_products_are_those_of_a_draft(shape, rows):
    """Attention aside, where columns behind a level's nodes are masked or left out."""
    target = small_target(vocab_size=40)
    poss = drafter_for(target, shape)
    top_k, depth, accepted = (1 if shape == "chain" else 4), 4, 3
    settings = DraftSettings(depth, top_k, 12)
    reference = TargetReference.from_target(target, poss.config)
    prompt = make_prompt(8).repeat(rows, 1)
    config = target.generation_config
    config.max_length = 40
    drafter = PosSCandidateGenerator(prompt, poss, config, {}, target)
    features = torch.randn(rows, 8, 32)
    with torch.no_grad():
        drafter.extend_context(features, prompt)
        with FlopCounterMode(display=False) as drafted:
            drafter.extend_context(features[:, :accepted], prompt[:, :accepted])
            drafter.draft(prompt[:, -1], settings)
        operations = bare_operations._operations(poss, reference, settings, rows, 8 + accepted, accepted)
        with FlopCounterMode(display=False) as bare:
            for kind, operation in operations:
                if kind != "attention":
                    operation()

    def products(counter: FlopCounterMode) -> int:
        """With weights; some releases compute rotary angles by a batched product."""
        counts = counter.get_flop_counts()["Global"]
        return sum(counts.get(name, 0) for name in (torch.ops.aten.mm, torch.ops.aten.addmm))

    assert products(bare) > 0
    assert products(bare) == products(drafted)


def test_seconds_are_told_by_kind():
    target = small_target()
    poss = drafter_for(target, "tree")
    reference = TargetReference.from_target(target, poss.config)
    seconds = bare_operations.bare_draft_seconds(poss, reference, DraftSettings(3, 4, 12), 1, 20, 2, repeats=2)
    kinds = {"projections", "rotation", "cache", "attention", "residuals", "norms", "mlp", "head", "top-k", "tree"}
    kinds |= {"parents"}
    assert set(seconds) == kinds | {"all"}
    assert min(seconds.values()) > 0
    assert seconds["all"] >= sum(seconds[kind] for kind in kinds)


def test_what_prepares_and_what_warms_up_is_not_counted(monkeypatch):
    clock, calls = [0.0], []

    def operation() -> None:
        calls.append(1)
        clock[0] += 100.0 if len(calls) <= 4 else 3.0

    def prepare() -> None:
        clock[0] += 50.0

    monkeypatch.setattr(bare_operations.time, "perf_counter", lambda: clock[0])
    operations = [("mlp", operation), ("head", operation)]
    seconds = bare_operations._mean_seconds(operations, torch.device("cpu"), prepare, repeats=5)
    assert seconds == {"mlp": 3.0, "head": 3.0, "all": 6.0}
