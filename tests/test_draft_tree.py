"""Draft trees against EAGLE-2 written out in plain Python, one path at a time."""

import math
import random

import pytest
import torch

from hf_poss.draft_tree import DraftTree, DraftTreeBuilder


VOCAB = 13
Path = tuple[int, ...]  # tokens below the root


class RandomDrafter:
    """Logits that depend on the path alone, so any implementation can ask for them in any order."""

    def __init__(self, seed: int, vocab: int = VOCAB):
        self.seed, self.vocab = seed, vocab

    def logits(self, path: Path) -> list[float]:
        generator = random.Random(f"{self.seed} {path}")
        return [generator.gauss(0.0, 2.0) for _ in range(self.vocab)]


class CertainDrafter(RandomDrafter):
    """One token has all the probability; the rest ties."""

    height = 1e4

    def logits(self, path: Path) -> list[float]:
        certain = random.Random(f"{self.seed} {path}").randrange(self.vocab)
        return [self.height if token == certain else 0.0 for token in range(self.vocab)]


class UndecidedDrafter(RandomDrafter):
    """All tokens tie everywhere."""

    def logits(self, path: Path) -> list[float]:
        return [0.0] * self.vocab


def brute_force(drafter, depth: int, top_k: int, total: int) -> tuple[list[list[Path]], set[Path]]:
    """EAGLE-2 (section 4): the frontier of every level, best first, and the nodes kept."""
    frontier: list[tuple[Path, float]] = [((), 0.0)]
    frontiers, candidates = [], []
    for _ in range(depth):
        level = []
        for path, score in frontier:
            logits = drafter.logits(path)
            normalizer = math.log(sum(math.exp(logit) for logit in logits))
            best = sorted(range(len(logits)), key=lambda token: -logits[token])[:top_k]
            level += [((*path, token), score + logits[token] - normalizer) for token in best]
        candidates += level
        frontier = sorted(level, key=lambda node: -node[1])[:top_k]
        frontiers.append([path for path, _ in frontier])
    kept = sorted(candidates, key=lambda node: -node[1])[: total - 1]
    return frontiers, {path for path, _ in kept}


def grow(drafters, roots: list[int], depth: int, top_k: int) -> tuple[DraftTreeBuilder, list[list[list[Path]]]]:
    """Feeds a builder one drafter a row; returns it with the paths of its frontiers, [level][row]."""
    builder = DraftTreeBuilder(torch.tensor(roots), top_k)
    paths: list[list[Path]] = [[()] for _ in drafters]
    levels = []
    for _ in range(depth):
        logits = torch.tensor(
            [[drafter.logits(path) for path in row] for drafter, row in zip(drafters, paths, strict=True)]
        )
        frontier = builder.grow(logits)
        paths = [
            [(*row[parent], token) for parent, token in zip(parents, tokens, strict=True)]
            for row, parents, tokens in zip(paths, frontier.parents.tolist(), frontier.tokens.tolist(), strict=True)
        ]
        levels.append(paths)
    return builder, levels


def node_paths(tree: DraftTree, row: int = 0) -> list[Path]:
    """Path of every node, told from its parents."""
    tokens, parents = tree.tokens[row].tolist(), tree.parents[row].tolist()
    paths: list[Path] = [()]
    for node in range(1, len(tokens)):
        assert 0 <= parents[node] < node, "a parent comes before its children"
        paths.append((*paths[parents[node]], tokens[node]))
    return paths


def assert_well_formed(tree: DraftTree, row: int, root: int) -> list[Path]:
    paths = node_paths(tree, row)
    assert len(set(paths)) == len(paths), "a node comes twice"
    assert tree.tokens[row, 0] == root and tree.parents[row, 0] == 0
    assert tree.depths[row].tolist() == [len(path) for path in paths]
    assert tree.depths[row].tolist() == sorted(tree.depths[row].tolist())
    return paths


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("depth", "top_k", "total"),
    [(1, 3, 4), (1, 4, 3), (2, 2, 5), (3, 4, 10), (5, 3, 20), (6, 10, 60), (4, 13, 30), (4, 6, 2), (7, 2, 100)],
)
def test_trees_are_those_of_plain_eagle_2(depth, top_k, total, batch):
    drafters = [RandomDrafter(seed) for seed in range(batch)]
    roots = list(range(3, 3 + batch))
    builder, levels = grow(drafters, roots, depth, top_k)
    tree = builder.build(total)
    for row, drafter in enumerate(drafters):
        frontiers, kept = brute_force(drafter, depth, top_k, total)
        assert [level[row] for level in levels] == frontiers
        assert set(assert_well_formed(tree, row, roots[row])) == {(), *kept}


