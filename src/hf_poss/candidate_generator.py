"""Depth-routed drafting: draft position k runs specialist s(k) on the features of position k - 1."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation import AssistedCandidateGenerator
from transformers.utils import ModelOutput, logging

from .caches import Columns, KeyValueBuffer
from .compatibility import device_of, input_device
from .configuration_poss import eos_token_ids
from .draft_planner import RoundPlan
from .draft_tree import DraftTree, choose_nodes, rank_candidates
from .features import hidden_states_wanted, select_features
from .modeling_poss import PosSModel, TargetReference
from .static_rounds import round_functions
from .transfers import upload


__all__ = ["DraftSettings", "PosSCandidateGenerator", "prompt_entries"]

logger = logging.get_logger(__name__)

# A CPU pays for every node that it verifies, so its trees are small.
CPU_TOP_K = 6
CPU_TOTAL_TOKENS = 20

# Context entries that are made at a time.
CHUNK = 2048


@dataclass(frozen=True)
class DraftSettings:
    """Shape of a draft.

    Args:
        depth: draft positions, 1 or more (`num_assistant_tokens`).
        top_k: branches a node (`draft_top_k`); 1 is a chain.
        total_tokens: nodes verified a round, the root included (`draft_total_tokens`), 2 or more.
        auto_depth: `depth` is the most that is tried, and each round takes what pays.
        auto_nodes: likewise, of `total_tokens`.
    """

    depth: int
    top_k: int
    total_tokens: int
    auto_depth: bool = False
    auto_nodes: bool = False

    @classmethod
    def of(cls, poss: PosSModel, device: torch.device | str, auto: bool = True) -> "DraftSettings":
        """The knobs of `poss.generation_config`, with defaults where they are None.

        On an accelerator the defaults are EAGLE-2's tree: verifying 60 nodes costs it about as much as
        verifying one. "auto" tries up to twice as many, and up to twice the trained depth: where a drafter is sure,
        the last specialist still pays there. Without `auto`, it stands for the default.

        Raises:
            ValueError: if a knob is neither an integer nor, where that is possible, "auto"; or too small.
        """
        knobs, config = poss.generation_config, poss.config
        on_cpu = torch.device(device).type == "cpu"
        nodes = CPU_TOTAL_TOKENS if on_cpu else 60
        defaults = {  # the default, the least, the most that "auto" tries
            "num_assistant_tokens": (config.num_draft_positions, 1, 2 * config.num_draft_positions),
            "draft_top_k": (CPU_TOP_K if on_cpu else 10, 1, None),
            "draft_total_tokens": (nodes, 2, 2 * nodes),
        }
        chosen, automatic = [], []
        for name, (default, least, most) in defaults.items():
            value = getattr(knobs, name, None)
            value = default if value is None or (value == "auto" and most is not None and not auto) else value
            automatic.append(value == "auto" and most is not None)
            value = most if automatic[-1] else value
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                reason = " (the root and one drafted token)" if name == "draft_total_tokens" else ""
                other = "" if most is None else ', "auto"'
                raise ValueError(
                    f"`poss.generation_config.{name}` is {value!r}; expected an integer of {least} or more{reason}"
                    f"{other}, or None for the default."
                )
            chosen.append(value)
        depth, top_k, total_tokens = chosen
        top_k = min(top_k, config.draft_vocab_size or config.vocab_size)
        auto_depth, _, auto_nodes = automatic
        return cls(depth, top_k, total_tokens, auto_depth, auto_nodes)

    @property
    def is_auto(self) -> bool:
        return self.auto_depth or self.auto_nodes

    @property
    def is_chain(self) -> bool:
        return self.top_k == 1

    def most_nodes(self, depth: int) -> int:
        """Nodes of the largest tree of `depth` levels: the root's children, then those of `top_k` nodes a level."""
        return min(self.total_tokens, 1 + self.top_k + (depth - 1) * self.top_k**2)

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
        compile_settings: arguments of `torch.compile` for rounds of fixed shapes; None to compile nothing.

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
        compile_settings: dict[str, Any] | None = None,
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

        self.device = assistant_model.device
        self.columns = Columns(input_ids.shape[0])
        self.buffer = KeyValueBuffer()  # of all specialists, [rows, specialists, key_value_heads, columns, head_dim]
        self.functions = round_functions(target, assistant_model, self.reference, self.head, compile_settings)
        self.query: torch.Tensor | None = None  # fused input of each slot's last entry, [active, 1, hidden]
        self._places: _Places | None = None
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
        self,
        features: torch.Tensor,
        next_tokens: torch.LongTensor,
        counts: Sequence[int] | None = None,
        chunk: int | None = None,
    ) -> None:
        """Commits the tokens whose features the target has just computed.

        Costs `fc` and one product for all keys and values an entry, nothing else. Prompts are taken in chunks, so that
        what a chunk needs does not grow with them.

        Args:
            features: [active, entries, feature size] of the target.
            next_tokens: int64 [active, entries], the token that follows each.
            counts: for each slot how many of its entries count, the first ones; all if None.
            chunk: entries that are made at a time, a divisor of them where shapes are fixed.

        Raises:
            ValueError: if the target's features are not finite; asked of the first ones only.
        """
        chunk = chunk or CHUNK
        rows, entries = features.shape[:2]
        if self.query is None and not torch.isfinite(features).all():
            raise ValueError(
                "The target's hidden states hold NaN or infinite values, so nothing can be drafted from them. "
                "Run the target in bfloat16 or float32, and check its weights."
            )
        counts = [entries] * rows if counts is None else counts
        next_tokens = next_tokens.to(self.device)
        for start in range(0, entries, chunk):
            end = min(start + chunk, entries)
            taken = [min(max(count - start, 0), end - start) for count in counts]
            self.query = self._extend(features[:, start:end], next_tokens[:, start:end], taken)

    def _extend(self, features: torch.Tensor, next_tokens: torch.LongTensor, counts: Sequence[int]) -> torch.Tensor:
        """Commits a chunk; returns the fused input of each slot's last entry, [active, 1, hidden]."""
        columns = self.columns
        rows, entries = next_tokens.shape
        lengths = columns.lengths[:rows]
        there = upload(lengths, self.device)
        self._reserve(max(lengths) + entries)
        states, where = self.buffer.states, there[:, None] + torch.arange(entries, device=self.device)
        if columns.capacity is None:
            states = tuple(part[:rows] for part in states)
            if min(lengths) == max(lengths):
                where = slice(lengths[0], lengths[0] + entries)
        else:  # a chunk of a longer run has strides of its own, for which there is no graph
            features, next_tokens = features.contiguous(), next_tokens.contiguous()
        commit = self.functions.passes.commit if columns.capacity is None else self.functions.commit
        fused = commit(features, next_tokens, there, states, where)
        columns.lengths[:rows] = [length + count for length, count in zip(lengths, counts, strict=True)]
        if min(counts) == entries:
            # Of its own strides, and not a view that keeps a whole prompt.
            return fused[:, -1:].clone(memory_format=torch.contiguous_format)
        last = upload([max(count - 1, 0) for count in counts], self.device)
        newest = fused[torch.arange(rows, device=self.device), last][:, None]
        if min(counts) > 0:
            return newest
        idle = upload([count == 0 for count in counts], self.device).bool()
        return torch.where(idle[:, None, None], self.query[:rows], newest)

    def _reserve(self, end: int) -> None:
        """Makes room for `end` columns."""
        config = self.assistant_model.config
        shape = (len(self.columns.lengths), config.num_specialists, config.num_key_value_heads, 0, config.head_dim)
        like = torch.empty(shape, dtype=self.assistant_model.dtype, device=self.device)
        self.buffer.reserve(end, like, like)

    def retire(self, slot: int) -> None:
        """Gives up the slot of a finished row; the caller extends the context of the others next."""
        width = max(self.columns.lengths)
        slot, last = self.columns.retire(slot)
        self.buffer.swap(slot, last, width)

    def draft(
        self,
        root_tokens: torch.LongTensor,
        settings: DraftSettings,
        enter: Callable[[str, int], None] = lambda part, position: None,
        plan: RoundPlan | None = None,
    ) -> DraftTree:
        """A tree below the newest token of every active row; with one branch, a chain.

        Args:
            root_tokens: int64 [active], the newest tokens, committed by `extend_context`.
            settings: depth, branches and size.
            enter: told when a part of the work begins: "passes" with a draft position, and "tree".
            plan: decides how far to go, and how many nodes are worth a verification; else `settings` do. Where it has
                not decided ahead, it waits for the device once a pass.
        """
        root_tokens = root_tokens.to(self.device)
        config, columns, rows = self.assistant_model.config, self.columns, self.columns.active
        depth, top_k = settings.depth, settings.top_k
        fixed, start = columns.capacity is not None, columns.start
        lengths = upload(columns.lengths[:rows], self.device)
        places = self._places_of(depth, top_k)
        self._reserve(start + depth * top_k)
        states = self.buffer.states
        if not fixed:
            states = tuple(part[:rows, ..., : start + depth * top_k, :] for part in states)
        beyond = None  # [active, 1, start], added to the scores of context: -inf behind the end of a row
        if columns.ragged:
            beyond = _additive(columns.in_use(self.device), self.query.dtype)[:, None]
        # Of fixed width, all passes are one graph; the first has one node and others that are none.
        width = top_k if fixed else 1
        frontier, (cos, sin) = self.functions.root(self.query[:rows], lengths, depth, width, depth * top_k)
        levels = []
        last = depth if plan is None else min(depth, plan.depth)
        for position in range(1, last + 1):
            enter("passes", position)
            first = start + (position - 1) * top_k
            if fixed:
                where = start + places.columns[position - 1]
            else:
                where = slice(first, first + top_k) if position > 1 else None
            specialist = config.specialist_index(position)
            children, frontier = self.functions.expand[specialist](
                specialist,
                frontier,
                (cos[:, position - 1 : position], sin[:, position - 1 : position]),
                states,
                where,
                places.own[min(position, depth - 1)],
                beyond,
                top_k,
                last=position == last and not fixed,
                end=None if fixed else config.specialist_index(depth) + 1,
            )
            levels.append(children)
            if plan is not None and plan.size is None:
                best = children.scores.topk(min(top_k, children.scores.shape[1])).values
                if not plan.deepen(best.tolist()):
                    break
        enter("tree", 0)
        # Nodes that are none come last.
        most = settings.most_nodes(len(levels))
        if plan is None:
            candidates = self.functions.rank_candidates(levels, top_k, most - 1)
            return self.functions.choose_nodes(root_tokens, candidates, most)
        candidates = rank_candidates(levels, top_k, most - 1)
        size = plan.size
        if size is None:
            size = plan.nodes(candidates.scores.tolist(), candidates.depths.tolist())
        if size == 1:
            return DraftTree.of_roots(root_tokens)
        tree = choose_nodes(root_tokens, candidates, min(size, most))
        tree.ranked = candidates.scores, candidates.depths
        return tree

    def _places_of(self, depth: int, top_k: int) -> "_Places":
        if self._places is None or self._places.columns.shape != (depth, top_k):
            columns = torch.arange(depth * top_k, device=self.device)
            own = _additive(columns[:, None] == columns, self.query.dtype)
            self._places = _Places(columns.view(depth, top_k), own.view(depth, top_k, -1))
        return self._places


@dataclass(frozen=True)
class _Places:
    """Where the nodes of a draft lie, by level: the root's, which stays empty, and those below it.

    Args:
        columns: int64 [depth, top_k], behind the context.
        own: [depth, top_k, depth * top_k], added to scores: 0 at a node's own column, -inf elsewhere.
    """

    columns: torch.LongTensor
    own: torch.Tensor


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


def _until_eos(drafted: torch.LongTensor, eos_token_ids: list[int]) -> torch.LongTensor:
    """Drafted tokens [1, drafted] up to the first end of sequence, which is kept: nothing can follow it."""
    if not eos_token_ids:
        return drafted
    ends = torch.isin(drafted[0], torch.tensor(eos_token_ids, device=drafted.device)).nonzero()
    return drafted[:, : int(ends[0]) + 1] if len(ends) else drafted
