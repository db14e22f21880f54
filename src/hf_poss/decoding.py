"""The decoding loop: draft below every row, verify all in one pass of the target, walk; until all rows end."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.utils import logging

from .caches import Columns, TargetCache
from .candidate_generator import DraftSettings, PosSCandidateGenerator, prompt_entries
from .compatibility import (
    CACHE,
    compile_settings,
    input_device,
    outlives_call,
    plain_decoding,
    sequences_left,
    tensor_parallel_group,
)
from .configuration_poss import eos_token_ids
from .context_memory import CachedFeatures, FeatureHistory, recall
from .draft_planner import RoundPlan
from .draft_tree import DraftTree
from .limits import check_memory, check_positions, rope_obstacle
from .modeling_poss import PosSModel, adapter_obstacle
from .outputs import RowOutputs, stacked
from .pending_context import PendingContext
from .prompt import Prompt, columns_of
from .ranks import Ranks
from .round_sizes import RoundSizes
from .row_processors import processors_by_row
from .static_rounds import StaticBuffers, bucket, is_static, outside_inference_mode
from .statistics import CallRecord, recorded_call
from .transfers import read_together, upload
from .verification import StopCheck, TokenPicker, TokenRows, Walk, confirmed_paths, greedy_picks, walk_all
from .verifier import Verifier, mask_obstacle


__all__ = ["decode"]

logger = logging.get_logger(__name__)

# Tokens that the specialists are not told of while nothing is drafted.
MOST_PENDING = 512


@torch.no_grad()
def decode(
    target: PreTrainedModel,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    assistant_model: PosSModel,
    streamer: Any = None,
    synced_gpus: bool = False,
    inputs_tensor: torch.Tensor | None = None,
    tokenizer: Any = None,
    assistant_tokenizer: Any = None,
    **model_kwargs: Any,
) -> GenerateDecoderOnlyOutput | torch.LongTensor:
    """Draft a tree or chain below every row, verify all in one pass of the target, walk each; until all rows end.

    Takes the arguments of transformers' `_assisted_decoding` and returns what it returns, for any number of rows.
    Every row accepts as much of its draft as the target confirms, whatever the others do. `inputs_tensor` and the
    tokenizers are not used.

    Args:
        input_ids: int64 [rows, tokens].

    Raises:
        ValueError: if the target, its cache or the arguments do not allow to verify drafts.
    """
    rows, config = input_ids.shape[0], generation_config
    prompt = Prompt.of(target, input_ids, config, model_kwargs)
    obstacle = adapter_obstacle(target) or rope_obstacle(target, prompt.first_length, config.max_length)
    static = is_static(model_kwargs[CACHE])
    if obstacle is None and static:
        obstacle = mask_obstacle(target)
    if obstacle is not None:
        logger.warning_once(f"Decoding without drafts: {obstacle}.")
        return plain_decoding(target)(
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **model_kwargs,
        )

    device = input_device(target)
    settings = DraftSettings.of(assistant_model, device)
    if settings.is_auto and (synced_gpus or tensor_parallel_group(target) is not None):
        logger.warning_once(
            "'auto' chooses by the clock of a process, and several have to choose alike here: the default sizes of "
            "drafts are used."
        )
        settings = DraftSettings.of(assistant_model, device, auto=False)
    verifier = Verifier.of(target, settings, config, rows)
    if not verifier.takes_trees:
        settings = replace(settings, top_k=1)
    check_positions(target, prompt.longest)
    first = settings.up_to(max(config.max_length - input_ids.shape[1] - 1, 1))
    check_memory(target, first.depth, first.top_k, first.total_tokens, rows, input_ids.shape[1])

    mode = outside_inference_mode if static else contextlib.nullcontext
    with mode():
        drafter = PosSCandidateGenerator(
            input_ids,
            assistant_model,
            config,
            model_kwargs,
            target,
            inputs_tensor,
            logits_processor,
            compile_settings(target, config, model_kwargs) if static else None,
        )
    longest = prompt.hidden + config.max_length
    specialists = assistant_model.config
    with contextlib.ExitStack() as stack:
        buffers = None
        if static:  # a round's entries are made `depth + 1` at a time, however many count
            fixed = _fixed(target, drafter, settings, model_kwargs, rows, longest + settings.depth + 1)
            buffers = stack.enter_context(fixed)
        cache = TargetCache(
            model_kwargs[CACHE],
            rows,
            longest + max(settings.total_tokens, settings.depth + 1),
            None if buffers is None else buffers.layers,
            outlives=outlives_call(model_kwargs[CACHE], config),
        )
        record = stack.enter_context(
            recorded_call(specialists.positions_per_specialist, specialists.num_specialists, device, rows)
        )
        stack.enter_context(cache.lend())
        ranks = Ranks(tensor_parallel_group(target))
        pad = config.pad_token_id if config.pad_token_id is not None else next(iter(eos_token_ids(config)), 0)
        text = TokenRows(input_ids, pad)
        stop = StopCheck(stopping_criteria, rows, ranks.agree)
        as_dict = config.return_dict_in_generate
        pickers = [
            TokenPicker(
                processors,
                config.do_sample,
                generator,
                keep_scores=as_dict and config.output_scores,
                keep_logits=as_dict and config.output_logits,
                agree=ranks.agree,
            )
            for processors, generator in zip(
                processors_by_row(logits_processor, rows),
                _generators(rows, input_ids.device) if config.do_sample else [None] * rows,
                strict=True,
            )
        ]
        capacity = None if buffers is None else buffers.capacity
        loop = _Loop(
            target,
            drafter,
            settings,
            verifier,
            prompt,
            cache,
            text,
            stop,
            pickers,
            ranks,
            record,
            streamer,
            capacity,
            RoundSizes(target, drafter, settings, verifier, cache, prompt, capacity) if settings.is_auto else None,
        )
        with mode():
            outputs = loop.run(input_ids, model_kwargs, config, synced_gpus)

    length = stop.limit
    sequences = text.up_to(length).clone()
    if streamer is not None:
        streamer.end()
    if not as_dict:
        return sequences
    steps = length - text.prompt_length
    return GenerateDecoderOnlyOutput(
        sequences=sequences,
        scores=stacked([picker.scores for picker in pickers], steps) if config.output_scores else None,
        logits=stacked([picker.logits for picker in pickers], steps) if config.output_logits else None,
        hidden_states=outputs.hidden_states(steps),
        attentions=outputs.attentions(steps),
        **{CACHE: model_kwargs[CACHE]},
    )


@contextlib.contextmanager
def _fixed(
    target: PreTrainedModel,
    drafter: PosSCandidateGenerator,
    settings: DraftSettings,
    model_kwargs: dict[str, Any],
    rows: int,
    limit: int,
) -> Iterator[StaticBuffers]:
    """Buffers of one size for the whole call, which the drafter takes its own from.

    Args:
        limit: columns of context that a row may come to need.
    """
    layers = model_kwargs[CACHE].layers
    capacity = bucket(max(limit, *(getattr(layer, "max_cache_len", 0) for layer in layers)))
    nodes, draft_nodes = settings.total_tokens, settings.depth * settings.top_k
    make = functools.partial(StaticBuffers.of, len(layers), capacity, nodes, draft_nodes)
    kinds = [(model.device, model.dtype) for model in (target, drafter.assistant_model)]
    drafter.functions = drafter.functions.of_shape(rows, capacity, nodes, draft_nodes, *kinds)
    with drafter.functions.buffers(make) as buffers:
        drafter.buffer = buffers.specialists
        yield buffers


def _generators(rows: int, device: torch.device) -> list[torch.Generator | None]:
    """One source of randomness a row, so that a row's draws do not depend on how far its neighbours got. A single row
    draws from torch's default generator, as it would without drafts."""
    if rows == 1:
        return [None]
    seeds = torch.randint(2**62, (rows,)).tolist()
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


