"""The decoding loop: draft below every row, verify all in one pass of the target, walk; until all rows end."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.utils import logging

from .caches import Columns, TargetCache
from .candidate_generator import DraftSettings, PosSCandidateGenerator, prompt_entries
from .compatibility import input_device, outlives_call, plain_decoding, sequences_left, tensor_parallel_group
from .configuration_poss import eos_token_ids
from .context_memory import CachedFeatures, FeatureHistory, recall
from .draft_tree import DraftTree
from .limits import check_memory, check_positions, rope_obstacle
from .modeling_poss import PosSModel, adapter_obstacle
from .outputs import RowOutputs, stacked
from .prompt import Prompt, columns_of
from .ranks import Ranks
from .row_processors import processors_by_row
from .statistics import CallRecord, recorded_call
from .verification import StopCheck, TokenPicker, TokenRows, Walk, walk_all
from .verifier import Verifier


__all__ = ["decode"]

logger = logging.get_logger(__name__)


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
    verifier = Verifier.of(target, settings, config, rows)
    if not verifier.takes_trees:
        settings = replace(settings, top_k=1)
    check_positions(target, prompt.longest)
    first = settings.up_to(max(config.max_length - input_ids.shape[1] - 1, 1))
    check_memory(target, first.depth, first.top_k, first.total_tokens, rows, input_ids.shape[1])

    drafter = PosSCandidateGenerator(
        input_ids, assistant_model, config, model_kwargs, target, inputs_tensor, logits_processor
    )
    widest = max(settings.total_tokens, settings.depth + 1)
    cache = TargetCache(model_kwargs["past_key_values"], rows, prompt.hidden + config.max_length + widest)
    specialists = assistant_model.config
    with (
        recorded_call(specialists.positions_per_specialist, specialists.num_specialists, device, rows) as record,
        cache.lend(),
    ):
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
        loop = _Loop(target, drafter, settings, verifier, prompt, cache, text, stop, pickers, ranks, record, streamer)
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
        past_key_values=model_kwargs["past_key_values"],
    )


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
    ):
        self.target, self.drafter, self.settings, self.verifier = target, drafter, settings, verifier
        self.prompt, self.cache, self.text, self.stop, self.pickers = prompt, cache, text, stop, pickers
        self.ranks, self.record, self.streamer = ranks, record, streamer
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
        outlives = outlives_call(self.cache.cache, config)
        history = None
        if outlives and tokens.shape == self.prompt.mask.shape:
            history = FeatureHistory(features, self.drafter.feature_layers)
        del outputs
        while True:
            slots = self._retire(keep_one=synced_gpus)
            unfinished = any(self._goes_on(row) for row in self.columns.rows[: self.columns.active])
            if not sequences_left(self.target, not unfinished, synced_gpus, input_ids.device):
                break
            self._enter("drafting")
            self._extend(features, entries, following, slots)
            tree = self._draft(following, slots, full=synced_gpus)
            self._enter("verifying")
            outputs = self.target(**self.verifier.inputs(tree, self.cache, self.prompt), **flags)
            self._enter("other")
            features = self.drafter.features_of(outputs)
            walks = self._walk(tree, outputs.logits)
            self._keep(tree, walks, outputs, features, collected, history)
            entries = [walk.path if walk is not None else [0] for walk in walks]
            following = [
                walk.emitted if walk is not None else tree.tokens[slot, :1].tolist() for slot, walk in enumerate(walks)
            ]
        if outlives:
            self._read_ends(flags, history, synced_gpus)
        self._finish(history, tokens)
        return collected

    @property
    def columns(self) -> Columns:
        return self.cache.columns

    def _enter(self, part: str) -> None:
        if self.record is not None:
            self.record.enter(part)

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
        self._enter("verifying")
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
            inputs["past_key_values"] = self.cache.cache
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
            "`past_key_values` was filled without these specialists, so the target reads what it holds once more, for "
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
            self.text.append(row, [token])
            self.stop(row, token, self.text, picker.scores)
            behind = [*known[1:], token]
            following.append([behind[entry] for entry in entries[row]])
            if self.record is not None:
                self.record.rows[row].add_prompt_pass()
        self._settle()
        return following

    # ---- A round ----

    def _retire(self, keep_one: bool) -> list[int]:
        """Takes finished rows out of the passes.

        Returns:
            for each slot that is left, the slot that its row had before.
        """
        slots = list(range(self.columns.active))
        for slot in reversed(range(self.columns.active)):
            if self._goes_on(self.columns.rows[slot]) or (keep_one and self.columns.active == 1):
                continue
            self.cache.retire(slot)
            self.drafter.retire(slot)
            last = slots.pop()
            if slot < len(slots):
                slots[slot] = last
        return slots

    def _extend(
        self,
        features: torch.Tensor,
        entries: Sequence[Sequence[int]],
        following: Sequence[Sequence[int]],
        slots: Sequence[int],
    ) -> None:
        """Gives the drafter the features of what was just accepted."""
        counts = [len(entries[slot]) for slot in slots]
        most = max(counts)
        whole = slots == list(range(features.shape[0])) and all(
            list(entries[slot]) == list(range(features.shape[1])) for slot in slots
        )
        if not whole:
            picked = [[*entries[slot], *[entries[slot][-1]] * (most - len(entries[slot]))] for slot in slots]
            index = torch.tensor(picked, device=features.device)
            features = features[torch.tensor(slots, device=features.device)[:, None], index]
        tokens = [[*following[slot], *[following[slot][-1]] * (most - len(following[slot]))] for slot in slots]
        self.drafter.extend_context(features, torch.tensor(tokens), None if min(counts) == most else counts)

    def _draft(self, following: Sequence[Sequence[int]], slots: Sequence[int], full: bool) -> DraftTree:
        """Trees below the newest tokens; no deeper than some row has room for, unless they have to be `full`."""
        roots = torch.tensor([following[slot][-1] for slot in slots])
        depth = self.settings.depth
        left = self.verifier.positions_left(self.cache, self.prompt)
        if not full and left is not None:
            depth = min(depth, left)
        if not full and self.stop.limit is not None:
            # The last token of the budget is the target's own, so a draft need not reach it.
            shortest = min(self.text.lengths[row] for row in self.columns.rows[: self.columns.active])
            depth = min(depth, self.stop.limit - shortest - 1)
        if depth < 1:
            zeros = torch.zeros_like(roots[:, None])
            return DraftTree(tokens=roots[:, None], parents=zeros, depths=zeros, max_depth=0)
        return self.ranks.agree_on_tree(self.drafter.draft(roots, self.settings.up_to(depth)))

    def _walk(self, tree: DraftTree, logits: torch.Tensor) -> list[Walk | None]:
        """Walks of the active slots; None for one that is finished and waits for other processes."""
        packed = [tree.tokens, tree.parents]
        fast = not self.pickers[0].needs_prefix
        if fast:
            packed.append(logits.argmax(-1).to(tree.tokens.device))
        tokens, parents, *picks = torch.stack(packed).tolist()  # the round's one wait for the device
        walks: list[Walk | None] = []
        for slot, row in enumerate(self.columns.rows[: self.columns.active]):
            walk = None
            if self._goes_on(row):
                own = self.ranks.agree(picks[0][slot]) if fast else None
                walk = Walk(
                    tokens[slot], parents[slot], row, self.text, self.stop, self.pickers[row], logits[slot], own
                )
            walks.append(walk)
        walk_all([walk for walk in walks if walk is not None], self.verifier.in_step)
        return walks

    def _keep(
        self,
        tree: DraftTree,
        walks: Sequence[Walk | None],
        outputs: Any,
        features: torch.Tensor,
        collected: RowOutputs,
        history: FeatureHistory | None,
    ) -> None:
        """Keeps of the pass what was accepted."""
        columns = self.columns
        width = columns.width
        for slot, walk in enumerate(walks):
            if walk is not None:
                row = columns.rows[slot]
                length = columns.lengths[slot]
                collected.add(
                    row, slot, walk.path, length, width, outputs.hidden_states, getattr(outputs, "attentions", None)
                )
                if history is not None:
                    history.add(row, features[slot, walk.path])
                if self.record is not None:
                    levels = torch.bincount(tree.depths[slot], minlength=1)[1:].tolist()
                    self.record.rows[row].add_round(levels, walk.accepted, len(walk.emitted))
        self.cache.keep_paths([[0] if walk is None else walk.path for walk in walks])
        self._settle()

    def _settle(self) -> None:
        """Asks the criteria that look at all rows, and streams what is final."""
        self.stop.ask_together(self.text, self._scores_up_to)
        if self.streamer is None:
            return
        settled = self.stop.settled(self.text)
        for step in range(self.streamed, settled):
            self.streamer.put(self.text.up_to(settled)[:, step].cpu())
        self.streamed = max(self.streamed, settled)

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
            tokens, zeros = torch.cat(last), torch.zeros_like(torch.cat(last))
            roots = DraftTree(tokens, zeros, zeros, max_depth=0)
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
