"""The walk over a verified tree, on trees and logits made by hand."""

from collections import Counter

import pytest
import torch
from scipy.stats import chi2
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, StoppingCriteria, StoppingCriteriaList

from hf_poss.draft_tree import DraftTree
from hf_poss.verification import StopCheck, TokenPicker, walk


VOCAB = 8
PROMPT = torch.tensor([[5, 1, 2]])  # the last token is the root

#         2
#       3   4
#      5 6   3
#      |     |
#      7     1
# Two nodes carry token 3, at depths 1 and 2.
TREE = DraftTree(
    tokens=torch.tensor([[2, 3, 4, 5, 6, 3, 7, 1]]),
    parents=torch.tensor([[0, 0, 0, 1, 1, 2, 3, 5]]),
    depths=torch.tensor([[0, 1, 1, 2, 2, 2, 3, 3]]),
    max_depth=3,
)


def picking(*picks: int) -> torch.Tensor:
    """Logits [1, nodes, vocab] whose most likely token at node i is `picks[i]`."""
    logits = torch.zeros(1, len(picks), VOCAB)
    for node, token in enumerate(picks):
        logits[0, node, token] = 1.0
    return logits


def stop_check(*criteria) -> StopCheck:
    return StopCheck(StoppingCriteriaList(criteria))


def greedy(*processors, **kwargs) -> TokenPicker:
    return TokenPicker(LogitsProcessorList(processors), do_sample=False, **kwargs)


class Recording(LogitsProcessor):
    """Changes nothing and writes down what it is asked."""

    def __init__(self):
        self.prefixes, self.rows = [], []

    def __call__(self, input_ids, scores):
        self.prefixes.append(input_ids[0].tolist())
        self.rows.append(scores.clone())
        return scores


# Picks by node 0..7; path kept; tokens emitted; how many of these were drafted.
WALKS = {
    "nothing accepted": ((1, 0, 0, 0, 0, 0, 0, 0), [0], [1], 0),
    "one accepted": ((4, 0, 7, 0, 0, 0, 0, 0), [0, 2], [4, 7], 1),
    "left path to its leaf": ((3, 5, 0, 7, 0, 0, 2, 0), [0, 1, 3, 6], [3, 5, 7, 2], 3),
    "right path to its leaf": ((4, 0, 3, 0, 0, 1, 0, 6), [0, 2, 5, 7], [4, 3, 1, 6], 3),
    "second sibling": ((3, 6, 0, 0, 4, 0, 0, 0), [0, 1, 4], [3, 6, 4], 2),
    # 3 below 4 is a node, 4 below 3 is none; 5 is a child of node 1 alone.
    "another branch's token": ((3, 4, 3, 0, 0, 0, 0, 0), [0, 1], [3, 4], 1),
    "another branch's child": ((4, 5, 5, 7, 0, 0, 0, 0), [0, 2], [4, 5], 1),
}


@pytest.mark.parametrize("with_processor", [False, True])
@pytest.mark.parametrize(("picks", "path", "emitted", "accepted"), list(WALKS.values()), ids=list(WALKS))
def test_walk_follows_the_picks(picks, path, emitted, accepted, with_processor):
    """One argmax for all nodes where nothing depends on the prefix gives what pick by pick gives."""
    picker = greedy(Recording()) if with_processor else greedy()
    assert picker.needs_prefix == with_processor

    result = walk(TREE, picking(*picks), PROMPT, picker, stop_check())

    assert result.path == path
    assert result.input_ids.tolist() == [[*PROMPT[0].tolist(), *emitted]]
    assert (result.emitted, result.accepted, result.finished) == (len(emitted), accepted, False)


def test_processors_run_once_a_token_on_its_prefix():
    processor = Recording()
    logits = picking(3, 5, 0, 7, 0, 0, 2, 0)
    walk(TREE, logits, PROMPT, greedy(processor), stop_check())
    assert processor.prefixes == [[5, 1, 2], [5, 1, 2, 3], [5, 1, 2, 3, 5], [5, 1, 2, 3, 5, 7]]
    for row, node in zip(processor.rows, (0, 1, 3, 6), strict=True):
        assert torch.equal(row, logits[:, node])


def test_a_processor_decides_the_way():
    class NotThree(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:, 3] = -torch.inf  # in place, as some processors do
            return scores

    logits = picking(3, 5, 3, 7, 0, 1, 2, 0)
    logits[0, 0, 4] = logits[0, 2, 6] = 0.5
    before = logits.clone()
    result = walk(TREE, logits, PROMPT, greedy(NotThree()), stop_check())
    assert (result.path, result.input_ids[0, 3:].tolist()) == ([0, 2], [4, 6])
    assert torch.equal(logits, before), "the target's logits were changed"


def test_the_input_is_not_changed():
    prompt = PROMPT.clone()
    walk(TREE, picking(3, 5, 0, 7, 0, 0, 2, 0), prompt, greedy(), stop_check())
    assert torch.equal(prompt, PROMPT)


LEFT = (3, 5, 0, 7, 0, 0, 2, 0)  # emits 3, 5, 7 along the tree and then 2


