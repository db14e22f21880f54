"""A tiny target and specialists that were trained for it in seconds, so that a planted fault is the only one."""

import copy
import functools

import torch
from conftest import SMALL_VOCAB, make_poss, small_target
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_poss import PosSModel
from hf_poss.training.features import target_features


_TEXTS, _LENGTH, _STEPS = 256, 24, 100


def sound_pair() -> tuple[PreTrainedModel, PosSModel, PreTrainedTokenizerFast]:
    """Target, specialists and tokenizer, the caller's own copies: two specialists for two draft positions each."""
    target, poss = copy.deepcopy(_trained())
    return target, poss, small_tokenizer()


@functools.lru_cache
def own_prompts() -> list[list[int]]:
    """Prompts of several lengths, of text that the target writes itself."""
    return [row[: 6 + index].tolist() for index, row in enumerate(sampled_texts(_trained()[0])[:6])]


def small_tokenizer(shift: int = 0) -> PreTrainedTokenizerFast:
    """Words `w3`, `w4`... of ids 3, 4..., or moved round by `shift`; `<pad>`, `<s>` and `</s>` are 0, 1 and 2."""
    words = {f"w{i}": 3 + (i - 3 + shift) % (SMALL_VOCAB - 3) for i in range(3, SMALL_VOCAB)}
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, **words}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@functools.lru_cache
def _trained() -> tuple[PreTrainedModel, PosSModel]:
    target = small_target()
    target.config.name_or_path = target.name_or_path = "someone/small-target"
    poss = make_poss(target, positions_per_specialist=2, num_draft_positions=4)
    texts = sampled_texts(target)
    features, _ = target_features(target, texts)
    optimizer = torch.optim.AdamW(poss.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, _STEPS)
    generator = torch.Generator().manual_seed(0)
    for _ in range(_STEPS):
        rows = torch.randint(_TEXTS, (32,), generator=generator)
        loss = poss(texts[rows], features[rows], losses={"token": 1.0, "feature": 2.0}).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return target, poss.eval()


def sampled_texts(target: PreTrainedModel) -> torch.LongTensor:
    """int64 [256, 24], by the target at temperature 1."""
    torch.manual_seed(0)
    begins = torch.randint(3, SMALL_VOCAB, (_TEXTS, 2))
    return target.generate(begins, do_sample=True, top_k=0, max_new_tokens=_LENGTH - 2, pad_token_id=0)
