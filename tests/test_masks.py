"""What the nodes of a tree see, against transformers' own masks of each node's path."""

import pytest
import torch
from conftest import TARGET_CONFIGS, WINDOW_CONFIGS, make_target
from transformers import Llama4TextConfig, PreTrainedConfig
from transformers.masking_utils import (
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
)

from hf_poss.draft_tree import DraftTree
from hf_poss.masks import LayerKinds, chain_mask, tree_masks


#  0 -> 1, 2;  1 -> 3;  2 -> 4, 5;  4 -> 6
PARENTS = [0, 0, 0, 1, 2, 2, 4]
DEPTHS = [0, 1, 1, 2, 2, 2, 3]


def chunked_config() -> Llama4TextConfig:
    return Llama4TextConfig(
        num_hidden_layers=2, layer_types=["chunked_attention", "full_attention"], attention_chunk_size=4
    )


STOCK = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
    "chunked_attention": create_chunked_causal_mask,
}
CONFIGS = {"full": TARGET_CONFIGS["llama"], **WINDOW_CONFIGS, "chunked": chunked_config}


def tree(rows: int) -> DraftTree:
    parents, depths = (torch.tensor([values] * rows) for values in (PARENTS, DEPTHS))
    return DraftTree(torch.zeros_like(parents), parents, depths, max_depth=3)


def path_to(node: int) -> list[int]:
    path = [node]
    while path[0]:
        path.insert(0, PARENTS[path[0]])
    return path


def seen_by_last(config: PreTrainedConfig, mask: list[int], kind: str) -> list[bool]:
    """Which of the tokens the last of a text sees, by transformers; `mask` is 0 for padding."""
    config._attn_implementation = "eager"
    made = STOCK[kind](config, torch.zeros(1, len(mask), 8), torch.tensor([mask]), past_key_values=None)
    return (made[0, 0, -1] == 0).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_node_sees_what_it_would_see_behind_its_path(name, dtype):
    """Rows with padding, with holes, shorter than the window and longer."""
    texts = [[1] * 5, [0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 14, [0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1], [0, 0, 1]]
    config, width = CONFIGS[name](), max(map(len, texts))
    kinds = LayerKinds.of(config)
    assert kinds.unknown == [] and kinds.windowed == (name != "full")
    context = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts]).bool()
    lengths = torch.tensor([len(text) for text in texts])
    padding = torch.tensor([text.index(1) for text in texts])

    masks = tree_masks(kinds, tree(len(texts)), context, width, lengths, padding, dtype)

    assert isinstance(masks, dict) == (len(kinds.names) > 1)
    masks = masks if isinstance(masks, dict) else {kinds.names[0]: masks}
    assert set(masks) == set(kinds.names)
    for kind, mask in masks.items():
        assert mask.shape == (len(texts), 1, len(PARENTS), width + len(PARENTS)) and mask.dtype == dtype
        assert mask.unique().tolist() == [torch.finfo(dtype).min, 0.0]
        for row, text in enumerate(texts):
            for node in range(len(PARENTS)):
                path = path_to(node)
                columns = [*range(len(text)), *(width + step for step in path)]
                seen = mask[row, 0, node] == 0
                assert seen[columns].tolist() == seen_by_last(config, [*text, *[1] * len(path)], kind)
                seen[columns] = False
                assert not seen.any(), "a node sees other branches or other rows' columns"


@pytest.mark.parametrize("name", list(CONFIGS))
def test_without_padding_nothing_has_to_be_said_about_the_context(name):
    """Rows of one length, all of it context: with and without saying so."""
    kinds, lengths, padding = LayerKinds.of(CONFIGS[name]()), torch.tensor([11, 11]), torch.zeros(2, dtype=torch.long)
    context = torch.ones(2, 11, dtype=torch.bool)
    said, unsaid = (
        tree_masks(kinds, tree(2), known, 11, lengths, padding, torch.float32) for known in (context, None)
    )
    assert isinstance(said, dict) == isinstance(unsaid, dict)
    for kind in kinds.names:
        one, other = (masks[kind] if isinstance(masks, dict) else masks for masks in (said, unsaid))
        assert torch.equal(one, other)


def test_kinds_that_are_not_known_are_named():
    config = WINDOW_CONFIGS["gemma3"]()
    config.layer_types = ["linear_attention", "full_attention", "sliding_attention"]
    assert LayerKinds.of(config).unknown == ["linear_attention"]
    config.sliding_window = None
    assert LayerKinds.of(config).unknown == ["linear_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, ("full_attention",)),
        ({"sliding_window": 4}, ("sliding_attention",)),
        ({"attention_chunk_size": 4}, ("chunked_attention",)),
        ({"sliding_window": 4, "layer_types": ["full_attention"] * 2}, ("full_attention",)),
    ],
    ids=str,
)
def test_kinds_of_layers(settings, names):
    assert LayerKinds.of(PreTrainedConfig(**settings)).names == names


@torch.no_grad()
def test_the_mask_of_a_chain_hides_padding_and_the_ends_of_shorter_rows():
    """A target that makes its own masks gets from it the logits of each text alone."""
    target = make_target("llama", scale=2.0)
    texts = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14]]
    cache = target(torch.tensor([[*texts[0], 0, 0], texts[1]])).past_key_values
    context = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6]).bool()
    chain = torch.tensor([[20, 21], [22, 23]])
    mask = chain_mask(context, 2)
    assert mask.dtype == torch.long and mask.shape == (2, 8)
    positions = torch.tensor([[4, 5], [6, 7]])
    logits = target(chain, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    for row, text in enumerate(texts):
        alone = target(torch.tensor([[*text, *chain[row].tolist()]])).logits[0, -2:]
        torch.testing.assert_close(logits[row], alone, rtol=1e-4, atol=1e-4)
