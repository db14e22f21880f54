"""`generate` with position specialists against plain `generate`: same text or distribution, nothing else touched."""

import itertools
import json
import logging
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import TARGET_CONFIGS, make_poss, make_target, pretrained_folder
from scipy.stats import chi2
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    T5Config,
    T5ForConditionalGeneration,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    set_seed,
)
from transformers.generation.streamers import BaseStreamer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging as transformers_logging

import hf_poss
from hf_poss import PosSCandidateGenerator, PosSModel, collect_statistics
from hf_poss import generation as poss_generation
from hf_poss.draft_tree import DraftTree
from hf_poss.verification import walk


SMALL_VOCAB = 12
# Seeds and widths whose greedy text does not fall into a loop of one or two tokens at once.
LIVELY = {"llama": (4, 10.0), "qwen3": (0, 10.0), "gpt2": (7, 6.0), "opt": (1, 10.0)}
TOP_K = {"chain": 1, "tree": 4}
SHAPES = list(TOP_K)


def small_target(family: str = "llama", attention: str = "sdpa", seed: int | None = None) -> PreTrainedModel:
    """A random target of few tokens, so that random drafts are accepted often; it knows no end of sequence."""
    config = TARGET_CONFIGS[family]()
    config.vocab_size, config.eos_token_id = SMALL_VOCAB, None
    family_seed, scale = LIVELY[family]
    set_seed(family_seed if seed is None else seed)
    target = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in target.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return target


def drafter_for(target: PreTrainedModel, shape: str, total: int = 20, depth: int | None = None, **kwargs) -> PosSModel:
    poss = make_poss(target, **{"positions_per_specialist": 2, "num_draft_positions": 4, **kwargs})
    knobs = poss.generation_config
    knobs.draft_top_k, knobs.draft_total_tokens, knobs.num_assistant_tokens = TOP_K[shape], total, depth
    return poss


def make_prompt(length: int, seed: int = 1, vocab: int = SMALL_VOCAB) -> torch.LongTensor:
    return torch.randint(3, vocab, (1, length), generator=torch.Generator().manual_seed(seed))


def compare(target, poss, input_ids, **kwargs):
    """Asserts that greedy text is the same with and without `poss`; returns the statistics and the new tokens."""
    kwargs = {"max_new_tokens": 24, "do_sample": False, **kwargs}
    if "attention_mask" not in kwargs:
        kwargs["attention_mask"] = torch.ones_like(input_ids)
    plain = target.generate(input_ids, **kwargs)
    with collect_statistics() as stats:
        assisted = target.generate(input_ids, assistant_model=poss, **kwargs)
    assert assisted.tolist() == plain.tolist()
    new_tokens = plain[0, input_ids.shape[1] :].tolist()
    assert len(stats.calls[0].authors) == len(new_tokens)
    return stats, new_tokens


@pytest.fixture
def scripted(monkeypatch):
    """Replaces the drafter's guesses: `scripted(text)` makes every draft hold the next tokens of `text`, a branch of
    wrong tokens before or behind each right one. Deep paths are then accepted, and which is known in advance."""

    def script(text: list[int], vocab: int = SMALL_VOCAB) -> None:
        def draft(self, root_tokens, settings):
            committed = self.next_position + self.num_padding + 1
            right = text[committed : committed + settings.depth]
            tokens, parents, depths, parent = [int(root_tokens)], [0], [0], 0
            for depth, token in enumerate(right, start=1):
                siblings = [token]
                if not settings.is_chain:
                    siblings.insert((committed + depth) % 2, (token + 1) % vocab)
                tokens += siblings
                parents += [parent] * len(siblings)
                depths += [depth] * len(siblings)
                parent = len(tokens) - len(siblings) + siblings.index(token)
            rows = (torch.tensor([row]) for row in (tokens, parents, depths))
            return DraftTree(*rows, max_depth=len(right))

        monkeypatch.setattr(PosSCandidateGenerator, "draft", draft)

    return script


