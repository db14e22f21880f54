"""How a target verifies drafts: what it can take, and its inputs for a pass over them."""

from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from .caches import TargetCache
from .candidate_generator import DraftSettings
from .compatibility import CACHE, attention_of, input_device
from .draft_tree import DraftTree
from .limits import last_position
from .masks import LayerKinds, chain_mask, tree_masks
from .prompt import Prompt, takes_positions
from .transfers import upload


__all__ = ["Verifier", "mask_obstacle"]

logger = logging.get_logger(__name__)


@dataclass
class Verifier:
    """How a target verifies drafts.

    Args:
        target: the model.
        kinds: of its layers.
        takes_trees: it takes masks from us; else it makes its own, from a mask of padding, and verifies chains only.
        in_step: rows must stay of one length, since the target tells places in a text by columns.
    """

    target: PreTrainedModel
    kinds: LayerKinds
    takes_trees: bool
    in_step: bool

    @classmethod
    def of(cls, target: PreTrainedModel, settings: DraftSettings, config: GenerationConfig, rows: int) -> "Verifier":
        """Reads the target; logs once why it takes no trees, if it takes none.

        Raises:
            ValueError: if `output_attentions` is asked for and drafts are trees.
        """
        kinds = LayerKinds.of(target.config.get_text_config())
        column_bound, obstacle = _column_obstacle(target), mask_obstacle(target)
        takes_trees = obstacle is None
        if not settings.is_chain:
            if not takes_trees:
                logger.warning_once(f"Drafting chains instead of trees: {obstacle}.")
            elif config.return_dict_in_generate and config.output_attentions:
                raise ValueError(
                    "`output_attentions` was given; attentions are returned for chains. Set "
                    "`poss.generation_config.draft_top_k = 1`, or leave it out."
                )
        return cls(
            target, kinds, takes_trees, not takes_trees and rows > 1 and (column_bound is not None or kinds.windowed)
        )

    def inputs(self, tree: DraftTree, cache: TargetCache, prompt: Prompt) -> dict[str, Any]:
        """The target's inputs for one pass over the nodes of all active rows.

        Args:
            tree: the nodes, [active, nodes].
            cache: what the target has read.
            prompt: of the call.
        """
        columns, device, nodes = cache.columns, input_device(self.target), tree.tokens.shape[1]
        rows = columns.rows[: columns.active]
        # The mask and the positions of a prompt are read in the order of the slots, once that is another one.
        slots = slice(None) if rows == list(range(len(columns.rows))) else upload(rows, prompt.mask.device)
        lengths = upload(columns.lengths[: columns.active], device)
        context = columns.in_use(device) if prompt.is_padded or columns.ragged else None
        if prompt.is_padded:
            known = prompt.mask[slots].to(device)[:, : context.shape[1]]
            context[:, : known.shape[1]] &= known
        if self.takes_trees:
            padding = prompt.padding[slots].to(device)
            mask = tree_masks(self.kinds, tree, context, columns.start, lengths, padding, self.target.dtype)
        else:
            mask = None if context is None else chain_mask(context, nodes)
        inputs = {
            "input_ids": tree.tokens.to(device),
            "attention_mask": mask,
            CACHE: cache.cache,
            "use_cache": True,
            "return_dict": True,
        }
        if prompt.positions is not None:
            first = prompt.positions[..., slots].to(device) + lengths - prompt.mask.shape[1] + 1
            positions = first[..., None] + tree.depths.to(device)
            limit = last_position(self.target)
            if limit is not None:  # only where other processes need a draft of full depth does it reach beyond
                positions = positions.clamp(max=limit)
            inputs["position_ids"] = positions
        return inputs

    def positions_left(self, cache: TargetCache, prompt: Prompt) -> int | None:
        """How much deeper than its root a tree may be; None if the target can take any position.

        Raises:
            ValueError: if a text has outgrown the positions that the target learned.
        """
        limit, columns = last_position(self.target), cache.columns
        if limit is None:
            return None
        roots = (
            prompt.lengths[columns.rows[slot]] + columns.lengths[slot] - prompt.mask.shape[1]
            for slot in range(columns.active)
        )
        left = limit - max(roots)
        if left < 0:
            raise ValueError(
                f"A text has outgrown the {limit + 1} positions that {self.target.__class__.__name__} has embeddings "
                "of. Lower `max_new_tokens` or `max_length`, or shorten the prompt."
            )
        return left


def mask_obstacle(target: PreTrainedModel) -> str | None:
    """Why a target cannot be given positions and masks that are no plain text's, or None."""
    text = target.config.get_text_config()
    kinds, attention = LayerKinds.of(text), attention_of(text)
    if obstacle := _column_obstacle(target):
        return obstacle
    if attention not in ("eager", "sdpa"):
        return f"{attention} attention takes no tree mask; load the target with `attn_implementation='sdpa'`"
    if kinds.unknown:
        return f"{target.__class__.__name__} has layers of a kind without a tree mask ({', '.join(kinds.unknown)})"
    return None


def _column_obstacle(target: PreTrainedModel) -> str | None:
    """Why a node's column in a pass has to be its place in the text, or None."""
    text, name = target.config.get_text_config(), target.__class__.__name__
    if not takes_positions(target) or getattr(text, "alibi", False):
        return f"{name} takes no position ids or uses ALiBi, so two nodes cannot share a position"
    if "local" in getattr(text, "attention_layers", ()):  # GPT-Neo
        return f"{name} counts the columns of a pass for its windows, so two nodes cannot share a position"
    return None
