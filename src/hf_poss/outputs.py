"""What `return_dict_in_generate` asks for, gathered row by row and returned step by step."""

from collections.abc import Sequence
from itertools import zip_longest

import torch


__all__ = ["RowOutputs", "stacked"]


class RowOutputs:
    """Hidden states and attentions of the rows of a call, one entry a token, as plain decoding returns them.

    Args:
        rows: rows of the batch.
        prompt_hidden_states: of the prompt's pass, by layer [rows, tokens, hidden]; None if they are not asked for.
        prompt_attentions: likewise, [rows, heads, tokens, columns].
        windows: by layer the tokens that a cache of plain decoding keeps, None for all; attentions are cut to these.
    """

    def __init__(
        self,
        rows: int,
        prompt_hidden_states: tuple[torch.Tensor, ...] | None = None,
        prompt_attentions: tuple[torch.Tensor, ...] | None = None,
        windows: Sequence[int | None] = (),
    ):
        self.windows = windows
        self.prompt_hidden_states = prompt_hidden_states
        self.prompt_attentions = None if prompt_attentions is None else self._in_windows(prompt_attentions)
        self._hidden_states: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in range(rows)]
        self._attentions: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in range(rows)]

    def add(
        self,
        row: int,
        slot: int,
        path: Sequence[int],
        length: int,
        width: int,
        hidden_states: Sequence[torch.Tensor] | None,
        attentions: Sequence[torch.Tensor] | None,
    ) -> None:
        """One round of a row.

        Args:
            row: of the batch.
            slot: of the row in the pass.
            path: nodes that gave a token, the root first.
            length: columns of the row's context.
            width: columns of context in the pass, before the nodes.
            hidden_states: of the pass by layer, [active, nodes, hidden].
            attentions: of the pass by layer, [active, heads, nodes, width + nodes].
        """
        for count, node in enumerate(path, start=1):
            if self.prompt_hidden_states is not None:
                step = tuple(states[slot : slot + 1, node : node + 1].clone() for states in hidden_states)
                self._hidden_states[row].append(step)
            if self.prompt_attentions is not None:
                seen = [*range(length), *(width + earlier for earlier in path[:count])]
                step = [weights[slot : slot + 1, :, node : node + 1, seen] for weights in attentions]
                self._attentions[row].append(self._in_windows(step))

    def _in_windows(self, attentions: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple(
            weights if window is None else weights[..., -(window - 1 + weights.shape[-2]) :]
            for weights, window in zip_longest(attentions, self.windows)
        )

    def hidden_states(self, steps: int) -> tuple[tuple[torch.Tensor, ...], ...] | None:
        """By step and layer, [rows, 1, hidden] behind the prompt's; zero where a row had ended."""
        return self._by_step(self.prompt_hidden_states, self._hidden_states, steps)

    def attentions(self, steps: int) -> tuple[tuple[torch.Tensor, ...], ...] | None:
        """By step and layer, [rows, heads, 1, tokens] behind the prompt's; zero where a row had ended."""
        return self._by_step(self.prompt_attentions, self._attentions, steps)

    @staticmethod
    def _by_step(prompt, by_row, steps):
        if prompt is None:
            return None
        layers = range(len(prompt))
        later = [stacked([[step[layer] for step in row] for row in by_row], steps - 1) for layer in layers]
        return (prompt, *zip(*later, strict=True))


def stacked(by_row: Sequence[Sequence[torch.Tensor]], steps: int) -> tuple[torch.Tensor, ...]:
    """What rows gave token by token as one tensor [rows, ...] a step; zero where a row has nothing.

    Args:
        by_row: tensors [1, ...] by row and step; all rows have the same shape at a step.
        steps: how many to return.
    """
    result = []
    for step in range(steps):
        like = next(row[step] for row in by_row if len(row) > step)
        result.append(torch.cat([row[step] if len(row) > step else torch.zeros_like(like) for row in by_row]))
    return tuple(result)