# ---- Greedy text ----


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", list(TARGET_CONFIGS))
def test_greedy_text_is_the_same(family, attention, shape):
    target = small_target(family, attention)
    poss = drafter_for(target, shape)
    accepted = 0
    for length in (1, 2, 9, 300):
        stats, _ = compare(target, poss, make_prompt(length))
        accepted += sum(stats.accepted)
    assert accepted > 0, "no draft was accepted, so the test shows nothing"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", list(TARGET_CONFIGS))
def test_greedy_text_is_the_same_when_deep_paths_are_accepted(family, shape, scripted):
    target = small_target(family)
    prompt = make_prompt(7)
    text = target.generate(prompt, max_new_tokens=40, do_sample=False)[0].tolist()
    # A slip in every sixth draft makes accepted lengths vary.
    scripted([(token + 1) % SMALL_VOCAB if index % 6 == 5 else token for index, token in enumerate(text)])

    stats, _ = compare(target, drafter_for(target, shape, depth=5), prompt, max_new_tokens=32)

    assert stats.tau > 2.5
    assert 0 < sum(stats.accepted) < sum(stats.reached)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 4, 5, 11])
def test_every_length_is_met_exactly(max_new_tokens, shape, scripted):
    target = small_target()
    prompt = make_prompt(7)
    scripted(target.generate(prompt, max_new_tokens=20, do_sample=False)[0].tolist())
    _, new_tokens = compare(target, drafter_for(target, shape), prompt, max_new_tokens=max_new_tokens)
    assert len(new_tokens) == max_new_tokens


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [1, 2, 255, 256, 257])
def test_prompts_around_the_size_of_a_buffer(length, shape):
    target = small_target("qwen3")
    compare(target, drafter_for(target, shape), make_prompt(length), max_new_tokens=8)


@pytest.mark.parametrize("shape", SHAPES)
def test_end_of_sequence_at_any_step(shape, scripted):
    """Every token of the text in turn is the end of sequence, so it falls on roots, inside paths and behind them."""
    target = small_target()
    prompt = make_prompt(7, seed=1)
    text = target.generate(prompt, max_new_tokens=24, do_sample=False)[0].tolist()
    scripted(text)
    poss = drafter_for(target, shape, depth=3)
    ends = set()
    for eos in set(text[7:]):
        _, new_tokens = compare(target, poss, prompt, eos_token_id=[eos, SMALL_VOCAB - 1], pad_token_id=0)
        ends.add(len(new_tokens))
    assert len(ends) >= 5, "the text is too monotonous for this test"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", list(TARGET_CONFIGS))
def test_padding_in_front(family, shape):
    target = small_target(family)
    poss = drafter_for(target, shape)
    prompt = make_prompt(9)
    padded = torch.cat((torch.zeros(1, 6, dtype=torch.long), prompt), dim=1)
    mask = torch.cat((torch.zeros(1, 6, dtype=torch.long), torch.ones_like(prompt)), dim=1)

    stats, new_tokens = compare(target, poss, padded, attention_mask=mask)

    unpadded, same_tokens = compare(target, poss, prompt)
    assert new_tokens == same_tokens
    assert stats.accepted == unpadded.accepted, "padding changed what was drafted"


PROCESSORS = {
    "repetition_penalty": {"repetition_penalty": 1.4},
    "no_repeat_ngram": {"no_repeat_ngram_size": 2},
    "min_new_tokens": {"min_new_tokens": 12, "eos_token_id": list(range(6)), "pad_token_id": 0},
    "bad_words": {"bad_words_ids": [[4], [5, 6], [7, 8]]},
    "forced_eos": {"forced_eos_token_id": 3, "eos_token_id": 3, "pad_token_id": 0},
    "decay": {"exponential_decay_length_penalty": (4, 1.3), "eos_token_id": 5, "pad_token_id": 0},
    "several": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "suppress_tokens": [9]},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("processors", list(PROCESSORS.values()), ids=list(PROCESSORS))