class _Loop:
    """The rounds of one `generate` call."""

    def __init__(
        self,
        target: PreTrainedModel,
        drafter: PosSCandidateGenerator,
        settings: DraftSettings,
        verifier: Verifier,
        prompt: Prompt,
        cache: TargetCache,
        text: TokenRows,
        stop: StopCheck,
        pickers: Sequence[TokenPicker],
        ranks: Ranks,
        record: CallRecord | None,
        streamer: Any,
        capacity: int | None,
        sizes: RoundSizes | None,
    ):
        self.target, self.drafter, self.settings, self.verifier = target, drafter, settings, verifier
        self.prompt, self.cache, self.text, self.stop, self.pickers = prompt, cache, text, stop, pickers
        self.ranks, self.record, self.streamer = ranks, record, streamer
        self.capacity = capacity  # columns for context where shapes are fixed
        self.functions = drafter.functions
        self.sizes = sizes
        self.streamed = text.prompt_length

    def run(
        self,
        input_ids: torch.LongTensor,
        model_kwargs: dict[str, Any],
        config: GenerationConfig,
        synced_gpus: bool,
    ) -> RowOutputs:
        """Writes the text."""
        flags = {
            name: value
            for name, value in model_kwargs.items()
            if isinstance(value, (bool, int, float, str)) and name not in ("logits_to_keep", "use_cache")
        } | self.drafter.model_kwargs_overrides
        outputs, features, tokens = self._read_prompt(input_ids, model_kwargs, config.prefill_chunk_size)
        collected = self._collector(outputs, config)
        entries = prompt_entries(self.prompt.mask if self.prompt.is_padded else None, features)
        following = self._first_tokens(tokens, outputs.logits[:, -1], entries)
        pending = PendingContext(features, entries, following, [own[-1] for own in following])
        outlives = self.cache.outlives
        history = None
        if outlives and tokens.shape == self.prompt.mask.shape:
            history = FeatureHistory(features, self.drafter.feature_layers)
        del outputs
        while True:
            pending.select(self._retire(keep_one=synced_gpus))
            unfinished = any(self._goes_on(row) for row in self.columns.rows[: self.columns.active])
            if not sequences_left(self.target, not unfinished, synced_gpus, input_ids.device):
                break
            start = time.perf_counter()
            self.functions.begin()
            depth = self._room(full=synced_gpus)
            plan = None if self.sizes is None else self._plan(depth, pending, flags)
            drafts = depth > 0 and (plan is None or plan.depth > 0)
            if drafts or pending.most > MOST_PENDING or self.columns.capacity != self.capacity:
                self._extend(pending)
            tree = self._draft(pending.newest, depth, plan) if drafts else self._roots(pending.newest)
            self._enter("verification")
            outputs = self.functions.verify(
                tree.tokens.shape[1], {**self.verifier.inputs(tree, self.cache, self.prompt), **flags}
            )
            features = self.drafter.features_of(outputs)
            if self.functions.is_compiled:  # the only thing of a graph's memory that rounds to come look at
                features = features.clone()
            self._enter("walk")
            walks, depths, likely = self._walk(tree, outputs.logits, plan)
            self._enter("cache")
            self._keep(depths, walks, outputs, features, collected, history)
            newest = [
                walk.emitted[-1] if walk is not None else before
                for walk, before in zip(walks, pending.newest, strict=True)
            ]
            entries = [self._kept(walk) for walk in walks]
            following = [
                walk.emitted if walk is not None else [before] * len(kept)
                for walk, before, kept in zip(walks, pending.newest, entries, strict=True)
            ]
            read = PendingContext(features, entries, following, newest)
            if pending.most:
                pending.add(read)
            else:
                pending = read
            if plan is not None:
                self.sizes.observe(plan, depths, likely, walks, time.perf_counter() - start)
        if outlives:
            self._read_ends(flags, history, synced_gpus)
        self._finish(history, tokens)
        return collected

    @property
    def columns(self) -> Columns:
        return self.cache.columns

    def _enter(self, part: str, position: int = 0) -> None:
        if self.record is not None:
            self.record.enter(part, position)

    def _goes_on(self, row: int) -> bool:
        return self.stop.may_go_on(row, self.text.lengths[row])

    # ---- The prompt ----

    def _read_prompt(
        self, input_ids: torch.LongTensor, model_kwargs: dict[str, Any], chunk: int | None
    ) -> tuple[Any, torch.Tensor, torch.LongTensor]:
        """The target's passes over what its cache does not hold yet.

        Returns:
            outputs of the last pass; features [rows, columns, hidden] of the prompt's last columns, of all if that is
            possible; and their tokens, int64 [rows, columns].
        """
        self._enter("prompt")
        prompt, overrides = self.prompt, self.drafter.model_kwargs_overrides
        known = self._read_cached(input_ids, model_kwargs) if prompt.cached else None
        total = prompt.mask.shape[1]
        chunk = chunk or total
        features = [] if known is None else [known.features]
        for start in range(prompt.cached, total, chunk):
            end = min(start + chunk, total)
            inputs = self.target.prepare_inputs_for_generation(
                input_ids[:, start - prompt.hidden : end - prompt.hidden],
                is_first_iteration=True,
                **(model_kwargs | columns_of(model_kwargs, start, end, total)),
            )
            # Some targets hand on another cache (Phi-3 beyond its original length) or other positions (PaliGemma's
            # count from 1) than they were given.
            inputs[CACHE] = self.cache.cache
            if inputs.get("position_ids") is not None and prompt.positions is not None:
                prompt.positions = inputs["position_ids"][..., -1].expand(prompt.positions.shape)
            outputs = self.target(**{**inputs, **overrides, "return_dict": True})
            self.cache.commit(end - start)
            features.append(self.drafter.features_of(outputs))
        self._check_features(outputs)
        self._enter("other")
        tokens = input_ids[:, prompt.cached - prompt.hidden :]
        if known is not None:
            tokens = torch.cat((known.tokens.to(tokens.device), tokens), dim=1)
        return outputs, torch.cat(features, dim=1) if len(features) > 1 else features[0], tokens

    def _check_features(self, outputs: Any) -> None:
        """Whether drafts can be told from the last hidden states of a pass over the prompt."""
        features, name = outputs.hidden_states[-1], self.target.__class__.__name__
        if features.dim() != 3:
            raise ValueError(
                f"The last hidden state of {name} has the shape {list(features.shape)}; specialists read [rows, "
                "tokens, hidden]. Call `generate` without this assistant."
            )
        logits = outputs.logits[:, -1].float()
        drafted = self.drafter.reference.logits(features[:, -1].to(self.drafter.assistant_model.device))
        if (logits - drafted.to(logits.device)).abs().mean() > 0.1 * logits.std():
            logger.warning_once(
                f"The logits of {name} are not those of its head for its last hidden state. The text is right in any "
                "case, but drafts are scored otherwise than the target scores, and few may be accepted."
            )

    def _read_cached(self, input_ids: torch.LongTensor, model_kwargs: dict[str, Any]) -> CachedFeatures | None:
        """Features of what a caller's cache holds: kept from the call that filled it, or computed again."""
        prompt, target = self.prompt, self.target
        mask = prompt.mask[:, : prompt.cached]
        tokens = None if prompt.hidden else input_ids[:, : prompt.cached]
        known = recall(self.cache.cache, target, mask, tokens, self.drafter.feature_layers)
        if known is not None or tokens is None:
            return known
        logger.warning_once(
            f"`{CACHE}` was filled without these specialists, so the target reads what it holds once more, for "
            "their context. Calls that go on from a cache which they filled themselves do without."
        )
        kept = {name: model_kwargs[name] for name in ("logits_to_keep",) if name in model_kwargs}
        inputs = target.prepare_inputs_for_generation(
            tokens,
            is_first_iteration=True,
            use_cache=False,
            **(kept | columns_of(model_kwargs, 0, prompt.cached, prompt.mask.shape[1])),
        )
        outputs = target(**{**inputs, **self.drafter.model_kwargs_overrides, "return_dict": True})
        return CachedFeatures(tokens, self.drafter.features_of(outputs), self.drafter.feature_layers)

    def _first_tokens(
        self, tokens: torch.LongTensor, logits: torch.Tensor, entries: Sequence[Sequence[int]]
    ) -> list[list[int]]:
        """Picks each row's first token; returns for the entries of its prompt the tokens that follow them."""
        following = []
        for row, (picker, known) in enumerate(zip(self.pickers, tokens.tolist(), strict=True)):
            token = picker.pick(self.text.prefix(row), logits[row : row + 1])
            self.text.append(row, token)
            self.stop(row, token, self.text, picker.scores)
            behind = [*known[1:], token]
            following.append([behind[entry] for entry in entries[row]])
            if self.record is not None:
                self.record.rows[row].add_prompt_pass()
        self._settle()
        return following

    # ---- A round ----

    def _retire(self, keep_one: bool) -> list[int]:
        """Takes finished rows out of the passes, unless shapes are fixed.

        Returns:
            for each slot that is left, the slot that its row had before.
        """
        slots = list(range(self.columns.active))
        if self.capacity is not None:
            return slots
        for slot in reversed(range(self.columns.active)):
            if self._goes_on(self.columns.rows[slot]) or (keep_one and self.columns.active == 1):
                continue
            self.cache.retire(slot)
            self.drafter.retire(slot)
            last = slots.pop()
            if slot < len(slots):
                slots[slot] = last
        return slots

    def _extend(self, pending: PendingContext) -> None:
        """Gives the drafter the features of what was accepted."""
        self._enter("context")
        columns = None if self.columns.capacity is None else self.settings.depth + 1
        features, tokens, counts = pending.gathered(columns or 1)
        self.drafter.extend_context(features, tokens, counts, columns)
        pending.clear()
        # From here on nodes of rounds of fixed shapes lie behind all context.
        self.columns.capacity = self.drafter.columns.capacity = self.capacity

    def _room(self, full: bool) -> int:
        """How deep to draft at most: no deeper than some row has room for, unless drafts have to be `full`."""
        depth = self.settings.depth
        left = self.verifier.positions_left(self.cache, self.prompt)
        if full or self.capacity is not None:
            return depth
        if left is not None:
            depth = min(depth, left)
        if self.stop.limit is not None:
            # The last token of the budget is the target's own, so a draft need not reach it.
            shortest = min(self.text.lengths[row] for row in self.columns.rows[: self.columns.active])
            depth = min(depth, self.stop.limit - shortest - 1)
        return max(depth, 0)

    def _roots(self, newest: Sequence[int]) -> DraftTree:
        return DraftTree.of_roots(upload(newest, self.drafter.device))

    def _draft(self, newest: Sequence[int], depth: int, plan: RoundPlan | None) -> DraftTree:
        """Trees below the newest tokens."""
        roots = upload(newest, self.drafter.device)
        return self.ranks.agree_on_tree(self.drafter.draft(roots, self.settings.up_to(depth), self._enter, plan))

    def _plan(self, depth: int, pending: PendingContext, flags: dict[str, Any]) -> RoundPlan:
        """How much to draft in this round."""
        rows = sum(self._goes_on(row) for row in self.columns.rows[: self.columns.active])

        def read() -> None:
            self._extend(pending)
            self._enter("other")

        return self.sizes.plan(max(rows, 1), depth, pending, read, flags)

    # ---- The walk ----

    def _walk(
        self, tree: DraftTree, logits: torch.Tensor, plan: RoundPlan | None
    ) -> tuple[list[Walk | None], list[list[int]], list[tuple[list[float], list[int]]]]:
        """Walks of the active slots, None for one that is finished and waits for others; the depth of every node; and
        what a planner wants to know, see [`RoundSizes.observe`].

        Where picks depend on nothing but logits, all ways are found on the device, and reading them is the one time
        that a round waits for it. Else every pick is waited for, as in plain decoding.
        """
        wanted = {"depths": tree.depths}
        if tree.ranked is not None:
            scores, others = (part[:, tree.tokens.shape[1] - 1 :] for part in tree.ranked)  # the best are verified
            wanted |= {"scores": torch.cat((tree.scores[:, 1:], scores), dim=1), "others": others}
        makers: list[Callable[..., Walk]]
        if self.pickers[0].needs_prefix:
            found = read_together(wanted | {"tokens": tree.tokens, "parents": tree.parents})
            ways = zip(found["tokens"], found["parents"], logits, strict=True)
            makers = [functools.partial(Walk.picking, *way) for way in ways]
        else:
            picks = self.ranks.agree_on_picks(greedy_picks(tree, logits))
            counts, paths = (self.functions.confirmed_paths if plan is None else confirmed_paths)(tree, picks)
            emitted = picks.gather(1, paths)
            found = read_together(wanted | {"counts": counts[:, None], "paths": paths, "emitted": emitted})
            ways = zip(found["counts"], found["paths"], found["emitted"], strict=True)
            makers = [functools.partial(Walk.along, path[:count], emitted[:count]) for (count,), path, emitted in ways]
        rows = self.columns.rows[: self.columns.active]
        walks = [
            make(row, self.text, self.stop, self.pickers[row]) if self._goes_on(row) else None
            for row, make in zip(rows, makers, strict=True)
        ]
        walk_all([walk for walk in walks if walk is not None], self.verifier.in_step)
        empty: list[list] = [[]] * len(rows)
        likely = list(zip(found.get("scores", empty), found.get("others", empty), strict=True))
        return walks, found["depths"], likely

    def _keep(
        self,
        depths: Sequence[Sequence[int]],
        walks: Sequence[Walk | None],
        outputs: Any,
        features: torch.Tensor,
        collected: RowOutputs,
        history: FeatureHistory | None,
    ) -> None:
        """Keeps of the pass what was accepted."""
        columns = self.columns
        start = columns.start
        for slot, walk in enumerate(walks):
            if walk is not None:
                row = columns.rows[slot]
                length = columns.lengths[slot]
                collected.add(
                    row, slot, walk.path, length, start, outputs.hidden_states, getattr(outputs, "attentions", None)
                )
                if history is not None:
                    history.add(row, features[slot, upload(walk.path, features.device)])
                if self.record is not None:
                    levels = [depths[slot].count(depth) for depth in range(1, max(depths[slot]) + 1)]
                    self.record.rows[row].add_round(levels, walk.accepted, len(walk.emitted))
        if self.record is not None:
            self.record.rounds += 1
        paths = [self._kept(walk) for walk in walks]
        count = None if self.capacity is None else len(paths) * (self.settings.depth + 1)
        self.cache.keep_paths(paths, self.functions.move_entries, count)
        self._enter("other")
        self._settle()

    def _kept(self, walk: Walk | None) -> list[int]:
        """Nodes that a slot keeps. One that waits for other processes keeps its root again and again."""
        return walk.path if walk is not None else [0] * (self.columns.capacity is None)

    def _settle(self) -> None:
        """Asks the criteria that look at all rows, and streams what is final."""
        self.stop.ask_together(self.text, self._scores_up_to)
        if self.streamer is None:
            return
        settled = self.stop.settled(self.text)
        if settled > self.streamed:
            for tokens in self.text.up_to(settled)[:, self.streamed :].cpu().unbind(dim=1):
                self.streamer.put(tokens)
            self.streamed = settled

    def _scores_up_to(self, length: int) -> tuple[torch.Tensor, ...] | None:
        if self.pickers[0].scores is None:
            return None
        return stacked([picker.scores for picker in self.pickers], length - self.text.prompt_length)

    def _collector(self, outputs: Any, config: GenerationConfig) -> RowOutputs:
        wants = config.return_dict_in_generate
        attentions = getattr(outputs, "attentions", None) if wants and config.output_attentions else None
        return RowOutputs(
            len(self.columns.rows),
            outputs.hidden_states if wants and config.output_hidden_states else None,
            attentions if attentions and attentions[0] is not None else None,
            self.cache.windows,
        )

    # ---- The end ----

    def _held_in_the_end(self, row: int) -> int:
        """Entries of a row in the cache that a call leaves: all of its text but the very last token of the batch."""
        length = self.stop.limit - 1
        return self.prompt.hidden + (min(self.stop.ends[row], length) if self.stop.pads else length)

    def _read_ends(self, flags: dict[str, Any], history: FeatureHistory | None, synced_gpus: bool) -> None:
        """Lets the target read the last token of rows that ended before others, as it does in plain decoding."""
        columns = self.columns
        ended = [slot for slot, row in enumerate(columns.rows) if columns.lengths[slot] < self._held_in_the_end(row)]
        groups = [[slot] for slot in ended] if self.verifier.in_step else [ended] * bool(ended)
        while sequences_left(self.target, not groups, synced_gpus, self.prompt.mask.device):
            group = groups.pop(0) if groups else []
            for place, slot in enumerate(group):
                self.cache.swap(place, slot)
            columns.active = max(len(group), 1)  # without a group the pass is for the other processes
            last = [self.text.prefix(row)[:, -1:] for row in columns.rows[: columns.active]]
            roots = DraftTree.of_roots(torch.cat(last)[:, 0])
            outputs = self.target(**self.verifier.inputs(roots, self.cache, self.prompt), **flags)
            self.cache.keep_paths([[0]] * len(group))
            if history is not None:
                features = self.drafter.features_of(outputs)
                for slot in range(len(group)):
                    history.add(columns.rows[slot], features[slot])

    def _finish(self, history: FeatureHistory | None, tokens: torch.LongTensor) -> None:
        """Cuts what rows hold behind their end, and keeps the features for a call that goes on from here.

        Args:
            tokens: int64 [rows, columns] of the prompt, the cached ones included if they are known.
        """
        columns = self.columns
        for slot, row in enumerate(columns.rows):
            columns.lengths[slot] = min(columns.lengths[slot], self._held_in_the_end(row))
        if self.record is not None:
            for row, record in enumerate(self.record.rows):
                length = min(self.text.lengths[row], self.stop.limit)
                del record.authors[length - self.text.prompt_length :]
        if history is not None:
            cached = tokens[:, : self.prompt.hidden]
            tokens = torch.cat((cached, self.text.up_to(max(columns.lengths) - cached.shape[1])), dim=1)
            lengths = [columns.lengths[columns.rows.index(row)] for row in range(len(columns.rows))]
            history.remember(self.cache.cache, self.target, tokens, lengths)
