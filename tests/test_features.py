"""Features of several layers of a target: what is read of it, in training and in drafting."""

import pytest
import torch
from conftest import SHAPES, drafter_for, left_padded, make_poss, make_prompt, make_target, small_target
from transformers import AutoModel, DynamicCache

from hf_poss import PosSConfig, PosSModel, collect_statistics
from hf_poss.features import hidden_states_wanted, select_features
from hf_poss.training.features import target_features


LAYERS = {"last": None, "low and high": [0, 2], "one": [1]}


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_what_is_asked_for_is_what_all_hidden_states_hold(family, layers):
    target, tokens = small_target(family), make_prompt(7)
    with torch.no_grad():
        states = target(tokens, output_hidden_states=True).hidden_states
        outputs = target(tokens, output_hidden_states=hidden_states_wanted(layers))
    expected = states[-1] if layers is None else torch.cat([states[layer] for layer in layers], dim=-1)
    assert torch.equal(select_features(outputs.hidden_states, layers), expected)
    features, last = target_features(target, tokens, feature_layers=layers)
    assert torch.equal(features, expected) and torch.equal(last, states[-1])


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_drafting_reads_what_training_reads(layers):
    """The first draft of a round is the roll-out's prediction at the last token of the prompt."""
    target = small_target()
    poss = drafter_for(target, "chain", feature_layers=layers, depth=3)
    prompt = make_prompt(9)
    with torch.no_grad():
        root = target(prompt).logits[:, -1:].argmax(-1)
    features, _ = target_features(target, prompt, feature_layers=layers)
    with torch.no_grad():
        tokens = torch.cat((prompt[:, 1:], root), dim=1)
        predicted = poss.roll_out(features, tokens)[0][:, -1]
        expected = poss.reference.logits(predicted).argmax(-1)

    from hf_poss import PosSCandidateGenerator

    drafter = PosSCandidateGenerator(prompt, poss, target.generation_config, {}, target)
    with torch.no_grad():
        drafter.extend_context(features, tokens)
        tree = drafter.draft(root[0], drafter.settings)
    assert tree.tokens[0, 1] == expected[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "mistral"])
def test_the_text_stays_the_targets(family, shape):
    target = small_target(family)
    poss = drafter_for(target, shape, feature_layers=[0, 1, 2])
    inputs = left_padded([make_prompt(9), make_prompt(5, seed=2)])
    knobs = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    expected = target.generate(**inputs, **knobs)
    with collect_statistics() as stats:
        assert torch.equal(target.generate(**inputs, assistant_model=poss, **knobs), expected)
    assert stats.rounds


def test_hidden_states_that_are_asked_for_are_all_returned():
    target = small_target()
    poss = drafter_for(target, "tree", feature_layers=[0, 1])
    knobs = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_hidden_states": True}
    expected = target.generate(make_prompt(6), **knobs)
    found = target.generate(make_prompt(6), assistant_model=poss, **knobs)
    assert torch.equal(found.sequences, expected.sequences)
    for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_conversation_goes_on_with_drafters_that_read_other_layers():
    """What is remembered of a cache's features is of the layers that were read then."""
    target = small_target()
    drafters = [drafter_for(target, "tree", feature_layers=layers) for layers in ([0, 1], [1, 2], None, [0, 1])]
    cache, tokens = DynamicCache(), make_prompt(6)
    for poss in drafters:
        knobs = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 8, "do_sample": False}
        expected = target.generate(tokens, **knobs)
        tokens = target.generate(tokens, assistant_model=poss, past_key_values=cache, **knobs)
        assert torch.equal(tokens, expected)


@pytest.mark.parametrize("load", [PosSModel.from_pretrained, AutoModel.from_pretrained])
def test_the_projection_is_saved(llama, tmp_path, load):
    poss = make_poss(llama, feature_layers=[0, 2])
    poss.save_pretrained(tmp_path)
    back = load(tmp_path)
    assert back.config.feature_layers == [0, 2]
    assert torch.equal(back.feature_fc.weight, poss.feature_fc.weight)
    assert back.feature_fc.weight.shape == (32, 64)


