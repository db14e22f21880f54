"""The walk over a verified tree: which path is accepted, which token follows, and when a row ends."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

import torch
from transformers import LogitsProcessorList
from transformers.generation import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from .draft_tree import DraftTree
from .transfers import upload


__all__ = [
    "StopCheck",
    "TokenPicker",
    "TokenRows",
    "Walk",
    "confirmed_paths",
    "greedy_picks",
    "scripted_picks",
    "walk_all",
]

Agree = Callable[[list[int]], list[int]]


def _alone(values: list[int]) -> list[int]:
    return values


class TokenRows:
    """The tokens of a batch whose rows grow at their own pace, left-aligned; padding behind a row's end.

    New tokens are gathered on the host, and go to the device together when somebody reads a row there.

    Args:
        input_ids: the prompts, int64 [rows, tokens].
        pad_token_id: what stands behind a finished row.
    """

    def __init__(self, input_ids: torch.LongTensor, pad_token_id: int):
        self.prompt_length = input_ids.shape[1]
        self.lengths = [input_ids.shape[1]] * input_ids.shape[0]
        self._pad = pad_token_id
        self._tokens = input_ids
        self._new: list[list[int]] = [[] for _ in self.lengths]

    def append(self, row: int, token: int) -> None:
        """Adds a token at the end of a row."""
        self._new[row].append(token)
        self.lengths[row] += 1

    def cut(self, row: int, length: int) -> None:
        """Takes back what a row has behind `length`."""
        self._write()
        self._tokens[row, length : self.lengths[row]] = self._pad
        self.lengths[row] = length

    def prefix(self, row: int) -> torch.LongTensor:
        """int64 [1, tokens]: a row as it is now."""
        self._write()
        return self._tokens[row : row + 1, : self.lengths[row]]

    def up_to(self, length: int) -> torch.LongTensor:
        """int64 [rows, length]: all rows, cut off or padded."""
        self._write()
        if length > self._tokens.shape[1]:
            raise ValueError(f"No row has {length} tokens; the longest has {max(self.lengths)}.")
        return self._tokens[:, :length]

    def _write(self) -> None:
        if not any(self._new):
            return
        end = max(self.lengths)
        if end > self._tokens.shape[1]:  # also keeps the caller's prompt from being written to
            longer = self._tokens.new_full((len(self.lengths), end + end // 2 + 64), self._pad)
            longer[:, : self._tokens.shape[1]] = self._tokens
            self._tokens = longer
        for row, (new, length) in enumerate(zip(self._new, self.lengths, strict=True)):
            if new:
                self._tokens[row, length - len(new) : length] = upload(new, self._tokens.device)
                new.clear()


class TokenPicker:
    """Picks the target's tokens of one row from its logits, as `generate` does without an assistant.

    Args:
        logits_processor: run once for each picked token, on the prefix that it would see without drafts.
        do_sample: one multinomial draw instead of the most likely token.
        generator: for the draws; torch's default one if None.
        keep_scores, keep_logits: collect processed and raw logits, float32 [1, vocab] a token.
        agree: makes ranks that decode the same rows pick the same.
    """

    def __init__(
        self,
        logits_processor: LogitsProcessorList,
        do_sample: bool,
        generator: torch.Generator | None = None,
        keep_scores: bool = False,
        keep_logits: bool = False,
        agree: Agree = _alone,
    ):
        self.logits_processor = logits_processor
        self.do_sample = do_sample
        self.generator = generator
        self.scores: list[torch.Tensor] | None = [] if keep_scores else None
        self.logits: list[torch.Tensor] | None = [] if keep_logits else None
        self.agree = agree

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
            token = torch.multinomial(scores.softmax(-1), num_samples=1, generator=self.generator)
        else:
            token = scores.argmax(-1)
        return self.agree([int(token)])[0]


class StopCheck:
    """When the rows of a batch end, at the token at which they end without drafts.

    Every criterion is asked after every token, once. Those of transformers that look at a row by itself are asked as
    the row grows. A caller's own criteria may look at the whole batch: with several rows they are asked step by step,
    with all rows at the same length as in plain decoding, as soon as the slowest row is there; what a faster row wrote
    behind its end is taken back.

    As in plain decoding, a row that has ended is padded where there is an end-of-sequence criterion, and else goes on
    until all rows have ended.

    Args:
        criteria: of the call.
        rows: rows of the batch.
        agree: makes ranks that decode the same rows stop at the same token.
    """

    def __init__(self, criteria: StoppingCriteriaList, rows: int, agree: Agree = _alone):
        self.max_length = min(
            (criterion.max_length for criterion in criteria if type(criterion) is MaxLengthCriteria), default=None
        )
        self.eos_token_ids = {
            token
            for criterion in criteria
            if type(criterion) is EosTokenCriteria
            for token in criterion.eos_token_id.flatten().tolist()
        }
        self.pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self.by_row, self.together = StoppingCriteriaList(), StoppingCriteriaList()
        for criterion in criteria:
            if type(criterion) in (MaxLengthCriteria, EosTokenCriteria):
                continue
            looks_at_a_row = rows == 1 or type(criterion) in (MaxTimeCriteria, StopStringCriteria)
            (self.by_row if looks_at_a_row else self.together).append(criterion)
        self.ends: list[int | None] = [None] * rows
        self.asked: int | None = None  # length up to which `together` was asked
        self.agree = agree

    @property
    def limit(self) -> int | None:
        """Length that no row needs to exceed."""
        return self.max_length if None in self.ends else max(self.ends)

    def may_go_on(self, row: int, length: int) -> bool:
        """Whether a row of this length takes another token."""
        if self.pads and self.ends[row] is not None:
            return False
        return self.limit is None or length < self.limit

    def __call__(self, row: int, token: int, tokens: TokenRows, scores: Sequence[torch.Tensor] | None = None) -> bool:
        """Asked after every token of a row.

        Args:
            row: whose newest token is asked about.
            token: the newest.
            tokens: of the batch, the newest included.
            scores: of the row so far, if they are kept.

        Returns:
            whether the row stops here.
        """
        length = tokens.lengths[row]
        if self.ends[row] is None and self._ends(row, token, tokens, scores):
            self.ends[row] = length
        return not self.may_go_on(row, length)

    def _ends(self, row: int, token: int, tokens: TokenRows, scores: Sequence[torch.Tensor] | None) -> bool:
        ends = token in self.eos_token_ids
        ends |= self.max_length is not None and tokens.lengths[row] >= self.max_length
        if self.by_row:  # asked in any case, as they may keep state
            asked = self.by_row(tokens.prefix(row), None if scores is None else tuple(scores))
            ends |= bool(self.agree([int(torch.as_tensor(asked).all())])[0])
        return ends

    def available(self, tokens: TokenRows) -> int:
        """Length up to which every row is known, by padding if it has ended."""
        growing = [
            length for length, end in zip(tokens.lengths, self.ends, strict=True) if not self.pads or end is None
        ]
        return min(growing) if None in self.ends else min([*growing, self.limit])

    def ask_together(self, tokens: TokenRows, scores_up_to: Callable[[int], tuple[torch.Tensor, ...] | None]) -> None:
        """Asks the criteria that look at the whole batch about all lengths that every row has reached.

        Args:
            tokens: of the batch; what lies behind an end that is found is taken back.
            scores_up_to: gives the scores of all rows up to a length, if they are kept.
        """
        if not self.together:
            return
        self.asked = tokens.prompt_length if self.asked is None else self.asked
        while self.asked < self.available(tokens):
            self.asked += 1
            found = self.together(tokens.up_to(self.asked).contiguous(), scores_up_to(self.asked))
            found = torch.as_tensor(found).expand(len(self.ends)).long().tolist()
            for row, ends in enumerate(self.agree(found)):
                if ends and (self.ends[row] is None or self.ends[row] > self.asked):
                    self.ends[row] = self.asked
                    if self.pads:
                        tokens.cut(row, self.asked)

    def settled(self, tokens: TokenRows) -> int:
        """Length up to which the rows' tokens are final."""
        return self.available(tokens) if not self.together else self.asked


