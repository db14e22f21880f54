"""The decoding loop: how often a round waits for the device."""

import itertools
import warnings

import pytest
import torch
from conftest import (
    PAD,
    drafter_for,
    left_padded,
    make_prompt,
    small_target,
)
from families import FAMILIES
from waits import counted_waits, waits_by_round

from hf_poss import PosSCandidateGenerator, collect_statistics
from hf_poss.transfers import upload


EOS = 3
BATCHES = {"one": [7], "three": [9, 4, 12]}


@pytest.fixture(params=BATCHES)
def prompts(request) -> dict[str, torch.LongTensor]:
    return left_padded([make_prompt(length, seed=length) for length in BATCHES[request.param]])


# ---- What counts ----

READS = {
    "item": lambda x: x[0].item(),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool(x.any()),
    "if": lambda x: 1 if x[0] > 0 else 2,
    "int": lambda x: int(x[0]),
    "float": lambda x: float(x[0]),
    "index": lambda x: range(x[1]),
    "contains": lambda x: 4 in x,
    "cpu": lambda x: x.cpu(),
    "to cpu": lambda x: x.to("cpu"),
    "numpy": lambda x: x.numpy(),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "mask": lambda x: x[x > 0],
    "write by mask": lambda x: x.__setitem__(x > 0, x.new_ones(2)),
    "masked_select": lambda x: x.masked_select(x > 0),
    "equal": lambda x: torch.equal(x, x + 1),
    "unique": lambda x: x.unique(),
    "repeats": lambda x: x.repeat_interleave(x),
    "list as index": lambda x: x[[0, 1]],
    "made there": lambda x: torch.tensor([1, 2], device=x.device),
}

NO_READS = {
    "sum": lambda x: (x + x).sum(-1),
    "gather": lambda x: x.gather(0, x % 2),
    "index by tensor": lambda x: x[x % 2],
    "write by tensor": lambda x: x.__setitem__(x % 2, 0),
    "slice": lambda x: x[1:][None, ..., 0],
    "where of three": lambda x: torch.where(x > 0, x, 0),
    "masked_fill": lambda x: x.masked_fill(x > 0, 1),
    "topk": lambda x: x.topk(2),
    "sort": lambda x: x.sort().indices,
    "repeat": lambda x: x[None].repeat_interleave(3, dim=1),
    "move": lambda x: x.to(torch.float32).to(x.device),
    "upload": lambda x: upload([3, 4], x.device),
    "shape": lambda x: (len(x), x.shape[0], x.numel()),
}


@pytest.mark.parametrize("read", list(READS.values()), ids=list(READS))
def test_a_read_counts_once(read):
    x = torch.tensor([0, 1, 2])
    with counted_waits() as waits:
        read(x)
    assert len(waits.stretches[0]) == 1


@pytest.mark.parametrize("work", list(NO_READS.values()), ids=list(NO_READS))
def test_what_stays_on_the_device_does_not_count(work):
    x = torch.tensor([0, 1, 2])
    with counted_waits() as waits:
        work(x)
    assert waits.stretches == [[]]


def test_a_read_that_is_planted_into_rounds_shows_there(prompts, shape, monkeypatch):
    draft, target = PosSCandidateGenerator.draft, small_target()

    def reading(self, *args):
        tree = draft(self, *args)
        assert tree.tokens.max() >= 0
        return tree

    calls = []
    for patched in (draft, reading):
        monkeypatch.setattr(PosSCandidateGenerator, "draft", patched)
        calls.append(rounds_of(target, drafter_for(target, shape), prompts))
    clean, planted = (list(map(len, rounds)) for rounds in calls)
    # Drafts are made ahead of their round's pass, so the first one's reads are the prompt's; the last has none behind.
    assert [more - before for before, more in zip(clean, planted, strict=True)][:-2] == [1] * (len(clean) - 2)


# ---- Rounds ----


def rounds_of(target, poss, prompts, **kwargs) -> list[list[str]]:
    """What each round of a greedy call waits for."""
    kwargs = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": EOS, "pad_token_id": PAD, **kwargs}
    return waits_by_round(target, lambda: target.generate(**prompts, assistant_model=poss, **kwargs))[1:]


def assert_at_most_one(rounds: list[list[str]]) -> None:
    assert len(rounds) > 2, "too few rounds to tell anything"
    # A cache that outlives the call is filled behind the last round: transformers makes its layers' tensors.
    rounds = [*rounds[:-1], [wait for wait in rounds[-1] if wait != "tensor"]]
    assert [waits for waits in rounds if len(waits) > 1] == []


