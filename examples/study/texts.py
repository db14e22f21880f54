"""What the study's drafters learn and are tested on: token ids of a target's own text, and of real text, by domain."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from hf_poss.demo import held_out_sources, training_sources


PROMPT_LENGTH = 16
BATCH_SIZE = 64
# A text that a tiny target cannot read at all says nothing about drafting; these it reads byte by byte at worst.
DOMAINS = ("stories", "code", "maths", "chat")

Texts = list[list[int]]


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _code(corpora: Path) -> Iterator[str]:
    return (record["text"] for record in _json_lines(corpora / "code" / "thealgorithms_python.jsonl"))


def _maths(corpora: Path) -> Iterator[str]:
    records = _json_lines(corpora / "gsm8k" / "train.jsonl")
    return (f"{record['question']}\n{record['answer']}" for record in records)


def _chat(corpora: Path) -> Iterator[str]:
    for name, turns in (("synthetic_conversations_1k", "messages"), ("sgd_train_conversations", "conversations")):
        for record in _json_lines(corpora / "chat" / f"{name}.jsonl"):
            yield "\n".join(f"{turn['role']}: {turn['content']}" for turn in record[turns])


_DOCUMENTS: dict[str, Callable[[Path], Iterator[str]]] = {"code": _code, "maths": _maths, "chat": _chat}


def documents(domain: str, corpora: Path) -> list[str]:
    """Documents of a domain of real text, in the order of the file. "python" is the standard library's own source, in
    which the demo target writes; every tenth document of a domain is held out from training, see [`split`].

    Raises:
        FileNotFoundError: if the corpus is not there.
    """
    if domain == "python":
        return list(training_sources().values())
    return list(_DOCUMENTS[domain](corpora))


def split(items: Sequence[Any], held_out: bool) -> list[Any]:
    """Every tenth item is held out, the others are for training."""
    return [item for index, item in enumerate(items) if (index % 10 == 0) == held_out]


def windows(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int) -> Texts:
    """`count` windows of `length` tokens, drawn from all that the texts hold, the same for a seed.

    Raises:
        ValueError: if the texts hold too few.
    """
    found = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        found += [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    if len(found) < count:
        raise ValueError(f"{len(found)} windows of {length} tokens in {len(texts)} texts; expected {count} or more.")
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    return [found[index] for index in order[:count]]


def continued(target: PreTrainedModel, prompts: Texts, length: int, seed: int, temperature: float = 1.0) -> Texts:
    """The target's own text behind prompts of one length, `length` tokens in all, drawn from its distribution."""
    set_seed(seed)
    texts: Texts = []
    for start in tqdm(range(0, len(prompts), BATCH_SIZE), desc="the target's own text", leave=False):
        batch = torch.tensor(prompts[start : start + BATCH_SIZE], device=target.device)
        written = target.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            do_sample=True,
            temperature=temperature,
            top_k=0,
            max_new_tokens=length - batch.shape[1],
            min_new_tokens=length - batch.shape[1],
            pad_token_id=target.config.pad_token_id or 0,
        )
        texts += written.tolist()
    return texts


class TextSource:
    """Training and test texts of one target.

    Args:
        target: writes its own text.
        tokenizer: of the target.
        corpora: folder of real text.
        home: the domain that the target was trained on: "stories" (it writes them from nothing) or "python".
        length: tokens of a training text.
    """

    def __init__(
        self, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, corpora: Path, home: str, length: int
    ):
        self.target, self.tokenizer, self.corpora, self.home, self.length = target, tokenizer, corpora, home, length

    def own(self, domain: str, count: int, seed: int) -> Texts:
        """Texts that the target wrote, from nothing in "stories", else behind the beginnings of real text."""
        if domain == "stories":
            prompts = [[self.target.config.bos_token_id]] * count
        else:
            prompts = [text[:PROMPT_LENGTH] for text in self.fixed(domain, count, seed)]
        return continued(self.target, prompts, self.length, seed)

    def fixed(self, domain: str, count: int, seed: int) -> Texts:
        """Real text as it is."""
        texts = split(documents(domain, self.corpora), held_out=False)
        return windows(texts, self.tokenizer, self.length, count, seed)

    def prompts(self, domain: str, count: int, length: int = PROMPT_LENGTH) -> Texts:
        """Beginnings of held-out text, from which drafting is measured."""
        if domain == "stories":
            texts = continued(self.target, [[self.target.config.bos_token_id]] * count, length, seed=2**20)
        else:
            held_out = (
                held_out_sources().values() if domain == "python" else split(documents(domain, self.corpora), True)
            )
            texts = windows(list(held_out), self.tokenizer, length, count, seed=2**20)
        return texts
