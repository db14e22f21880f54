"""Draft passes against specialists written out plainly: one path at a time, one head at a time."""

from dataclasses import dataclass

import pytest
import torch
from conftest import make_poss, make_target
from transformers import set_seed
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hf_poss import PosSModel
from hf_poss.draft_passes import ContextProjection, DraftPasses
from hf_poss.modeling_poss import TargetReference


KINDS = {
    "plain": {},
    "biases": {"attention_bias": True},
    "a head of keys each": {"num_key_value_heads": 4},
    "one head of keys": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 16},
    "LoRA": {"specialist_adapter": {"r": 4, "lora_alpha": 6}},
}


def lively(poss: PosSModel) -> PosSModel:
    """Weights with which attention tells keys apart, biases are not zero and adapters differ."""
    set_seed(2)
    with torch.no_grad():
        for name, parameter in poss.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.25)
            elif parameter.dim() > 1 or "bias" in name:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    return poss


@pytest.fixture(scope="module")
def target():
    return make_target("llama", scale=1.0)


@pytest.fixture(params=KINDS)
def poss(request, target) -> PosSModel:
    settings = KINDS[request.param]
    if "specialist_adapter" in settings:
        pytest.importorskip("peft")
    return lively(make_poss(target, positions_per_specialist=2, num_draft_positions=6, **settings))


def passes_of(poss: PosSModel, target) -> DraftPasses:
    reference = TargetReference.from_target(target, poss.config)
    return DraftPasses(poss, reference, poss.draft_head(reference))


# ---- The projection ----


@torch.no_grad()
def project_and_compare(project: ContextProjection, poss: PosSModel, first: int, end: int | None) -> None:
    fused = torch.randn(3, 5, poss.config.hidden_size)
    rotary = poss.rotary(fused, torch.randint(0, 90, (3, 5)))
    keys, values = project(fused, rotary, first, end)
    layers = list(poss.layers)[first:end]
    assert keys.shape == values.shape
    assert keys.shape == (3, len(layers), poss.config.num_key_value_heads, 5, poss.config.head_dim)
    for index, layer in enumerate(layers):
        for mine, own in zip((keys, values), layer.keys_values(fused, rotary), strict=True):
            torch.testing.assert_close(mine[:, index], own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("first", "end"), [(0, None), (1, None), (2, None), (0, 1), (1, 2), (0, 3)])
def test_one_product_gives_what_the_layers_give(poss, first, end):
    project_and_compare(ContextProjection(poss.layers), poss, first, end)


def test_weights_that_have_changed_are_taken_up(poss):
    project = ContextProjection(poss.layers)
    with torch.no_grad():
        for parameter in poss.parameters():
            parameter.mul_(1.5)
    project.refresh()
    project_and_compare(project, poss, 0, None)


def test_tensors_stay_where_they_are_when_weights_change(target):
    """So that what was compiled for them goes on to hold."""
    poss = make_poss(target, attention_bias=True)
    project = ContextProjection(poss.layers)
    places = project.weight.data_ptr(), project.bias.data_ptr()
    project.refresh()
    assert (project.weight.data_ptr(), project.bias.data_ptr()) == places


def test_a_module_with_a_hook_is_called(target):
    """What is more than a matrix keeps its say."""
    poss = lively(make_poss(target, positions_per_specialist=2, num_draft_positions=6))
    calls = []
    for projection in (poss.layers[0].self_attn.k_proj, poss.layers[2].self_attn.v_proj):
        projection.register_forward_hook(lambda module, args, output: calls.append(module) or 2 * output)
    project = ContextProjection(poss.layers)
    project_and_compare(project, poss, 0, None)
    assert len(calls) == 4, "the projection's calls and the comparison's own"
    poss.layers[0].self_attn.k_proj._forward_hooks.clear()
    poss.layers[2].self_attn.v_proj._forward_hooks.clear()
    project.refresh()
    project_and_compare(project, poss, 0, None)
    assert len(calls) == 4


# ---- Passes ----


@dataclass
class Node:
    path: tuple[int, ...]
    score: float
    inputs: list[torch.Tensor]  # fused, [hidden] each, of the nodes on the path