def test_logits_processors(processors, shape, scripted):
    target = small_target()
    prompt = make_prompt(7)
    text = target.generate(prompt, max_new_tokens=30, do_sample=False, **processors)[0].tolist()
    scripted([*text, *[0] * 30])
    stats, _ = compare(target, drafter_for(target, shape), prompt, **processors)
    assert sum(stats.accepted) > 0


@pytest.mark.parametrize("shape", SHAPES)
def test_custom_processor_sees_the_prefix_without_drafts(shape):
    """Its scores depend on the length and on the tokens before, so a wrong prefix changes the text."""

    class Shift(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.roll(int(input_ids.sum() + input_ids.shape[1]) % SMALL_VOCAB, dims=-1)

    target = small_target()
    stats, new_tokens = compare(target, drafter_for(target, shape), make_prompt(7), logits_processor=[Shift()])
    assert len(set(new_tokens)) > 4
    assert sum(stats.accepted) > 0


@pytest.mark.parametrize("drafter", ["PosS2-stories260k", "eagle-stories260k"])
@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_pretrained_pair(stories, drafter, shape):
    """A trained drafter for a real model: the same stories in clearly fewer rounds."""
    target, tokenizer = stories
    poss = PosSModel.from_pretrained(pretrained_folder(drafter)).eval()
    poss.generation_config.draft_top_k = 1 if shape == "chain" else None
    for prompt in ("Once upon a time, there was a little", "Tom and Lily", "A"):
        inputs = tokenizer(prompt, return_tensors="pt")
        stats, _ = compare(target, poss, inputs["input_ids"], max_new_tokens=80)
        assert stats.tau > (2.0 if shape == "tree" else 1.5)


@pytest.mark.parametrize("shape", SHAPES)
def test_calls_do_not_see_each_other(shape):
    target = small_target()
    poss = drafter_for(target, shape)
    first, _ = compare(target, poss, make_prompt(7))
    compare(target, poss, make_prompt(30, seed=2))
    again, _ = compare(target, poss, make_prompt(7))
    assert (first.accepted, first.rounds) == (again.accepted, again.rounds)


def test_threads_share_a_drafter():
    """One drafter for two targets at once; each thread gets its own target's text and its own statistics."""
    targets = [small_target(seed=4), small_target(seed=3)]
    poss = drafter_for(targets[0], "tree")
    prompts = [make_prompt(7, seed=seed) for seed in range(4)]
    expected, alone = [], []
    for target in targets:
        with collect_statistics() as stats:
            expected.append(
                [
                    target.generate(p, assistant_model=poss, max_new_tokens=24, do_sample=False).tolist()
                    for p in prompts
                ]
            )
        alone.append((stats.rounds, stats.accepted))
        plain = [target.generate(p, max_new_tokens=24, do_sample=False).tolist() for p in prompts]
        assert expected[-1] == plain
    assert expected[0] != expected[1]

    barrier = threading.Barrier(2)
    outputs, counts = [None, None], [None, None]

    def work(index):
        barrier.wait()
        with collect_statistics() as stats:
            outputs[index] = [
                targets[index].generate(p, assistant_model=poss, max_new_tokens=24, do_sample=False).tolist()
                for p in prompts
            ]
        counts[index] = (stats.rounds, stats.accepted)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outputs == expected
    assert counts == alone


# ---- Sampling ----

TINY_VOCAB = 6
SAMPLING = {"temperature": 0.9, "top_k": 4, "top_p": 0.95, "repetition_penalty": 1.3}
ERROR_RATE = 1e-4  # chance that a correct sampler fails one of these tests, seeds being free
NUM_SAMPLES = 1200


@pytest.fixture(scope="module")
def tiny_target() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=TINY_VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    set_seed(5)
    target = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in target.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    return target


def exact_joint(target: PreTrainedModel, prompt: torch.LongTensor) -> dict[tuple[int, ...], float]:
    """Probability of every sequence of three sampled tokens, from the target's own passes."""
    processors = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(SAMPLING["repetition_penalty"]),
            TemperatureLogitsWarper(SAMPLING["temperature"]),
            TopKLogitsWarper(SAMPLING["top_k"]),
            TopPLogitsWarper(SAMPLING["top_p"]),
        ]
    )
    joint = {(): 1.0}
    for _ in range(3):
        prefixes = torch.tensor([[*prompt[0].tolist(), *tokens] for tokens in joint])
        with torch.no_grad():
            logits = target(prefixes).logits[:, -1].float()
        rows = processors(prefixes, logits).softmax(-1).tolist()
        joint = {
            (*tokens, token): before * row[token]
            for (tokens, before), row in zip(joint.items(), rows, strict=True)
            for token in range(TINY_VOCAB)
        }
    return joint