@pytest.mark.parametrize(
    ("family", "attention"),
    [("llama", "sdpa"), ("llama", "eager"), ("gpt2", "sdpa"), ("mistral", "sdpa"), ("gemma3", "sdpa")],
)
def test_a_greedy_round_waits_once(family, attention, prompts, shape):
    target = small_target(family, attention)
    assert_at_most_one(rounds_of(target, drafter_for(target, shape), prompts))


def test_rows_that_grow_and_end_apart_wait_no_more(shape):
    target = small_target()
    prompts = left_padded([make_prompt(length, seed=length) for length in BATCHES["three"]])
    with collect_statistics() as stats:
        assert_at_most_one(rounds_of(target, drafter_for(target, shape), prompts, max_new_tokens=30))
    assert len({row.rounds for row in stats.calls}) == 3, "rows were to end in different rounds"
    assert len({row.tokens / row.rounds for row in stats.calls}) == 3, "rows were to accept different numbers"


def test_a_static_cache_waits_no_more(prompts, shape):
    target = small_target()
    assert_at_most_one(rounds_of(target, drafter_for(target, shape), prompts, cache_implementation="static"))


def test_trees_of_a_size_that_pays_wait_no_more(prompts, shape):
    """Where reading costs: on a CPU, a dynamic cache's drafts are looked at while they grow."""
    target = small_target()
    poss = drafter_for(target, shape, total="auto", depth="auto")
    assert_at_most_one(rounds_of(target, poss, prompts, cache_implementation="static"))


@pytest.mark.parametrize("key", ["llama_4_text", "gemma_4_text", "deepseek-v3"])
def test_targets_of_other_make_wait_no_more(key, prompts):
    """Layers of several kinds, of unlike shape, that share keys, with experts and with narrow values."""
    (family,) = (family for family in FAMILIES if family.key == key)
    target = family.make_target("eager")
    assert_at_most_one(rounds_of(target, drafter_for(target, "tree"), prompts, eos_token_id=None))


def test_a_draft_vocabulary_waits_no_more(prompts, shape):
    target = small_target()
    poss = drafter_for(target, shape, draft_vocab_size=6)
    poss.set_draft_vocabulary(torch.arange(12))
    assert_at_most_one(rounds_of(target, poss, prompts))


def test_features_of_several_layers_wait_no_more(prompts, shape):
    target = small_target()
    assert_at_most_one(rounds_of(target, drafter_for(target, shape, feature_layers=[0, 1, 2]), prompts))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.8, "top_k": 4, "top_p": 0.9},
        {"repetition_penalty": 1.3},
        {"return_dict_in_generate": True, "output_scores": True},
    ],
    ids=["sampled", "warped", "processed", "kept"],
)
def test_picks_that_depend_on_one_another_wait_once_each(kwargs, prompts, shape):
    """A read an emitted token and one a round, at most; each row's own draws included."""
    target = small_target()
    torch.manual_seed(0)
    with collect_statistics() as stats:
        rounds = rounds_of(target, drafter_for(target, shape), prompts, eos_token_id=None, **kwargs)
    reads = [wait for waits in rounds[:-1] for wait in waits]  # behind the last one the call gives back its cache
    assert len(reads) <= stats.tokens + len(rounds)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="counts what CUDA itself says of its waits")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_round_on_a_gpu_waits_once(attention, prompts, shape):
    """Uploads from pageable memory and what torch's kernels wait for by themselves included."""
    target = small_target(attention=attention).cuda()
    poss = drafter_for(target, shape)
    on_device = {name: tensor.cuda() for name, tensor in prompts.items()}

    def write() -> None:
        target.generate(
            **on_device,
            assistant_model=poss,
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )

    write()  # handles and workspaces are made by the first call
    passes: list[int] = []  # warnings up to each pass of the target
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        hook = target.register_forward_pre_hook(lambda *_: passes.append(len(seen)))
        torch.cuda.set_sync_debug_mode("warn")
        try:
            torch.ones(1, device="cuda").item()
            assert any("synchroniz" in str(warning.message) for warning in seen), "the mode says nothing"
            write()
        finally:
            torch.cuda.set_sync_debug_mode("default")
            hook.remove()
    said = ["synchroniz" in str(warning.message) for warning in seen]
    rounds = [sum(said[start:end]) for start, end in itertools.pairwise(passes[1:])]
    assert len(rounds) > 2 and max(rounds) <= 1
