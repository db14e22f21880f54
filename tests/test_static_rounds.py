"""Rounds of fixed shapes: the text of plain `generate` on the same static cache, and nothing compiled twice."""

import contextlib
import copy
import gc
import itertools
import threading
import weakref
from collections.abc import Iterator

import pytest
import torch
from conftest import (
    PAD,
    SMALL_VOCAB,
    TARGET_CONFIGS,
    WINDOW_CONFIGS,
    drafter_for,
    left_padded,
    make_prompt,
    small_target,
    unknown_attention,
    widened,
    with_slips,
)
from families import FAMILIES
from test_candidate_generator import assert_same_caches, drafter_of
from torch._dynamo.utils import counters
from transformers import (
    CompileConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    set_seed,
)
from transformers.generation.streamers import BaseStreamer

from hf_poss import PosSCandidateGenerator, PosSModel, collect_statistics, static_rounds
from hf_poss.compatibility import compile_everywhere
from hf_poss.static_rounds import StaticBuffers, bucket


PROMPTS = [make_prompt(7, seed=1), make_prompt(3, seed=2), make_prompt(11, seed=3)]
BATCHES = {"one_row": left_padded(PROMPTS[:1]), "three_rows": left_padded(PROMPTS)}
STAGGERED = {"eos_token_id": [2, 3], "pad_token_id": PAD}  # ends the Llama's rows one after another
STATIC = {"cache_implementation": "static"}


def compiled(backend: str = "eager") -> dict:
    """Arguments of `generate` that compile its steps here too. Backends that make no code trace like those that do."""
    return STATIC | {"compile_config": compile_everywhere(CompileConfig(backend=backend, mode="default"))}


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """What was compiled before does not count."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=list(BATCHES))
def inputs(request) -> dict[str, torch.LongTensor]:
    return BATCHES[request.param]


@pytest.fixture
def three_rows() -> dict[str, torch.LongTensor]:
    return BATCHES["three_rows"]


def little_target():
    """Of one layer, which is compiled sooner."""
    return small_target(num_hidden_layers=1)


def compare(target, poss, inputs, mode=STATIC, plain_mode=STATIC, **kwargs):
    """Asserts that greedy text is that of a static and of a dynamic run without `poss`; returns the statistics."""
    kwargs = {"max_new_tokens": 24, "do_sample": False, **kwargs}
    expected = target.generate(**inputs, **kwargs)
    assert target.generate(**inputs, **kwargs, **plain_mode).tolist() == expected.tolist()
    with collect_statistics() as stats:
        output = target.generate(**inputs, assistant_model=poss, **kwargs, **mode)
    assert output.tolist() == expected.tolist()
    return stats


def authors(stats) -> list[list[int]]:
    """By row, which draft position proposed each token but the last, for which drafts of one depth have no room."""
    return [call.authors[:-1] for call in stats.calls]


@contextlib.contextmanager
def nothing_compiles() -> Iterator[None]:
    with torch.compiler.set_stance("fail_on_recompile"):
        yield


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


# ---- The same text ----


@pytest.mark.parametrize("family", [*TARGET_CONFIGS, *WINDOW_CONFIGS])
def test_greedy_text_is_the_same(family, shape, inputs):
    target = small_target(family)
    poss = drafter_for(target, shape)
    accepted = 0
    for ends in ({}, STAGGERED):
        accepted += sum(compare(target, poss, inputs, **ends).accepted)
    assert accepted > 0, "no draft was accepted, so the test shows nothing"


@pytest.mark.parametrize(
    ("family", "shape", "batch", "backend"),
    [
        ("llama", "tree", "one_row", "aot_eager"),
        ("gemma3", "tree", "three_rows", "eager"),
        ("gpt2", "chain", "three_rows", "eager"),
    ],
)
def test_compiled_greedy_text_is_the_same(family, shape, batch, backend):
    target = small_target(family)
    poss, mode, inputs = drafter_for(target, shape), compiled(backend), BATCHES[batch]
    with collect_statistics() as dynamic:
        target.generate(**inputs, assistant_model=poss, max_new_tokens=24, do_sample=False, **STAGGERED)
    stats = compare(target, poss, inputs, mode, plain_mode=mode, **STAGGERED)
    assert authors(stats) == authors(dynamic) and sum(stats.accepted) > 0
    stats = compare(target, poss, {name: value.flip(0) for name, value in inputs.items()}, mode)
    assert sum(stats.accepted) > 0
    if batch == "one_row":
        with nothing_compiles():
            assert_same_samples(target, poss, mode)
    assert not counters["graph_break"]


def test_prompts_around_a_bucket(shape):
    target = small_target("qwen3")
    poss = drafter_for(target, shape)
    for length in (1, 2, 227, 228, 229, 255, 256, 257, 400):
        compare(target, poss, {"input_ids": make_prompt(length)}, max_new_tokens=8)


def test_the_last_learned_position(shape, inputs):
    """A GPT-2 of 48 positions: drafts of fixed depth reach beyond them, texts do not."""
    target = small_target("gpt2", n_positions=48)
    for length in (36, 48):
        compare(target, drafter_for(target, shape), inputs, max_new_tokens=None, max_length=length)
    prompt = {"input_ids": make_prompt(40), "attention_mask": torch.ones(1, 40, dtype=torch.long)}
    compare(target, drafter_for(target, shape), prompt, max_new_tokens=None, max_length=48)


@pytest.mark.parametrize("chunk", [1, 5])
def test_prompts_in_chunks(chunk, shape, inputs):
    target = small_target("gemma3")
    compare(target, drafter_for(target, shape), inputs, prefill_chunk_size=chunk)


def test_caches_after_rounds_are_those_of_a_fresh_prefill(shape, inputs, scripted, monkeypatch):
    """Whatever was accepted, in each row: the specialists' context, in buffers of one size."""
    target = small_target()
    poss = drafter_for(target, shape)
    plain = target.generate(**inputs, max_new_tokens=30, do_sample=False)
    texts = [row[mask.argmax() :] for row, mask in zip(plain, inputs["attention_mask"], strict=True)]
    scripted(*(with_slips(text.tolist(), 7 + 3 * row) for row, text in enumerate(texts)))
    with checked_contexts(poss, target, texts) as seen:
        output = target.generate(**inputs, assistant_model=poss, max_new_tokens=30, do_sample=False, **STATIC)
    assert output.tolist() == plain.tolist()
    steps = {after[row] - before[row] for before, after in itertools.pairwise(seen) for row in range(len(texts))}
    assert len(seen) > 5 and len(steps) > 1, "all rounds were alike"


