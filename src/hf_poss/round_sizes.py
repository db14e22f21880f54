"""How much a call drafts in each round, where that is to be chosen: what passes cost here, and what came of drafts."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from .caches import TargetCache
from .candidate_generator import DraftSettings, PosSCandidateGenerator
from .draft_planner import DraftPlanner, RoundPlan, planner_for
from .draft_tree import DraftTree
from .modeling_poss import PosSModel
from .pending_context import PendingContext
from .prompt import Prompt
from .round_costs import CostKey, RoundCosts, context_bucket, convex, known_costs, measure_curve
from .transfers import upload
from .verification import Walk
from .verifier import Verifier


__all__ = ["RoundSizes"]

# Sizes of verification that are timed, and, where each is compiled, the only ones.
NODE_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96)
STATIC_SIZES = (1, 8, 16, 32, 64)

_DRAFTS_TIMED = 5


class RoundSizes:
    """Asks a planner how much to draft, tells it what passes cost on this device, and what was accepted.

    Args:
        target: of the call.
        drafter: of the call.
        settings: of which some are chosen.
        verifier, cache, prompt: of the call.
        capacity: columns for context where shapes are fixed; None where they are not.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        drafter: PosSCandidateGenerator,
        settings: DraftSettings,
        verifier: Verifier,
        cache: TargetCache,
        prompt: Prompt,
        capacity: int | None,
    ):
        self.target, self.drafter, self.settings = target, drafter, settings
        self.verifier, self.cache, self.prompt = verifier, cache, prompt
        self.capacity = capacity
        self.planner = _planner(target, drafter.assistant_model, settings)

    def plan(
        self, rows: int, depth: int, pending: PendingContext, read: Callable[[], None], flags: dict[str, Any]
    ) -> RoundPlan:
        """How much to draft in a round.

        Args:
            rows: that are still written.
            depth: draft positions that there is room for.
            pending: what the specialists have not read.
            read: lets them read it.
            flags: of the target's passes.
        """
        # Reading what is drafted costs a CPU nothing; another device would wait for its host after every pass.
        ahead = self.drafter.device.type != "cpu" or self.capacity is not None
        plan = self.planner.begin_round(self._costs(pending, read, flags), rows, room=depth, ahead=ahead)
        if plan.size is not None and self.capacity is not None:  # few sizes, as each is compiled
            sizes = self._sizes()
            plan.size = next((size for size in sizes if size >= plan.size), sizes[-1])
        return plan

    def observe(
        self,
        plan: RoundPlan,
        depths: Sequence[Sequence[int]],
        likely: Sequence[tuple[Sequence[float], Sequence[int]]],
        walks: Sequence[Walk | None],
        seconds: float,
    ) -> None:
        """Tells the planner what of a draft was accepted.

        Args:
            plan: of the round.
            depths: for each slot the draft position of every node that was verified, the root's 0 first.
            likely: for each slot scores of the nodes below the root, then of what was drafted and not verified; and
                draft positions of the latter.
            walks: for each slot; None if it was not written.
            seconds: that the round took.
        """
        its_depths, scores, accepted = [], [], []
        for own, (own_scores, others), walk in zip(depths, likely, walks, strict=True):
            if walk is None:
                continue
            path = {*walk.path[1:], walk.node}
            its_depths.append([*own[1:], *others])
            scores.append(list(own_scores))
            accepted.append([node in path for node in range(1, len(own))])
        self.planner.observe(plan, its_depths, scores, accepted, seconds)

    def _sizes(self) -> list[int]:
        """Nodes of the passes that are timed and, where each size is compiled, of all that there are."""
        settings = self.settings.up_to(self.settings.depth)
        largest = [settings.most_nodes(depth) for depth in range(1, settings.depth + 1)]
        sizes = NODE_SIZES if self.capacity is None else (*STATIC_SIZES, *largest)
        return sorted({size for size in sizes if size < largest[-1]} | {largest[-1]})

    def _costs(self, pending: PendingContext, read: Callable[[], None], flags: dict[str, Any]) -> RoundCosts:
        """Prices of a round at this length of the context, measured where they are not known."""
        columns, functions = self.cache.columns, self.drafter.functions
        if self.capacity is None:
            rows, context, mode = 1 << (columns.active - 1).bit_length(), context_bucket(columns.width), "eager"
        else:
            rows, context, mode = columns.active, self.capacity, "compiled" if functions.is_compiled else "static"
        key = CostKey(str(self.drafter.device), str(self.target.dtype), rows, context, mode)
        # Measuring compiles every size, so it is done for each set of functions that is compiled apart.
        known = known_costs(functions if functions.is_compiled else self.planner)
        if key not in known:
            if pending.most:
                read()
            known[key] = self._measure(pending, flags)
        return known[key]

    def _measure(self, pending: PendingContext, flags: dict[str, Any]) -> RoundCosts:
        """Times passes of the target over nodes that nobody keeps, and draft passes, where the texts are now."""
        drafter, functions, settings = self.drafter, self.drafter.functions, self.settings
        roots = upload(pending.newest, drafter.device)
        sizes = self._sizes()

        def verify(size: int) -> None:
            functions.begin()
            tree = DraftTree.star(roots, size)
            inputs = self.verifier.inputs(tree, self.cache, self.prompt)
            functions.verify(size, {**inputs, **flags})

        if functions.is_compiled:  # what need not be timed, rounds to come may need
            for size in sizes:
                verify(size)
            rows, entries = len(pending.newest), settings.depth + 1
            nothing = pending.features.new_zeros(rows, entries, pending.features.shape[2])
            drafter.extend_context(nothing, roots.new_zeros(rows, entries), [0] * rows, entries)
        verification = convex(measure_curve(verify, sizes, self._synchronize, repeats=5, seconds=1.0))
        # Drafts are timed behind a pass of the target, which leaves nothing of them in a processor's caches.
        depths = (1, settings.depth) if self.capacity is None else (settings.depth,)
        times: dict[int, list[float]] = {depth: [] for depth in depths}
        for _ in range(_DRAFTS_TIMED):
            for depth in depths:
                verify(sizes[0])
                self._synchronize()
                start = time.perf_counter()
                drafter.draft(roots, replace(settings, depth=depth))
                self._synchronize()
                times[depth].append(time.perf_counter() - start)
        longest = statistics.median(times[settings.depth])
        # One pass's worth is choosing the nodes, where fixed shapes leave nothing to compare.
        shortest = statistics.median(times[1]) if len(depths) == 2 else 2 * longest / (settings.depth + 1)
        each = max(longest - shortest, 0.0) / max(settings.depth - 1, 1)
        # Extending the context is fc and projections of a few entries: about a pass.
        return RoundCosts(verification(1), verification, each, context=each, overhead=max(shortest - each, 0.0))

    def _synchronize(self) -> None:
        if self.drafter.device.type != "cpu":
            torch.accelerator.synchronize(self.drafter.device)


def _planner(target: PreTrainedModel, poss: PosSModel, settings: DraftSettings) -> DraftPlanner:
    settings = settings.up_to(settings.depth)
    return planner_for(
        target,
        poss,
        settings.depth,
        settings.total_tokens,
        depth=None if settings.auto_depth else settings.depth,
        nodes=None if settings.auto_nodes or settings.is_chain else settings.total_tokens,
        top_k=settings.top_k,
    )
