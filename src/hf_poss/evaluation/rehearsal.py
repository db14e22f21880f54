"""The passes of a `generate` call one by one, at a length of the context that stays: to time them and follow their
memory."""

import copy
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from ..caches import TargetCache
from ..candidate_generator import DraftSettings, PosSCandidateGenerator
from ..compatibility import CACHE, input_device
from ..draft_tree import DraftTree
from ..modeling_poss import PosSModel
from ..pending_context import PendingContext
from ..prompt import Prompt
from ..transfers import read_together, upload
from ..verification import confirmed_paths, greedy_picks
from ..verifier import Verifier


__all__ = ["Parts", "PlainRehearsal", "RoundRehearsal", "rehearse"]

# Brackets a part of a call, by its name: to time it, or to watch its memory.
Parts = Callable[[str], AbstractContextManager]


class RoundRehearsal:
    """The passes of a call with position specialists, as the decoding loop makes them, without its bookkeeping on the
    host: the same cache, masks, drafts and verification. What a round accepts is given, and texts are not written.

    Rounds can be repeated where they are: [`rewind`] takes back what the last one added.

    Args:
        target: the model.
        poss: its specialists.
        settings: shape of the drafts; chains where the target takes no trees.
        rows: prompts of the batch, all of one length.
        context: tokens of a prompt.
        new_tokens: that the call has room for.
        accepted: drafted tokens that a round accepts; half of the depth if not given.

    Raises:
        ValueError: if the target cannot verify drafts, or there is no room for one.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        poss: PosSModel,
        settings: DraftSettings,
        rows: int,
        context: int,
        new_tokens: int,
        accepted: int | None = None,
    ):
        _check_sizes(rows, context, new_tokens)
        self.target, self.rows, self.context = target, rows, context
        self.longest = context + new_tokens
        self.input_ids = torch.zeros(rows, context, dtype=torch.long, device=input_device(target))
        config = copy.deepcopy(target.generation_config)
        config.max_length = self.longest
        self.verifier = Verifier.of(target, settings, config, rows)
        settings = settings if self.verifier.takes_trees else replace(settings, top_k=1)
        self.settings = settings.up_to(min(settings.depth, new_tokens - 1))
        self.accepted = self.settings.depth // 2 if accepted is None else min(accepted, self.settings.depth)
        self.cache = TargetCache(
            _dynamic_cache(target),
            rows,
            self.longest + max(self.settings.total_tokens, self.settings.depth + 1),
            outlives=False,
        )
        self.prompt = Prompt.of(target, self.input_ids, config, {CACHE: self.cache.cache})
        self.prompt.lengths = [context] * rows  # known, so that nobody asks the device
        self.drafter = PosSCandidateGenerator(self.input_ids, poss, config, {}, target)
        self._stack = ExitStack()
        self.outputs: Any = None
        self.features: torch.Tensor | None = None
        self.tree: DraftTree | None = None
        self.pending: PendingContext | None = None

    def __enter__(self) -> "RoundRehearsal":
        self._stack.enter_context(torch.no_grad())
        self._stack.enter_context(self.cache.lend())
        return self

    def __exit__(self, *raised: Any) -> None:
        self._stack.close()

    def read_prompt(self) -> None:
        """The target's pass over the prompts."""
        outputs = _prompt_pass(self.target, self.input_ids, self.cache.cache, self.drafter.model_kwargs_overrides)
        self.cache.commit(self.context)
        self.features = self.drafter.features_of(outputs)
        _first_logits(outputs)
        entries, following = range(self.context), [0] * self.context
        self.pending = PendingContext(self.features, [entries] * self.rows, [following] * self.rows, [0] * self.rows)

    def extend(self) -> None:
        """The specialists read what they have not: the prompts, or what the last round accepted."""
        features, tokens, counts = self.pending.gathered()
        self.drafter.extend_context(features, tokens, counts)
        self.pending.clear()

    def draft(self, enter: Callable[[str, int], None] = lambda part, position: None, depth: int | None = None) -> None:
        """Drafts below the newest tokens.

        Args:
            enter: as in [`PosSCandidateGenerator.draft`].
            depth: draft positions, all of the settings' if not given.
        """
        roots = upload(self.pending.newest, self.drafter.device)
        self.tree = self.drafter.draft(roots, self.settings.up_to(depth or self.settings.depth), enter)

    def verify(self, tree: DraftTree | None = None) -> None:
        """The target's pass over the draft, or over another tree of the same rows."""
        tree = self.tree if tree is None else tree
        inputs = self.verifier.inputs(tree, self.cache, self.prompt)
        self.outputs = self.target(**inputs, **self.drafter.model_kwargs_overrides)
        self.features = self.drafter.features_of(self.outputs)

    def walk(self) -> None:
        """Finds what the target confirms, and reads it."""
        picks = greedy_picks(self.tree, self.outputs.logits)
        counts, paths = confirmed_paths(self.tree, picks)
        wanted = {"depths": self.tree.depths, "counts": counts[:, None], "paths": paths}
        read_together(wanted | {"emitted": picks.gather(1, paths)})

    def keep(self) -> None:
        """Keeps as many nodes of the last pass as a round accepts, and the root."""
        kept = list(range(min(self.accepted + 1, self.tree.tokens.shape[1])))
        self.cache.keep_paths([kept] * self.rows)
        self.pending = PendingContext(
            self.features, [kept] * self.rows, [[0] * len(kept)] * self.rows, [0] * self.rows
        )

    def round(self, part: Parts = lambda name: nullcontext()) -> None:
        """A whole round, from the specialists' context to what the target keeps."""
        with part("context"):
            self.extend()
        with part("draft"):
            self.draft()
        with part("verification"):
            self.verify()
        with part("walk"):
            self.walk()
        with part("cache"):
            self.keep()

    def rewind(self) -> None:
        """Takes back what the last round added, so that the next one runs at the same length."""
        added = self.pending.most
        for columns in (self.cache.columns, self.drafter.columns):
            columns.lengths[:] = [length - added for length in columns.lengths]

    def skip_to_end(self) -> None:
        """Goes on to the round of the call that needs most columns, as if the text were written up to there. Near its
        end, drafts get no deeper than there is room for."""
        settings = self.settings

        def needed(depth: int) -> int:
            return settings.up_to(depth).most_nodes(depth) - depth

        depth = max(range(1, settings.depth + 1), key=needed)
        entries = max(self.longest - depth - 2, self.cache.columns.width)
        pending = self.pending.most
        self.cache.columns.lengths[:] = [entries] * self.rows
        self.drafter.columns.lengths[:] = [entries - pending] * self.rows
        self.settings = settings.up_to(depth)

    @property
    def target_cache(self) -> list[torch.Tensor]:
        """Keys and values of the target."""
        return _states_of(self.cache.cache)

    @property
    def specialist_caches(self) -> list[torch.Tensor]:
        """Keys and values of the specialists."""
        return list(self.drafter.buffer.states or ())

    @property
    def head_rows(self) -> list[torch.Tensor]:
        """Rows of the target's head that drafts are chosen from, where they are not all; kept from call to call."""
        rows = self.drafter.head.rows
        return [] if rows is None else [tensor for tensor in (rows.weight, rows.bias) if tensor is not None]

    @property
    def projections(self) -> list[torch.Tensor]:
        """Key and value projections of all specialists, joined."""
        project = self.drafter.functions.passes.project
        return [tensor for tensor in (project.weight, project.bias) if tensor is not None]

    @property
    def copies(self) -> list[torch.Tensor]:
        """Weights that drafting holds once more: `projections` and `head_rows`."""
        return [*self.projections, *self.head_rows]