class Walk:
    """Follows the target's own picks through a row's tree, from the root until a pick was not drafted.

    The picks are the target's, so the text is the same as without drafts when greedy, and has the same distribution
    when sampled: the drafter only decides how far one pass reaches. A pick that leaves the tree is the round's extra
    token.

    Args:
        row: of the batch.
        tokens: of the batch; the row's last one is the root. The emitted ones are appended.
        stop: asked after every token.
        picker: how the target picks.
        step: gives for a node the target's pick there, and the child that carries it, None if none does.

    Attributes:
        path: nodes whose keys and values the target keeps, the root first; one for each emitted token.
        emitted: tokens added.
        accepted: of these, tokens that were drafted.
        node: where the walk stands; None once a pick has left the tree.
        ended: the row stops here.
    """

    def __init__(
        self,
        row: int,
        tokens: TokenRows,
        stop: StopCheck,
        picker: TokenPicker,
        step: Callable[[int], tuple[int, int | None]],
    ):
        self._row, self._tokens, self._stop, self._picker, self._step = row, tokens, stop, picker, step
        self.path: list[int] = []
        self.emitted: list[int] = []
        self.accepted = 0
        self.node: int | None = 0
        self.ended = False

    @classmethod
    def along(
        cls,
        path: Sequence[int],
        emitted: Sequence[int],
        row: int,
        tokens: TokenRows,
        stop: StopCheck,
        picker: TokenPicker,
    ) -> "Walk":
        """A walk whose way is known, see [`confirmed_paths`].

        Args:
            path: nodes, the root first.
            emitted: the target's pick at each.
        """
        steps = dict(zip(path, zip(emitted, [*path[1:], None], strict=True), strict=True))
        return cls(row, tokens, stop, picker, steps.__getitem__)

    @classmethod
    def picking(
        cls,
        nodes: Sequence[int],
        parents: Sequence[int],
        logits: torch.Tensor,
        row: int,
        tokens: TokenRows,
        stop: StopCheck,
        picker: TokenPicker,
    ) -> "Walk":
        """A walk whose every pick waits for the one before: it is drawn, kept, or depends on the prefix.

        Args:
            nodes: token of each node, the root first.
            parents: parent of each node.
            logits: [nodes, vocab] of the target at every node.
        """

        def step(node: int) -> tuple[int, int | None]:
            token = picker.pick(tokens.prefix(row), logits[node : node + 1])
            return token, _child(nodes, parents, node, token)

        return cls(row, tokens, stop, picker, step)

    def advance(self) -> None:
        """One token further."""
        self.path.append(self.node)
        token, self.node = self._step(self.node)
        self._tokens.append(self._row, token)
        self.emitted.append(token)
        self.accepted += self.node is not None
        self.ended = self._stop(self._row, token, self._tokens, self._picker.scores)


