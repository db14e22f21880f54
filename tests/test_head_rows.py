"""Rows that are copied out of a head once: never those of a head that was."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from conftest import VOCAB_SIZE, drafter_for, make_poss, make_prompt, make_target, peft_for_add_adapter, small_target
from torch import nn

from hf_poss.head_rows import PROBED_COLUMNS, rows_of


HIDDEN = 2 * PROBED_COLUMNS


@pytest.fixture
def head() -> nn.Linear:
    return nn.Linear(HIDDEN, 20)


@pytest.fixture
def chosen() -> torch.LongTensor:
    return torch.tensor([7, 3, 11])


def assert_current(head: nn.Linear, chosen: torch.LongTensor) -> None:
    rows = rows_of(head, chosen)
    assert torch.equal(rows.weight, head.weight[chosen])
    assert rows.bias is None if head.bias is None else torch.equal(rows.bias, head.bias[chosen])


@pytest.mark.parametrize("bias", [False, True])
def test_they_are_copied_once(bias, chosen):
    head = nn.Linear(HIDDEN, 20, bias=bias)
    assert_current(head, chosen)
    assert rows_of(head, chosen) is rows_of(head, chosen)
    assert not rows_of(head, chosen).weight.requires_grad


def in_place(head):
    with torch.no_grad():
        head.weight[3, -1] += 1


def past_autograd(head):
    head.weight.data[3] += 1


def bias_past_autograd(head):
    head.bias.data[7] += 1


def step(head):
    head(torch.ones(1, HIDDEN)).sum().backward()
    torch.optim.SGD(head.parameters(), lr=0.1).step()


def other_weights(head):
    head.load_state_dict(nn.Linear(HIDDEN, 20).state_dict())


def other_data(head):
    head.weight.data = head.weight.data + 1


def other_parameter(head):
    head.weight = nn.Parameter(head.weight.detach() + 1)


def other_dtype(head):
    head.bfloat16()


CHANGES = [in_place, past_autograd, bias_past_autograd, step, other_weights, other_data, other_parameter, other_dtype]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_changed_head_gives_other_rows(head, chosen, change, mode):
    with mode():
        before = rows_of(head, chosen)
    change(head)
    with mode():
        assert rows_of(head, chosen) is not before
        assert_current(head, chosen)
        assert rows_of(head, chosen) is rows_of(head, chosen)


@pytest.mark.parametrize("write", [lambda chosen: chosen.copy_(chosen.flip(0)), lambda chosen: chosen.data.add_(1)])
def test_a_changed_choice_gives_other_rows(head, chosen, write):
    rows_of(head, chosen)
    write(chosen)
    assert_current(head, chosen)


def test_heads_and_choices_do_not_mix(head, chosen):
    other_head, other_choice = copy.deepcopy(head), torch.tensor([0, 1])
    in_place(other_head)
    for _ in range(2):
        for one in (head, other_head):
            for choice in (chosen, other_choice):
                assert_current(one, choice)
    assert rows_of(head, chosen) is rows_of(head, chosen)


def test_rows_copied_in_inference_mode_take_part_in_gradients(head, chosen):
    with torch.inference_mode():
        rows_of(head, chosen)
    rows = rows_of(head, chosen)
    features = torch.randn(2, HIDDEN, requires_grad=True)
    nn.functional.linear(features, rows.weight, rows.bias).sum().backward()
    torch.testing.assert_close(features.grad, head.weight[chosen].sum(0).expand(2, -1))


def test_a_head_whose_changes_are_not_counted_is_copied_anew(chosen):
    """Inference tensors have no version."""
    with torch.inference_mode():
        head = nn.Linear(HIDDEN, 20)
        assert_current(head, chosen)
        head.weight[3, -1] += 1
        assert_current(head, chosen)
    assert_current(head, chosen)


@pytest.mark.parametrize("goes", ["head", "chosen"])
def test_they_go_with_either(goes):
    things = {"head": nn.Linear(HIDDEN, 20), "chosen": torch.tensor([1, 2])}
    watched = weakref.ref(rows_of(**things))
    gc.collect()
    assert watched() is not None
    del things[goes]
    gc.collect()
    assert watched() is None


def test_models_stay_copyable(tmp_path):
    target = small_target()
    poss = drafter_for(target, "tree").set_draft_vocabulary(torch.arange(12), 5)
    target.generate(make_prompt(9), assistant_model=poss, max_new_tokens=4, do_sample=False)
    for model in (target, poss):
        pickle.dumps(copy.deepcopy(model).state_dict())
    torch.save(poss, tmp_path / "poss.pt")


# ---- In `generate` ----


def test_calls_in_a_row_copy_once():
    target = small_target()
    poss = drafter_for(target, "tree").set_draft_vocabulary(torch.arange(12), 5)
    target.generate(make_prompt(9), assistant_model=poss, max_new_tokens=8, do_sample=False)
    rows = rows_of(target.lm_head, poss.draft_vocabulary)
    target.generate(make_prompt(5), assistant_model=poss, max_new_tokens=8, do_sample=False)
    assert rows_of(target.lm_head, poss.draft_vocabulary) is rows
    assert poss.draft_head(poss.reference).rows is rows


@pytest.mark.parametrize("safe", [False, True])
def test_a_merged_head_gives_its_new_rows(safe):
    """peft merges through `.data`, into the very tensor whose rows were copied."""
    peft = pytest.importorskip("peft")
    target = make_target()
    poss = make_poss(target).set_draft_vocabulary(torch.arange(VOCAB_SIZE), 20)
    features = torch.randn(1, 3, 32)
    before = poss.draft_head(poss.reference).logits(features)
    weight = target.lm_head.weight
    adapted = peft.get_peft_model(target, peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    assert poss.attach(adapted).draft_head(poss.reference).rows is None
    merged = adapted.merge_and_unload(safe_merge=safe)
    head = poss.attach(merged).draft_head(poss.reference)
    assert merged.lm_head.weight is weight and head.rows is not None
    found = head.logits(features)
    torch.testing.assert_close(found, poss.reference.logits(features)[..., poss.draft_vocabulary])
    assert not torch.allclose(found, before)


def test_an_adapter_on_the_head_is_drafted_with():
    """`load_adapter` and what undoes it."""
    peft = peft_for_add_adapter()
    target = make_target()
    poss = make_poss(target).set_draft_vocabulary(torch.arange(VOCAB_SIZE), 20)
    features = torch.randn(1, 3, 32)

    def assert_the_targets() -> torch.Tensor:
        found = poss.attach(target).draft_head(poss.reference).logits(features)
        torch.testing.assert_close(found, target.get_output_embeddings()(features)[..., poss.draft_vocabulary])
        return found

    with torch.no_grad():
        before = assert_the_targets()
        target.add_adapter(peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
        assert not torch.allclose(assert_the_targets(), before)
        target.disable_adapters()
        torch.testing.assert_close(assert_the_targets(), before)
