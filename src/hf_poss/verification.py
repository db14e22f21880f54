"""The walk over a verified tree: which path is accepted, which token follows."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import LogitsProcessorList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList

from .draft_tree import DraftTree


__all__ = ["StopCheck", "TokenPicker", "Walk", "walk"]


class TokenPicker:
    """Picks the target's token from its logits, as `generate` does without an assistant.

    Args:
        logits_processor: run once for each picked token, on the prefix that it would see without drafts.
        do_sample: one multinomial draw instead of the most likely token.
        keep_scores, keep_logits: collect processed and raw logits, float32 [1, vocab] a token.
    """

    def __init__(
        self,
        logits_processor: LogitsProcessorList,
        do_sample: bool,
        keep_scores: bool = False,
        keep_logits: bool = False,
    ):
        self.logits_processor = logits_processor
        self.do_sample = do_sample
        self.scores: list[torch.Tensor] | None = [] if keep_scores else None
        self.logits: list[torch.Tensor] | None = [] if keep_logits else None

    @property
    def needs_prefix(self) -> bool:
        """Whether a pick depends on more than a row of logits, or must be drawn or kept one at a time."""
        return bool(self.logits_processor) or self.do_sample or self.scores is not None or self.logits is not None

    def pick(self, input_ids: torch.LongTensor, logits: torch.Tensor) -> int:
        """The token that follows `input_ids` [1, tokens], given the target's logits [1, vocab] there."""
        logits = logits.to(dtype=torch.float32, device=input_ids.device, copy=True)
        if self.logits is not None:
            self.logits.append(logits.clone())
        scores = self.logits_processor(input_ids, logits)
        if self.scores is not None:
            self.scores.append(scores)
        if self.do_sample:
            return int(torch.multinomial(scores.softmax(-1), num_samples=1))
        return int(scores.argmax(-1))


class StopCheck:
    """Whether a sequence ends with its newest token, asked after every token as `generate` asks without an assistant.

    Length and end-of-sequence tokens, nearly all there ever is, are checked without a tensor.
    """

    def __init__(self, criteria: StoppingCriteriaList):
        self.max_length = min(
            (criterion.max_length for criterion in criteria if type(criterion) is MaxLengthCriteria), default=None
        )
        self.eos_token_ids = {
            token
            for criterion in criteria
            if type(criterion) is EosTokenCriteria
            for token in criterion.eos_token_id.flatten().tolist()
        }
        self.others = StoppingCriteriaList(
            criterion for criterion in criteria if type(criterion) not in (MaxLengthCriteria, EosTokenCriteria)
        )

    def __call__(self, input_ids: torch.LongTensor, token: int, scores: list[torch.Tensor] | None) -> bool:
        """`input_ids` [1, tokens] end with `token`; `scores` are those kept so far."""
        if token in self.eos_token_ids:
            return True
        if self.max_length is not None and input_ids.shape[1] >= self.max_length:
            return True
        return bool(self.others) and bool(self.others(input_ids, None if scores is None else tuple(scores)).all())


@dataclass
class Walk:
    """What one verification gives.

    Args:
        input_ids: int64 [1, tokens], with the emitted tokens behind.
        path: accepted nodes, the root first, whose keys and values the target keeps.
        emitted: number of tokens added.
        accepted: of these, tokens that were drafted.
        finished: the sequence is complete.
    """

    input_ids: torch.LongTensor
    path: list[int] = field(default_factory=lambda: [0])
    emitted: int = 0
    accepted: int = 0
    finished: bool = False


def walk(
    tree: DraftTree,
    logits: torch.Tensor,
    input_ids: torch.LongTensor,
    picker: TokenPicker,
    stop: Callable[[torch.LongTensor, int, list[torch.Tensor] | None], bool],
) -> Walk:
    """Follows the target's own picks through the tree, from the root until a pick was not drafted.

    The picks are the target's, so the text is the same as without drafts when greedy, and has the same distribution
    when sampled: the drafter only decides how far one pass reaches. A pick that leaves the tree is the round's extra
    token.

    Args:
        tree: drafted nodes, batch of 1.
        logits: [1, nodes, vocab] of the target at every node.
        input_ids: int64 [1, tokens]; the last one is the root.
        picker: how the target picks.
        stop: asked after every token.
    """
    rows = [tree.tokens[0], tree.parents[0]]
    if not picker.needs_prefix:
        rows.append(logits[0].argmax(-1).to(tree.tokens.device))
    tokens, parents, *picks = torch.stack(rows).tolist()  # the round's one wait for the device
    children = {
        (parent, token): node for node, (parent, token) in enumerate(zip(parents, tokens, strict=True)) if node
    }

    result = Walk(input_ids=input_ids)
    node: int | None = 0
    while node is not None and not result.finished:
        token = picks[0][node] if picks else picker.pick(result.input_ids, logits[:, node])
        result.input_ids = torch.cat((result.input_ids, input_ids.new_tensor([[token]])), dim=1)
        result.emitted += 1
        result.finished = stop(result.input_ids, token, picker.scores)
        node = children.get((node, token))
        if node is not None:
            result.accepted += 1
            if not result.finished:
                result.path.append(node)
    return result
