"""Draft trees against EAGLE-2 written out in plain Python, one path at a time."""

import math
import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_poss.draft_passes import DraftPasses
from hf_poss.draft_tree import DraftTree, choose_nodes, rank_candidates
from hf_poss.draft_vocabulary import DraftHead


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


class Predicting:
    """Specialists, embedding and head at once, whose features say of which path they are: the number of a path."""

    head_dim, k_proj, v_proj = 1, nn.Identity(), nn.Identity()

    def __init__(self, drafters):
        self.drafters = drafters
        self.paths: list[tuple[int, Path]] = [(row, ()) for row in range(len(drafters))]
        self.self_attn, self.layers = self, [self]

    def rotary(self, query, positions):
        return (positions[..., None].float(),) * 2

    def queries(self, fused, rotary):
        return fused[:, None]

    def complete(self, fused, attended):
        return fused

    def embed(self, tokens, like):
        return tokens[..., None]

    def fuse(self, embeddings, features):
        numbers = torch.zeros_like(features)
        for place, token in zip(torch.ones_like(embeddings).nonzero().tolist(), embeddings.flatten(), strict=True):
            row, path = self.paths[int(features[tuple(place)])]
            numbers[tuple(place)] = len(self.paths)
            self.paths.append((row, (*path, int(token))))
        return numbers

    def logits(self, features):
        rows = [self.paths[int(number)] for number in features.flatten()]
        return torch.tensor([self.drafters[row].logits(path) for row, path in rows]).unflatten(0, features.shape[:-1])


def grow(drafters, roots: list[int], depth: int, top_k: int) -> tuple[SimpleNamespace, list[list[list[Path]]]]:
    """Runs draft passes for one drafter a row; returns what builds their tree, with the paths of the frontiers,
    [level][row]."""
    predicting = Predicting(drafters)
    passes = DraftPasses(predicting, predicting, DraftHead(predicting, None))
    rows, top_k = len(drafters), min(top_k, len(drafters[0].logits(())))
    root = torch.arange(float(rows))[:, None, None]
    nodes = torch.zeros(rows, 1, 1, depth * top_k, 1)
    frontier, rotary = passes.root(root, torch.ones(rows, dtype=torch.long), depth, 1, depth * top_k)
    levels, frontiers = [], []
    for level in range(1, depth + 1):
        own = torch.zeros(top_k, depth * top_k)
        children, frontier = passes.expand(0, frontier, rotary, (nodes, nodes), None, own, None, top_k)
        levels.append(children)
        numbers = frontier.fused[..., 0].int().tolist()
        frontiers.append([[predicting.paths[number][1] for number in row] for row in numbers])
        assert all(len(path) == level for row in frontiers[-1] for path in row)

    def build(total: int, ranked: int | None = None) -> DraftTree:
        candidates = rank_candidates(levels, top_k, total - 1 if ranked is None else ranked)
        return choose_nodes(torch.tensor(roots), candidates, total)

    return SimpleNamespace(build=build, levels=levels, top_k=top_k), frontiers


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
        assert torch.equal(together.ancestors[row], alone.ancestors[0])


def naive_ancestors(tree: DraftTree, row: int) -> list[list[bool]]:
    paths = node_paths(tree, row)
    return [[path[: len(other)] == other for other in paths] for path in paths]


@pytest.mark.parametrize(
    ("depth", "top_k", "total"), [(1, 4, 5), (4, 3, 15), (6, 1, 7), (6, 4, 40), (9, 2, 30), (12, 1, 13), (3, 1, 2)]
)
def test_ancestors(depth, top_k, total):
    tree = grow([RandomDrafter(seed) for seed in range(2)], [3, 4], depth, top_k)[0].build(total)
    assert tree.ancestors.dtype == torch.bool
    for row in range(2):
        assert tree.ancestors[row].tolist() == naive_ancestors(tree, row)


@pytest.mark.parametrize("nodes", [1, 2, 3, 8, 9, 33])
@pytest.mark.parametrize("levels", ["found", "more"])
def test_ancestors_of_any_tree(nodes, levels):
    """Trees whose nodes hang anywhere, chains of every length among them; `max_depth` may lie above all depths."""
    generator = random.Random(nodes)
    for bushy in (1, 2, nodes):
        parents = [[0] + [generator.randrange(max(0, node - bushy), node) for node in range(1, nodes)] for _ in "abc"]
        depths = [[0] * nodes for _ in parents]
        for row, above in enumerate(parents):
            for node in range(1, nodes):
                depths[row][node] = depths[row][above[node]] + 1
        deepest = max(map(max, depths)) + (5 if levels == "more" else 0)
        tokens = torch.arange(nodes).expand(3, -1)
        tree = DraftTree(tokens, torch.tensor(parents), torch.tensor(depths), max_depth=deepest)
        for row in range(3):
            assert tree.ancestors[row].tolist() == naive_ancestors(tree, row)


