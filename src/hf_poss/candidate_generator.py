"""Depth-routed drafting: draft position k runs specialist s(k) on the features of position k - 1."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation import AssistedCandidateGenerator
from transformers.utils import ModelOutput, logging

from .caches import Columns, SpecialistCache
from .compatibility import device_of, input_device
from .configuration_poss import eos_token_ids
from .draft_tree import DraftTree, DraftTreeBuilder
from .features import hidden_states_wanted, select_features
from .modeling_poss import PosSModel, RotaryAngles, TargetReference


__all__ = ["DraftSettings", "PosSCandidateGenerator", "prompt_entries"]

logger = logging.get_logger(__name__)

# A CPU pays for every node that it verifies, so its trees are small.
CPU_TOP_K = 6
CPU_TOTAL_TOKENS = 20


@dataclass(frozen=True)
class DraftSettings:
    """Shape of a draft.

    Args:
        depth: draft positions, 1 or more (`num_assistant_tokens`).
        top_k: branches a node (`draft_top_k`); 1 is a chain.
        total_tokens: nodes verified a round, the root included (`draft_total_tokens`), 2 or more.
    """

    depth: int
    top_k: int
    total_tokens: int

    @classmethod
    def of(cls, poss: PosSModel, device: torch.device | str) -> "DraftSettings":
        """The knobs of `poss.generation_config`, with defaults where they are None.

        On an accelerator the defaults are EAGLE-2's tree: verifying 60 nodes costs it about as much as
        verifying one.

        Raises:
            ValueError: if a knob is no integer or too small.
        """
        knobs = poss.generation_config
        on_cpu = torch.device(device).type == "cpu"
        values = {
            "num_assistant_tokens": (getattr(knobs, "num_assistant_tokens", None), poss.config.num_draft_positions, 1),
            "draft_top_k": (getattr(knobs, "draft_top_k", None), CPU_TOP_K if on_cpu else 10, 1),
            "draft_total_tokens": (getattr(knobs, "draft_total_tokens", None), CPU_TOTAL_TOKENS if on_cpu else 60, 2),
        }
        chosen = []
        for name, (value, default, least) in values.items():
            value = default if value is None else value
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                reason = " (the root and one drafted token)" if name == "draft_total_tokens" else ""
                raise ValueError(
                    f"`poss.generation_config.{name}` is {value!r}; expected an integer of {least} or more{reason}, "
                    "or None for the default."
                )
            chosen.append(value)
        return cls(*chosen)

    @property
    def is_chain(self) -> bool:
        return self.top_k == 1

    def up_to(self, depth: int) -> "DraftSettings":
        """These settings, no deeper than `depth`; a chain has a node a position, whatever `total_tokens` says."""
        depth = min(self.depth, depth)
        return replace(self, depth=depth, total_tokens=depth + 1 if self.is_chain else self.total_tokens)


class PosSCandidateGenerator(AssistedCandidateGenerator):
    """Candidates for one `generate` call, drafted by position specialists, for any number of rows.

    Holds each specialist's keys and values. Rows of the batch grow at their own pace; the slots of finished ones are
    given up (see [`Columns`]). Context comes from the target's features, one entry a committed token: entry t is made
    of the feature of t and token t + 1, at position t. A round's nodes come from features that the specialist before
    predicted, and are forgotten when the round ends.

    Example of the indices: the prompt is tokens 0..4, and the target has picked token 5, the root. Context entries are
    0..4; entry 4 (feature 4, token 5) is the query of draft position 1 and predicts feature 5, hence token 6. A
    drafted token 6 makes a node (predicted feature 5, token 6) at position 5, the query of draft position 2.

    The decoding loop of this package calls `extend_context` and `draft`; in transformers' own loop, `get_candidates`
    answers with a chain.

    Args:
        input_ids: the prompts, int64 [rows, tokens].
        assistant_model: the specialists.
        generation_config: of the `generate` call.
        model_kwargs: of the `generate` call.
        target: the model that `generate` runs on; its embedding and head are used.
        inputs_tensor, logits_processor: as in the base class; a draft does not need them.

    Raises:
        ValueError: if the specialists do not fit the target, or a drafting knob is wrong.
    """

    requires_model_outputs = True

    def __init__(
        self,
        input_ids: torch.LongTensor,
        assistant_model: PosSModel,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        target: PreTrainedModel,
        inputs_tensor: torch.Tensor | None = None,
        logits_processor: LogitsProcessorList | None = None,
    ):
        super().__init__(input_ids, assistant_model, generation_config, model_kwargs, inputs_tensor, logits_processor)
        self.reference = TargetReference.from_target(target, assistant_model.config)
        self.head = assistant_model.draft_head(self.reference)
        self.feature_layers = assistant_model.config.feature_layers
        head_device = device_of(target.get_output_embeddings())
        if assistant_model.device != head_device:
            logger.warning_once(
                f"The drafter is on {assistant_model.device} and the target's head on {head_device}; every draft pass "
                f"crosses over. Move it once with `poss.to({str(head_device)!r})`."
            )
        self.settings = DraftSettings.of(assistant_model, input_device(target))
        self.num_assistant_tokens = self.settings.depth
        every_layer = generation_config.output_hidden_states
        self.model_kwargs_overrides = {
            "output_hidden_states": True if every_layer else hidden_states_wanted(self.feature_layers)
        }
        self.eos_token_ids = eos_token_ids(generation_config)

        self.columns = Columns(input_ids.shape[0])
        self.caches = [SpecialistCache(self.columns) for _ in assistant_model.layers]
        self.query: torch.Tensor | None = None  # fused input of each slot's last entry, [active, 1, hidden]
        self.prompt_mask = model_kwargs.get("attention_mask")

    # ---- The contract of transformers' assisted decoding ----

    @torch.no_grad()
    def get_candidates(
        self,
        input_ids: torch.LongTensor,
        model_kwargs: dict[str, Any] | None = None,
        model_outputs: ModelOutput | None = None,
        is_first_iteration: bool = True,
        n_last_matches: int = 0,
        **kwargs: Any,
    ) -> tuple[torch.LongTensor, None]:
        """`input_ids` with a chain of drafted tokens behind them.

        No logits come with it: each token is the drafter's most likely one, not a sample, so the target's own choice
        decides, which is lossless for sampling too.

        Args:
            input_ids: int64 [1, tokens], all tokens so far.
            model_outputs: of the target's last pass; its features extend the context.
            is_first_iteration: True before the target has seen the prompt; nothing is drafted then.
            n_last_matches: drafted tokens accepted in the last pass.
        """
        if is_first_iteration or model_outputs is None:
            return input_ids, None
        features = self.features_of(model_outputs)
        if self.query is None:
            entries = prompt_entries(self.prompt_mask, features)[0]
        else:  # the pass saw the accepted tokens first and the rejected ones behind them
            entries = range(int(n_last_matches) + 1)
        features = features[:, list(entries)]
        self.extend_context(features, input_ids[:, -features.shape[1] :])
        settings = replace(self.settings, top_k=1).up_to(self.main_model_max_length - input_ids.shape[1] - 1)
        if settings.depth < 1:
            return input_ids, None
        tree = self.draft(input_ids[:, -1], settings)
        drafted = _until_eos(tree.tokens[:, 1:].to(input_ids.device), self.eos_token_ids)
        return torch.cat((input_ids, drafted), dim=1), None

    def update_candidate_strategy(self, input_ids: torch.LongTensor, scores: torch.Tensor, num_matches: int) -> None:
        """The depth of drafts stays as it is."""

    # ---- Drafting ----

    def features_of(self, outputs: ModelOutput) -> torch.Tensor:
        """What specialists read of a pass of the target, [rows, tokens, feature size]."""
        return select_features(outputs.hidden_states, self.feature_layers)

    def extend_context(
        self, features: torch.Tensor, next_tokens: torch.LongTensor, counts: Sequence[int] | None = None
    ) -> None:
        """Commits the tokens whose features the target has just computed.

        Costs `fc`, key and value projections an entry and specialist, nothing else.

        Args:
            features: [active, entries, feature size] of the target.
            next_tokens: int64 [active, entries], the token that follows each.
            counts: for each slot how many of its entries count, the first ones; all if None.

        Raises:
            ValueError: if the target's features are not finite; asked of the first ones only.
        """
        poss, columns = self.assistant_model, self.columns
        rows, entries = features.shape[:2]
        if self.query is None and not torch.isfinite(features).all():
            raise ValueError(
                "The target's hidden states hold NaN or infinite values, so nothing can be drafted from them. "
                "Run the target in bfloat16 or float32, and check its weights."
            )
        features = poss.project(features.to(device=poss.device, dtype=poss.dtype))
        fused = poss.fuse(self.reference.embed(next_tokens, like=features), features)
        first = torch.tensor(columns.lengths[:rows], device=fused.device)[:, None]
        rotary = poss.rotary(fused, first + torch.arange(entries, device=fused.device))
        for layer, cache in zip(poss.layers, self.caches, strict=True):
            cache.append_nodes(*layer.keys_values(fused, rotary))
            cache.drop_nodes()
        moves = columns.keep([range(count) for count in counts or [entries] * rows])
        if moves is not None:
            for cache in self.caches:
                cache.buffer.move(moves)
        if counts is None:
            self.query = fused[:, -1:]
        else:
            self.query = fused[torch.arange(rows), torch.tensor(counts) - 1][:, None]

    def retire(self, slot: int) -> None:
        """Gives up the slot of a finished row; the caller extends the context of the others next."""
        width = max(self.columns.lengths)
        slot, last = self.columns.retire(slot)
        for cache in self.caches:
            cache.buffer.swap(slot, last, width)

    def draft(self, root_tokens: torch.LongTensor, settings: DraftSettings) -> DraftTree:
        """A tree below the newest token of every active row; with one branch, a chain.

        Args:
            root_tokens: int64 [active], the newest tokens, committed by `extend_context`.
            settings: depth, branches and size.
        """
        poss: PosSModel = self.assistant_model
        device = self.query.device
        builder = DraftTreeBuilder(root_tokens.to(device), settings.top_k, self.head.vocabulary)
        rows = self.columns.active
        first = torch.tensor(self.columns.lengths[:rows], device=device)[:, None] - 1  # of each row's last entry
        cos, sin = poss.rotary(
            self.query, first + torch.arange(settings.depth, device=device)
        )  # [active, depth, head_dim], one a draft position

        # Both are added to scores: 0 where an entry is seen, -inf where not.
        beyond: torch.Tensor | None = None  # [active, 1, width], columns behind the end of a row
        if self.columns.ragged:
            beyond = _additive(self.columns.in_use(device), self.query.dtype)[:, None]
        hidden = self.query.new_zeros(rows, 1, 0)  # [active, frontier, nodes so far], by ancestry
        nodes: list[tuple[torch.Tensor, RotaryAngles]] = []  # fused input and angles by level
        fused, rotary = self.query, (cos[:, :1], sin[:, :1])
        for position in range(1, settings.depth + 1):
            layer = poss.specialist(position)
            cache = self.caches[poss.config.specialist_index(position)]
            if new := nodes[self._levels_held(cache, nodes) :]:
                cache.append_nodes(*layer.keys_values(*_joined(new)))
            attended = _attend(layer.queries(fused, rotary), *cache.keys_values(), beyond, hidden)
            features = layer.complete(fused, attended)  # [active, frontier, hidden]
            frontier = builder.grow(self.head.logits(features))
            if position == settings.depth:
                break
            features = features.gather(1, frontier.parents[:, :, None].expand(-1, -1, features.shape[-1]))
            fused = poss.fuse(self.reference.embed(frontier.tokens, like=features), features)
            width = fused.shape[1]
            rotary = tuple(angle[:, position : position + 1].expand(-1, width, -1) for angle in (cos, sin))
            nodes.append((fused, rotary))
            own = _additive(torch.eye(width, dtype=torch.bool, device=device), fused.dtype).expand(rows, -1, -1)
            ancestors = hidden.gather(1, frontier.parents[:, :, None].expand(-1, -1, hidden.shape[-1]))
            hidden = torch.cat((ancestors, own), dim=-1)
        for cache in self.caches:
            cache.drop_nodes()
        return builder.build(settings.total_tokens)

    @staticmethod
    def _levels_held(cache: SpecialistCache, nodes: list[tuple[torch.Tensor, RotaryAngles]]) -> int:
        """Levels of this round whose keys a specialist has already: it made them at an earlier depth of its span."""
        held = 0
        for level, (fused, _) in enumerate(nodes):
            held += fused.shape[1]
            if held > cache.num_nodes:
                return level
        return len(nodes)


def prompt_entries(mask: torch.Tensor | None, features: torch.Tensor) -> list[Sequence[int]]:
    """For each row of a prompt the tokens that are no padding, by their index in `features` [rows, entries, hidden]
    of the prompt's last tokens. The last token counts in any case: what follows is drafted from it.

    Args:
        mask: int64 [rows, tokens], 0 for padding; None if there is none.
    """
    rows, entries = features.shape[:2]
    if mask is None:
        return [range(entries)] * rows
    counts = mask[:, -entries:].cpu().to(torch.bool, copy=True)
    counts[:, -1] = True
    return [range(entries) if row.all() else row.nonzero().flatten().tolist() for row in counts]


def _additive(seen: torch.BoolTensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


def _joined(levels: list[tuple[torch.Tensor, RotaryAngles]]) -> tuple[torch.Tensor, RotaryAngles]:
    """Fused inputs and angles of several levels, one behind the other."""
    if len(levels) == 1:
        return levels[0]
    fused, angles = zip(*levels, strict=True)
    cos, sin = zip(*angles, strict=True)
    return torch.cat(fused, dim=1), (torch.cat(cos, dim=1), torch.cat(sin, dim=1))


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, beyond: torch.Tensor | None, hidden: torch.Tensor
) -> torch.Tensor:
    """Attention [active, heads, frontier, head_dim] of a frontier on its row's context, and on nodes.

    Heads that share keys become rows: the keys are not repeated for them.

    Args:
        query: [active, heads, frontier, head_dim].
        keys, values: [active, key_value_heads, width + nodes, head_dim].
        beyond: [active, 1, width], added to the scores of context; None where all of it is seen.
        hidden: [active, frontier, nodes], added to the scores of nodes.
    """
    active, heads, frontier = query.shape[:3]
    groups = keys.shape[1]
    mask = None
    if beyond is not None:
        mask = torch.cat((beyond.expand(-1, frontier, -1), hidden), dim=-1)
    elif hidden.shape[-1]:
        mask = F.pad(hidden, (keys.shape[-2] - hidden.shape[-1], 0))
    if mask is not None:
        mask = mask.repeat(1, heads // groups, 1)[:, None]
    rows = query.reshape(active, groups, heads // groups * frontier, -1)
    return F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask).view(active, heads, frontier, -1)


def _until_eos(drafted: torch.LongTensor, eos_token_ids: list[int]) -> torch.LongTensor:
    """Drafted tokens [1, drafted] up to the first end of sequence, which is kept: nothing can follow it."""
    if not eos_token_ids:
        return drafted
    ends = torch.isin(drafted[0], torch.tensor(eos_token_ids, device=drafted.device)).nonzero()
    return drafted[:, : int(ends[0]) + 1] if len(ends) else drafted
