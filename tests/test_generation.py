"""`generate` with position specialists against plain `generate`: same text or distribution, nothing else touched."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import (
    SHAPES,
    SMALL_VOCAB,
    TARGET_CONFIGS,
    WINDOW_CONFIGS,
    drafter_for,
    make_poss,
    make_prompt,
    make_target,
    pretrained_folder,
    small_target,
    unknown_attention,
    with_slips,
)
from scipy.stats import chi2
from transformers import (
    DynamicCache,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    T5Config,
    T5ForConditionalGeneration,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    set_seed,
)

import hf_poss
from hf_poss import PosSModel, collect_statistics, decoding
from hf_poss.compatibility import CACHE
from hf_poss.verification import Walk


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


# ---- Greedy text ----


FAMILIES = [*TARGET_CONFIGS, *WINDOW_CONFIGS]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_the_same(family, attention, shape):
    target = small_target(family, attention)
    poss = drafter_for(target, shape)
    accepted = 0
    for length in (1, 2, 9, 300):
        stats, _ = compare(target, poss, make_prompt(length))
        accepted += sum(stats.accepted)
    assert accepted > 0, "no draft was accepted, so the test shows nothing"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_the_same_when_deep_paths_are_accepted(family, shape, scripted):
    target = small_target(family)
    prompt = make_prompt(7)
    text = target.generate(prompt, max_new_tokens=40, do_sample=False)[0].tolist()
    scripted(with_slips(text, every=6))

    stats, _ = compare(target, drafter_for(target, shape, depth=5), prompt, max_new_tokens=32)

    assert stats.tau > 2.5
    assert 0 < sum(stats.accepted) < sum(stats.reached)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [1, 2, 255, 256, 257])
def test_prompts_around_the_size_of_a_buffer(length, shape):
    target = small_target("qwen3")
    compare(target, drafter_for(target, shape), make_prompt(length), max_new_tokens=8)


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


# ---- Sampling ----

TINY_VOCAB = 6
SAMPLING = {"temperature": 0.9, "top_k": 4, "top_p": 0.95, "repetition_penalty": 1.3}
ERROR_RATE = 1e-4  # chance that a correct sampler fails one of these tests, seeds being free
NUM_SAMPLES = 400


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


class EagerWalk(Walk):
    """A walk that takes drafted tokens wherever it can."""

    @classmethod
    def picking(cls, nodes, parents, logits, row, tokens, stop, picker):
        def step(node):
            prefix = tokens.prefix(row)
            scores = picker.logits_processor(prefix, logits[node : node + 1].clone())
            children = [child for child in range(1, len(nodes)) if parents[child] == node]
            children = [child for child in children if scores[0, nodes[child]] > -torch.inf]
            if not children:
                return picker.pick(prefix, logits[node : node + 1]), None
            return nodes[children[0]], children[0]

        return cls(row, tokens, stop, picker, step)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_distribution_test_notices_a_walk_that_favours_drafts(tiny_target, shape, monkeypatch):
    monkeypatch.setattr(decoding, "Walk", EagerWalk)
    counts, _ = sample(tiny_target, drafter_for(tiny_target, shape), PROMPT, NUM_SAMPLES // 2)
    assert chi_square_p_value(counts, exact_joint(tiny_target, PROMPT)) < ERROR_RATE


# ---- A caller's own cache ----


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


@pytest.mark.filterwarnings("error::FutureWarning")
def test_the_cache_goes_by_the_name_that_the_release_has_for_it(shape, warnings_seen):
    """`cache` since 5.24, `past_key_values` before: in and out, without a word of deprecation."""
    target = small_target()
    poss = drafter_for(target, shape)
    prompt = make_prompt(7)
    cache = DynamicCache(config=target.config)
    kwargs = {"do_sample": False, "return_dict_in_generate": True}
    first = target.generate(prompt, assistant_model=poss, max_new_tokens=6, **{CACHE: cache}, **kwargs)
    assert first[CACHE] is cache
    turn = first.sequences
    second = target.generate(turn, assistant_model=poss, max_new_tokens=6, **{CACHE: first[CACHE]}, **kwargs)
    plain = target.generate(prompt, max_new_tokens=12, **kwargs)
    assert second.sequences.tolist() == plain.sequences.tolist()
    assert type(second) is type(plain) and second.keys() == plain.keys()
    assert not [message for message in warnings_seen("transformers") if "deprecated" in message]


def test_a_full_cache_is_refused():
    target = small_target()
    prompt = make_prompt(7)
    cache = DynamicCache(config=target.config)
    with torch.no_grad():
        target(prompt, past_key_values=cache)
    with pytest.raises(ValueError, match=CACHE):
        target.generate(prompt, past_key_values=cache, assistant_model=drafter_for(target, "tree"), max_new_tokens=4)


# ---- What cannot verify a tree drafts chains ----


def test_an_attention_without_tree_masks_drafts_chains(warnings_seen):
    attention = unknown_attention()
    target = small_target(attention=attention)
    stats, _ = compare(target, drafter_for(target, "tree"), make_prompt(9))
    assert 0 < stats.drafted[0] <= stats.rounds, "these were no chains"
    assert any("chain" in message and attention in message for message in warnings_seen())


@pytest.mark.parametrize("family", ["llama", *WINDOW_CONFIGS])
def test_a_fit_target_drafts_trees_without_a_word(family, warnings_seen):
    target = small_target(family)
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
