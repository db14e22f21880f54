"""Drafting from the most frequent tokens: which they are, what a head of theirs computes, what is saved."""

import copy
from collections import Counter

import pytest
import test_generation
import torch
from conftest import (
    SHAPES,
    SMALL_VOCAB,
    VOCAB_SIZE,
    drafter_for,
    left_padded,
    make_poss,
    make_prompt,
    make_target,
    pretrained_folder,
    small_target,
)
from safetensors.torch import load_file, save_file
from test_checkpoints import VOCAB, published_weights, write_checkpoint
from test_generation import ERROR_RATE, PROMPT, SAMPLING, TINY_VOCAB, chi_square_p_value, exact_joint
from tiny_chat import word_tokenizer
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, CohereConfig, PreTrainedModel

from hf_poss import PosSConfig, PosSModel, collect_statistics
from hf_poss.draft_vocabulary import rank_tokens, size_of_coverage
from hf_poss.modeling_poss import TargetReference


tiny_target = test_generation.tiny_target


def counts_of(vocab: int = VOCAB_SIZE, seed: int = 0) -> torch.LongTensor:
    return torch.randint(50, (vocab,), generator=torch.Generator().manual_seed(seed))


def test_the_most_frequent_come_first():
    counts = torch.tensor([5, 0, 9, 5, 1, 7])
    assert rank_tokens(counts, 4).tolist() == [2, 5, 0, 3]
    assert rank_tokens(counts, 4, always=[1]).tolist() == [1, 2, 5, 0]
    assert rank_tokens(counts, 6, always=[3, 1, 3]).tolist() == [1, 3, 2, 5, 0, 4]


def test_ends_of_a_sequence_are_always_drafted(llama):
    poss = make_poss(llama, draft_vocab_size=3)
    counts = counts_of()
    counts[llama.config.eos_token_id] = 0
    assert llama.config.eos_token_id in poss.set_draft_vocabulary(counts).draft_vocabulary.tolist()


def test_a_share_of_the_text_chooses_the_size():
    counts = torch.tensor([5, 0, 9, 5, 1, 0])  # 20 in all
    assert [size_of_coverage(counts, share) for share in (0.01, 0.45, 0.46, 0.7, 0.95, 0.96, 1.0)] == [
        *(1, 1, 2, 2, 3, 4, 4)
    ]
    assert size_of_coverage(counts, 0.45, always=[1, 5]) == 3
    assert size_of_coverage(counts, 0.01, always=[1, 2]) == 2


# ---- Setting it ----


@pytest.mark.parametrize("kind", ["texts", "generator", "ids"])
def test_it_is_counted_from_a_corpus(poss, kind):
    texts = ["w20 w21 w20", "w20 w30 w21"]
    corpus = {"texts": texts, "generator": iter(texts), "ids": [[20, 21, 20], [20, 30, 21]]}[kind]
    tokenizer = None if kind == "ids" else word_tokenizer(chat_template=None)
    assert poss.set_draft_vocabulary(corpus, 3, tokenizer=tokenizer) is poss
    assert poss.draft_vocabulary.tolist() == [2, 20, 21]  # the end of a sequence always


def test_a_share_of_the_text_is_covered(poss):
    corpus = [[20] * 90 + [21] * 8 + [22] * 2]
    for coverage, tokens in {0.9: [20], 0.98: [20, 21], 0.981: [20, 21, 22], 1.0: [20, 21, 22]}.items():
        poss.set_draft_vocabulary(corpus, coverage=coverage)
        assert poss.draft_vocabulary.tolist() == [2, *tokens]  # the end of a sequence always
        assert poss.config.draft_vocab_size == 1 + len(tokens)


def test_what_the_chat_template_writes_is_always_drafted(poss):
    tokenizer = word_tokenizer("{{ bos_token }}{% for turn in messages %}w90 {{ turn['content'] }} w91{% endfor %}")
    tokenizer.add_special_tokens({"additional_special_tokens": ["w90", "w91"]})
    counts = torch.zeros(VOCAB_SIZE, dtype=torch.long)
    counts[20:40] = 5
    assert poss.set_draft_vocabulary(counts, 10).draft_vocabulary.tolist() == [2, *range(20, 29)]
    found = poss.set_draft_vocabulary(counts, 10, tokenizer=tokenizer).draft_vocabulary
    assert found.tolist() == [1, 2, 90, 91, *range(20, 26)]
    with pytest.raises(ValueError, match="is 3, and 4 tokens are kept in any case"):
        poss.set_draft_vocabulary(counts, 3, tokenizer=tokenizer)


