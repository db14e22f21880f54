"""All checks of a pair, one after the other."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ...modeling_poss import PosSModel, check_drafter
from ...statistics import GenerationStatistics
from ...training.drafting import longest_prompt, preserved_random_state
from .acceptance import acceptance, boundaries
from .distribution import distribution
from .drifting import drift
from .effort import THOROUGH, Effort
from .findings import Finding, PairReport, Verdict
from .fit import geometry, names
from .losslessness import greedy_texts, losslessness
from .pair import Pair, Texts, bare_settings
from .precision import dtype_name, in_dtype, obstacle_to_dtype
from .recorded import Recorded
from .roll_outs import RollOuts, roll_outs
from .specialists import specialists
from .tokenizers import surprise, tokenizer_fits
from .weights import outputs, weights


__all__ = ["check_pair"]

logger = logging.get_logger(__name__)

# Whatever follows rests on these.
_NEEDED = ("geometry", "tokenizer", "weights", "prompts", "outputs")


def check_pair(
    target: PreTrainedModel,
    poss: PosSModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    drafter: str | None = None,
    effort: Effort = THOROUGH,
    seed: int = 0,
    on_check: Callable[[str], None] = lambda name: None,
    on_finding: Callable[[Finding], None] = lambda finding: None,
) -> PairReport:
    """Checks whether specialists are sound for a target: that drafts leave its text and its distribution as they are,
    and that every specialist does its work.

    Models, settings and random numbers are afterwards what they were before.

    Args:
        target: a decoder-only language model, in `eval` mode.
        poss: its specialists, on the device where they draft.
        tokenizer: the target's.
        prompts: token ids of text that the target is to go on with, chat template and all; of those that leave no
            room for more, the last ones.
        drafter: folder or Hub name of the specialists, for what is recorded there; nothing is looked up if None.
        effort: how much text is looked at.
        seed: of what is sampled.
        on_check: called with the name of a check before it runs.
        on_finding: called with each finding, as soon as it is there.

    Returns:
        a finding for each check.

    Raises:
        ValueError: if there is no prompt, or one holds no token.

    Example:

    ```python
    >>> report = check_pair(target, poss, tokenizer, tokenizer(["Once upon a time", "Tom and Lily"])["input_ids"])
    >>> report.verdict, report["specialists"].summary
    ```"""
    if not prompts or not all(map(len, prompts)):
        raise ValueError("There is no prompt, or one without tokens. Pass token ids of text that the target knows.")
    run, findings = _Run(target, poss, tokenizer, prompts, Recorded.of(drafter), effort, seed), {}
    with torch.no_grad(), preserved_random_state(target.device), bare_settings(target):
        for name, check in run.checks.items():
            on_check(name)
            failed = next((of for of in _NEEDED if of in findings and findings[of].verdict is Verdict.FAILURE), None)
            findings[name] = (
                _guarded(name, check)
                if failed is None
                else Finding.skipped(name, f"It rests on {failed}, which failed.")
            )
            on_finding(findings[name])
    return PairReport(list(findings.values()))


def _guarded(name: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:  # whatever a pair raises is what is to be told of it
        logger.debug("It was raised here:", exc_info=error)
        told = f"It broke off: {type(error).__name__}: {error}".strip()
        return Finding(name, Verdict.FAILURE, told, "Mend what raises this, and check again.")


class _Run:
    """The checks of a pair, by name, and what several of them look at."""

    def __init__(
        self,
        target: PreTrainedModel,
        poss: PosSModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Sequence[int]],
        recorded: Recorded,
        effort: Effort,
        seed: int,
    ):
        self.target, self.poss, self.tokenizer = target, poss, tokenizer
        self.prompts, self.effort, self.seed = prompts, effort, seed
        self.recorded = recorded
        self.generation_config = target.generation_config
        self.greedy: GenerationStatistics | None = None
        self.checks: dict[str, Callable[[], Finding]] = {
            "geometry": self.geometry,
            "names": lambda: names(target, poss.config, self.recorded),
            "tokenizer": lambda: tokenizer_fits(tokenizer, target.config, self.generation_config, self.recorded),
            "weights": lambda: weights(poss, target),
            "prompts": lambda: surprise(self.pair),
            "outputs": lambda: outputs(self.pair, self.texts),
            "greedy float32": lambda: self.greedy_text("greedy float32", torch.float32),
            "greedy half": lambda: self.greedy_text("greedy half", self.half),
            "distribution": self.distribution,
            "acceptance": lambda: acceptance(self.roll_outs, self.greedy),
            "boundaries": lambda: boundaries(self.roll_outs, poss.config.positions_per_specialist),
            "specialists": lambda: specialists(self.roll_outs, poss.config),
            "drift": lambda: drift(self.pair, self.texts),
        }

    @functools.cached_property
    def pair(self) -> Pair:
        effort = self.effort
        new = max(effort.new_tokens, effort.sampled_tokens, effort.lead + effort.text_tokens)
        longest = longest_prompt(self.target.config, new) or 0
        prompts = [list(tokens)[-longest:] for tokens in self.prompts[: effort.prompts]]
        return Pair(self.target, self.poss, self.tokenizer, prompts)

    @functools.cached_property
    def texts(self) -> Texts:
        torch.manual_seed(self.seed)
        return Texts.of(self.pair, self.effort.texts, self.effort.lead, self.effort.text_tokens)

    @functools.cached_property
    def roll_outs(self) -> RollOuts:
        return roll_outs(self.pair, self.texts)

    @property
    def half(self) -> torch.dtype:
        """The target's dtype, or that in which a target in float32 would be sped up."""
        return self.target.dtype if self.target.dtype.itemsize == 2 else torch.bfloat16

    @contextlib.contextmanager
    def in_dtype(self, dtype: torch.dtype) -> Iterator[None]:
        with in_dtype(self.target, dtype), in_dtype(self.poss, dtype):
            yield

    def geometry(self) -> Finding:
        check_drafter(self.poss)
        depth = self.poss.generation_config.num_assistant_tokens
        return geometry(
            self.target,
            self.poss.config,
            depth if isinstance(depth, int) else None,
            [] if self.poss.config.draft_vocab_size is None else self.poss.draft_vocabulary.tolist(),
        )

    def greedy_text(self, name: str, dtype: torch.dtype) -> Finding:
        obstacle = None if dtype == self.target.dtype else obstacle_to_dtype(self.target, dtype)
        if obstacle is not None:
            return Finding.skipped(name, f"Not run in {dtype_name(dtype)}: {obstacle}.")
        with self.in_dtype(dtype):
            texts = greedy_texts(self.pair, self.effort.new_tokens)
        if self.greedy is None or dtype == torch.float32:
            self.greedy = texts.statistics
        return losslessness(name, texts, dtype)

    def distribution(self) -> Finding:
        """In float32 where that is possible: what rounding does is another matter."""
        exact = self.target.dtype == torch.float32 or obstacle_to_dtype(self.target, torch.float32) is None
        with self.in_dtype(torch.float32) if exact else contextlib.nullcontext():
            return distribution(
                self.pair, self.effort.copies, self.effort.sampled_tokens, seed=self.seed, nucleus=exact
            )
