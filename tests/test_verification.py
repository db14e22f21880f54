"""The walk over a verified tree, on trees and logits made by hand, and when rows end."""

import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from scipy.stats import chi2
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper
from transformers.generation import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)

from hf_poss.draft_tree import DraftTree
from hf_poss.verification import (
    StopCheck,
    TokenPicker,
    TokenRows,
    Walk,
    confirmed_paths,
    greedy_picks,
    scripted_picks,
    walk_all,
)


VOCAB = 8
PAD = 0
PROMPT = torch.tensor([[5, 1, 2]])  # the last token is the root

#         2
#       3   4
#      5 6   3
#      |     |
#      7     1
# Two nodes carry token 3, at depths 1 and 2.
TOKENS = [2, 3, 4, 5, 6, 3, 7, 1]
PARENTS = [0, 0, 0, 1, 1, 2, 3, 5]


def picking(*picks: int) -> torch.Tensor:
    """Logits [nodes, vocab] whose most likely token at node i is `picks[i]`."""
    logits = torch.zeros(len(picks), VOCAB)
    for node, token in enumerate(picks):
        logits[node, token] = 1.0
    return logits


def stop_check(*criteria, rows: int = 1) -> StopCheck:
    return StopCheck(StoppingCriteriaList(criteria), rows)


def greedy(*processors, **kwargs) -> TokenPicker:
    return TokenPicker(LogitsProcessorList(processors), do_sample=False, **kwargs)


def walked(
    logits: torch.Tensor,
    picker: TokenPicker,
    stop: StopCheck | None = None,
    all_at_once: bool = False,
    tokens: TokenRows | None = None,
    row: int = 0,
    tree: tuple[list[int], list[int]] = (TOKENS, PARENTS),
) -> Walk:
    """A walk at its end. `all_at_once` finds its way from the most likely token of every node."""
    tokens = TokenRows(PROMPT, PAD) if tokens is None else tokens
    stop = stop or stop_check(rows=len(tokens.lengths))
    if all_at_once:
        walk = Walk.along(*way_through(tree, logits.argmax(-1)), row, tokens, stop, picker)
    else:
        walk = Walk.picking(*tree, logits, row, tokens, stop, picker)
    walk_all([walk])
    return walk


def way_through(tree: tuple[list[int], list[int]], picks: torch.Tensor) -> tuple[list[int], list[int]]:
    """The path that the picks [nodes] confirm, and the token picked at each of its nodes."""
    counts, paths = confirmed_paths(draft_tree([tree]), picks[None])
    path = paths[0, : counts[0]]
    return path.tolist(), picks[path].tolist()


def draft_tree(trees: list[tuple[list[int], list[int]]]) -> DraftTree:
    """Trees of as many nodes, by tokens and parents."""
    depths = []
    for _, parents in trees:
        depths.append([0] * len(parents))
        for node in range(1, len(parents)):
            depths[-1][node] = depths[-1][parents[node]] + 1
    tokens, parents = zip(*trees, strict=True)
    return DraftTree(*map(torch.tensor, (tokens, parents, depths)), max_depth=max(map(max, depths)))


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


@pytest.mark.parametrize("way", ["all_at_once", "one_by_one", "with_processor"])
@pytest.mark.parametrize(("picks", "path", "emitted", "accepted"), list(WALKS.values()), ids=list(WALKS))
def test_walk_follows_the_picks(picks, path, emitted, accepted, way):
    """One argmax for all nodes gives what pick by pick gives."""
    picker = greedy(Recording()) if way == "with_processor" else greedy()
    assert picker.needs_prefix == (way == "with_processor")
    tokens = TokenRows(PROMPT, PAD)

    walk = walked(picking(*picks), picker, all_at_once=way == "all_at_once", tokens=tokens)

    assert walk.path == path
    assert walk.emitted == emitted
    assert (walk.accepted, walk.ended, walk.node) == (accepted, False, None)
    assert tokens.prefix(0).tolist() == [[*PROMPT[0].tolist(), *emitted]]