def test_it_can_be_changed_and_taken_back(llama, tmp_path):
    poss = make_poss(llama)
    everything = copy.deepcopy(poss)
    tokens, features = make_prompt(6), torch.randn(1, 6, 32)

    def loss(model):
        with torch.no_grad():
            return model.attach(llama)(input_ids=tokens, features=features).loss

    poss.set_draft_vocabulary(counts_of(), 10).set_draft_vocabulary(counts_of(seed=1), 5)
    other = make_poss(llama).set_draft_vocabulary(counts_of(seed=1), 5)
    assert poss.config.draft_vocab_size == 5 and torch.equal(poss.draft_vocabulary, other.draft_vocabulary)
    assert not torch.equal(loss(poss), loss(everything))
    assert poss.set_draft_vocabulary(None) is poss
    assert poss.set_draft_vocabulary(None).config.draft_vocab_size is None
    assert torch.equal(loss(poss), loss(everything))
    assert poss.state_dict().keys() == everything.state_dict().keys()
    poss.save_pretrained(tmp_path)
    assert PosSModel.from_pretrained(tmp_path).config.draft_vocab_size is None


def test_a_refusal_leaves_what_was_set(poss):
    poss.set_draft_vocabulary(counts_of(), 10)
    before = poss.draft_vocabulary.clone()

    def corpus():
        yield [5, 6]
        raise RuntimeError("the stream broke")

    for bad in (corpus(), [[5, VOCAB_SIZE]]):
        with pytest.raises((RuntimeError, ValueError)):
            poss.set_draft_vocabulary(bad, 5)
        assert poss.config.draft_vocab_size == 10 and torch.equal(poss.draft_vocabulary, before)


def test_a_size_is_refused_before_a_corpus_is_read(poss):
    corpus = iter([[5, 6]])
    with pytest.raises(ValueError, match="is 98; expected"):
        poss.set_draft_vocabulary(corpus, 98)
    assert next(corpus) == [5, 6]


# ---- The head ----


@pytest.mark.parametrize("kind", ["matrix", "hooked", "another class"])
@pytest.mark.parametrize("bias", [False, True])
def test_its_logits_are_rows_of_the_targets(kind, bias):
    class OtherLinear(nn.Linear):
        pass

    target = make_target()
    head = (OtherLinear if kind == "another class" else nn.Linear)(32, VOCAB_SIZE, bias=bias)
    if kind == "hooked":
        head.register_forward_hook(lambda module, inputs, output: output + 1.0)
    target.lm_head = head
    poss = make_poss(target, draft_vocab_size=20).set_draft_vocabulary(counts_of())
    poss.reference.logit_scale, poss.reference.softcap = 0.5, 3.0
    cut = poss.draft_head(poss.reference)
    features = torch.randn(2, 3, 32)
    with torch.no_grad():
        expected = poss.reference.logits(features)[..., poss.draft_vocabulary]
        torch.testing.assert_close(cut.logits(features), expected)
    assert (cut.rows is None) == (kind != "matrix")


def head_on_its_device() -> PreTrainedModel:
    """As accelerate leaves a head of a model that it spreads over devices."""
    hooks = pytest.importorskip("accelerate.hooks")
    target = small_target()
    hooks.add_hook_to_module(target.lm_head, hooks.AlignDevicesHook("cpu", io_same_device=True))
    return target


def offloaded_head() -> PreTrainedModel:
    accelerate = pytest.importorskip("accelerate")
    target = small_target()
    accelerate.cpu_offload(target.lm_head, execution_device="cpu")
    return target


def head_of(module: nn.Module) -> PreTrainedModel:
    target = small_target()
    target.lm_head = module
    return target


HEADS = {  # how to make a target, and whether rows are taken of its head
    "tied": (lambda: small_target(tie_word_embeddings=True), True),
    "biased": (lambda: head_of(nn.Linear(32, SMALL_VOCAB)), True),
    "half": (lambda: head_of(nn.Linear(32, SMALL_VOCAB, bias=False).bfloat16()), True),
    "on its device": (head_on_its_device, True),
    "offloaded": (offloaded_head, False),
    "patched": (lambda: head_of(patched_forward(nn.Linear(32, SMALL_VOCAB))), False),
}


