"""What a draft costs if nothing but its operations is done: drafting is measured against it."""

import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import rotate_half

from ..candidate_generator import DraftSettings
from ..compatibility import is_plain_linear
from ..modeling_poss import PosSModel, TargetReference
from .timing import synchronize


__all__ = ["bare_draft_seconds"]

Operations = list[tuple[str, Callable[[], object]]]


@torch.no_grad()
def bare_draft_seconds(
    poss: PosSModel,
    reference: TargetReference,
    settings: DraftSettings,
    rows: int,
    entries: int,
    accepted: int,
    prepare: Callable[[], object] = lambda: None,
    repeats: int = 20,
) -> dict[str, float]:
    """Seconds of the operations of one draft phase, run one after the other on inputs that lie ready.

    These are, for the context, embedding, `fc` and the key and value projections of all specialists, which go into
    the cache; for every pass its specialist's projections, rotation, attention, norm, MLP and two residual sums, the
    head and its most likely tokens, the choice of the next frontier, its parents' features, embedding and `fc`, and
    its keys and values in the cache; and the choice of the tree. No masks, and nothing that leads from one to the
    next.

    Args:
        reference: to the target whose embedding and head are used.
        settings: of the drafts.
        rows: of the batch.
        entries: of the context.
        accepted: entries that a round adds.
        prepare: called before the operations, and not timed. A pass of the target, as it goes before a draft in a
            round, leaves the processor's caches as drafting finds them; without one they hold the drafter's weights.
        repeats: of which the mean counts, since it is set against a mean over rounds.

    Returns:
        by kind on a CPU, and for "all".
    """
    operations = _operations(poss, reference, settings, rows, entries, accepted)
    return _mean_seconds(operations, poss.device, prepare, repeats)


def _mean_seconds(
    operations: Operations, device: torch.device, prepare: Callable[[], object], repeats: int
) -> dict[str, float]:
    clocked = device.type == "cpu"  # an accelerator would have to be waited for after each
    seconds: dict[str, float] = dict.fromkeys((kind for kind, _ in operations), 0.0) if clocked else {}
    seconds["all"] = 0.0
    for repeat in range(-2, repeats):
        if repeat == 0:  # the first ones warm up
            seconds = dict.fromkeys(seconds, 0.0)
        prepare()
        synchronize(device)
        start = last = time.perf_counter()
        for kind, operation in operations:
            operation()
            if clocked:
                now = time.perf_counter()
                seconds[kind] += now - last
                last = now
        synchronize(device)
        seconds["all"] += time.perf_counter() - start
    return {kind: spent / repeats for kind, spent in seconds.items()}


def _operations(
    poss: PosSModel, reference: TargetReference, settings: DraftSettings, rows: int, entries: int, accepted: int
) -> Operations:
    config, head = poss.config, poss.draft_head(reference)
    groups, head_dim = config.num_key_value_heads, config.head_dim
    shared = config.num_attention_heads // groups
    vocabulary = config.vocab_size if config.draft_vocab_size is None else config.draft_vocab_size
    branches = min(settings.top_k, vocabulary)
    operations: Operations = []

    def add(kind: str, operation: Callable[[], object]) -> None:
        operations.append((kind, operation))

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(rows, *shape, device=poss.device, dtype=poss.dtype)

    def fuse(width: int) -> None:
        tokens = torch.zeros(rows, width, dtype=torch.long, device=poss.device)
        features = values(width, config.hidden_size)
        add("projections", lambda: poss.fuse(reference.embed(tokens, like=features), features))

    def project(module: nn.Module, inputs: torch.Tensor) -> None:
        add("projections", lambda: module(inputs))

    def keys_values(inputs: torch.Tensor, first: int) -> None:
        """Of the specialists from `first` on: one product where they are plain matrices."""
        layers = poss.layers[first:]
        projections = [part for layer in layers for part in (layer.self_attn.k_proj, layer.self_attn.v_proj)]
        if all(is_plain_linear(projection) for projection in projections):
            weight = torch.cat([projection.weight for projection in projections])
            add("projections", lambda: F.linear(inputs, weight))
        else:
            for projection in projections:
                project(projection, inputs)
        rotate(len(layers) * groups, inputs.shape[1])
        new, held = values(2 * len(layers) * groups, inputs.shape[1], head_dim), states[:, : 2 * len(layers) * groups]
        add("cache", lambda: held[:, :, entries : entries + new.shape[2]].copy_(new))

    def gather(features: torch.Tensor, width: int) -> None:
        parents = torch.zeros(rows, width, 1, dtype=torch.long, device=poss.device).expand(-1, -1, config.hidden_size)
        add("parents", lambda: features.gather(1, parents))

    def rotate(heads: int, width: int) -> None:
        states, angle = values(heads, width, head_dim), values(1, width, head_dim)
        add("rotation", lambda: states * angle + rotate_half(states) * angle)

    most = max(accepted, branches)
    states = values(2 * len(poss.layers) * groups, entries + most, head_dim)
    if config.feature_layers is not None:
        features = values(accepted, config.feature_size)
        add("projections", lambda: poss.project(features))
    fuse(accepted)
    keys_values(values(accepted, config.hidden_size), first=0)
    for position in range(1, settings.depth + 1):
        index, layer = config.specialist_index(position), poss.specialist(position)
        width = 1 if position == 1 else branches
        fused = values(width, config.hidden_size)
        if position > 1:
            gather(fused, width)
            fuse(width)
            keys_values(fused, first=index)
        project(layer.self_attn.q_proj, fused)
        rotate(config.num_attention_heads, width)
        project(layer.self_attn.o_proj, values(width, config.num_attention_heads * head_dim))
        _attend(add, values, groups, shared * width, entries, (position - 1) * branches, head_dim)
        add("residuals", lambda fused=fused: (fused + fused, fused + fused))
        add("norms", lambda layer=layer, fused=fused: layer.post_attention_layernorm(fused))
        add("mlp", lambda layer=layer, fused=fused: layer.mlp(fused))
        add("head", lambda fused=fused: head.logits(fused))
        logits = values(width, vocabulary).float()
        add("top-k", lambda logits=logits: logits.log_softmax(-1).topk(branches))
        scores = values(width * branches).float()
        add("tree", lambda scores=scores: scores.topk(branches))
    scores = values(branches + (settings.depth - 1) * branches**2).float()
    kept = min(settings.up_to(settings.depth).total_tokens - 1, scores.shape[1])
    add("tree", lambda: scores.topk(kept))
    return operations


def _attend(
    add: Callable[[str, Callable[[], object]], None],
    values: Callable[..., torch.Tensor],
    groups: int,
    queries: int,
    entries: int,
    nodes: int,
    head_dim: int,
) -> None:
    query = values(groups, queries, head_dim)
    keys, states = values(groups, entries + nodes, head_dim), values(groups, entries + nodes, head_dim)
    mask = query.new_zeros(query.shape[0], 1, queries, entries + nodes) if nodes else None
    add("attention", lambda: F.scaled_dot_product_attention(query, keys, states, attn_mask=mask))