@pytest.mark.parametrize(
    "kwargs",
    [{"do_sample": True}, {"do_sample": False, "keep_scores": True}, {"do_sample": False, "keep_logits": True}],
)
def test_what_has_to_be_drawn_or_kept_is_picked_token_by_token(kwargs):
    assert TokenPicker(LogitsProcessorList(), **kwargs).needs_prefix


def test_processors_run_once_a_token_on_its_prefix():
    processor = Recording()
    logits = picking(3, 5, 0, 7, 0, 0, 2, 0)
    walked(logits, greedy(processor))
    assert processor.prefixes == [[5, 1, 2], [5, 1, 2, 3], [5, 1, 2, 3, 5], [5, 1, 2, 3, 5, 7]]
    for row, node in zip(processor.rows, (0, 1, 3, 6), strict=True):
        assert torch.equal(row, logits[node : node + 1])


def test_a_processor_decides_the_way():
    class NotThree(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:, 3] = -torch.inf  # in place, as some processors do
            return scores

    logits = picking(3, 5, 3, 7, 0, 1, 2, 0)
    logits[0, 4] = logits[2, 6] = 0.5
    before = logits.clone()
    walk = walked(logits, greedy(NotThree()))
    assert (walk.path, walk.emitted) == ([0, 2], [4, 6])
    assert torch.equal(logits, before), "the target's logits were changed"


def test_processors_get_float32():
    """As in plain decoding, whatever the target computes in."""
    processor = Recording()
    walked(picking(1, 0, 0, 0, 0, 0, 0, 0).to(torch.bfloat16), greedy(processor))
    assert processor.rows[0].dtype == torch.float32


def test_the_input_is_not_changed():
    prompt = PROMPT.clone()
    walked(picking(3, 5, 0, 7, 0, 0, 2, 0), greedy(), tokens=TokenRows(prompt, PAD))
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
@pytest.mark.parametrize("all_at_once", [False, True])
def test_end_of_sequence_on_the_way(eos, emitted, path, accepted, all_at_once):
    """The last token of a text is never fed to the target, so its node is not kept."""
    stop = stop_check(EosTokenCriteria([eos, 0]))
    walk = walked(picking(*LEFT), greedy(), stop, all_at_once)
    assert walk.ended and stop.ends == [3 + len(emitted)]
    assert (walk.emitted, walk.path, walk.accepted) == (emitted, path, accepted)


@pytest.mark.parametrize("new_tokens", [1, 2, 3, 4])
def test_maximal_length_on_the_way(new_tokens):
    walk = walked(picking(*LEFT), greedy(), stop_check(MaxLengthCriteria(3 + new_tokens)))
    assert walk.ended
    assert walk.emitted == [3, 5, 7, 2][:new_tokens]
    assert walk.path == [0, 1, 3, 6][:new_tokens]


def test_no_stop_before_the_end():
    walk = walked(picking(*LEFT), greedy(), stop_check(MaxLengthCriteria(8), EosTokenCriteria([6])))
    assert not walk.ended


class Asked(StoppingCriteria):
    """Stops one row at a length, and keeps what it was asked."""

    def __init__(self, until: int):
        self.until, self.seen, self.scores = until, [], []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids[0, 3:].tolist())
        self.scores.append(None if scores is None else len(scores))
        return torch.tensor([input_ids.shape[1] - 3 == self.until])


def test_other_criteria_are_asked_after_every_token():
    criterion = Asked(until=2)
    walk = walked(picking(*LEFT), greedy(), stop_check(criterion))
    assert walk.ended and walk.emitted == [3, 5]
    assert criterion.seen == [[3], [3, 5]]
    assert criterion.scores == [None, None]

    criterion = Asked(until=4)
    walked(picking(*LEFT), greedy(keep_scores=True), stop_check(criterion))
    assert criterion.scores == [1, 2, 3, 4]