def patched_forward(head: nn.Linear) -> nn.Linear:
    head.forward = lambda features: 2 * nn.Linear.forward(head, features)
    return head


@pytest.mark.parametrize("kind", HEADS)
def test_every_head_drafts_from_its_own_rows(kind, warnings_seen):
    make, cut = HEADS[kind]
    target = make()
    poss = drafter_for(small_target(), "tree").set_draft_vocabulary(torch.arange(SMALL_VOCAB), 5)
    reference = TargetReference.from_target(target, poss.config)
    features = torch.randn(2, 3, 32)
    with torch.no_grad():
        for _ in range(2):
            head = poss.draft_head(reference)
        torch.testing.assert_close(head.logits(features), reference.logits(features)[..., poss.draft_vocabulary])
    assert (head.rows is not None) == cut
    assert sum("saves no time" in warning for warning in warnings_seen()) == (not cut)


@pytest.mark.parametrize("kind", ["tied", "biased", "on its device", "offloaded", "patched"])
def test_the_text_of_every_head_stays_the_targets(kind):
    target = HEADS[kind][0]()
    poss = drafter_for(small_target(), "tree").set_draft_vocabulary(torch.arange(SMALL_VOCAB), 5)
    knobs = {"max_new_tokens": 30, "do_sample": False}
    expected = target.generate(make_prompt(9), **knobs)
    with collect_statistics() as stats:
        assert torch.equal(target.generate(make_prompt(9), assistant_model=poss, **knobs), expected)
    assert stats.tau > 1


@pytest.mark.parametrize("size", [None, 1, 5, 20, VOCAB_SIZE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_most_likely_drafts(llama, size, dtype):
    """As of log-probabilities over what is drafted from; equal logits come as `topk` gives them."""
    poss = make_poss(llama)
    if size is not None:
        poss.set_draft_vocabulary(counts_of(), size)
    poss.reference.logit_scale, poss.reference.softcap = 0.5, 3.0
    head = poss.draft_head(poss.reference)
    features = torch.cat((torch.randn(1, 2, 32), torch.zeros(1, 1, 32)), dim=1).to(dtype)
    with torch.no_grad():
        logits = poss.reference.logits(features)
        logits = logits if size is None else logits[..., poss.draft_vocabulary]
        for k in (1, 4, 1000):
            values, tokens = head.top(features, k)
            kept = min(k, size or VOCAB_SIZE)
            assert values.shape == tokens.shape == (1, 3, kept)
            assert values.dtype == torch.float32 and tokens.dtype == torch.int64
            expected, index = logits.log_softmax(-1).topk(kept, dim=-1)
            torch.testing.assert_close(values, expected)
            assert torch.equal(tokens, index if size is None else poss.draft_vocabulary[index])
            assert (values <= 0).all()


# ---- Drafting ----


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1, 4, 9])
def test_the_text_stays_the_targets(shape, size, sampled):
    target = small_target()
    poss = drafter_for(target, shape, draft_vocab_size=size)
    poss.set_draft_vocabulary(counts_of(target.config.vocab_size))
    knobs = {"max_new_tokens": 40, "do_sample": sampled}
    torch.manual_seed(0)
    expected = target.generate(make_prompt(9), **knobs)
    torch.manual_seed(0)
    assert torch.equal(target.generate(make_prompt(9), assistant_model=poss, **knobs), expected)