@pytest.mark.parametrize(
    ("eos", "emitted", "path", "accepted"),
    [
        (3, [3], [0], 1),
        (5, [3, 5], [0, 1], 2),
        (7, [3, 5, 7], [0, 1, 3], 3),
        (2, [3, 5, 7, 2], [0, 1, 3, 6], 3),
    ],
)
@pytest.mark.parametrize("with_processor", [False, True])
def test_end_of_sequence_on_the_way(eos, emitted, path, accepted, with_processor):
    """The last token of a text is never fed to the target, so its node is not kept."""
    picker = greedy(Recording()) if with_processor else greedy()
    stop = stop_check(EosTokenCriteria([eos, 0]))
    result = walk(TREE, picking(*LEFT), PROMPT, picker, stop)
    assert result.finished
    assert result.input_ids[0, 3:].tolist() == emitted
    assert (result.path, result.accepted, result.emitted) == (path, accepted, len(emitted))


@pytest.mark.parametrize("new_tokens", [1, 2, 3, 4])
def test_maximal_length_on_the_way(new_tokens):
    result = walk(TREE, picking(*LEFT), PROMPT, greedy(), stop_check(MaxLengthCriteria(3 + new_tokens)))
    assert result.finished
    assert result.input_ids[0, 3:].tolist() == [3, 5, 7, 2][:new_tokens]
    assert result.path == [0, 1, 3, 6][:new_tokens]


def test_no_stop_before_the_end():
    result = walk(TREE, picking(*LEFT), PROMPT, greedy(), stop_check(MaxLengthCriteria(8), EosTokenCriteria([6])))
    assert not result.finished


def test_other_criteria_are_asked_after_every_token():
    class Asked(StoppingCriteria):
        def __init__(self, until):
            self.until, self.seen, self.scores = until, [], []

        def __call__(self, input_ids, scores, **kwargs):
            self.seen.append(input_ids[0, 3:].tolist())
            self.scores.append(None if scores is None else len(scores))
            return torch.tensor([input_ids.shape[1] - 3 == self.until])

    criterion = Asked(until=2)
    result = walk(TREE, picking(*LEFT), PROMPT, greedy(), stop_check(criterion))
    assert result.finished and result.input_ids[0, 3:].tolist() == [3, 5]
    assert criterion.seen == [[3], [3, 5]]
    assert criterion.scores == [None, None]

    criterion = Asked(until=4)
    walk(TREE, picking(*LEFT), PROMPT, greedy(keep_scores=True), stop_check(criterion))
    assert criterion.scores == [1, 2, 3, 4]


def test_the_shortest_of_several_lengths_counts():
    stop = stop_check(MaxLengthCriteria(9), MaxLengthCriteria(5))
    assert not stop(torch.zeros(1, 4, dtype=torch.long), 0, None)
    assert stop(torch.zeros(1, 5, dtype=torch.long), 0, None)


def test_scores_and_logits_are_kept_by_token():
    picker = greedy(TemperatureLogitsWarper(0.5), keep_scores=True, keep_logits=True)
    logits = picking(*LEFT)
    walk(TREE, logits, PROMPT, picker, stop_check())
    for kept, factor in ((picker.logits, 1.0), (picker.scores, 2.0)):
        assert len(kept) == 4
        for row, node in zip(kept, (0, 1, 3, 6), strict=True):
            assert torch.equal(row, factor * logits[:, node])


def test_kept_logits_survive_a_processor_that_writes_in_place():
    class Zero(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.zero_()

    picker = greedy(Zero(), keep_logits=True)
    logits = picking(*LEFT)
    walk(TREE, logits, PROMPT, picker, stop_check())
    assert torch.equal(picker.logits[0], logits[:, 0])


@pytest.mark.parametrize("tree", ["drafted", "root alone"])
def test_sampled_walks_have_the_targets_distribution(tree):
    """Pairs of tokens drawn with a temperature, against softmax products; fails once in 10,000 seeds."""
    drafted = TREE
    if tree == "root alone":
        zero = torch.zeros(1, 1, dtype=torch.long)
        drafted = DraftTree(tokens=PROMPT[:, -1:], parents=zero, depths=zero, max_depth=0)
    nodes = drafted.tokens.shape[1]
    logits = torch.randn(1, nodes, VOCAB, generator=torch.Generator().manual_seed(0))
    probabilities = (logits / 0.7).softmax(-1)[0]
    children = {(int(drafted.parents[0, node]), int(drafted.tokens[0, node])): node for node in range(1, nodes)}
    # A walk that leaves the tree ends there; all others are followed to their second token.
    expected = {}
    for first in range(VOCAB):
        node = children.get((0, first))
        if node is None:
            expected[(first,)] = probabilities[0, first].item()
        else:
            for second in range(VOCAB):
                expected[(first, second)] = (probabilities[0, first] * probabilities[node, second]).item()

    torch.manual_seed(0)
    number = 4000
    picker = TokenPicker(LogitsProcessorList([TemperatureLogitsWarper(0.7)]), do_sample=True)
    counts = Counter(
        tuple(walk(drafted, logits, PROMPT, picker, stop_check()).input_ids[0, 3:5].tolist()) for _ in range(number)
    )
    assert counts.keys() <= expected.keys()
    statistic = sum((counts[cell] - number * p) ** 2 / (number * p) for cell, p in expected.items())
    assert min(expected.values()) * number > 1
    assert chi2.sf(statistic, len(expected) - 1) > 1e-4