@pytest.mark.parametrize("other", [EosTokenCriteria([5]), MaxLengthCriteria(5)])
def test_other_criteria_are_asked_after_the_last_token_too(other):
    criterion = Asked(until=9)
    walked(picking(*LEFT), greedy(), stop_check(other, criterion))
    assert criterion.seen == [[3], [3, 5]]


def test_the_shortest_of_several_lengths_counts():
    stop = stop_check(MaxLengthCriteria(9), MaxLengthCriteria(5))
    assert stop.max_length == stop.limit == 5


# ---- Walks of several rows ----


def test_rows_walk_their_own_way():
    tokens = TokenRows(PROMPT.expand(3, -1), PAD)
    stop = stop_check(EosTokenCriteria([5]), rows=3)
    rows = [LEFT, (4, 0, 3, 0, 0, 1, 0, 6), (1, 0, 0, 0, 0, 0, 0, 0)]
    walks = [
        Walk.picking(TOKENS, PARENTS, picking(*picks), row, tokens, stop, greedy()) for row, picks in enumerate(rows)
    ]
    walk_all(walks)
    assert [walk.emitted for walk in walks] == [[3, 5], [4, 3, 1, 6], [1]]
    assert [walk.ended for walk in walks] == [True, False, False]
    assert tokens.up_to(7)[:, 3:].tolist() == [[3, 5, PAD, PAD], [4, 3, 1, 6], [1, PAD, PAD, PAD]]


def test_rows_in_step_stay_of_one_length():
    """The first to leave its tree ends the round for all; one that has ended holds nobody up."""
    tokens = TokenRows(PROMPT.expand(3, -1), PAD)
    stop = stop_check(EosTokenCriteria([6]), rows=3)
    rows = [LEFT, (4, 0, 7, 0, 0, 0, 0, 0), (6, 0, 0, 0, 0, 0, 0, 0)]
    walks = [
        Walk.picking(TOKENS, PARENTS, picking(*picks), row, tokens, stop, greedy()) for row, picks in enumerate(rows)
    ]
    walk_all(walks, in_step=True)
    assert [walk.emitted for walk in walks] == [[3, 5], [4, 7], [6]]
    assert [len(walk.path) for walk in walks] == [2, 2, 1]


def naive_path(tokens: list[int], parents: list[int], picks: list[int]) -> list[int]:
    """Node by node: the child that carries the pick, until there is none."""
    path = [0]
    while True:
        node = path[-1]
        children = [child for child in range(1, len(tokens)) if parents[child] == node]
        accepted = [child for child in children if tokens[child] == picks[node]]
        if not accepted:
            return path
        path.append(accepted[0])


def random_tree(generator: random.Random, nodes: int, vocab: int) -> tuple[list[int], list[int]]:
    """Any tree in which a parent comes before its children and siblings differ."""
    tokens, parents = [generator.randrange(vocab)], [0]
    while len(tokens) < nodes:
        parent, token = generator.randrange(len(tokens)), generator.randrange(vocab)
        if all(parents[child] != parent or tokens[child] != token for child in range(1, len(tokens))):
            tokens.append(token)
            parents.append(parent)
    return by_level(tokens, parents)


def by_level(tokens: list[int], parents: list[int]) -> tuple[list[int], list[int]]:
    """The nodes in the order of a draft tree, level by level."""
    order, level = [0], [0]
    while level:
        level = [child for node in level for child in range(1, len(tokens)) if parents[child] == node]
        order += level
    return [tokens[node] for node in order], [order.index(parents[node]) for node in order]