def test_the_text_of_a_batch_stays_the_targets():
    target = small_target()
    poss = drafter_for(target, "tree", draft_vocab_size=6).set_draft_vocabulary(counts_of(target.config.vocab_size))
    inputs = left_padded([make_prompt(9), make_prompt(4, seed=2)])
    expected = target.generate(**inputs, max_new_tokens=30, do_sample=False)
    assert torch.equal(target.generate(**inputs, assistant_model=poss, max_new_tokens=30, do_sample=False), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_sampled_text_has_the_targets_distribution(tiny_target, shape):
    """Joint distribution of the first three tokens, of which half are never drafted; fails a correct sampler with
    probability `ERROR_RATE`."""
    poss = drafter_for(tiny_target, shape)
    poss.set_draft_vocabulary(torch.arange(TINY_VOCAB), TINY_VOCAB // 2)
    rows, knobs = 1000, {"max_new_tokens": 4, "do_sample": True, **SAMPLING}
    torch.manual_seed(0)
    with collect_statistics() as stats:
        texts = tiny_target.generate(PROMPT.expand(rows, -1), assistant_model=poss, **knobs)[:, PROMPT.shape[1] :]
    assert stats.accepted[0] > rows / 20
    counts = Counter(tuple(text[:3]) for text in texts.tolist())
    assert chi_square_p_value(counts, exact_joint(tiny_target, PROMPT)) > ERROR_RATE


def test_specialists_in_adapters_draft_from_it():
    peft = pytest.importorskip("peft")
    target = small_target()
    knobs = {"max_new_tokens": 30, "do_sample": False}
    expected = target.generate(make_prompt(9), **knobs)
    wrapped = peft.get_peft_model(drafter_for(target, "tree"), peft.LoraConfig(target_modules=["q_proj", "fc"]))
    wrapped.set_draft_vocabulary(torch.arange(SMALL_VOCAB), 5)
    own = drafter_for(target, "tree", specialist_adapter={"r": 4})
    own.set_draft_vocabulary(torch.arange(SMALL_VOCAB), 5)
    for poss in (wrapped, own):
        assert poss.config.draft_vocab_size == 5 and len(poss.draft_vocabulary) == 5
        assert torch.equal(target.generate(make_prompt(9), assistant_model=poss, **knobs), expected)


def test_only_its_tokens_are_drafted(monkeypatch):
    from hf_poss import PosSCandidateGenerator

    target = small_target()
    poss = drafter_for(target, "tree", draft_vocab_size=4).set_draft_vocabulary(counts_of(target.config.vocab_size))
    drafted, draft = set(), PosSCandidateGenerator.draft

    def watched(self, *args):
        tree = draft(self, *args)
        drafted.update(tree.tokens[:, 1:].flatten().tolist())
        return tree

    monkeypatch.setattr(PosSCandidateGenerator, "draft", watched)
    target.generate(make_prompt(9), assistant_model=poss, max_new_tokens=30, do_sample=False)
    assert drafted <= set(poss.draft_vocabulary.tolist()) and len(drafted) > 1


def test_a_vocabulary_of_all_tokens_drafts_what_no_vocabulary_drafts():
    target = small_target()
    full = drafter_for(target, "tree")
    cut = PosSModel(copy.deepcopy(full.config))
    cut.load_state_dict(full.state_dict())
    cut.set_draft_vocabulary(counts_of(target.config.vocab_size), size=target.config.vocab_size)
    features, tokens = torch.randn(1, 5, 32), make_prompt(5)
    with torch.no_grad():
        one = full.attach(target)(input_ids=tokens, features=features)
        other = cut.attach(target)(input_ids=tokens, features=features)
    torch.testing.assert_close(one.loss, other.loss)
    assert torch.equal(one.counts, other.counts)


# ---- Saving and loading ----


@pytest.mark.parametrize("load", [PosSModel.from_pretrained, AutoModel.from_pretrained])
def test_it_is_saved_with_the_weights(llama, tmp_path, load):
    poss = make_poss(llama, draft_vocab_size=10).set_draft_vocabulary(counts_of())
    poss.save_pretrained(tmp_path)
    back = load(tmp_path)
    assert back.config.draft_vocab_size == 10
    assert torch.equal(back.draft_vocabulary, poss.draft_vocabulary)
    assert back.half().draft_vocabulary.dtype == torch.int64


def test_a_published_checkpoint_takes_one(tmp_path):
    folder = write_checkpoint(tmp_path / "PosS2-tiny", published_weights(2))
    poss = PosSModel.from_pretrained(folder).set_draft_vocabulary(torch.arange(VOCAB), 7)
    poss.save_pretrained(tmp_path / "own")
    back = PosSModel.from_pretrained(tmp_path / "own")
    assert torch.equal(back.draft_vocabulary, poss.draft_vocabulary) and len(back.draft_vocabulary) == 7
    assert set(back.draft_vocabulary.tolist()) >= set(range(VOCAB - 6, VOCAB))


def test_specialists_that_never_learnt_with_one_draft_well_from_it(stories):
    """Half of the tokens make up most of a text: little of tau is lost, and nothing of the text."""
    target, tokenizer = stories
    poss = PosSModel.from_pretrained(pretrained_folder("PosS2-stories260k")).eval()
    inputs = tokenizer("Once upon a time there was a little dog named", return_tensors="pt")
    knobs = {"max_new_tokens": 120, "do_sample": False}
    written = target.generate(**inputs, **knobs)
    taus = []
    for size in (None, tokenizer.vocab_size // 2):
        if size is not None:
            poss.set_draft_vocabulary(tokenizer.batch_decode(written), size, tokenizer=tokenizer)
        with collect_statistics() as stats:
            assert torch.equal(target.generate(**inputs, assistant_model=poss, **knobs), written)
        taus.append(stats.tau)
    assert taus[1] > 0.9 * taus[0] > 1.8


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tokens: tokens.index_fill(0, torch.tensor([3]), VOCAB_SIZE), "outside of the target's 97"),
        (lambda tokens: tokens.index_fill(0, torch.tensor([0]), -1), "outside of the target's 97"),
        (lambda tokens: tokens.index_copy(0, torch.tensor([1]), tokens[:1]), "1 token.s. twice"),
        (lambda tokens: tokens[:-1], "does not hold position specialists of this shape"),
        (lambda tokens: None, "missing: draft_vocabulary"),
    ],
)
def test_one_that_cannot_be_is_refused_on_load(llama, tmp_path, change, told):
    make_poss(llama, draft_vocab_size=10).set_draft_vocabulary(counts_of()).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    changed = change(weights.pop("draft_vocabulary"))
    save_file(weights if changed is None else {**weights, "draft_vocabulary": changed}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=told):
        PosSModel.from_pretrained(tmp_path)