def chi_square_p_value(counts: Counter, joint: dict[tuple[int, ...], float]) -> float:
    """Goodness of fit; cells with fewer than 5 expected counts are one cell."""
    total = sum(counts.values())
    assert all(joint[cell] > 0 for cell in counts), "a token was sampled that the processors had ruled out"
    large = [cell for cell, probability in joint.items() if probability * total >= 5]
    observed = [counts[cell] for cell in large]
    expected = [joint[cell] * total for cell in large]
    if (rest := total - sum(expected)) > 1e-6 * total:
        observed.append(total - sum(observed))
        expected.append(rest)
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    return float(chi2.sf(statistic, len(expected) - 1))


def sample(target, poss, prompt, number) -> tuple[Counter, list[int]]:
    set_seed(0)
    with collect_statistics() as stats:
        # Of four tokens, so that the drafts which the first three meet have several levels.
        counts = Counter(
            tuple(
                target.generate(prompt, assistant_model=poss, max_new_tokens=4, do_sample=True, **SAMPLING)[
                    0, prompt.shape[1] : prompt.shape[1] + 3
                ].tolist()
            )
            for _ in range(number)
        )
    return counts, stats.accepted


PROMPT = torch.tensor([[3, 1, 4]])


@pytest.mark.parametrize("shape", SHAPES)
def test_sampled_tokens_have_the_targets_distribution(tiny_target, shape):
    """Joint distribution of the first three tokens; fails a correct sampler with probability `ERROR_RATE`."""
    joint = exact_joint(tiny_target, PROMPT)
    assert sum(probability > 0.01 for probability in joint.values()) > 15, "too concentrated to tell anything"

    counts, accepted = sample(tiny_target, drafter_for(tiny_target, shape), PROMPT, NUM_SAMPLES)

    assert accepted[0] > NUM_SAMPLES / 20 and accepted[1] > 0
    assert chi_square_p_value(counts, joint) > ERROR_RATE


