"""One suite for every family of targets: with specialists they write what plain `generate` writes, token for token."""

import functools
import itertools
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from conftest import PAD, SHAPES, SMALL_VOCAB, drafter_for, left_padded, make_prompt, with_slips
from families import FAMILIES, LOOK_BACK, REFUSED, SIZES, WINDOW, Family, merged, randomise
from family_table import ATTENTIONS, README, between_markers, render
from transformers import PreTrainedModel

from hf_poss import PosSConfig, PosSModel, collect_statistics
from hf_poss.modeling_poss import TargetReference


# One that is shorter than a window and whose text crosses it, one that nearly fills it, one that is longer.
PROMPTS = [make_prompt(length, seed=length) for length in (3, WINDOW - 2, WINDOW + 6)]
NEW_TOKENS = 16


def by_key(families: list[Family]) -> list[Any]:
    return [pytest.param(family, id=family.key) for family in families]


def greedy(target: PreTrainedModel, *prompts: torch.LongTensor, **kwargs: Any) -> list[list[int]]:
    """New tokens of each prompt; several are one batch."""
    inputs = left_padded(list(prompts))
    kwargs = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": PAD} | kwargs
    output = target.generate(**inputs, **kwargs)
    return output[:, inputs["input_ids"].shape[1] :].tolist()


@dataclass(frozen=True)
class PlainTexts:
    """What a target writes without specialists.

    Args:
        alone: new tokens of each prompt by itself, as many as asked for.
        end: a token which, as end of sequence, makes the rows of a batch end at different lengths.
        batch: new tokens of the prompts in one batch.
    """

    target: PreTrainedModel
    alone: list[list[int]]
    end: int
    batch: list[list[int]]


@functools.lru_cache
def plain_texts(family: Family, attention: str) -> PlainTexts:
    target = family.make_target(attention)
    alone = [greedy(target, prompt)[0] for prompt in PROMPTS]

    def lengths(end: int) -> list[int]:
        return [text.index(end) + 1 if end in text else NEW_TOKENS for text in alone]

    end = max(range(1, SMALL_VOCAB), key=lambda token: (len(set(lengths(token))), sum(lengths(token))))
    batch = greedy(target, *PROMPTS, eos_token_id=end)
    cut = [
        text[:length] + [PAD] * (max(lengths(end)) - length) for text, length in zip(alone, lengths(end), strict=True)
    ]
    assert batch == cut, "padding changes what the target writes"
    assert len(set(lengths(end))) > 1, "all rows end at once"
    return PlainTexts(target, alone, end, batch)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", by_key(FAMILIES))
def test_greedy_text_is_the_same(family, attention, shape, scripted, warnings_seen):
    """One row, and a batch with padding whose rows end one after another; drafts that are mostly wrong, and drafts
    that are mostly right."""
    plain = plain_texts(family, attention)
    poss = drafter_for(plain.target, shape)
    randomise(poss, seed=0, gain=1.0)

    with collect_statistics() as stats:
        alone = [greedy(plain.target, prompt, assistant_model=poss)[0] for prompt in PROMPTS]
        batch = greedy(plain.target, *PROMPTS, assistant_model=poss, eos_token_id=plain.end)
    assert alone == plain.alone
    assert batch == plain.batch
    assert 0 < sum(stats.accepted) < sum(stats.reached)

    texts = [prompt[0].tolist() + text for prompt, text in zip(PROMPTS, plain.alone, strict=True)]
    scripted(*(with_slips(text, every=5) for text in texts))
    with collect_statistics() as deep:
        batch = greedy(plain.target, *PROMPTS, assistant_model=poss, eos_token_id=plain.end)
    assert batch == plain.batch
    assert len(deep.accepted) > 2 and deep.accepted[2] > 0

    trees = shape == "tree" and not family.chains
    assert (stats.drafted[0] > stats.rounds) == trees
    messages = warnings_seen()
    if trees or shape == "chain":
        assert not messages
    else:
        assert len(messages) == 1 and "chain" in messages[0] and family.chains in messages[0]