@torch.no_grad()
def predicted(poss: PosSModel, position: int, inputs: list[torch.Tensor], context: int) -> torch.Tensor:
    """The feature [hidden] that a specialist predicts at the end of a path, head by head.

    Args:
        position: in the draft, which decides the specialist.
        inputs: fused, of all context and of the nodes on the path; the first node continues behind the context.
        context: of these, how many are context.
    """
    layer = poss.layers[poss.config.specialist_index(position)]
    attention, config = layer.self_attn, poss.config
    fused = torch.stack(inputs)[None]  # [1, entries, hidden]
    assert fused.shape[1] == context + position - 1
    angles = poss.rotary(fused, torch.arange(fused.shape[1])[None])

    def heads(projected: torch.Tensor) -> torch.Tensor:
        return projected.view(1, fused.shape[1], -1, config.head_dim).transpose(1, 2)

    queries, keys = apply_rotary_pos_emb(heads(attention.q_proj(fused)), heads(attention.k_proj(fused)), *angles)
    values, attended = heads(attention.v_proj(fused)), []
    for head in range(config.num_attention_heads):
        shared = head // (config.num_attention_heads // config.num_key_value_heads)
        weights = (keys[0, shared] @ queries[0, head, -1] / config.head_dim**0.5).softmax(-1)
        attended.append(weights @ values[0, shared])
    hidden = fused[0, -1] + attention.o_proj(torch.cat(attended))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


@torch.no_grad()
def plain_levels(passes: DraftPasses, context: torch.Tensor, depth: int, top_k: int) -> list[list[Node]]:
    """All nodes that a draft looks at, level by level, below a row's context [entries, hidden]."""
    poss, frontier, levels = passes.poss, [Node((), 0.0, [])], []
    for position in range(1, depth + 1):
        levels.append([])
        for node in frontier:
            feature = predicted(poss, position, [*context, *node.inputs], len(context))
            log_probabilities = passes.reference.logits(feature).double().log_softmax(-1)
            for token in log_probabilities.argsort(descending=True)[:top_k]:
                embedding = passes.reference.embed(token, like=feature)
                below = [*node.inputs, poss.fc(torch.cat((embedding, feature)))]
                score = node.score + log_probabilities[token].item()
                levels[-1].append(Node((*node.path, int(token)), score, below))
        frontier = sorted(levels[-1], key=lambda node: -node.score)[:top_k]
    return levels


LENGTHS = [4, 9, 1]


@torch.no_grad()
def context_of(passes: DraftPasses, lengths: list[int], columns: int) -> tuple:
    """Rows of context committed into buffers of so many columns: fused inputs [rows, entries, hidden] and the buffers.

    What lies behind a row's end, and all else that is not to be read, is full of noise.
    """
    config, most = passes.poss.config, max(lengths)
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(len(lengths), most, config.hidden_size, generator=generator)
    following = torch.randint(3, 90, (len(lengths), most), generator=generator)
    shape = (len(lengths), config.num_specialists, config.num_key_value_heads, columns, config.head_dim)
    states = tuple(10 * torch.randn(shape, generator=generator) for _ in range(2))
    zeros = torch.zeros(len(lengths), dtype=torch.long)
    fused = passes.commit(features, following, zeros, states, slice(0, most))
    return fused, states


