"""Prompts of a benchmark: from files, in batches."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from .benchmark import Prompt
from .questions import Question, json_lines


__all__ = ["batches", "read_prompts"]


def read_prompts(path: str | Path) -> list[tuple[str, str]]:
    """Title and text of every line of a JSON lines file: its "prompt", or the first of its "turns" or "messages".

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it has no lines, or one of them has none of these.
    """
    return [
        (f"{Path(path).name}:{number}", Question.of(record, number, f"Line {number} of {path}").texts[0])
        for number, record in json_lines(path)
    ]


def batches(
    prompts: Sequence[tuple[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    device: torch.device,
    chat: bool = False,
) -> list[Prompt]:
    """`batch_size` prompts a batch, padded on the left; the last batch may be smaller.

    Args:
        prompts: title and text of each.
        chat: wraps each in the tokenizer's chat template.
    """
    texts = [text for _, text in prompts]
    if chat:
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
            )
            for text in texts
        ]
    if batch_size > 1 and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    made = []
    for start in range(0, len(texts), batch_size):
        part = slice(start, start + batch_size)
        inputs = tokenizer(
            texts[part],
            return_tensors="pt",
            padding=batch_size > 1,
            padding_side="left",
            add_special_tokens=not chat,
        ).to(device)
        title = ", ".join(title for title, _ in prompts[part])
        made.append(Prompt(title, {name: inputs[name] for name in ("input_ids", "attention_mask")}))
    return made