class PlainRehearsal:
    """The passes of a call without drafts, in a dynamic cache, as [`RoundRehearsal`].

    Args:
        target: the model.
        rows: prompts of the batch, all of one length.
        context: tokens of a prompt.
        new_tokens: that the call has room for.
    """

    def __init__(self, target: PreTrainedModel, rows: int, context: int, new_tokens: int):
        _check_sizes(rows, context, new_tokens)
        self.target, self.rows, self.context = target, rows, context
        self.longest = context + new_tokens
        self.input_ids = torch.zeros(rows, context, dtype=torch.long, device=input_device(target))
        self.cache = _dynamic_cache(target)
        self._stack = ExitStack()

    def __enter__(self) -> "PlainRehearsal":
        self._stack.enter_context(torch.no_grad())
        return self

    def __exit__(self, *raised: Any) -> None:
        self._stack.close()

    def read_prompt(self) -> None:
        """The target's pass over the prompts."""
        self._next = _first_logits(_prompt_pass(self.target, self.input_ids, self.cache, {}))

    def step(self) -> None:
        """One token more in every row."""
        tokens = self._next.argmax(-1)[:, None]
        inputs = self.target.prepare_inputs_for_generation(
            tokens,
            use_cache=True,
            **{CACHE: self.cache},
            **_position_arguments(self.target, tokens, self.cache.get_seq_length()),
        )
        self._next = _first_logits(self.target(**inputs, return_dict=True))

    def skip_to_end(self) -> None:
        """Goes on to the last step, as if the text were written up to there."""
        missing = self.longest - 2 - self.cache.get_seq_length()
        if missing < 1:
            return
        for index, layer in enumerate(self.cache.layers):
            if getattr(layer, "keys", None) is not None:
                keys, values = (
                    states.new_zeros(*states.shape[:-2], missing, states.shape[-1])
                    for states in (layer.keys, layer.values)
                )
                self.cache.update(keys, values, index)

    @property
    def target_cache(self) -> list[torch.Tensor]:
        """Keys and values of the target."""
        return _states_of(self.cache)

    @property
    def specialist_caches(self) -> list[torch.Tensor]:
        """None: nothing is drafted."""
        return []

    @property
    def head_rows(self) -> list[torch.Tensor]:
        """None: nothing is drafted."""
        return []

    @property
    def copies(self) -> list[torch.Tensor]:
        """None: nothing is drafted."""
        return []