@pytest.mark.parametrize("total", [2, 3, 5, 9, 30, 1000])
@pytest.mark.parametrize("top_k", [1, 2, 4, VOCAB, VOCAB + 5])
@pytest.mark.parametrize("kind", [CertainDrafter, UndecidedDrafter])
def test_trees_are_closed_under_parents_when_scores_tie(kind, top_k, total):
    """A child with probability 1 has its parent's score, and must not be kept instead of it."""
    drafter = kind(seed=1)
    builder, levels = grow([drafter], [7], depth=4, top_k=top_k)
    tree = builder.build(total)
    paths = assert_well_formed(tree, 0, 7)
    branches = min(top_k, VOCAB)
    assert len(paths) == min(total, 1 + branches + 3 * branches * branches)
    # A node whose parent was left out would hang elsewhere: on a path that was never looked at.
    expanded = {(), *(path for level in levels[:-1] for path in level[0])}
    for path in paths[1:]:
        best = sorted(drafter.logits(path[:-1]), reverse=True)[:top_k]
        assert path[:-1] in expanded
        assert drafter.logits(path[:-1])[path[-1]] >= best[-1]


@pytest.mark.parametrize("height", [1.0, 15.0, 17.0, 20.0, 40.0, 100.0])
def test_rounding_does_not_put_children_above_their_parents(height):
    """Near probability 1 the log-probability is a difference of like numbers."""
    drafter = CertainDrafter(seed=2)
    drafter.height = height
    for total in range(2, 12):
        builder, levels = grow([drafter], [7], depth=8, top_k=2)
        expanded = {(), *(path for level in levels[:-1] for path in level[0])}
        paths = assert_well_formed(builder.build(total), 0, 7)
        assert {path[:-1] for path in paths[1:]} <= expanded


def test_certain_drafts_make_a_tree_that_is_deep_first():
    """Enough room for the certain path and nothing else: it is kept whole."""
    drafter = CertainDrafter(seed=1)
    builder, _ = grow([drafter], [7], depth=5, top_k=3)
    path = ()
    for _ in range(5):
        logits = drafter.logits(path)
        path = (*path, logits.index(max(logits)))
    assert set(node_paths(builder.build(6))) == {path[:length] for length in range(6)}


@pytest.mark.parametrize(("total", "nodes"), [(8, 8), (6, 6), (2, 2), (50, 8)])
def test_one_branch_is_a_chain(total, nodes):
    drafter = RandomDrafter(seed=5)
    builder, levels = grow([drafter], [4], depth=7, top_k=1)
    tree = builder.build(total)
    path = ()
    for _ in range(7):
        logits = drafter.logits(path)
        path = (*path, logits.index(max(logits)))
    assert levels[-1] == [[path]]
    assert tree.tokens[0].tolist() == [4, *path][:nodes]
    assert tree.parents[0].tolist() == [0, *range(nodes - 1)]
    assert tree.depths[0].tolist() == list(range(nodes))


def test_fewer_candidates_than_asked_for_are_all_kept():
    builder, _ = grow([RandomDrafter(seed=6)], [4], depth=2, top_k=2)
    assert builder.build(1000).tokens.shape == (1, 1 + 2 + 4)
    builder, _ = grow([RandomDrafter(seed=6, vocab=3)], [0], depth=2, top_k=10)
    assert builder.build(1000).tokens.shape == (1, 1 + 3 + 9)


def test_a_batch_is_its_rows():
    drafters = [RandomDrafter(0), CertainDrafter(1), UndecidedDrafter(2)]
    together = grow(drafters, [3, 4, 5], depth=4, top_k=3)[0].build(14)
    for row, drafter in enumerate(drafters):
        alone = grow([drafter], [3 + row], depth=4, top_k=3)[0].build(14)
        for name in ("tokens", "parents", "depths"):
            assert torch.equal(getattr(together, name)[row], getattr(alone, name)[0]), name
        assert torch.equal(together.ancestor_mask()[row], alone.ancestor_mask()[0])


@pytest.mark.parametrize(("depth", "top_k", "total"), [(1, 4, 5), (4, 3, 15), (6, 1, 7), (6, 4, 40)])
def test_ancestor_mask(depth, top_k, total):
    tree = grow([RandomDrafter(seed) for seed in range(2)], [3, 4], depth, top_k)[0].build(total)
    mask = tree.ancestor_mask()
    assert mask.dtype == torch.bool
    for row in range(2):
        paths = node_paths(tree, row)
        expected = [[path[: len(other)] == other for other in paths] for path in paths]
        assert mask[row].tolist() == expected


def test_the_example_of_the_documentation():
    """Root 7 with children 3 and 5, and 9 below 5."""
    builder = DraftTreeBuilder(torch.tensor([7]), top_k=2)
    builder.grow(torch.tensor([[[0.0, 0, 0, 6, 0, 7, 0, 0, 0, 0]]]))
    second = torch.zeros(1, 2, 10)
    second[0, 0, 9] = 20.0  # below 5, the better of the two
    builder.grow(second)
    tree = builder.build(4)
    assert set(node_paths(tree)) == {(), (3,), (5,), (5, 9)}