@torch.no_grad()
def assert_levels_agree(
    passes: DraftPasses, lengths: list[int], start: int, where: str, depth: int, top_k: int
) -> None:
    """Drafts level by level for rows of any length whose nodes begin at column `start`, and node by node."""
    fused, states = context_of(passes, lengths, start + depth * top_k)
    rows, held = len(lengths), torch.tensor(lengths)
    query = fused[torch.arange(rows), held - 1][:, None]
    beyond = torch.zeros(rows, 1, start)
    beyond.masked_fill_(torch.arange(start) >= held[:, None, None], -torch.inf)
    if (beyond == 0).all():
        beyond = None
    width = 1 if where == "slice" else top_k
    frontier, (cos, sin) = passes.root(query, held, depth, width, depth * top_k)
    own = torch.full((depth * top_k,) * 2, -torch.inf).fill_diagonal_(0.0).view(depth, top_k, -1)
    expected = [plain_levels(passes, fused[row, :length], depth, top_k) for row, length in enumerate(lengths)]
    parents = [[()] for _ in lengths]
    for position in range(1, depth + 1):
        first = start + (position - 1) * top_k
        columns = torch.arange(first, first + top_k)
        columns = {
            "slice": slice(first, first + top_k) if position > 1 else None,
            "columns": columns,
            "columns of each row": columns.expand(rows, -1),
        }[where]
        children, frontier = passes.expand(
            passes.poss.config.specialist_index(position),
            frontier,
            (cos[:, position - 1 : position], sin[:, position - 1 : position]),
            states,
            columns,
            own[min(position, depth - 1)],
            beyond,
            top_k,
        )
        for row in range(rows):
            tokens = children.tokens[row].view(-1, top_k)[: len(parents[row])].tolist()
            paths = [(*path, token) for path, below in zip(parents[row], tokens, strict=True) for token in below]
            scores = {node.path: node.score for node in expected[row][position - 1]}
            assert set(paths) == set(scores)
            found = children.scores[row, : len(paths)]
            torch.testing.assert_close(found, torch.tensor([scores[path] for path in paths]), rtol=1e-4, atol=1e-4)
            assert (children.scores[row, len(paths) :] == -torch.inf).all(), "a node below none"
            parents[row] = [paths[index] for index in children.chosen[row].tolist()]
            best = sorted(scores, key=lambda path: -scores[path])[:top_k]
            assert parents[row] == best
            torch.testing.assert_close(frontier.scores[row], found[children.chosen[row]])
            inputs = {node.path: node.inputs[-1] for node in expected[row][position - 1]}
            torch.testing.assert_close(
                frontier.fused[row], torch.stack([inputs[path] for path in parents[row]]), rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("where", ["slice", "columns", "columns of each row"])
@pytest.mark.parametrize(("depth", "top_k"), [(4, 3), (7, 1), (2, 4), (1, 3)])
def test_a_draft_is_that_of_every_path_by_itself(poss, target, depth, top_k, where):
    """Rows of unlike length side by side; of nodes at fixed columns, the root's frontier is one node and some that
    are none."""
    assert_levels_agree(passes_of(poss, target), LENGTHS, max(LENGTHS) + 2, where, depth, top_k)


@pytest.mark.parametrize("where", ["slice", "columns"])
def test_rows_that_fill_the_context_hide_nothing_of_it(target, where):
    poss = lively(make_poss(target, positions_per_specialist=1, num_draft_positions=3))
    assert_levels_agree(passes_of(poss, target), [6, 6], 6, where, 4, 3)


def test_keys_are_made_for_the_specialists_of_the_draft_alone(target):
    """Entries of those behind `end` stay as they were."""
    poss = lively(make_poss(target, positions_per_specialist=1, num_draft_positions=4))
    passes = passes_of(poss, target)
    fused, states = context_of(passes, [5], 5 + 6)
    frontier, (cos, sin) = passes.root(fused[:, -1:], torch.tensor([5]), 2, 1, 6)
    own = torch.full((6, 6), -torch.inf).fill_diagonal_(0.0).view(2, 3, -1)
    with torch.no_grad():
        _, frontier = passes.expand(0, frontier, (cos[:, :1], sin[:, :1]), states, None, own[1], None, 3)
        before = [part.clone() for part in states]
        passes.expand(1, frontier, (cos[:, 1:], sin[:, 1:]), states, slice(8, 11), own[1], None, 3, last=True, end=3)
    for part, old in zip(states, before, strict=True):
        changed = (part != old).flatten(2).any(-1)[0].tolist()
        assert changed == [False, True, True, False]


def test_the_last_pass_makes_no_frontier(poss, target):
    passes = passes_of(poss, target)
    fused, states = context_of(passes, [5], 8)
    frontier, rotary = passes.root(fused[:, -1:], torch.tensor([5]), 1, 1, 3)
    with torch.no_grad():
        children, none = passes.expand(0, frontier, rotary, states, None, torch.zeros(3, 3), None, 3, last=True)
    assert none is None and children.chosen is None
    expected = plain_levels(passes, fused[0], 1, 3)[0]
    assert children.tokens[0].tolist() == [node.path[0] for node in expected]


# ---- Context ----


@torch.no_grad()
def test_entries_go_to_the_columns_of_their_row(poss, target):
    """Rows that hold 4, 9 and 1 entries get three more each, at their own places and positions."""
    passes = passes_of(poss, target)
    config = poss.config
    features, following = torch.randn(3, 12, config.hidden_size), torch.randint(3, 90, (3, 12))
    shape = (3, config.num_specialists, config.num_key_value_heads, 14, config.head_dim)
    whole = tuple(torch.zeros(shape) for _ in range(2))
    passes.commit(features, following, torch.zeros(3, dtype=torch.long), whole, slice(0, 12))
    states = tuple(torch.full(shape, 7.0) for _ in range(2))
    held = torch.tensor(LENGTHS)
    for row, length in enumerate(LENGTHS):  # what they hold already
        alone = tuple(part[row : row + 1] for part in states)
        passes.commit(
            features[row : row + 1, :length],
            following[row : row + 1, :length],
            torch.tensor([0]),
            alone,
            slice(0, length),
        )
    places = held[:, None] + torch.arange(3)
    rows = torch.arange(3)[:, None]
    passes.commit(features[rows, places], following[rows, places], held, states, places)
    for row, length in enumerate(LENGTHS):
        for part, all_at_once in zip(states, whole, strict=True):
            torch.testing.assert_close(
                part[row, :, :, : length + 3], all_at_once[row, :, :, : length + 3], rtol=1e-4, atol=1e-4
            )
            assert (part[row, :, :, length + 3 :] == 7.0).all()