def rehearse(rehearsal: RoundRehearsal | PlainRehearsal, part: Parts) -> None:
    """A call from its prompt to its end: the passes that need most memory among them.

    Args:
        part: brackets "prefill", "context", "draft", "verification" and so on, or "step" where nothing is drafted.
    """
    with rehearsal:
        with part("prefill"):
            rehearsal.read_prompt()
        if isinstance(rehearsal, PlainRehearsal):
            with part("step"):
                rehearsal.step()
            rehearsal.skip_to_end()
            with part("step"):
                rehearsal.step()
            return
        rehearsal.round(part)
        rehearsal.round(part)
        rehearsal.skip_to_end()
        rehearsal.round(part)


def _check_sizes(rows: int, context: int, new_tokens: int) -> None:
    if rows < 1 or context < 1 or new_tokens < 2:
        raise ValueError(
            f"A call of {rows} row(s), {context} token(s) of context and {new_tokens} new one(s); expected 1 row, 1 "
            "token and 2 new ones or more."
        )


def _dynamic_cache(target: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=target.config.get_text_config(decoder=True))


def _prompt_pass(
    target: PreTrainedModel, input_ids: torch.LongTensor, cache: DynamicCache, overrides: dict[str, Any]
) -> Any:
    inputs = target.prepare_inputs_for_generation(
        input_ids,
        is_first_iteration=True,
        use_cache=True,
        **{CACHE: cache},
        **_position_arguments(target, input_ids, 0),
    )
    return target(**inputs, **overrides, return_dict=True)


def _position_arguments(target: PreTrainedModel, tokens: torch.LongTensor, start: int) -> dict[str, Any]:
    """What `generate` adds to the arguments of a pass over `tokens` [rows, columns] behind `start` others."""
    arguments: dict[str, Any] = {}
    parameters = inspect.signature(target.forward).parameters
    if "logits_to_keep" in parameters:
        arguments["logits_to_keep"] = 1
    if "position_ids" in parameters:
        columns = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        arguments["position_ids"] = columns.expand(tokens.shape[0], -1)
    return arguments


def _first_logits(outputs: Any) -> torch.Tensor:
    """float32 [rows, vocab] of the last column, a copy, as tokens are picked from."""
    return outputs.logits[:, -1].to(torch.float32, copy=True)


def _states_of(cache: DynamicCache) -> list[torch.Tensor]:
    held = []
    for layer in cache.layers:
        buffer = getattr(layer, "buffer", None)
        states = (
            buffer.states if buffer is not None else (getattr(layer, "keys", None), getattr(layer, "values", None))
        )
        held += [part for part in states or () if part is not None]
    return held
