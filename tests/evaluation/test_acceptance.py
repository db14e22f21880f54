"""Scripted acceptance: patterns, the picks that follow them, and drafters as sure as they are right."""

from fractions import Fraction

import pytest
import torch
from conftest import drafter_for, make_prompt, small_target

from hf_poss import collect_statistics
from hf_poss.draft_tree import DraftTree
from hf_poss.evaluation.acceptance import Acceptance, AcceptanceScript, match_confidence
from hf_poss.verification import scripted_picks


@pytest.mark.parametrize(("tau", "depth"), [("4.83", 6), ("1", 6), ("7", 6), ("2.5", 3), ("3.333", 4), ("1.0625", 8)])
def test_a_pattern_has_exactly_the_mean_asked_for(tau, depth):
    lengths = Acceptance.of(tau, depth).lengths
    assert 1 + Fraction(sum(lengths), len(lengths)) == Fraction(tau)
    assert min(lengths) >= 0 and max(lengths) <= depth


def test_rates_by_position_are_those_of_the_pattern():
    rates = [0.9, 0.8, 0.75]
    acceptance = Acceptance.of("0.9,0.8,0.75", 5)
    period = len(acceptance.lengths)
    for position, rate in enumerate([*rates, 0.75, 0.75], start=1):  # the last one goes on
        reached = sum(length >= position - 1 for length in acceptance.lengths)
        accepted = sum(length >= position for length in acceptance.lengths)
        assert accepted / reached == pytest.approx(rate, abs=1.5 * position / period / 0.2)
    assert acceptance.mean_rate == pytest.approx((0.9 + 0.8 + 3 * 0.75) / 5)


def test_a_mean_is_spread_like_one_rate_for_all_positions():
    acceptance = Acceptance.of("4.83", 6)
    rate = acceptance.mean_rate
    assert sum(rate**k for k in range(7)) == pytest.approx(4.83)
    for least in range(1, 7):
        share = sum(length >= least for length in acceptance.lengths) / len(acceptance.lengths)
        assert share == pytest.approx(rate**least, abs=0.02)


def test_every_stretch_of_rounds_has_nearly_the_mean():
    lengths = Acceptance.of("4.83", 6).lengths
    for rounds in range(10, len(lengths)):
        assert 1 + sum(lengths[:rounds]) / rounds == pytest.approx(4.83, abs=7 / rounds)  # a round's tokens


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("8", "8 is impossible: 6 draft positions allow 1 to 7"),
        ("0.5", "0.5 is impossible"),
        ("1.2,0.3", "expected one or more from 0 to 1"),
        ("fast", "expected a mean acceptance length like 4.83"),
        ("", "expected a mean acceptance length like 4.83"),
    ],
)
def test_what_no_drafter_accepts_is_refused(text, told):
    with pytest.raises(ValueError, match=told):
        Acceptance.of(text, 6)


def tree() -> DraftTree:
    """Root 7 with children 3 and 5, 9 and 4 below 5, 1 below 9; and root 8 with a chain 0, 1, 2, 3, 4."""
    return DraftTree(
        tokens=torch.tensor([[7, 3, 5, 9, 4, 1], [8, 0, 1, 2, 3, 4]]),
        parents=torch.tensor([[0, 0, 0, 2, 2, 3], [0, 0, 1, 2, 3, 4]]),
        depths=torch.tensor([[0, 1, 1, 2, 2, 3], [0, 1, 2, 3, 4, 5]]),
        max_depth=5,
    )


def test_picks_follow_first_children_to_the_depth_of_the_pattern():
    acceptance = Acceptance([1.0], 5)
    acceptance.lengths = [2, 0, 1, 3]  # row 1 begins at half of the period
    script = AcceptanceScript(acceptance, torch.device("cpu"))
    for accepted in ([2, 1], [0, 3], [1, 2], [3, 0], [2, 1]):
        picks = script(tree(), torch.full((2, 6), 50))
        for row, (first_children, length) in enumerate(
            zip(({0: 3, 2: 9, 3: 1}, {0: 0, 1: 1, 2: 2, 3: 3, 4: 4}), accepted, strict=True)
        ):
            tokens, depths = tree().tokens[row].tolist(), tree().depths[row].tolist()
            for node, pick in enumerate(picks[row].tolist()):
                if node in first_children and depths[node] < length:
                    assert pick == first_children[node]
                else:
                    assert pick not in tokens


def test_a_script_never_waits_for_the_device():
    """A tensor on `meta` has no values that could be waited for."""
    script = AcceptanceScript(Acceptance.of("2.5", 3), torch.device("meta"))
    nodes = [part.to("meta") for part in (tree().tokens, tree().parents, tree().depths)]
    picks = script(DraftTree(*nodes, max_depth=5), torch.empty(2, 6, dtype=torch.long, device="meta"))
    assert picks.shape == (2, 6) and picks.is_meta


@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_a_call_accepts_what_the_pattern_says(shape):
    target = small_target(vocab_size=60)
    poss = drafter_for(target, shape, total=40, depth=4)
    acceptance = Acceptance([0.8], 4)
    prompt = make_prompt(6)
    # A tree of unsure drafts may end above the depth that a round is to accept.
    poss.attach(target)
    with torch.no_grad():
        features = target(prompt, output_hidden_states=True).hidden_states[-1]
    match_confidence(poss, features, prompt, 0.95)
    script = AcceptanceScript(acceptance, torch.device("cpu"))
    with scripted_picks(script), collect_statistics() as stats:
        target.generate(
            prompt, attention_mask=torch.ones_like(prompt), assistant_model=poss, max_new_tokens=60, do_sample=False
        )
    rounds, accepted = [], 0
    for author in stats.calls[0].authors[1:]:
        if author:
            accepted = author
        else:  # the target's own token ends a round
            rounds.append(accepted)
            accepted = 0
    complete = rounds[:-2]  # the budget cuts the last ones short
    assert len(complete) > 8
    assert complete == [acceptance.lengths[index % len(acceptance.lengths)] for index in range(len(complete))]


@pytest.mark.parametrize("tied", [False, True])
def test_confidence_is_matched_by_the_head_alone(tied):
    target = small_target(vocab_size=200, tie_word_embeddings=tied)
    poss = drafter_for(target, "tree").attach(target)
    prompt = make_prompt(24)
    with torch.no_grad():
        features = target(prompt, output_hidden_states=True).hidden_states[-1]
        before = poss.roll_out(features, prompt)
    reached = match_confidence(poss, features, prompt, 0.7)
    with torch.no_grad():
        after = poss.roll_out(features, prompt)
        sure = torch.stack([(part @ target.lm_head.weight.T).softmax(-1).amax(-1) for part in after])
    assert reached == pytest.approx(0.7, abs=0.01)
    assert sure.mean().item() == pytest.approx(reached, abs=1e-4)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