def _child(nodes: Sequence[int], parents: Sequence[int], node: int, token: int) -> int | None:
    """The child of a node that carries a token, None if there is none."""
    child = node
    while token in nodes[child + 1 :]:
        child = nodes.index(token, child + 1)
        if parents[child] == node:
            return child
    return None


def confirmed_paths(tree: DraftTree, picks: torch.LongTensor) -> tuple[torch.LongTensor, torch.LongTensor]:
    """The way of a walk whose picks are all known, on the device.

    A node is confirmed if it and all of its ancestors carry the picks at their parents. Siblings carry different
    tokens, so these nodes are one path.

    Args:
        tree: the nodes, [rows, nodes].
        picks: int64 [rows, nodes], the target's token at every node.

    Returns:
        int64 [rows]: nodes on the path, the root included; and int64 [rows, max_depth + 1]: the path, whose first ones
        count.
    """
    rows, nodes = tree.tokens.shape
    missed = tree.tokens != picks.gather(1, tree.parents)
    index = torch.arange(nodes, device=picks.device)
    missed = missed & (index > 0)  # nobody picks the root
    confirmed = ~(tree.ancestors & missed[:, None]).any(-1)  # [rows, nodes]
    order = torch.where(confirmed, index, nodes).sort(dim=-1).values[:, : tree.max_depth + 1]
    return confirmed.sum(-1), order.clamp(max=nodes - 1)


class _Script(threading.local):
    def __init__(self):
        self.function: Callable[[DraftTree, torch.LongTensor], torch.LongTensor] | None = None


_script = _Script()


@contextlib.contextmanager
def scripted_picks(function: Callable[[DraftTree, torch.LongTensor], torch.LongTensor]) -> Iterator[None]:
    """For measurements of what a round costs: the greedy picks of the target are replaced, in this thread.

    Calls that sample or process logits pick as ever.

    Args:
        function: takes a tree and the picks int64 [rows, nodes], on the device; returns others.
    """
    before, _script.function = _script.function, function
    try:
        yield
    finally:
        _script.function = before


def greedy_picks(tree: DraftTree, logits: torch.Tensor) -> torch.LongTensor:
    """int64 [rows, nodes]: the target's most likely token at every node, from its logits [rows, nodes, vocab]."""
    picks = logits.argmax(-1).to(tree.tokens.device)
    return picks if _script.function is None else _script.function(tree, picks)


def walk_all(walks: Sequence[Walk], in_step: bool = False) -> None:
    """Takes every walk to its end.

    Args:
        walks: of the rows of a batch.
        in_step: rows that go on stay of one length: the first to leave its tree ends the round.
    """
    going = list(walks)
    while going:
        for walk in going:
            walk.advance()
        left = any(walk.node is None and not walk.ended for walk in going)
        going = [walk for walk in going if walk.node is not None and not walk.ended]
        if in_step and left:
            return