def test_one_that_was_never_set_is_asked_for(llama, tmp_path):
    poss = make_poss(llama, draft_vocab_size=10)
    for work in (
        lambda: poss(input_ids=make_prompt(4), features=torch.randn(1, 4, 32)),
        lambda: llama.generate(make_prompt(4), assistant_model=poss, max_new_tokens=4),
    ):
        with pytest.raises(ValueError, match="draft vocabulary is not set.*set_draft_vocabulary"):
            work()
    poss.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="never set"):
        PosSModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("counts", "size", "told"),
    [
        (torch.zeros(5), 3, r"shape \(5,\); expected \(97,\)"),
        (counts_of(), 0, "is 0; expected 1 to 97"),
        (counts_of(), 98, "is 98; expected 1 to 97"),
        (counts_of(), None, "is None; expected 1 to 97"),
        (counts_of(), True, "is True; expected 1 to 97"),
        (counts_of(), 10.0, "is 10.0; expected 1 to 97"),
        (-counts_of(), 3, "below 0"),
        (torch.full((97,), float("nan")), 3, "no numbers"),
        (torch.zeros(97, dtype=torch.long), 3, "No token was counted"),
        ([], 3, "No token was counted"),
        (None, 3, "nothing to choose tokens by"),
    ],
)
def test_wrong_counts_and_sizes_are_refused(poss, counts, size, told):
    with pytest.raises(ValueError, match=told):
        poss.set_draft_vocabulary(counts, size)


@pytest.mark.parametrize(
    ("size", "coverage", "told"),
    [(None, 0.0, "is 0.0; expected a share"), (None, 1.5, "is 1.5"), (5, 0.5, "expected one of the two")],
)
def test_wrong_shares_are_refused(poss, size, coverage, told):
    with pytest.raises(ValueError, match=told):
        poss.set_draft_vocabulary(counts_of(), size, coverage=coverage)


@pytest.mark.parametrize("size", [0, VOCAB_SIZE + 1])
def test_a_size_beyond_the_vocabulary_is_refused(size):
    with pytest.raises(ValueError, match=f"`draft_vocab_size` is {size}"):
        PosSConfig(vocab_size=VOCAB_SIZE, draft_vocab_size=size)


def test_scaled_logits_are_scaled_once():
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = CohereConfig(**sizes, num_attention_heads=2, logit_scale=0.25, pad_token_id=0, eos_token_id=1)
    target = AutoModelForCausalLM.from_config(config).eval()
    poss = PosSModel.from_target(target, draft_vocab_size=5).set_draft_vocabulary(counts_of(20))
    with torch.no_grad():
        output = target(torch.arange(6)[None], output_hidden_states=True)
        found = poss.draft_head(poss.reference).logits(output.hidden_states[-1])
    torch.testing.assert_close(found, output.logits[..., poss.draft_vocabulary])