@pytest.mark.parametrize("family", by_key([family for family in FAMILIES if family.windows]))
def test_windows_decide_the_text(family):
    """Otherwise the suite would not notice a window that drafts ignore."""
    wide = family.make_target(**{name: 128 for name in LOOK_BACK if name in family.config})
    for prompt, text in zip(PROMPTS, plain_texts(family, "eager").alone, strict=True):
        assert greedy(wide, prompt)[0] != text


# Rotary frequencies that change once a text is longer than 16 tokens.
CHANGING = [
    Family(
        "LongRoPE",
        "Phi3ForCausalLM",
        merged(
            SIZES,
            original_max_position_embeddings=16,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 4,
                "long_factor": [1.0, 2.0, 4.0, 8.0],
            },
        ),
    ),
    Family(
        "dynamic NTK",
        "LlamaForCausalLM",
        merged(
            SIZES,
            max_position_embeddings=16,
            rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        ),
    ),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", by_key(CHANGING))
def test_frequencies_that_change_on_the_way_are_decoded_without_drafts(family, shape, warnings_seen):
    rounds = {}
    for length, new_tokens in ((3, 13), (10, 16), (20, 16)):
        # Each from a fresh target: a dynamic one remembers the longest text that it has read.
        expected = greedy(family.make_target(), make_prompt(length), max_new_tokens=new_tokens)
        target = family.make_target()
        poss = drafter_for(target, shape)
        with collect_statistics() as stats:
            text = greedy(target, make_prompt(length), max_new_tokens=new_tokens, assistant_model=poss)
        assert text == expected
        rounds[length] = stats.rounds
    assert rounds[3] > 0 and rounds[10] == 0
    assert ["without drafts" in message for message in warnings_seen()] == [True]


@pytest.mark.parametrize("family", by_key(FAMILIES))
def test_drafts_are_scored_as_the_target_scores(family):
    """Scaling and soft caps that a target puts on its logits apply to the distributions that drafts come from."""
    target = family.make_target()
    reference = TargetReference.from_target(target, PosSModel.from_target(target).config)
    with torch.no_grad():
        outputs = target(PROMPTS[-1], output_hidden_states=True)
        features = outputs.hidden_states[-1]
        torch.testing.assert_close(reference.logits(features), outputs.logits)
        bent = not torch.allclose(target.get_output_embeddings()(features), outputs.logits)
    assert bent == family.bends_logits


@pytest.mark.parametrize("family", by_key(REFUSED))
def test_a_target_that_cannot_go_back_is_refused(family):
    target = family.make_target()
    expected = greedy(target, PROMPTS[0])
    poss = PosSModel(PosSConfig(vocab_size=SMALL_VOCAB, hidden_size=32, intermediate_size=48, num_attention_heads=4))
    ran = []
    hooks = [module.register_forward_pre_hook(lambda *_: ran.append(1)) for module in target.modules()]
    with pytest.raises(ValueError, match=family.target):
        greedy(target, PROMPTS[0], assistant_model=poss)
    for hook in hooks:
        hook.remove()
    assert not ran, "the target ran before the call was refused"
    assert greedy(target, PROMPTS[0]) == expected


def test_the_readme_lists_what_the_suite_runs():
    """Made by `python tests/family_table.py --write`; which attention a family has depends on the release."""
    shown = between_markers(README.read_text(encoding="utf-8"))
    versions = re.search(r"Ran with (transformers (\S+) and torch \S+)\.$", shown)
    passes = {(family.key, None): {"passed"} for family in REFUSED}
    for family, attention in itertools.product(FAMILIES, ATTENTIONS):
        passes[family.key, attention] = {"passed" if family.has(attention) else "skipped"}
    expected = render(passes, versions[1])
    if versions[2] != transformers.__version__:
        cells = r"\| (trees|chains|–) \| (trees|chains|–) \|"
        shown, expected = re.sub(cells, "|", shown), re.sub(cells, "|", expected)
    assert shown == expected