def test_one_target_row_reads_one_projection(llama):
    """The projection is what `roll_out` reads: [low; high] side by side, low first."""
    poss = make_poss(llama, feature_layers=[0, 2], num_draft_positions=2)
    plain = PosSModel(PosSConfig(**{**poss.config.to_dict(), "feature_layers": None})).eval().attach(llama)
    plain.load_state_dict({k: v for k, v in poss.state_dict().items() if k != "feature_fc.weight"})
    low, high, tokens = torch.randn(1, 5, 32), torch.randn(1, 5, 32), make_prompt(5)
    with torch.no_grad():
        found = poss.roll_out(torch.cat((low, high), dim=-1), tokens)
        fused = low @ poss.feature_fc.weight[:, :32].T + high @ poss.feature_fc.weight[:, 32:].T
        for one, other in zip(found, plain.roll_out(fused, tokens), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", [[], [-1], [1, 1]])
def test_layers_that_cannot_be_are_refused(layers):
    with pytest.raises(ValueError, match="`feature_layers` is"):
        PosSConfig(feature_layers=layers)


def test_layers_that_the_target_lacks_are_refused(llama):
    with pytest.raises(ValueError, match=r"hidden states \[1, 3\], LlamaForCausalLM has 0 to 2"):
        PosSModel.from_target(llama, feature_layers=[1, 3])


def test_copies_of_a_layer_read_what_it_reads(llama, tmp_path):
    eagle = make_poss(llama, feature_layers=[0, 2], positions_per_specialist=2, num_draft_positions=2)
    eagle.save_pretrained(tmp_path)
    copies = PosSModel.from_eagle(tmp_path, positions_per_specialist=1, num_draft_positions=3)
    assert copies.config.feature_layers == [0, 2]
    assert torch.equal(copies.feature_fc.weight, eagle.feature_fc.weight)
    with pytest.raises(ValueError, match="`feature_layers` cannot be chosen"):
        PosSModel.from_eagle(tmp_path, feature_layers=[0, 1, 2])


def test_features_of_another_width_are_refused(llama):
    poss = make_poss(llama, feature_layers=[0, 2])
    with pytest.raises(ValueError, match=r"`features` has shape \(1, 4, 32\); expected \(1, 4, 64\)"):
        poss(input_ids=make_prompt(4), features=torch.randn(1, 4, 32), target_features=torch.randn(1, 4, 32))


def test_the_loss_compares_with_the_last_layer(llama):
    poss = make_poss(llama, feature_layers=[0, 1], num_draft_positions=2)
    tokens = make_prompt(6)
    features, last = target_features(llama, tokens, feature_layers=[0, 1])
    with torch.no_grad():
        output = poss(input_ids=tokens, features=features, target_features=last, losses={"feature": 1.0})
        expected = [
            torch.nn.functional.smooth_l1_loss(predicted, last[:, 1:], reduction="none").mean(-1).sum()
            for predicted in output.predictions
        ]
    torch.testing.assert_close(output.loss_sums[0, 0], torch.stack(expected))


# ---- Packed samples ----


def packed(lengths, seed=0):
    """A packed sample and its documents."""
    generator = torch.Generator().manual_seed(seed)
    documents = [torch.randint(3, 12, (1, length), generator=generator) for length in lengths]
    segment_ids = torch.cat([torch.full((1, length), n) for n, length in enumerate(lengths, start=1)], dim=1)
    position_ids = torch.cat([torch.arange(length)[None] for length in lengths], dim=1)
    return documents, segment_ids, position_ids


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mistral", "gemma3"])
def test_documents_of_a_packed_sample_do_not_see_each_other(family, attention):
    """Windows of 8 tokens; documents are shorter and longer than that."""
    target = small_target(family, attention)
    one, segments, positions = packed([11, 3, 14])
    two, other_segments, other_positions = packed([20, 1], seed=1)
    tokens = torch.zeros(2, 28, dtype=torch.long)
    segment_ids, position_ids = torch.zeros_like(tokens), torch.zeros_like(tokens)
    tokens[0], segment_ids[0], position_ids[0] = torch.cat(one, dim=1), segments, positions
    tokens[1, :21], segment_ids[1, :21] = torch.cat(two, dim=1), other_segments
    position_ids[1, :21] = other_positions
    mask = (segment_ids > 0).long()
    features, last = target_features(target, tokens, mask, segment_ids, position_ids, feature_layers=[1, 2])
    for row, documents in enumerate((one, two)):
        start = 0
        for document in documents:
            end = start + document.shape[1]
            wanted, wanted_last = target_features(target, document, feature_layers=[1, 2])
            torch.testing.assert_close(features[row, start:end], wanted[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(last[row, start:end], wanted_last[0], rtol=1e-4, atol=1e-4)
            start = end


def test_a_target_that_takes_no_masks_reads_a_row_a_document(warnings_seen):
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    target = BloomForCausalLM(BloomConfig(vocab_size=12, hidden_size=32, n_layer=2, n_head=4)).eval()
    documents, segment_ids, position_ids = packed([5, 2, 9])
    tokens = torch.nn.functional.pad(torch.cat(documents, dim=1), (0, 3))
    segment_ids, position_ids = (torch.nn.functional.pad(x, (0, 3)) for x in (segment_ids, position_ids))
    features, last = target_features(target, tokens, (segment_ids > 0).long(), segment_ids, position_ids)
    assert features.shape == (1, 19, 32)
    start = 0
    for document in documents:
        end = start + document.shape[1]
        wanted, _ = target_features(target, document)
        torch.testing.assert_close(features[:, start:end], wanted, rtol=1e-4, atol=1e-4)
        start = end
    assert not features[:, 16:].any() and torch.equal(features, last)
    assert any("a row a document" in text for text in warnings_seen())


def test_packing_changes_no_loss():
    """The losses of documents in one sample are those of documents on their own."""
    target = make_target()
    poss = make_poss(target, num_draft_positions=4, feature_layers=[1, 2])
    documents, segment_ids, position_ids = packed([11, 3, 9])
    tokens = torch.cat(documents, dim=1)
    labels = tokens.masked_fill(position_ids == 0, -100)
    features, last = target_features(target, tokens, None, segment_ids, position_ids, feature_layers=[1, 2])
    with torch.no_grad():
        together = poss(
            input_ids=tokens,
            features=features,
            target_features=last,
            labels=labels,
            segment_ids=segment_ids,
            position_ids=position_ids,
        )
        apart = []
        for document in documents:
            features, last = target_features(target, document, feature_layers=[1, 2])
            apart.append(poss(input_ids=document, features=features, target_features=last))
    sums = torch.stack([part.loss_sums for part in apart]).sum(0)
    torch.testing.assert_close(together.loss_sums, sums, rtol=1e-4, atol=1e-4)
    assert torch.equal(together.counts, torch.stack([part.counts for part in apart]).sum(0))
