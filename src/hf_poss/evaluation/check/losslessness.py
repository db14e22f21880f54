"""Whether greedy text is the same with drafts as without; and where it is not, by how much the target minds."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ...compatibility import CACHE, input_device
from ...statistics import GenerationStatistics, collect_statistics
from ..contestants import Contestant, fixed_settings, make_contestants
from ..differences import first_difference
from .findings import Finding, Verdict
from .pair import Pair, text_logits
from .precision import dtype_name


__all__ = ["Divergence", "GreedyTexts", "greedy_texts", "losslessness", "shapes"]

_MEASURED = 3  # texts on which rounding is measured
# What rounding may come to, as a share of the largest logit: beyond it, a target does not compute what it should.
_MOST_IN_FLOAT32, _MOST_IN_HALF = 1e-3, 0.05


@dataclass(frozen=True)
class Divergence:
    """Where a text with drafts leaves the one without.

    Args:
        drafts: "poss-chain" or "poss-tree".
        rows: "one row" or "batch".
        prompt: its index.
        token: index of the first new token that differs, from 0.
        plain, drafted: the two tokens; None where a text has ended.
        margin: by how much the target's logits, from a plain pass over the text up to there, prefer their best token
            to the drafted one; None if there is none.
    """

    drafts: str
    rows: str
    prompt: int
    token: int
    plain: int | None
    drafted: int | None
    margin: float | None


@dataclass(frozen=True)
class GreedyTexts:
    """Greedy texts with and without drafts.

    Args:
        compared: texts with drafts.
        tokens: of these texts.
        divergences: of those that differ.
        worst_margin: the largest of all tokens with drafts; 0 if each is the target's most likely one.
        rounding: largest difference of logits between passes over one token each, as in plain decoding, and one pass
            over the same text: what passes of another length do to this target in this dtype.
        tolerance: margins that rounding can explain: `rounding` for each of two logits, and at the least one unit in
            the last place of the largest logit.
        statistics: of trees on one row.
        drafted, accepted: tokens, in all.
    """

    compared: int
    tokens: int
    divergences: Sequence[Divergence]
    worst_margin: float
    rounding: float
    tolerance: float
    statistics: GenerationStatistics
    drafted: int
    accepted: int


def shapes(pair: Pair) -> list[Contestant]:
    """The specialists drafting chains, and trees of one size."""
    device = input_device(pair.target)
    settings = fixed_settings(pair.poss, device)
    made = make_contestants(["poss-chain", "poss-tree"], pair.poss, settings, device)
    return [contestant for contestant in made if contestant.has_specialists]


def greedy_texts(pair: Pair, new_tokens: int) -> GreedyTexts:
    """Greedy texts of chains and trees, a row by itself and all prompts in one batch padded on the left, each against
    plain `generate` of the same rows.

    Margins and rounding are taken from logits that no processor has changed, see [`bare_settings`].
    """
    arguments = {"do_sample": False, "max_new_tokens": new_tokens}
    groups = {"one row": [[prompt] for prompt in pair.prompts]}
    if len(pair.prompts) > 1:
        groups["batch"] = [list(pair.prompts)]

    plain: dict[str, list[list[int]]] = {}
    margins = _Margins(pair)
    for rows, calls in groups.items():
        plain[rows] = []
        for prompts in calls:
            plain[rows] += pair.new_tokens(pair.generate(prompts, **arguments), max(map(len, prompts)))
    for prompt, text in list(zip(pair.prompts, plain["one row"], strict=True))[:_MEASURED]:
        margins.measure_rounding(prompt, text)

    divergences, compared, tokens, drafted, accepted = [], 0, 0, 0, 0
    statistics = GenerationStatistics()
    for contestant in shapes(pair):
        for rows, calls in groups.items():
            texts = []
            with contestant.set_up(), collect_statistics(timed=False) as stats:
                for prompts in calls:
                    sequences = pair.generate(prompts, **arguments, **contestant.arguments)
                    texts += pair.new_tokens(sequences, max(map(len, prompts)))
            if (contestant.name, rows) == ("poss-tree", "one row"):
                statistics = stats
            drafted, accepted = drafted + sum(stats.drafted), accepted + sum(stats.accepted)
            for index, (with_drafts, without) in enumerate(zip(texts, plain[rows], strict=True)):
                compared, tokens = compared + 1, tokens + len(with_drafts)
                of_text = margins.of(index, with_drafts)
                place = first_difference(with_drafts, without)
                if place is not None:
                    divergences.append(
                        Divergence(
                            contestant.name,
                            rows,
                            index,
                            place,
                            _at(without, place),
                            _at(with_drafts, place),
                            _at(of_text, place),
                        )
                    )
    return GreedyTexts(
        compared,
        tokens,
        divergences,
        margins.worst,
        margins.rounding,
        margins.tolerance,
        statistics,
        drafted,
        accepted,
    )


def _at(values: Sequence[Any], index: int) -> Any:
    return values[index] if index < len(values) else None


class _Margins:
    """By how much the target prefers its best token to that of a text, from a plain pass; and what rounding does."""

    def __init__(self, pair: Pair):
        self.pair = pair
        self.worst = self.rounding = self.largest = 0.0
        self._known: dict[tuple[int, ...], list[float]] = {}

    @property
    def tolerance(self) -> float:
        eps = torch.finfo(self.pair.target.dtype).eps
        most = _MOST_IN_FLOAT32 if self.pair.target.dtype == torch.float32 else _MOST_IN_HALF
        return 2 * min(max(self.rounding, eps * self.largest), most * self.largest)

    def of(self, prompt: int, text: list[int]) -> list[float]:
        """Of every token of a text."""
        key = (prompt, *text)
        if key not in self._known:
            logits = self._logits(self.pair.prompts[prompt], text)
            picked = logits.gather(-1, torch.tensor(text, device=logits.device)[:, None])[:, 0]
            self._known[key] = (logits.max(-1).values - picked).tolist()
            # Written so that NaN counts as the worst.
            self.worst = max([self.worst, *(margin if margin >= 0 else float("inf") for margin in self._known[key])])
        return self._known[key]

    def measure_rounding(self, prompt: list[int], text: list[int]) -> None:
        """Takes the text a token a pass, as plain decoding does, and in one pass; not by `generate`, which may be what
        is wrong."""
        device, cache, rest = input_device(self.pair.target), None, prompt
        whole = self._logits(prompt, text)  # [tokens, vocab]
        for logits, token in zip(whole, text, strict=True):
            ids = torch.tensor([rest], device=device)
            output = self.pair.target(input_ids=ids, use_cache=True, return_dict=True, **{CACHE: cache})
            cache, rest = output[CACHE], [token]
            step = output.logits[0, -1].float().to(logits.device)
            self.rounding = max(self.rounding, float((logits - step).abs().nan_to_num(posinf=0.0).max()))
            self.largest = max(self.largest, float(step.abs().nan_to_num(posinf=0.0).max()))

    def _logits(self, prompt: list[int], text: list[int]) -> torch.Tensor:
        return next(text_logits(self.pair.target, torch.tensor([[*prompt, *text]]), len(prompt)))[0]


def losslessness(name: str, texts: GreedyTexts, dtype: torch.dtype) -> Finding:
    """What greedy texts say.

    Args:
        name: of the finding.
        dtype: of the target. In half precision a near tie may fall either way, since a pass over several tokens rounds
            differently from a pass over one; in float32 that hardly ever happens, and is warned about.
    """
    exact = dtype == torch.float32
    numbers = {
        "dtype": dtype_name(dtype),
        "texts": texts.compared,
        "tokens": texts.tokens,
        "different": len(texts.divergences),
        "drafted": texts.drafted,
        "accepted": texts.accepted,
        "worst_margin": texts.worst_margin,
        "rounding": texts.rounding,
        "tolerance": texts.tolerance,
        "divergences": [asdict(divergence) for divergence in texts.divergences],
    }
    count = (
        f"{texts.compared} texts in {dtype_name(dtype)} ({texts.tokens} tokens, chains and trees, rows and batches)"
    )
    if not texts.drafted:
        return Finding(
            name,
            Verdict.SKIPPED,
            "The target decoded without drafts here, for the reason that the log gives, so nothing was compared.",
            numbers=numbers,
        )
    worst = max(texts.divergences, key=_severity, default=None)
    if texts.worst_margin > texts.tolerance or (worst is not None and worst.margin is None):
        if worst is None:
            told = f"`generate` picks other tokens than the target's best, with and without drafts ({count})"
        else:
            told = (
                f"Drafts change the text: {len(texts.divergences)} of {count} differ from plain `generate`; the worst "
                f"is {_told(worst)}"
            )
        return Finding(
            name,
            Verdict.FAILURE,
            f"{told}. A token lies {texts.worst_margin:.3g} below the target's best, rounding explains "
            f"{texts.tolerance:.3g}.",
            "Do not use this pair: something between drafts and text is wrong. Look for code that changes `generate`, "
            "try `attn_implementation='eager'` and `draft_top_k=1`, and report it with this output.",
            numbers,
        )
    if worst is not None:
        return Finding(
            name,
            Verdict.WARNING if exact else Verdict.OK,
            f"{len(texts.divergences)} of {count} differ from plain `generate`, from a near tie on; the worst is "
            f"{_told(worst)}, and rounding explains {texts.tolerance:.3g}.",
            "Nothing is wrong; for the same text to the last token, decode in float32." * exact,
            numbers,
        )
    told = f"{count} are the same with drafts as without, token for token"
    if not texts.accepted:
        return Finding(
            name,
            Verdict.WARNING,
            f"{told}; but no draft was accepted, so that little was put to the test.",
            "See what is said of acceptance.",
            numbers,
        )
    return Finding(name, Verdict.OK, f"{told}; {texts.accepted} drafted tokens were accepted.", numbers=numbers)


def _severity(divergence: Divergence) -> float:
    return float("inf") if divergence.margin is None else divergence.margin


def _told(divergence: Divergence) -> str:
    where = (
        f"prompt {divergence.prompt + 1}, new token {divergence.token + 1} ({divergence.drafts}, {divergence.rows})"
    )
    if divergence.margin is None:
        return f"{where}, where one text ends and the other does not"
    return (
        f"{where}: token {divergence.drafted} in place of {divergence.plain}, {divergence.margin:.3g} below the best"
    )