@contextlib.contextmanager
def checked_contexts(poss, target, texts: list[torch.LongTensor]) -> Iterator[list[list[int]]]:
    """Whenever specialists get context inside the block, all of it must be what a fresh drafter has of these texts;
    gives the lengths by row."""
    seen, inside = [], []
    extend_context = PosSCandidateGenerator.extend_context

    def checked(self, *args):
        extend_context(self, *args)
        if inside:
            return
        inside.append(True)  # the fresh drafters' own
        lengths = dict(zip(self.columns.rows[: self.columns.active], self.columns.lengths, strict=False))
        for slot, (row, length) in enumerate(lengths.items()):
            assert_same_caches(self, drafter_of(poss, target, texts[row][None, : length + 1]), slot)
        seen.append(lengths)
        inside.clear()

    PosSCandidateGenerator.extend_context = checked
    try:
        yield seen
    finally:
        PosSCandidateGenerator.extend_context = extend_context


# ---- The other arguments of `generate` ----


class NoRepeats(LogitsProcessor):
    """Rules out the newest token of each row."""

    def __call__(self, input_ids, scores):
        return scores.scatter(1, input_ids[:, -1:], -torch.inf)


@pytest.mark.parametrize(
    "arguments",
    [
        {"repetition_penalty": 1.4, "no_repeat_ngram_size": 3},
        {"min_new_tokens": 6, **STAGGERED},
        {"logits_processor": LogitsProcessorList([NoRepeats()])},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_processors(arguments, shape, inputs):
    target = small_target()
    stats = compare(target, drafter_for(target, shape), inputs, **arguments)
    assert sum(stats.accepted) > 0


def test_one_row_samples_what_plain_generate_samples(shape):
    target = small_target()
    assert_same_samples(target, drafter_for(target, shape), STATIC)


def assert_same_samples(target, poss, mode) -> None:
    texts, accepted = set(), 0
    for seed in range(4):
        written = []
        for assistant in (None, poss):
            set_seed(seed)
            kwargs = {"max_new_tokens": 20, "do_sample": True, "temperature": 0.8, "top_k": 6}
            kwargs |= STATIC if assistant is None else mode
            with collect_statistics() as stats:
                written.append(target.generate(PROMPTS[0], assistant_model=assistant, **kwargs).tolist())
        assert written[0] == written[1]
        texts.add(str(written[0]))
        accepted += sum(stats.accepted)
    assert len(texts) > 1 and accepted > 0


def test_a_batch_samples_what_it_samples_in_a_dynamic_cache(shape, three_rows):
    """Every row draws from a generator of its own, whatever its neighbours and its cache."""
    target = small_target()
    poss = drafter_for(target, shape)
    for seed in range(3):
        written = []
        for mode in ({}, STATIC):
            set_seed(seed)
            kwargs = {"max_new_tokens": 20, "do_sample": True, **STAGGERED, **mode}
            written.append(target.generate(**three_rows, assistant_model=poss, **kwargs).tolist())
        assert written[0] == written[1]


class Received(BaseStreamer):
    def __init__(self):
        self.steps, self.ended = [], 0

    def put(self, value):
        self.steps += value.reshape(value.shape[0], -1).T.tolist() if value.dim() == 2 else [value.tolist()]

    def end(self):
        self.ended += 1


def test_streams(shape):
    target = small_target()
    received = [Received(), Received()]
    for streamer, assistant in zip(received, (None, drafter_for(target, shape)), strict=True):
        target.generate(PROMPTS[0], assistant_model=assistant, streamer=streamer, max_new_tokens=20, **STATIC)
    assert received[0].steps == received[1].steps and received[0].ended == received[1].ended == 1


def assert_close(one, other) -> None:
    assert len(one) == len(other)
    for step, other_step in zip(one, other, strict=True):
        if isinstance(step, torch.Tensor):
            torch.testing.assert_close(step, other_step, rtol=1e-4, atol=1e-4)
        else:
            assert_close(step, other_step)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_what_a_dict_returns(family, shape, inputs):
    """Scores, logits and hidden states of the static run without specialists; a static cache filled as that one."""
    assert_same_dict(small_target(family), shape, inputs, STATIC)


def test_what_a_dict_returns_of_compiled_rounds(three_rows):
    assert_same_dict(little_target(), "tree", three_rows, compiled())


def assert_same_dict(target, shape, inputs, mode) -> None:
    kwargs = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True}
    kwargs |= {"output_scores": True, "output_logits": True, "output_hidden_states": True}
    plain = target.generate(**inputs, **kwargs, **STATIC)
    output = target.generate(**inputs, assistant_model=drafter_for(target, shape), **kwargs, **mode)
    assert output.sequences.tolist() == plain.sequences.tolist()
    for name in ("scores", "logits", "hidden_states"):
        assert_close(output[name], plain[name])
    assert type(output.past_key_values) is StaticCache
    assert_same_layers(output.past_key_values, plain.past_key_values, inputs["attention_mask"])


def assert_same_layers(cache, plain, mask) -> None:
    """Static layers hold the same at every token of a text; what they hold for padding in front means nothing."""
    for layer, other in zip(cache.layers, plain.layers, strict=True):
        assert type(layer) is type(other) and layer.keys.shape == other.keys.shape
        held = int(layer.get_seq_length())
        assert held == int(other.get_seq_length())
        first = max(held - layer.keys.shape[-2], 0)  # of the columns that are left
        for row, padding in enumerate((mask == 0).sum(-1).tolist()):
            seen = slice(max(padding - first, 0), held - first)
            for states, other_states in ((layer.keys, other.keys), (layer.values, other.values)):
                torch.testing.assert_close(states[row, :, seen], other_states[row, :, seen], rtol=1e-4, atol=1e-4)


def test_attentions_of_chains():
    """Over the columns that hold something; those of the static run beyond them are zero."""
    target = small_target(attention="eager")
    kwargs = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_attentions": True}
    plain = target.generate(PROMPTS[0], **kwargs)  # in a dynamic cache: without columns that hold nothing
    output = target.generate(PROMPTS[0], assistant_model=drafter_for(target, "chain"), **kwargs, **STATIC)
    assert_close(output.attentions, plain.attentions)


# ---- A caller's own cache ----


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("before", ["nothing", "plain turn", "turn with drafts"])
def test_a_static_cache_of_ones_own(family, before, shape, three_rows):
    """As large as the text needs, and not larger; the rows' second turn goes on from the first."""
    target = small_target(family)
    poss, mask = drafter_for(target, shape), three_rows["attention_mask"]
    longest = mask.shape[1]
    caches = [StaticCache(config=target.config, max_cache_len=longest + 40) for _ in range(2)]
    turns = [three_rows, three_rows]
    if before != "nothing":
        first = (None, poss if before == "turn with drafts" else None)
        turns = [
            second_turn(
                target.generate(
                    **three_rows, past_key_values=cache, assistant_model=own, max_new_tokens=9, do_sample=False
                ),
                mask,
            )
            for cache, own in zip(caches, first, strict=True)
        ]
    kwargs = {"max_new_tokens": 20, "do_sample": False}
    plain = target.generate(**turns[0], past_key_values=caches[0], **kwargs)
    output = target.generate(**turns[1], past_key_values=caches[1], assistant_model=poss, **kwargs)
    assert output.tolist() == plain.tolist() == target.generate(**turns[0], **kwargs).tolist()
    assert_same_layers(caches[1], caches[0], turns[1]["attention_mask"])


def second_turn(text: torch.LongTensor, mask: torch.LongTensor) -> dict[str, torch.LongTensor]:
    said = torch.tensor([[5, 3, 8]]).expand(len(text), -1)
    text = torch.cat((text, said), dim=1)
    return {
        "input_ids": text,
        "attention_mask": torch.nn.functional.pad(mask, (0, text.shape[1] - mask.shape[1]), value=1),
    }


def test_a_larger_cache_is_asked_for(shape):
    target = small_target()
    compare(target, drafter_for(target, shape), BATCHES["three_rows"], max_cache_len=300)


# ---- Other drafters and targets ----


def with_layers(target, shape) -> PosSModel:
    return drafter_for(target, shape, feature_layers=[0, 1])


def with_vocabulary(target, shape) -> PosSModel:
    return drafter_for(target, shape).set_draft_vocabulary(torch.arange(SMALL_VOCAB) + 1, 7)


def with_adapters(target, shape) -> PosSModel:
    pytest.importorskip("peft")
    poss = drafter_for(target, shape, specialist_adapter={"r": 2, "lora_alpha": 4})
    return noisy(poss, "lora_B")


def noisy(model, name: str, seed: int = 1):
    """Weights of that name are moved from where they are, at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if name in parameter_name:
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model


DRAFTERS = {"feature layers": with_layers, "draft vocabulary": with_vocabulary, "LoRA specialists": with_adapters}


@pytest.mark.parametrize("kind", DRAFTERS)
def test_other_drafters(kind, three_rows):
    target = small_target()
    modes = [("chain", STATIC), ("tree", STATIC)]
    if kind == "LoRA specialists":  # another way to keys and values
        modes.append(("tree", compiled()))
    for shape, mode in modes:
        poss = DRAFTERS[kind](target, shape)
        with collect_statistics() as dynamic:
            target.generate(**three_rows, assistant_model=poss, max_new_tokens=24, do_sample=False)
        stats = compare(target, poss, three_rows, mode)
        assert authors(stats) == authors(dynamic) and sum(stats.accepted) > 0
    assert not counters["graph_break"]


def test_an_adapter_on_the_target(three_rows):
    peft = pytest.importorskip("peft")
    target = little_target()
    bare = target.generate(**three_rows, max_new_tokens=24, do_sample=False).tolist()
    adapted = peft.get_peft_model(target, peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2))
    noisy(adapted, "lora_B").eval()
    poss, mode = drafter_for(target, "tree"), compiled()
    stats = compare(adapted, poss, three_rows, mode)
    assert sum(stats.accepted) > 0
    with adapted.disable_adapter():
        kwargs = {"max_new_tokens": 24, "do_sample": False, **mode}
        assert adapted.generate(**three_rows, assistant_model=poss, **kwargs).tolist() == bare
    compare(adapted, poss, three_rows, STATIC)


@pytest.mark.parametrize(
    ("key", "reason"), [("bloom", "ALiBi"), ("gpt-neo", "windows"), ("some_kernel", "some_kernel")]
)
def test_targets_without_trees_decode_plainly(key, reason, shape, warnings_seen):
    """Chains too need masks that say which columns hold nothing."""
    if key == "some_kernel":
        target = small_target(attention=unknown_attention())
    else:
        target = next(family for family in FAMILIES if family.key == key).make_target("eager")
    poss = drafter_for(target, shape)
    kwargs = {"max_new_tokens": 20, "do_sample": False, **STATIC}
    plain = target.generate(**BATCHES["three_rows"], **kwargs)
    for _ in range(2):
        with collect_statistics() as stats:
            output = target.generate(**BATCHES["three_rows"], assistant_model=poss, **kwargs)
        assert output.tolist() == plain.tolist() and stats.rounds == 0
    seen = [message for message in warnings_seen() if "Decoding without drafts" in message]
    assert len(seen) == 1 and reason in seen[0]


# ---- Calls do not see each other ----


class Raises(StoppingCriteria):
    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] > self.length:
            raise KeyError("the caller's own error")
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("mode", [STATIC, compiled()], ids=["static", "compiled"])
def test_a_call_that_fails_leaves_others_right(mode):
    target = little_target()
    poss, inputs = drafter_for(target, "tree"), BATCHES["one_row"]
    compare(target, poss, inputs, mode)
    for length in (7, 12):
        criteria = StoppingCriteriaList([Raises(length)])
        with pytest.raises(KeyError, match="own error"):
            target.generate(
                **inputs, assistant_model=poss, max_new_tokens=24, stopping_criteria=criteria, do_sample=False, **mode
            )
        compare(target, poss, inputs, mode)


def test_what_a_call_leaves_behind_is_not_seen(three_rows, monkeypatch):
    """Buffers serve call after call; here, they come back full of values that spoil whatever looks at them."""
    target = little_target()
    poss, mode, pools = drafter_for(target, "tree"), compiled(), []
    make = StaticBuffers.of.__func__

    def seen(cls, *args):
        pools.append(make(cls, *args))
        return pools[-1]

    monkeypatch.setattr(StaticBuffers, "of", classmethod(seen))
    first = compare(target, poss, three_rows, mode)
    for _ in range(2):
        for buffer in (*pools[0].layers, pools[0].specialists):
            for states in buffer.states:
                states.fill_(torch.nan)
        again = compare(target, poss, three_rows, mode)
        assert authors(again) == authors(first)
        compare(target, poss, {name: value[:, 4:] for name, value in three_rows.items()}, mode)
    assert len(pools) == 1


def test_threads_do_not_see_each_other(monkeypatch):
    """Calls of one shape, in step: buffers are those of one call at a time."""
    target = little_target()
    poss, mode = drafter_for(target, "tree"), compiled()
    prompts = [make_prompt(6, seed=seed) for seed in range(2)]
    kwargs = {"max_new_tokens": 20, "do_sample": False}
    expected = [target.generate(prompt, **kwargs).tolist() for prompt in prompts]
    assert expected[0] != expected[1]
    target.generate(prompts[0], assistant_model=poss, **kwargs, **mode)  # compiles
    barrier, found = threading.Barrier(2, timeout=60), {}
    draft = PosSCandidateGenerator.draft

    def in_step(self, *args):
        with contextlib.suppress(threading.BrokenBarrierError):
            barrier.wait()
        return draft(self, *args)

    monkeypatch.setattr(PosSCandidateGenerator, "draft", in_step)

    def write(index: int) -> None:
        try:
            found[index] = target.generate(prompts[index], assistant_model=poss, **kwargs, **mode).tolist()
        finally:
            barrier.abort()

    for _ in range(2):
        threads = [threading.Thread(target=write, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [found[0], found[1]] == expected
        barrier.reset()


# ---- Weights that change ----


def train_keys(target, poss) -> None:
    noisy(poss, "self_attn.k_proj")


def train_fc(target, poss) -> None:
    noisy(poss, "fc.weight")


def change_target(target, poss) -> None:
    noisy(target, "layers.1.mlp.down_proj", seed=2)


def change_head(target, poss) -> None:
    with torch.no_grad():
        target.lm_head.weight.copy_(target.lm_head.weight.flip(0))


def replace_layer(target, poss) -> None:
    poss.layers[0] = noisy(copy.deepcopy(poss.layers[1]), "proj")


def change_vocabulary(target, poss) -> None:
    poss.set_draft_vocabulary(torch.arange(SMALL_VOCAB).flip(0) + 1, 7)


def all_tokens(target, poss) -> None:
    poss.set_draft_vocabulary(None)


def test_weights_that_changed_take_effect(monkeypatch):
    """One after another, on a drafter with a draft vocabulary: drafts are those of rounds that nothing compiled."""
    target = small_target()
    poss, mode, trees = widened(with_vocabulary(target, "tree"), 6.0), compiled(), []
    draft = PosSCandidateGenerator.draft

    def seen(self, *args):
        tree = draft(self, *args)
        trees.append((tree.tokens.tolist(), tree.parents.tolist()))
        return tree

    monkeypatch.setattr(PosSCandidateGenerator, "draft", seen)

    def drafts(mode) -> list:
        trees.clear()
        compare(target, poss, BATCHES["one_row"], mode, max_new_tokens=16)
        return list(trees)

    before = drafts(mode)
    assert before == drafts(STATIC)
    for change in (train_keys, train_fc, change_head, change_target, replace_layer, change_vocabulary, all_tokens):
        change(target, poss)
        after = drafts(mode)
        assert after == drafts(STATIC), change.__name__
        assert after != before, f"{change.__name__} changed no draft, so the test shows nothing"
        before = after


def test_another_dtype_takes_effect():
    target = little_target()
    poss, mode = drafter_for(target, "tree", depth=2), compiled()
    compare(target, poss, BATCHES["one_row"], mode)
    compare(target.double(), poss, BATCHES["one_row"], mode)


# ---- What is compiled ----


def test_sizes_of_buffers():
    sizes = [bucket(columns) for columns in range(1, 5000)]
    assert sizes == sorted(sizes)
    assert sorted(set(sizes))[:9] == [256, 320, 384, 448, 512, 640, 768, 896, 1024]
    for columns, size in enumerate(sizes, start=1):
        assert columns <= size <= max(256, 1.25 * columns)
        assert bucket(size) == size


@pytest.mark.parametrize(("batch", "shape"), [("one_row", "chain"), ("three_rows", "tree")])
def test_nothing_is_compiled_between_rounds_prompts_and_lengths(batch, shape):
    target = little_target()
    poss, mode, rows = drafter_for(target, shape), compiled(), len(BATCHES[batch]["input_ids"])
    kwargs = {"do_sample": False, **mode}
    target.generate(**BATCHES[batch], assistant_model=poss, max_new_tokens=20, **kwargs)
    assert not counters["graph_break"]
    made = graphs()
    with nothing_compiles():
        for length, written in ((1, 3), (2, 30), (5, 18), (40, 7), (100, 60)):
            prompts = left_padded([make_prompt(max(length - 2 * row, 1), seed=row) for row in range(rows)])
            for ends in ({}, STAGGERED):
                target.generate(**prompts, assistant_model=poss, max_new_tokens=written, **kwargs, **ends)
    assert graphs() == made and not counters["graph_break"]


def test_another_bucket_is_compiled():
    """The tests above would notice."""
    target = little_target()
    poss, kwargs = drafter_for(target, "tree", depth=2), {"do_sample": False, **compiled()}
    target.generate(PROMPTS[0], assistant_model=poss, max_new_tokens=20, **kwargs)
    kwargs |= {"max_new_tokens": 300, "eos_token_id": list(range(8)), "pad_token_id": PAD}
    with nothing_compiles(), pytest.raises(RuntimeError, match="recompile"):
        target.generate(PROMPTS[0], assistant_model=poss, **kwargs)
    made = graphs()
    target.generate(PROMPTS[0], assistant_model=poss, **kwargs)
    assert graphs() > made


def test_one_graph_for_verification_and_one_a_specialist(monkeypatch):
    """Whatever the depth of the pass that it serves, and for as many rounds and calls as there are."""
    target, traced, compile_ = little_target(), [], torch.compile

    def counting(function, **settings):
        def backend(graph, examples, name=function.__name__):
            traced.append(name)
            return graph.forward

        return compile_(function, **settings | {"backend": backend})

    monkeypatch.setattr(static_rounds.torch, "compile", counting)
    poss = drafter_for(target, "tree", depth=5, positions_per_specialist=2, num_draft_positions=4)
    for prompt in PROMPTS[:2]:
        target.generate(prompt, assistant_model=poss, max_new_tokens=16, do_sample=False, **compiled())
    assert traced.count("_pass") == 1
    assert traced.count("expand") == poss.config.num_specialists == 2
    assert len(traced) == len(set(traced)) + 1


def test_many_shapes_are_all_compiled():
    """torch.compile gives up on code that was compiled for so many shapes: for eight, and here for one."""
    target = little_target()
    poss, kwargs = drafter_for(target, "chain", depth=1), {"max_new_tokens": 6, "do_sample": False, **compiled()}
    shapes, made = range(1, 3), []
    with torch._dynamo.config.patch(recompile_limit=1):
        for rows in shapes:
            before = graphs()
            target.generate(PROMPTS[0].repeat(rows, 1), assistant_model=poss, **kwargs)
            made.append(graphs() - before)
        assert len(set(made)) == 1
        with nothing_compiles():
            for rows in shapes:
                target.generate(PROMPTS[0].repeat(rows, 1), assistant_model=poss, **kwargs)


def test_what_was_compiled_goes_with_the_drafter_and_copies_begin_anew():
    target = little_target()
    poss, inputs, mode = drafter_for(target, "tree"), BATCHES["one_row"], compiled()
    compare(target, poss, inputs, mode)
    twin = noisy(copy.deepcopy(poss), "layers.0")
    with nothing_compiles(), pytest.raises(RuntimeError, match="recompile"):
        target.generate(**inputs, assistant_model=twin, max_new_tokens=24, do_sample=False, **mode)
    gone = weakref.ref(poss)
    del poss
    gc.collect()
    assert gone() is None


def test_inference_mode_makes_no_difference():
    """What is compiled and kept in one mode serves calls in the other; a cache of one's own too."""
    target = little_target()
    poss, mode, inputs = with_vocabulary(target, "tree"), compiled(), BATCHES["one_row"]
    caches = []
    with torch.inference_mode():
        compare(target, poss, inputs, mode)
        for assistant in (None, poss):
            caches.append(StaticCache(config=target.config, max_cache_len=60))
            kwargs = {"past_key_values": caches[-1], "max_new_tokens": 9, "do_sample": False}
            text = target.generate(**inputs, assistant_model=assistant, **kwargs)
            turn = second_turn(text, inputs["attention_mask"])
            target.generate(**turn, assistant_model=poss, **kwargs)
    assert_same_layers(*caches, torch.ones(1, 1))
    made = graphs()
    with nothing_compiles():
        for inside in (False, True, False):
            with torch.inference_mode(inside), torch.no_grad():
                compare(target, poss, inputs, mode)
    assert graphs() == made