@pytest.mark.parametrize("vocab", [2, 3, 6])
@pytest.mark.parametrize("nodes", [1, 2, 5, 20, 61])
def test_ways_that_are_found_together_are_those_of_a_walk(nodes, vocab):
    """Batches of random trees and picks; few tokens, so that paths of any length are confirmed, on the first branch
    and others, and branches that are not reached hold the right tokens too."""
    generator, lengths = random.Random(nodes), Counter()
    vocab = max(vocab, 2)
    for _ in range(20):
        trees = [random_tree(generator, nodes, vocab) for _ in range(5)]
        picks = [[generator.randrange(vocab) for _ in range(nodes)] for _ in trees]
        for (tokens, parents), of_row in zip(trees, picks, strict=True):
            for node in range(1, nodes):  # half of the nodes agree with what is picked above them, up to siblings
                if generator.random() < 0.5:
                    of_row[parents[node]] = tokens[node]
        tree = draft_tree(trees)
        counts, paths = confirmed_paths(tree, torch.tensor(picks))
        assert paths.shape == (5, tree.max_depth + 1) and counts.dtype == paths.dtype == torch.long
        assert 0 <= paths.min() and paths.max() < nodes, "what does not count must be a node all the same"
        for (tokens, parents), of_row, count, path in zip(trees, picks, counts.tolist(), paths.tolist(), strict=True):
            expected = naive_path(tokens, parents, of_row)
            assert path[:count] == expected
            lengths[count] += 1
    assert nodes < 5 or len(lengths) > 2, "all ways were alike"


def test_trees_whose_levels_were_cut_off_are_walked_too():
    """Levels were grown of which no node was kept: `max_depth` is above all depths, the path no longer for it."""
    tree = draft_tree([(TOKENS, PARENTS)])
    deeper = DraftTree(tree.tokens, tree.parents, tree.depths, max_depth=6)
    counts, paths = confirmed_paths(deeper, picking(*LEFT).argmax(-1)[None])
    assert paths[0, : counts[0]].tolist() == [0, 1, 3, 6] and paths.shape == (1, 7)


def test_a_script_takes_the_place_of_greedy_picks():
    """Inside of its block alone, and of this thread; the one around it comes back."""
    tree, logits = draft_tree([(TOKENS, PARENTS)] * 2), torch.stack([picking(*LEFT), picking(1, *[0] * 7)])
    own = logits.argmax(-1)
    assert torch.equal(greedy_picks(tree, logits), own)
    seen = []

    def script(given, picks):
        seen.append((given, picks.clone()))
        return picks + 1

    with scripted_picks(lambda given, picks: picks * 0):
        with scripted_picks(script):
            assert torch.equal(greedy_picks(tree, logits), own + 1)
        assert not greedy_picks(tree, logits).any()
        with pytest.raises(RuntimeError), scripted_picks(script):
            raise RuntimeError
        assert not greedy_picks(tree, logits).any()
        with ThreadPoolExecutor() as pool:
            assert torch.equal(pool.submit(greedy_picks, tree, logits).result(), own)
    assert torch.equal(greedy_picks(tree, logits), own)
    assert len(seen) == 1 and seen[0][0] is tree and torch.equal(seen[0][1], own)


# ---- The tokens of a batch ----


def test_rows_grow_at_their_own_pace():
    prompts = torch.tensor([[1, 2], [3, 4]])
    rows = TokenRows(prompts, pad_token_id=9)
    for row, new in ((1, [5, 6, 7]), (0, [8]), (1, range(200))):
        for token in new:
            rows.append(row, token)
    assert rows.lengths == [3, 205]
    assert rows.prefix(0).tolist() == [[1, 2, 8]]
    assert rows.prefix(1).tolist() == [[3, 4, 5, 6, 7, *range(200)]]
    assert rows.up_to(4).tolist() == [[1, 2, 8, 9], [3, 4, 5, 6]]
    rows.cut(1, 3)
    assert rows.lengths == [3, 3]
    assert rows.up_to(5).tolist() == [[1, 2, 8, 9, 9], [3, 4, 5, 9, 9]]
    rows.append(1, 7)
    assert rows.prefix(1).tolist() == [[3, 4, 5, 7]]
    assert prompts.tolist() == [[1, 2], [3, 4]], "the caller's prompt was written to"


