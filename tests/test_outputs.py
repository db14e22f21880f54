"""Hidden states and attentions, gathered row by row and returned step by step."""

import pytest
import torch

from hf_poss.outputs import RowOutputs, stacked


def test_steps_are_rows_side_by_side():
    """Row 0 has three steps, row 1 one: zero behind its end, and nothing beyond what is asked for."""
    rows = [[torch.full((1, 2), float(step)) for step in range(1, 4)], [torch.full((1, 2), 9.0)]]
    steps = stacked(rows, 2)
    assert [step.tolist() for step in steps] == [[[1.0, 1.0], [9.0, 9.0]], [[2.0, 2.0], [0.0, 0.0]]]
    assert stacked(rows, 0) == ()


def random_pass(rows: int, nodes: int, width: int, layers: int = 2):
    generator = torch.Generator().manual_seed(width)
    hidden = [torch.randn(rows, nodes, 3, generator=generator) for _ in range(layers)]
    attentions = [torch.randn(rows, 2, nodes, width + nodes, generator=generator) for _ in range(layers)]
    return hidden, attentions


def test_a_round_gives_a_step_for_each_accepted_node():
    """Two rows in swapped slots; row 0 of 4 columns keeps nodes 0 and 2, row 1 of 6 the root."""
    prompt, prompt_attentions = random_pass(2, 5, 0)
    outputs = RowOutputs(2, tuple(prompt), tuple(prompt_attentions))
    hidden, attentions = random_pass(2, 3, 6)
    outputs.add(1, 0, [0], 6, 6, hidden, attentions)
    outputs.add(0, 1, [0, 2], 4, 6, hidden, attentions)

    steps = outputs.hidden_states(3)
    assert len(steps) == 3 and steps[0] == tuple(prompt)
    for layer in range(2):
        first, second = steps[1][layer], steps[2][layer]
        assert torch.equal(first, torch.stack((hidden[layer][1, :1], hidden[layer][0, :1])))
        assert torch.equal(second[0], hidden[layer][1, 2:])
        assert not second[1].any()

    # Columns of the row's own context, then those of the nodes on its path.
    single = RowOutputs(1, None, tuple(prompt_attentions))
    single.add(0, 1, [0, 2], 4, 6, hidden, attentions)
    steps = single.attentions(3)
    for layer in range(2):
        weights = attentions[layer][1]
        assert torch.equal(steps[1][layer][0], weights[:, :1, [0, 1, 2, 3, 6]])
        assert torch.equal(steps[2][layer][0], weights[:, 2:, [0, 1, 2, 3, 6, 8]])
    assert single.hidden_states(3) is None


def test_steps_do_not_keep_a_pass_alive():
    prompt, _ = random_pass(1, 2, 0)
    outputs = RowOutputs(1, tuple(prompt))
    hidden, _ = random_pass(1, 500, 6)
    outputs.add(0, 0, [0], 2, 2, hidden, None)
    kept = outputs.hidden_states(2)[1][0]
    assert kept.untyped_storage().nbytes() < hidden[0].untyped_storage().nbytes() / 100


@pytest.mark.parametrize("window", [3, 5, 9])
def test_attentions_are_cut_to_what_a_window_keeps(window):
    """Of a query behind n others, the window's last tokens; of several queries, that many more."""
    _, prompt = random_pass(1, 4, 4)  # 4 new tokens behind 4 cached ones
    outputs = RowOutputs(1, None, tuple(prompt), windows=[window, None])
    _, attentions = random_pass(1, 2, 8)
    outputs.add(0, 0, [0, 1], 8, 8, None, attentions)
    first, *later = outputs.attentions(3)
    assert torch.equal(first[0], prompt[0][..., -(window + 3) :]) and torch.equal(first[1], prompt[1])
    for number, step in enumerate(later):
        assert step[0].shape[-1] == min(window, 9 + number) and step[1].shape[-1] == 9 + number
        weights = attentions[0][:, :, number : number + 1, : 9 + number]
        assert torch.equal(step[0], weights[..., -window:])


def test_nothing_is_kept_that_was_not_asked_for():
    outputs = RowOutputs(1)
    hidden, attentions = random_pass(1, 2, 3)
    outputs.add(0, 0, [0, 1], 3, 3, hidden, attentions)
    assert outputs.hidden_states(3) is None and outputs.attentions(3) is None
