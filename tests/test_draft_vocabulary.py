"""Drafting from the most frequent tokens: which they are, what a head of theirs computes, what is saved."""

import copy

import pytest
import torch
from conftest import SHAPES, VOCAB_SIZE, drafter_for, left_padded, make_poss, make_prompt, make_target, small_target
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, CohereConfig

from hf_poss import PosSConfig, PosSModel
from hf_poss.draft_vocabulary import rank_tokens


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


@pytest.mark.parametrize("load", [PosSModel.from_pretrained, AutoModel.from_pretrained])
def test_it_is_saved_with_the_weights(llama, tmp_path, load):
    poss = make_poss(llama, draft_vocab_size=10).set_draft_vocabulary(counts_of())
    poss.save_pretrained(tmp_path)
    back = load(tmp_path)
    assert back.config.draft_vocab_size == 10
    assert torch.equal(back.draft_vocabulary, poss.draft_vocabulary)
    assert back.half().draft_vocabulary.dtype == torch.int64


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
    ],
)
def test_wrong_counts_and_sizes_are_refused(poss, counts, size, told):
    with pytest.raises(ValueError, match=told):
        poss.set_draft_vocabulary(counts, size)


@pytest.mark.parametrize("size", [0, VOCAB_SIZE + 1])
def test_a_size_beyond_the_vocabulary_is_refused(size):
    with pytest.raises(ValueError, match=f"`draft_vocab_size` is {size}"):
        PosSConfig(vocab_size=VOCAB_SIZE, draft_vocab_size=size)


def test_scaled_logits_are_scaled_once():
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    from transformers import AutoModelForCausalLM

    config = CohereConfig(**sizes, num_attention_heads=2, logit_scale=0.25, pad_token_id=0, eos_token_id=1)
    target = AutoModelForCausalLM.from_config(config).eval()
    poss = PosSModel.from_target(target, draft_vocab_size=5).set_draft_vocabulary(counts_of(20))
    with torch.no_grad():
        output = target(torch.arange(6)[None], output_hidden_states=True)
        found = poss.draft_head(poss.reference).logits(output.hidden_states[-1])
    torch.testing.assert_close(found, output.logits[..., poss.draft_vocabulary])