def test_a_length_that_no_row_has_is_refused():
    with pytest.raises(ValueError, match="No row has 900 tokens; the longest has 4"):
        rows = TokenRows(PROMPT, PAD)
        rows.append(0, 1)
        rows.up_to(900)


# ---- When the rows of a batch end ----


class AtLengths(StoppingCriteria):
    """Ends each row at a length of its own, and keeps every text that it was asked about."""

    def __init__(self, *lengths: int):
        self.lengths, self.seen = torch.tensor(lengths), []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.tolist())
        return input_ids.shape[1] >= self.lengths


def grown(stop: StopCheck, rows: list[list[int]]) -> TokenRows:
    """Rows written one after the other, each as far as it may go."""
    tokens = TokenRows(torch.full((len(rows), 1), 7), PAD)
    for row, text in enumerate(rows):
        for token in text:
            tokens.append(row, token)
            if stop(row, token, tokens):
                break
    return tokens


def test_rows_with_an_end_of_sequence_end_by_themselves():
    stop = stop_check(EosTokenCriteria([5]), MaxLengthCriteria(6), rows=2)
    tokens = grown(stop, [[1, 5, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    assert tokens.lengths == [3, 6]
    assert (stop.ends, stop.limit, stop.pads) == ([3, 6], 6, True)
    assert not stop.may_go_on(0, 3)


def test_rows_without_one_go_on_until_all_have_ended():
    stop = stop_check(AtLengths(3, 5), MaxLengthCriteria(9), rows=2)
    tokens = grown(stop, [[1] * 8, [2] * 8])
    stop.ask_together(tokens, lambda length: None)
    assert not stop.pads
    assert (stop.ends, stop.limit) == ([3, 5], 5)
    assert stop.settled(tokens) == 5
    assert tokens.up_to(5).tolist() == [[7, 1, 1, 1, 1], [7, 2, 2, 2, 2]]


def test_criteria_over_the_batch_are_asked_when_the_slowest_row_is_there():
    """Step by step with all rows at one length, once each, whatever the rows' pace."""
    criterion = AtLengths(9, 9)
    stop = stop_check(criterion, MaxLengthCriteria(9), rows=2)
    tokens = TokenRows(torch.tensor([[7], [7]]), PAD)

    def write(row, *new):
        for token in new:
            tokens.append(row, token)
            stop(row, token, tokens)
        stop.ask_together(tokens, lambda length: None)

    write(0, 1, 2, 3)
    assert criterion.seen == []
    write(1, 4)
    write(1, 5)
    write(0, 6)
    assert criterion.seen == [[[7, 1], [7, 4]], [[7, 1, 2], [7, 4, 5]]]


def test_what_lies_behind_an_end_that_is_found_late_is_taken_back():
    """Row 0 ran ahead to an end of sequence of its own; the criterion had ended it before."""
    criterion = AtLengths(3, 6)
    stop = stop_check(EosTokenCriteria([5]), criterion, MaxLengthCriteria(9), rows=2)
    tokens = grown(stop, [[1, 1, 1, 5], [2] * 8])
    assert stop.ends == [5, 9]
    stop.ask_together(tokens, lambda length: None)
    assert (stop.ends, tokens.lengths) == ([3, 6], [3, 6])
    assert tokens.up_to(6).tolist() == [[7, 1, 1, PAD, PAD, PAD], [7, 2, 2, 2, 2, 2]]
    # Texts that it saw beyond its end have the padding that plain decoding writes.
    assert criterion.seen[3] == [[7, 1, 1, PAD, PAD], [7, 2, 2, 2, 2]]
    assert len(criterion.seen) == 5


def test_a_python_bool_ends_all_rows():
    stop = stop_check(lambda tokens, scores: tokens.shape[1] == 4, MaxLengthCriteria(9), rows=3)
    tokens = grown(stop, [[1] * 8] * 3)
    stop.ask_together(tokens, lambda length: None)
    assert stop.ends == [4, 4, 4] and stop.limit == 4


def test_time_is_over_for_rows_one_by_one():
    """transformers' own criteria on a row's own text need no other row."""
    stop = stop_check(MaxTimeCriteria(0.0, initial_timestamp=time.time() - 1), rows=2)
    tokens = TokenRows(torch.tensor([[7], [7]]), PAD)
    tokens.append(1, 3)
    stop(1, 3, tokens)
    assert stop.ends == [None, 2]


def test_scores_reach_criteria_over_the_batch():
    seen = []
    stop = stop_check(lambda tokens, scores: bool(seen.append((tokens.shape[1], scores))), rows=2)
    tokens = TokenRows(torch.tensor([[7], [7]]), PAD)
    for row in range(2):
        tokens.append(row, 1)
    stop.ask_together(tokens, lambda length: ("scores up to", length))
    assert seen == [(2, ("scores up to", 2))]


def test_ranks_agree_on_picks_and_ends():
    """The first process's word holds, though another picked and asked otherwise."""
    picker = greedy(agree=lambda values: [4])
    stop = StopCheck(StoppingCriteriaList([lambda tokens, scores: True]), 1, agree=lambda values: [0])
    walk = walked(picking(3, 0, 6, 0, 0, 0, 0, 0), picker, stop)
    assert walk.emitted == [4, 4] and not walk.ended


# ---- Scores, logits and samples ----


def test_scores_and_logits_are_kept_by_token():
    picker = greedy(TemperatureLogitsWarper(0.5), keep_scores=True, keep_logits=True)
    logits = picking(*LEFT)
    walked(logits, picker)
    for kept, factor in ((picker.logits, 1.0), (picker.scores, 2.0)):
        assert len(kept) == 4
        for row, node in zip(kept, (0, 1, 3, 6), strict=True):
            assert torch.equal(row, factor * logits[node : node + 1])


def test_kept_logits_survive_a_processor_that_writes_in_place():
    class Zero(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.zero_()

    picker = greedy(Zero(), keep_logits=True)
    logits = picking(*LEFT)
    walked(logits, picker)
    assert torch.equal(picker.logits[0], logits[:1])


@pytest.mark.parametrize("tree", [(TOKENS, PARENTS), ([2], [0])], ids=["drafted", "root_alone"])
def test_sampled_walks_have_the_targets_distribution(tree):
    """Pairs of tokens drawn with a temperature, against softmax products; fails once in 10,000 seeds."""
    tokens, parents = tree
    logits = torch.randn(len(tokens), VOCAB, generator=torch.Generator().manual_seed(0))
    probabilities = (logits / 0.7).softmax(-1)
    children = {(parents[node], tokens[node]): node for node in range(1, len(tokens))}
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
    counts = Counter(tuple(walked(logits, picker, tree=tree).emitted[:2]) for _ in range(number))
    assert counts.keys() <= expected.keys()
    statistic = sum((counts[cell] - number * p) ** 2 / (number * p) for cell, p in expected.items())
    assert min(expected.values()) * number > 1
    assert chi2.sf(statistic, len(expected) - 1) > 1e-4


def test_a_picker_draws_from_its_own_generator():
    logits = torch.zeros(1, VOCAB)
    draws = []
    for noise in (0, 5):
        picker = TokenPicker(LogitsProcessorList(), do_sample=True, generator=torch.Generator().manual_seed(3))
        draws.append([])
        for _ in range(20):
            torch.rand(noise)
            draws[-1].append(picker.pick(PROMPT, logits))
    assert draws[0] == draws[1] and len(set(draws[0])) > 3