def test_the_distribution_test_notices_a_walk_that_favours_drafts(tiny_target, monkeypatch):
    def eager_walk(tree, logits, input_ids, picker, stop):
        tokens, parents = tree.tokens[0].tolist(), tree.parents[0].tolist()
        drawn, node = picker.pick, 0

        def pick(prefix, row):
            nonlocal node
            children = [child for child in range(1, len(tokens)) if parents[child] == node]
            scores = picker.logits_processor(prefix, row.clone())
            children = [child for child in children if scores[0, tokens[child]] > -torch.inf]
            if not children:
                return drawn(prefix, row)
            node = children[0]
            return tokens[node]

        monkeypatch.setattr(picker, "pick", pick)
        return walk(tree, logits, input_ids, picker, stop)

    monkeypatch.setattr(poss_generation, "walk", eager_walk)
    counts, _ = sample(tiny_target, drafter_for(tiny_target, "tree"), PROMPT, NUM_SAMPLES // 3)
    assert chi_square_p_value(counts, exact_joint(tiny_target, PROMPT)) < ERROR_RATE


def test_the_distribution_test_notices_a_chain_with_wrong_draft_probabilities(tiny_target, monkeypatch):
    """Drafts are the drafter's best tokens, not samples: telling the loop that they were drawn is a mistake."""
    original = PosSCandidateGenerator.get_candidates

    def get_candidates(self, input_ids, **kwargs):
        candidates, _ = original(self, input_ids, **kwargs)
        drafted = candidates.shape[1] - input_ids.shape[1]
        return candidates, torch.zeros(1, drafted, TINY_VOCAB) if drafted else None

    monkeypatch.setattr(PosSCandidateGenerator, "get_candidates", get_candidates)
    counts, _ = sample(tiny_target, drafter_for(tiny_target, "chain"), PROMPT, NUM_SAMPLES // 3)
    assert chi_square_p_value(counts, exact_joint(tiny_target, PROMPT)) < ERROR_RATE


# ---- The other arguments of generate ----


class Recorder(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], 0

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("shape", SHAPES)
def test_streamers_get_the_text(shape, scripted):
    target = small_target()
    prompt = make_prompt(7)
    text = target.generate(prompt, max_new_tokens=16, do_sample=False)[0].tolist()
    scripted(text)
    streamer = Recorder()
    poss = drafter_for(target, shape)
    target.generate(prompt, assistant_model=poss, max_new_tokens=16, do_sample=False, streamer=streamer)
    assert (streamer.tokens, streamer.ended) == (text, 1)


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_scores_and_logits_are_those_of_the_text(shape, do_sample, scripted):
    target = small_target()
    prompt = make_prompt(7)
    kwargs = {
        "max_new_tokens": 14,
        "do_sample": do_sample,
        "repetition_penalty": 1.2,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    scripted(target.generate(prompt, max_new_tokens=20, do_sample=False, repetition_penalty=1.2)[0].tolist())
    set_seed(3)
    output = target.generate(prompt, assistant_model=drafter_for(target, shape), **kwargs)

    with torch.no_grad():
        logits = target(output.sequences[:, :-1]).logits[:, 6:].float()
    assert output.sequences.shape == (1, 21)
    assert len(output.logits) == len(output.scores) == 14
    penalty = RepetitionPenaltyLogitsProcessor(1.2)
    for step in range(14):
        torch.testing.assert_close(output.logits[step], logits[:, step], rtol=1e-3, atol=1e-3)
        scores = penalty(output.sequences[:, : 7 + step], logits[:, step].clone())
        if do_sample:  # sampling has warpers of its own, all off but top-k, which is wider than the vocabulary
            assert output.scores[step].shape == scores.shape
        torch.testing.assert_close(output.scores[step], scores, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_is_kept_that_was_not_asked_for(shape):
    target = small_target()
    output = target.generate(
        make_prompt(7), assistant_model=drafter_for(target, shape), max_new_tokens=3, return_dict_in_generate=True
    )
    assert output.scores is None and output.logits is None


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", SHAPES)
def test_hidden_states_on_request(shape, attention):
    """Hidden states of a tree are no sequence's, so a request for them drafts chains; the text stays."""
    target = small_target(attention=attention)
    prompt = make_prompt(7)
    kwargs = {
        "max_new_tokens": 6,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_hidden_states": True,
        "output_attentions": attention == "eager",
    }
    plain = target.generate(prompt, **kwargs)
    output = target.generate(prompt, assistant_model=drafter_for(target, shape), **kwargs)
    assert output.sequences.tolist() == plain.sequences.tolist()
    assert len(output.hidden_states) == len(plain.hidden_states)
    for step, plain_step in zip(output.hidden_states, plain.hidden_states, strict=True):
        for layer, plain_layer in zip(step, plain_step, strict=True):
            torch.testing.assert_close(layer, plain_layer, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_returned_cache_is_that_of_the_text(shape, scripted):
    target = small_target()
    prompt = make_prompt(7)
    text = target.generate(prompt, max_new_tokens=40, do_sample=False)[0].tolist()
    scripted(text)
    poss = drafter_for(target, shape, depth=3)
    for number in (1, 2, 6, 13):
        kwargs = {"max_new_tokens": number, "do_sample": False, "return_dict_in_generate": True}
        plain = target.generate(prompt, **kwargs).past_key_values
        cache = target.generate(prompt, assistant_model=poss, **kwargs).past_key_values
        assert cache.get_seq_length() == plain.get_seq_length() == 7 + number - 1
        for layer, plain_layer in zip(cache.layers, plain.layers, strict=True):
            torch.testing.assert_close(layer.keys, plain_layer.keys, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(layer.values, plain_layer.values, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_cache_stops_with_the_text_inside_an_accepted_path(shape, scripted):
    target = small_target()
    prompt = make_prompt(7)
    text = target.generate(prompt, max_new_tokens=20, do_sample=False)[0].tolist()
    scripted(text)
    poss = drafter_for(target, shape)
    lengths = set()
    for eos in set(text[7:]):
        output = target.generate(
            prompt,
            assistant_model=poss,
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=0,
            return_dict_in_generate=True,
        )
        lengths.add(output.sequences.shape[1])
        assert output.past_key_values.get_seq_length() == output.sequences.shape[1] - 1
    assert len(lengths) > 3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cached", [1, 5, 6, 12])
def test_a_conversation_goes_on_from_a_cache(cached, shape):
    """A second turn whose first `cached` tokens are in the cache already, made without or with a drafter."""
    target = small_target()
    poss = drafter_for(target, shape)
    prompt = make_prompt(7)
    expected = target.generate(prompt, max_new_tokens=20, do_sample=False)
    kwargs = {"do_sample": False, "assistant_model": poss}
    if cached < 7:
        cache = DynamicCache(config=target.config)
        with torch.no_grad():
            target(prompt[:, :cached], past_key_values=cache)
        turn = prompt
    else:
        first = target.generate(prompt, max_new_tokens=cached - 6, return_dict_in_generate=True, **kwargs)
        turn, cache = first.sequences, first.past_key_values
        assert cache.get_seq_length() == cached
    output = target.generate(turn, past_key_values=cache, max_new_tokens=27 - turn.shape[1], **kwargs)
    assert output.tolist() == expected.tolist()


def test_a_full_cache_is_refused():
    target = small_target()
    prompt = make_prompt(7)
    cache = DynamicCache(config=target.config)
    with torch.no_grad():
        target(prompt, past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values"):
        target.generate(prompt, past_key_values=cache, assistant_model=drafter_for(target, "tree"), max_new_tokens=4)


def test_stopping_criteria_stop_inside_a_path(scripted):
    """A criterion of the caller's is asked after every token, as without drafts."""
    target = small_target()
    prompt = make_prompt(7)
    text = target.generate(prompt, max_new_tokens=30, do_sample=False)[0].tolist()
    scripted(text)

    class AfterPair(StoppingCriteria):
        def __init__(self, pair):
            self.pair = pair

        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([input_ids[0, -2:].tolist() == self.pair])

    lengths = set()
    for pair in itertools.pairwise(text[7:20]):
        criteria = StoppingCriteriaList([AfterPair(list(pair))])
        _, new_tokens = compare(target, drafter_for(target, "tree", depth=4), prompt, stopping_criteria=criteria)
        lengths.add(len(new_tokens))
    assert len(lengths) > 4


# ---- What cannot verify a tree drafts chains ----


@pytest.fixture
def warnings_seen(caplog):
    transformers_logging.warning_once.cache_clear()
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("hf_poss")]


def assert_chains(stats):
    assert 0 < stats.drafted[0] <= stats.rounds


def windowed_target() -> MistralForCausalLM:
    config = MistralConfig(
        vocab_size=SMALL_VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    set_seed(0)
    target = MistralForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in target.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    return target


@pytest.mark.parametrize("length", [3, 20])
def test_a_sliding_window_drafts_chains(length, warnings_seen):
    target = windowed_target()
    stats, _ = compare(target, drafter_for(target, "tree"), make_prompt(length), max_new_tokens=40)
    assert_chains(stats)
    assert sum(stats.accepted) > 0
    assert any("chain" in message and "window" in message for message in warnings_seen())


def test_a_sliding_window_with_a_cache_that_has_none():
    """The caller's own cache keeps every token; attention still has a window."""
    target = windowed_target()
    prompt, kwargs = make_prompt(20), {"max_new_tokens": 24, "do_sample": False}
    plain = target.generate(prompt, past_key_values=DynamicCache(), **kwargs)
    output = target.generate(
        prompt, past_key_values=DynamicCache(), assistant_model=drafter_for(target, "tree"), **kwargs
    )
    assert output.tolist() == plain.tolist()


def test_an_attention_without_tree_masks_drafts_chains(warnings_seen):
    AttentionInterface.register("some_kernel", sdpa_attention_forward)
    AttentionMaskInterface.register("some_kernel", sdpa_mask)
    target = small_target(attention="some_kernel")
    stats, _ = compare(target, drafter_for(target, "tree"), make_prompt(9))
    assert_chains(stats)
    assert any("chain" in message and "some_kernel" in message for message in warnings_seen())


def test_a_fit_target_drafts_trees_without_a_word(warnings_seen):
    target = small_target()
    stats, _ = compare(target, drafter_for(target, "tree"), make_prompt(9))
    assert stats.drafted[0] > stats.rounds
    assert not warnings_seen()


# ---- Refusals ----


@pytest.fixture
def refused():
    """Asserts that a call is refused with a message, before any module of the target has run."""

    def refuse(target, poss, message, **kwargs):
        ran = []
        hooks = [module.register_forward_pre_hook(lambda *_: ran.append(1)) for module in target.modules()]
        with pytest.raises(ValueError, match=message):
            target.generate(**{"input_ids": make_prompt(5), "max_new_tokens": 4, **kwargs}, assistant_model=poss)
        for hook in hooks:
            hook.remove()
        assert not ran, "the target ran before the call was refused"

    return refuse


@pytest.mark.parametrize("shape", SHAPES)
def test_batches_are_refused(shape, refused):
    target = small_target()
    poss = drafter_for(target, shape)
    refused(target, poss, "2 rows", input_ids=make_prompt(5).expand(2, -1))


def test_an_encoder_decoder_is_refused(refused):
    config = T5Config(
        vocab_size=SMALL_VOCAB, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    poss = drafter_for(small_target(), "tree")
    refused(T5ForConditionalGeneration(config).eval(), poss, "encoder-decoder")


def test_a_recurrent_target_is_refused(refused):
    config = MambaConfig(vocab_size=SMALL_VOCAB, hidden_size=32, state_size=4, num_hidden_layers=1)
    poss = drafter_for(small_target(), "tree")
    refused(MambaForCausalLM(config).eval(), poss, "recurrent state")


@pytest.mark.parametrize("shape", SHAPES)
def test_another_targets_drafter_is_refused(shape, refused):
    poss = drafter_for(small_target(), shape)
    vocabulary = TARGET_CONFIGS["llama"]()
    refused(LlamaForCausalLM(vocabulary), poss, f"{SMALL_VOCAB} tokens.*{vocabulary.vocab_size}")
    width = TARGET_CONFIGS["llama"]()
    width.vocab_size, width.hidden_size = SMALL_VOCAB, 64
    refused(LlamaForCausalLM(width), poss, "hidden size of 32.*64")


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("draft_total_tokens", 1),
        ("draft_total_tokens", 2.0),
        ("draft_top_k", 0),
        ("draft_top_k", True),
        ("num_assistant_tokens", 0),
        ("num_assistant_tokens", "3"),
    ],
)
def test_knobs_out_of_range_are_refused(knob, value, refused):
    target = small_target()
    poss = drafter_for(target, "tree")
    setattr(poss.generation_config, knob, value)
    refused(target, poss, knob)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(shape, bad):
    target = small_target()
    poss = drafter_for(target, shape)
    with torch.no_grad():
        target.model.norm.weight[3] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        target.generate(make_prompt(5), assistant_model=poss, max_new_tokens=4, do_sample=False)


def test_embeddings_instead_of_tokens_are_refused():
    target = small_target()
    embeddings = target.get_input_embeddings()(make_prompt(5))
    with pytest.raises(ValueError, match="inputs_embeds"):
        target.generate(inputs_embeds=embeddings, assistant_model=drafter_for(target, "tree"), max_new_tokens=4)


def test_specialists_cannot_write_alone(poss):
    with pytest.raises(NotImplementedError, match="assistant_model=poss"):
        poss.generate(make_prompt(5))


# ---- Everything else in transformers ----


def stock_outputs():
    """Texts of every other way to call `generate`. Runs in a process without this package too."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    def model(seed, layers):
        sizes = {"vocab_size": 12, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
        set_seed(seed)
        made = LlamaForCausalLM(
            LlamaConfig(num_hidden_layers=layers, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes)
        ).eval()
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(6.0)
        return made

    target, assistant = model(0, 2), model(1, 1)
    prompt = torch.tensor([[3, 4, 5, 6, 3, 4, 5]])
    calls = {
        "greedy": {"do_sample": False},
        "sampling": {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
        "beams": {"do_sample": False, "num_beams": 3},
        "assisted": {"do_sample": False, "assistant_model": assistant},
        "assisted sampling": {"do_sample": True, "assistant_model": assistant},
        "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
        "early exit": {"do_sample": False, "assistant_early_exit": 1},
    }
    outputs = {}
    for name, kwargs in calls.items():
        set_seed(11)
        try:
            outputs[name] = target.generate(prompt, max_new_tokens=20, **kwargs).tolist()
        except Exception as error:
            outputs[name] = f"{type(error).__name__}: {error}"
    set_seed(11)
    two_rows = prompt.expand(2, -1)
    outputs["batch"] = target.generate(two_rows, max_new_tokens=20, do_sample=True).tolist()
    try:
        target.generate(two_rows, max_new_tokens=20, assistant_model=assistant)
    except ValueError as error:
        outputs["assisted batch"] = str(error)
    return outputs


@pytest.fixture
def hooked():
    """Leaves the hook in place, whatever the test did to it."""
    yield
    hf_poss.enable()


def _stock_file(name: str) -> bool:
    """Whether `GenerationMixin` has transformers' own method; `__code__` sees through no wrapper."""
    return Path(getattr(GenerationMixin, name).__code__.co_filename).name == "utils.py"


HOOKED = ("_validate_generation_mode", "_get_candidate_generator", "_assisted_decoding")


def test_other_assistants_and_none_are_unaffected(hooked):
    """The same calls in a process that never imports the package, and here with the hook on and off."""
    import inspect

    script = inspect.getsource(stock_outputs) + (
        "\nimport json, sys, torch"
        "\ntorch.set_num_threads(1)"
        "\noutputs = stock_outputs()"
        "\nassert 'hf_poss' not in sys.modules"
        "\nprint(json.dumps(outputs))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    stock = json.loads(result.stdout.splitlines()[-1])
    assert all(isinstance(stock[name], list) for name in ("greedy", "assisted", "assisted sampling", "prompt lookup"))

    assert stock_outputs() == stock
    hf_poss.disable()
    assert stock_outputs() == stock
    hf_poss.enable()
    assert stock_outputs() == stock


def test_the_hook_goes_on_and_off_any_number_of_times(hooked):
    target = small_target()
    poss = drafter_for(target, "tree")
    hf_poss.enable()
    hf_poss.enable()
    assert not any(_stock_file(name) for name in HOOKED)
    compare(target, poss, make_prompt(7))

    hf_poss.disable()
    assert all(_stock_file(name) for name in HOOKED)
    hf_poss.disable()
    assert all(_stock_file(name) for name in HOOKED)

    hf_poss.enable()
    stats, _ = compare(target, poss, make_prompt(7))
    assert stats.rounds > 0


def test_conftest_targets_with_an_end_of_sequence(llama, poss):
    """The shared target and its drafter, with every knob at its default."""
    for seed in range(3):
        compare(llama, poss, make_prompt(12, seed=seed, vocab=97), max_new_tokens=32)
    compare(make_target("gpt2"), make_poss(make_target("gpt2")), make_prompt(12, vocab=97))