@pytest.mark.parametrize(("depth", "top_k", "total"), [(1, 4, 3), (4, 3, 15), (5, 1, 6), (6, 4, 40)])
def test_scores_are_those_of_the_paths(depth, top_k, total):
    drafters = [RandomDrafter(seed) for seed in range(2)]
    tree = grow(drafters, [3, 4], depth, top_k)[0].build(total)
    assert tree.scores.dtype == torch.float32
    for row, drafter in enumerate(drafters):
        expected = []
        for path in node_paths(tree, row):
            score = 0.0
            for step, token in enumerate(path):
                logits = torch.tensor(drafter.logits(path[:step]), dtype=torch.float64)
                score += logits.log_softmax(-1)[token].item()
            expected.append(score)
        torch.testing.assert_close(tree.scores[row], torch.tensor(expected))


@pytest.mark.parametrize("kind", [RandomDrafter, UndecidedDrafter])
@pytest.mark.parametrize(("depth", "top_k"), [(1, 4), (4, 3), (5, 1), (6, 4)])
def test_candidates_are_ranked_by_their_paths(depth, top_k, kind):
    """All that were looked at, with the scores and positions of their paths."""
    drafters = [kind(seed) for seed in range(2)]
    made, _ = grow(drafters, [3, 4], depth, top_k)
    candidates = rank_candidates(made.levels, top_k, 1000)
    whole = made.build(1001)
    for row in range(2):
        looked_at = sorted(zip(whole.scores[row, 1:].tolist(), whole.depths[row, 1:].tolist(), strict=True))
        ranked = list(zip(candidates.scores[row].tolist(), candidates.depths[row].tolist(), strict=True))
        assert sorted(ranked) == looked_at
        assert [score for score, _ in ranked] == sorted((score for score, _ in ranked), reverse=True)
    fewer = rank_candidates(made.levels, top_k, 3)
    for name in ("order", "scores", "depths"):
        assert torch.equal(getattr(fewer, name), getattr(candidates, name)[:, :3])


@pytest.mark.parametrize("total", [2, 5, 14])
def test_a_tree_does_not_depend_on_what_else_was_ranked(total):
    """Its size may be chosen when the ranking is known."""
    made, _ = grow([RandomDrafter(0), CertainDrafter(1), UndecidedDrafter(2)], [3, 4, 5], depth=4, top_k=3)
    tree, other = made.build(total), made.build(total, ranked=25)
    for name in ("tokens", "parents", "depths", "scores"):
        assert torch.equal(getattr(tree, name), getattr(other, name)), name


def test_roots_alone_are_a_tree_of_no_level():
    tree = DraftTree.of_roots(torch.tensor([5, 8]))
    assert (tree.tokens.tolist(), tree.parents.tolist(), tree.depths.tolist()) == ([[5], [8]], [[0]] * 2, [[0]] * 2)
    assert tree.max_depth == 0
    assert tree.ancestors.tolist() == [[[True]]] * 2


@pytest.mark.parametrize("nodes", [1, 2, 6])
def test_a_star_has_its_nodes_below_the_root(nodes):
    tree = DraftTree.star(torch.tensor([5, 8]), nodes)
    assert tree.tokens.tolist() == [[5] * nodes, [8] * nodes]
    assert tree.depths.tolist() == [[0] + [1] * (nodes - 1)] * 2 and tree.parents.tolist() == [[0] * nodes] * 2
    assert tree.ancestors[1].tolist() == [[column in (0, row) for column in range(nodes)] for row in range(nodes)]


def test_the_example_of_the_documentation():
    """Root 7 with children 3 and 5, and 9 below 5."""

    class Example(RandomDrafter):
        def logits(self, path):
            if path == (5,):  # the better of the two
                return [0.0] * 9 + [20.0]
            return [0.0, 0, 0, 6, 0, 7, 0, 0, 0, 0] if path == () else [0.0] * 10

    tree = grow([Example(0)], [7], depth=2, top_k=2)[0].build(4)
    assert set(node_paths(tree)) == {(), (3,), (5,), (5, 9)}
