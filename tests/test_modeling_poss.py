"""Position specialists as a model: what is saved, what a roll-out computes, its losses and gradients."""

import copy
import json
import math
import shutil
import weakref

import pytest
import torch
from conftest import make_poss, make_target
from safetensors import safe_open
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    HyperCLOVAXConfig,
    MambaConfig,
    MambaForCausalLM,
    PhiConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_poss import PosSConfig, PosSModel
from hf_poss import losses as losses_module
from hf_poss import roll_out as roll_out_module
from hf_poss.losses import LOSSES
from hf_poss.modeling_poss import TargetReference, chain_counts


VOCAB, HIDDEN = 97, 32


def random_rows(batch=2, rows=9, seed=0):
    """Features and next tokens of random rows."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, rows, HIDDEN, generator=generator)
    return features, torch.randint(VOCAB, (batch, rows), generator=generator)


def widen(poss, factor=4.0):
    """Weights with which specialists differ clearly from each other and from the identity."""
    with torch.no_grad():
        for parameter in poss.parameters():
            parameter.mul_(factor) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) / 4)
    return poss


def unattached(seed=0, **kwargs):
    """Specialists with another target than the tests' own: nothing but fields of the config."""
    torch.manual_seed(seed)
    geometry = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 48, "num_attention_heads": 4}
    return PosSModel(PosSConfig(**{**geometry, "num_draft_positions": 4, **kwargs})).eval()


def attach_random(poss, seed=0):
    torch.manual_seed(seed)
    embedding, head = nn.Embedding(VOCAB, HIDDEN), nn.Linear(HIDDEN, VOCAB, bias=False)
    poss.reference = TargetReference(embedding.to(poss.dtype), head.to(poss.dtype), poss.config)
    return poss


def saved_keys(folder):
    keys = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            keys |= set(opened.keys())
    return keys


def assert_same_weights(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


# ---- A target's specialists ----


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_target_takes_width_dtype_and_device(family, dtype):
    target = make_target(family).to(dtype)
    poss = PosSModel.from_target(target, positions_per_specialist=2, num_draft_positions=5)
    assert {parameter.dtype for parameter in poss.parameters()} == {dtype}
    assert {parameter.device for parameter in poss.parameters()} == {target.device}
    assert poss.fc.weight.shape == (HIDDEN, 2 * HIDDEN)
    assert len(poss.layers) == math.ceil(5 / 2)
    head_dim = {"qwen3": 16}.get(family, 8)
    key_value_heads = {"llama": 2, "qwen3": 2}.get(family, 4)
    for layer in poss.layers:
        assert layer.self_attn.q_proj.weight.shape == (4 * head_dim, HIDDEN)
        assert layer.self_attn.k_proj.weight.shape == (key_value_heads * head_dim, HIDDEN)
        assert layer.self_attn.o_proj.weight.shape == (HIDDEN, 4 * head_dim)
        assert layer.mlp.down_proj.weight.shape == (HIDDEN, 4 * HIDDEN if family == "gpt2" else 64)


def test_specialists_start_apart(llama):
    poss = PosSModel.from_target(llama, positions_per_specialist=1, num_draft_positions=2)
    assert not torch.equal(poss.layers[0].mlp.up_proj.weight, poss.layers[1].mlp.up_proj.weight)


@pytest.mark.parametrize(("n", "k"), [(1, 4), (2, 4), (2, 5), (4, 4), (9, 4)])
def test_a_position_is_served_by_its_specialist(n, k):
    poss = unattached(positions_per_specialist=n, num_draft_positions=k)
    for position in range(1, k + 3):
        assert poss.specialist(position) is poss.layers[min((position - 1) // n, math.ceil(k / n) - 1)]


def test_the_depth_is_k_unless_told_otherwise():
    assert unattached(num_draft_positions=7).generation_config.num_assistant_tokens == 7


def test_embedding_and_head_are_the_targets_own(llama, poss, tmp_path):
    assert poss.reference.embed_tokens is llama.get_input_embeddings()
    assert poss.reference.lm_head is llama.get_output_embeddings()
    shared = {parameter.data_ptr() for parameter in llama.parameters()}
    assert not shared & {parameter.data_ptr() for parameter in poss.parameters()}
    assert not any(tensor.shape[0] == VOCAB for tensor in poss.state_dict().values() if tensor.dim())

    poss.save_pretrained(tmp_path)
    projections = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    names = [*projections, "post_attention_layernorm"]
    layers = {f"layers.{index}.{name}.weight" for index in range(2) for name in names}
    assert saved_keys(tmp_path) == {"fc.weight", "fc.bias"} | layers


def test_casting_the_drafter_leaves_the_target_alone(llama, poss):
    poss.to(torch.bfloat16)
    assert llama.dtype == torch.float32


def test_a_deep_copy_keeps_to_the_same_target(llama, poss):
    twin = copy.deepcopy(poss)
    assert twin.reference.embed_tokens is llama.get_input_embeddings()
    assert twin.reference.lm_head is llama.get_output_embeddings()
    assert_same_weights(twin.state_dict(), poss.state_dict())
    with torch.no_grad():
        twin.fc.weight.zero_()
    assert poss.fc.weight.abs().sum() > 0


# ---- Targets that do not fit ----


def test_a_target_of_another_vocabulary_or_width_is_refused(llama):
    with pytest.raises(ValueError, match="vocabulary of 50 tokens, LlamaForCausalLM has 97"):
        unattached(vocab_size=50).attach(llama)
    with pytest.raises(ValueError, match="hidden size of 64, .* of LlamaForCausalLM has 32"):
        unattached(hidden_size=64).attach(llama)


def test_the_drafters_own_target_is_named_where_another_is_refused(llama):
    with pytest.raises(ValueError, match="trained for this target.*somebody/model"):
        unattached(vocab_size=50, target_name_or_path="somebody/model").attach(llama)


def test_an_encoder_decoder_is_refused():
    config = T5Config(d_model=HIDDEN, d_ff=16, num_heads=2, d_kv=16, num_layers=1, vocab_size=VOCAB)
    target = T5ForConditionalGeneration(config)
    with pytest.raises(ValueError, match="encoder-decoder"):
        PosSModel.from_target(target)
    with pytest.raises(ValueError, match="encoder-decoder"):
        unattached().attach(target)


def test_a_target_with_recurrent_state_is_refused():
    target = MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=1))
    with pytest.raises(ValueError, match="recurrent state"):
        unattached().attach(target)


def test_a_target_without_head_is_refused(llama):
    with pytest.raises(ValueError, match="no language modelling head.*AutoModelForCausalLM"):
        PosSModel.from_target(llama.model)


@pytest.mark.parametrize("count", ["positions_per_specialist", "num_draft_positions"])
def test_counts_below_one_are_refused(llama, count):
    with pytest.raises(Exception, match=f"`{count}` is 0; expected 1 or more"):
        PosSModel.from_target(llama, **{count: 0})


def test_what_needs_a_target_says_so():
    poss = unattached()
    features, tokens = random_rows()
    with pytest.raises(ValueError, match=r"no target yet.*attach\(target\)"):
        poss(input_ids=tokens, features=features)
    with pytest.raises(ValueError, match=r"no target yet.*attach\(target\)"):
        poss.roll_out(features, tokens)


def test_a_drafter_does_not_write_alone(poss):
    with pytest.raises(NotImplementedError, match=r"target\.generate\(.*assistant_model=poss"):
        poss.generate(torch.tensor([[1, 2]]), max_new_tokens=2)


# ---- Saving and loading ----


@pytest.mark.parametrize("load", [PosSModel.from_pretrained, AutoModel.from_pretrained])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_size", ["1GB", "12KB"])
def test_a_saved_model_comes_back_bit_by_bit(llama, tmp_path, load, dtype, max_shard_size):
    target = copy.deepcopy(llama).to(dtype)
    poss = make_poss(target, positions_per_specialist=2, num_draft_positions=5)
    poss.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size == "12KB")

    back = load(tmp_path)
    assert type(back) is PosSModel
    assert_same_weights(back.state_dict(), poss.state_dict())
    assert back.config.specialist_index(5) == 2
    features, tokens = random_rows()
    with torch.no_grad():
        expected = poss.roll_out(features, tokens)
        found = back.attach(target).roll_out(features, tokens)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("load", [PosSModel.from_pretrained, AutoModel.from_pretrained])
def test_drafting_knobs_are_saved_and_loaded(poss, tmp_path, load):
    knobs = {"num_assistant_tokens": 3, "draft_top_k": 7, "draft_total_tokens": 13}
    for name, value in knobs.items():
        setattr(poss.generation_config, name, value)
    poss.save_pretrained(tmp_path)
    found = load(tmp_path).generation_config
    assert {name: getattr(found, name, None) for name in knobs} == knobs


def test_casting_equals_loading_in_that_dtype(llama, poss, tmp_path):
    widen(poss, 10.0).save_pretrained(tmp_path)
    loaded = PosSModel.from_pretrained(tmp_path, dtype=torch.bfloat16).attach(llama)
    cast = poss.to(torch.bfloat16)
    assert_same_weights(loaded.state_dict(), cast.state_dict())
    features, tokens = random_rows(rows=200)  # far positions show rounded frequencies
    with torch.no_grad():
        pairs = zip(cast.roll_out(features, tokens), loaded.roll_out(features, tokens), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("cast", [lambda model: model.to(torch.bfloat16), lambda model: model.half()])
def test_rotary_frequencies_are_never_rounded(poss, cast):
    exact = 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    torch.testing.assert_close(cast(poss).float().rotary_emb.inv_freq.double(), exact, rtol=1e-6, atol=0)


def test_a_model_made_without_memory_takes_weights(llama, poss):
    with torch.device("meta"):
        empty = PosSModel(poss.config)
    assert all(parameter.is_meta for parameter in empty.parameters())
    empty.load_state_dict(poss.state_dict(), assign=True)
    assert_same_weights(empty.state_dict(), poss.state_dict())

    whole = PosSModel.from_pretrained(None, config=poss.config, state_dict=poss.state_dict()).attach(llama)
    features, tokens = random_rows()
    with torch.no_grad():
        pairs = zip(whole.roll_out(features, tokens), poss.roll_out(features, tokens), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_push_to_hub_uploads_what_save_pretrained_writes(poss, monkeypatch, tmp_path):
    uploaded = {}

    class Card:
        def save(self, path):
            open(path, "w").close()

    class Api:
        def create_repo(self, repo_id, **kwargs):
            return type("Repository", (), {"repo_id": repo_id})

    def upload(self, working_dir, repo_id, **kwargs):
        uploaded["repo_id"] = repo_id
        shutil.copytree(working_dir, tmp_path, dirs_exist_ok=True)

    monkeypatch.setattr("transformers.utils.hub.hf_api", Api)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *args, **kwargs: Card())
    monkeypatch.setattr(PosSModel, "_upload_modified_files", upload)
    poss.push_to_hub("me/PosS2-tiny")
    assert uploaded == {"repo_id": "me/PosS2-tiny"}
    files = {file.name for file in tmp_path.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "README.md", "custom_generate"} <= files
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "poss"
    assert_same_weights(PosSModel.from_pretrained(tmp_path).state_dict(), poss.state_dict())


# ---- The roll-out, against one row at a time in float64 ----


def slow_roll_out(poss, embedding, features, next_tokens, position_ids):
    """Every row on its own: a softmax over the keys it may see, nothing else. Differentiable, for one document."""
    config, weights = poss.config, {name: value.double() for name, value in poss.named_parameters()}
    rows, dim = len(features), config.head_dim
    features, group = features.double(), config.num_attention_heads // config.num_key_value_heads

    def linear(name, x):
        bias = weights.get(f"{name}.bias")
        return weights[f"{name}.weight"] @ x + (0 if bias is None else bias)

    def turn(vector, row):
        turned = []
        for i in range(dim // 2):
            angle = float(position_ids[row]) * config.rope_parameters["rope_theta"] ** (-2 * i / dim)
            a, b = vector[i], vector[i + dim // 2]
            turned.append((a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)))
        return torch.stack([pair[0] for pair in turned] + [pair[1] for pair in turned])

    def fuse(row, feature):
        token = embedding.weight[next_tokens[row]].detach().double()
        return linear("fc", torch.cat((token, feature)))

    streams, predictions, stream = [], [], list(features)
    for position in range(1, config.num_draft_positions + 1):
        layer = f"layers.{config.specialist_index(position)}"
        streams.append([fuse(row, stream[row]) for row in range(rows)])
        predicted = []
        for row in range(rows):
            start = row - position + 1  # the round's last committed row
            seen = [(streams[0][r], r) for r in range(start + 1)]
            seen += [(streams[j][start + j], start + j) for j in range(1, position) if start + j >= 0]
            own, heads = streams[-1][row], []
            for head in range(config.num_attention_heads):
                part = slice(dim * (head // group), dim * (head // group + 1))
                query = linear(f"{layer}.self_attn.q_proj", own)[dim * head : dim * (head + 1)]
                keys = [turn(linear(f"{layer}.self_attn.k_proj", x)[part], r) for x, r in seen]
                values = [linear(f"{layer}.self_attn.v_proj", x)[part] for x, _ in seen]
                scores = torch.stack([turn(query, row) @ key for key in keys]) / math.sqrt(dim)
                shares = (scores - scores.max()).exp()
                shares = shares / shares.sum()
                heads.append(sum(share * value for share, value in zip(shares, values, strict=True)))
            hidden = own + linear(f"{layer}.self_attn.o_proj", torch.cat(heads))
            scale = (hidden.square().mean() + config.rms_norm_eps).rsqrt()
            normed = weights[f"{layer}.post_attention_layernorm.weight"] * hidden * scale
            gate = linear(f"{layer}.mlp.gate_proj", normed)
            up = linear(f"{layer}.mlp.up_proj", normed)
            predicted.append(hidden + linear(f"{layer}.mlp.down_proj", gate * gate.sigmoid() * up))
        predictions.append(torch.stack(predicted))
        stream = [stream[0], *(x.detach() for x in predicted[:-1])]
    return predictions


CASES = [
    {"positions_per_specialist": 1, "num_draft_positions": 3},
    {"positions_per_specialist": 2, "num_draft_positions": 4, "num_key_value_heads": 2},
    {"positions_per_specialist": 4, "num_draft_positions": 4, "num_key_value_heads": 1, "fc_bias": False},
    {"positions_per_specialist": 2, "num_draft_positions": 3, "head_dim": 6, "attention_bias": True, "mlp_bias": True},
]


# By sample the lengths of its documents, of 7 rows; the rest is padding.
DOCUMENTS = {"one": [[7], [7]], "padded": [[7], [5]], "packed": [[3, 4], [1, 2, 2]]}


@pytest.mark.parametrize(
    ("chunk", "documents", "checkpointing"),
    [(128, "one", False), (2, "one", False), (3, "padded", False), (2, "packed", False), (128, "packed", True)],
)
@pytest.mark.parametrize("case", CASES)
def test_a_roll_out_equals_rows_on_their_own(case, chunk, documents, checkpointing, monkeypatch):
    monkeypatch.setattr(roll_out_module, "CHUNK_ROWS", chunk)
    poss = attach_random(widen(unattached(**case))).train()
    if checkpointing:
        enable = getattr(poss, "activation_checkpointing_enable", poss.gradient_checkpointing_enable)
        enable()
    features, tokens = random_rows(rows=7)
    position_ids, segment_ids = torch.zeros(2, 7, dtype=torch.long), torch.zeros(2, 7, dtype=torch.long)
    spans = []
    for b, lengths in enumerate(DOCUMENTS[documents]):
        start = 0
        for number, length in enumerate(lengths, start=1):
            spans.append((b, slice(start, start + length)))
            position_ids[b, start : start + length] = torch.arange(length) + 3 * b
            segment_ids[b, start : start + length] = number
            start += length
    positions = poss.config.num_draft_positions
    cotangents = [random_rows(rows=7, seed=k)[0] * (segment_ids > 0)[..., None] for k in range(1, positions + 1)]

    given = None if documents == "one" else segment_ids
    found = poss.roll_out(features, tokens, position_ids=position_ids, segment_ids=given)
    sum((x * y).sum() for x, y in zip(found, cotangents, strict=True)).backward()
    found_grads = {name: value.grad.double() for name, value in poss.named_parameters()}

    poss.zero_grad()
    expected_loss = 0
    for b, rows in spans:
        parts = features[b][rows], tokens[b][rows], position_ids[b][rows]
        expected = slow_roll_out(poss, poss.reference.embed_tokens, *parts)
        for k in range(positions):
            torch.testing.assert_close(found[k][b][rows].double(), expected[k], rtol=1e-4, atol=1e-4)
            expected_loss = expected_loss + (expected[k] * cotangents[k][b][rows]).sum()
    expected_loss.backward()
    for name, value in poss.named_parameters():
        scale = value.grad.abs().max().item()
        torch.testing.assert_close(found_grads[name], value.grad.double(), rtol=1e-3, atol=1e-4 * scale, msg=name)


@pytest.mark.parametrize("position", [1, 2, 3, 4])
def test_hidden_rows_weigh_nothing(position):
    poss = attach_random(widen(unattached(positions_per_specialist=2, num_key_value_heads=2)))
    features, tokens = random_rows(batch=1, rows=8)
    row = 6
    last_seen = row - position + 1  # the last row whose target feature a round has seen
    with torch.no_grad():
        before = poss.roll_out(features, tokens)[position - 1][0, row]
        changed = features.clone()
        changed[:, last_seen + 1 :] = 1e4
        changed_tokens = tokens.clone()
        changed_tokens[:, row + 1 :] = (tokens[:, row + 1 :] + 1) % VOCAB
        assert torch.equal(poss.roll_out(changed, changed_tokens)[position - 1][0, row], before)

        for seen in range(last_seen + 1):
            changed = features.clone()
            changed[:, seen] += 1.0
            assert not torch.allclose(poss.roll_out(changed, tokens)[position - 1][0, row], before)
        for seen in range(row + 1):
            changed_tokens = tokens.clone()
            changed_tokens[:, seen] = (tokens[:, seen] + 1) % VOCAB
            assert not torch.allclose(poss.roll_out(features, changed_tokens)[position - 1][0, row], before)


def test_padding_weighs_nothing():
    poss = attach_random(widen(unattached()))
    features, tokens = random_rows(rows=7)
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    with torch.no_grad():
        padded = poss.roll_out(features, tokens, segment_ids=mask)
        alone = poss.roll_out(features[1:, :5], tokens[1:, :5])
    for one, other in zip(padded, alone, strict=True):
        torch.testing.assert_close(one[1, :5], other[0], rtol=1e-5, atol=1e-5)


def test_padding_on_the_left_weighs_nothing():
    poss = attach_random(widen(unattached()))
    features, tokens = random_rows(rows=9)
    mask = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])
    position_ids = torch.tensor([list(range(9)), [0] * 3 + list(range(6))])
    with torch.no_grad():
        padded = poss.roll_out(features, tokens, segment_ids=mask, position_ids=position_ids)
        alone = poss.roll_out(features[1:, 3:], tokens[1:, 3:])
    for one, other in zip(padded, alone, strict=True):
        torch.testing.assert_close(one[1, 3:], other[0], rtol=1e-5, atol=1e-5)
        assert one.isfinite().all()


def test_compiled_it_computes_the_same(llama):
    torch.compiler.reset()
    poss = make_poss(llama, num_draft_positions=3).train()
    features, tokens = random_rows(rows=7)
    gradients = []
    for model in (poss, torch.compile(poss, backend="aot_eager")):
        poss.zero_grad()
        model(input_ids=tokens, features=features).loss.backward()
        gradients.append({name: value.grad.clone() for name, value in poss.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_one_specialist_rolls_out_the_same_whatever_the_span():
    """n >= K is EAGLE: one layer, however n is written."""
    one = attach_random(unattached(positions_per_specialist=4))
    other = attach_random(unattached(positions_per_specialist=9))
    features, tokens = random_rows()
    with torch.no_grad():
        pairs = zip(one.roll_out(features, tokens), other.roll_out(features, tokens), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


# ---- Gradients ----


def test_a_position_learns_through_its_own_specialist_alone():
    poss = attach_random(unattached(positions_per_specialist=1, num_draft_positions=3))
    features, tokens = random_rows()
    for position in range(3):
        poss.zero_grad()
        poss.roll_out(features, tokens)[position].square().sum().backward()
        for index, layer in enumerate(poss.layers):
            touched = {name for name, value in layer.named_parameters() if value.grad is not None and value.grad.any()}
            assert touched == (dict(layer.named_parameters()).keys() if index == position else set())
        assert poss.fc.weight.grad.any()


def test_no_gradient_reaches_the_target(poss, llama):
    llama.requires_grad_(True)
    features, tokens = random_rows()
    features.requires_grad_(True)
    poss.train()
    poss(input_ids=tokens, features=features, losses=dict.fromkeys(LOSSES, 1.0)).loss.backward()
    assert all(parameter.grad is None for parameter in llama.parameters())
    assert all(parameter.grad is not None for parameter in poss.parameters())


def test_no_gradient_reaches_a_head_of_another_class():
    class Head(nn.Linear):
        pass

    poss = attach_random(unattached())
    poss.reference.lm_head = Head(HIDDEN, VOCAB)
    features, tokens = random_rows()
    poss(input_ids=tokens, features=features).loss.backward()
    assert all(parameter.grad is None for parameter in poss.reference.lm_head.parameters())
    assert poss.fc.weight.grad.any()


class LiveBytes(TorchDispatchMode):
    """Most bytes of results alive at a time, and elements of the largest one."""

    def __init__(self):
        super().__init__()
        self.live, self.most, self.largest, self.known = 0, 0, 0, set()

    def _freed(self, key, size):
        self.known.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                self.largest = max(self.largest, storage.nbytes())
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.live)
        return result


def memory_of_a_step(poss, rows) -> LiveBytes:
    features, tokens = random_rows(batch=1, rows=rows)
    with LiveBytes() as memory:
        poss(input_ids=tokens, features=features).loss.backward()
    return memory


def test_memory_grows_with_rows(monkeypatch):
    """Not with their square, and no logits of all rows exist."""
    monkeypatch.setattr(losses_module, "CHUNK_ENTRIES", 16 * VOCAB)
    monkeypatch.setattr(roll_out_module, "CHUNK_ROWS", 16)
    poss = attach_random(unattached(num_draft_positions=5, positions_per_specialist=2)).train()
    short, long = memory_of_a_step(poss, 128), memory_of_a_step(poss, 512)
    assert long.most < 4.4 * short.most
    widest = max(2 * HIDDEN, 48)  # fused inputs and the MLP
    assert long.largest <= 4 * max(512 * widest, 16 * (512 + 5 * 16) * 4)


# ---- Losses ----


def slow_losses(predicted, target, logits, target_logits, top_k):
    """Feature, token and top-k loss of one row, element by element."""
    feature = 0.0
    for a, b in zip(predicted.tolist(), target.tolist(), strict=True):
        distance = abs(a - b)
        feature += 0.5 * distance**2 if distance < 1 else distance - 0.5
    normaliser = math.log(sum(math.exp(x) for x in logits.tolist()))
    target_normaliser = math.log(sum(math.exp(x) for x in target_logits.tolist()))
    parts = [
        (math.exp(y - target_normaliser), math.exp(y - target_normaliser) * (normaliser - x))
        for x, y in zip(logits.tolist(), target_logits.tolist(), strict=True)
    ]
    best = sorted(parts, reverse=True)[:top_k]
    return feature / len(predicted), sum(part for _, part in parts), sum(part for _, part in best)


def test_the_loss_compares_predictions_with_the_targets_next_feature():
    poss = attach_random(widen(unattached(num_draft_positions=3), 2.0))
    features, tokens = random_rows(rows=6)
    noisy = features + 0.1
    labels = tokens.clone()
    labels[0, 2:4] = -100
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    losses = {"feature": 0.7, "token": 0.3, "topk": 0.2}
    with torch.no_grad():
        output = poss(
            input_ids=tokens,
            features=noisy,
            target_features=features,
            labels=labels,
            attention_mask=mask,
            loss_top_k=4,
            losses=losses,
            position_weights=[1.0, 0.5, 0.25],
        )
        predictions = poss.roll_out(noisy[:, :-1], tokens[:, 1:], segment_ids=mask[:, :-1])
        head = poss.reference.lm_head.weight
        # Row t predicts the feature of t + 1, and counts where that one is labelled and no padding.
        counted = [(b, t) for b in range(2) for t in range(5) if labels[b, t + 1] != -100 and mask[b, t + 1]]
        assert len(counted) == 3 + 3
        sums = torch.zeros(2, 3, 3, dtype=torch.float64)  # [samples, losses, positions]
        for k in range(3):
            for b, t in counted:
                predicted, target = predictions[k][b, t], features[b, t + 1]
                row = slow_losses(predicted, target, head @ predicted, head @ target, 4)
                sums[b, :, k] += torch.tensor(row, dtype=torch.float64)
    torch.testing.assert_close(output.loss_sums.double(), sums, rtol=1e-4, atol=1e-5)
    weights = torch.tensor([[0.7], [0.3], [0.2]]) * torch.tensor([1.0, 0.5, 0.25])
    expected = (sums.sum(0) * weights).sum() / len(counted)
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-4, atol=1e-5)


def test_the_token_loss_counts_alone_by_default(poss):
    features, tokens = random_rows()
    output = poss(input_ids=tokens, features=features)
    named = poss(input_ids=tokens, features=features, losses={"token": 1.0})
    assert torch.equal(output.loss, named.loss)


def test_rows_that_do_not_count_change_nothing(poss):
    features, tokens = random_rows(rows=8)
    labels = tokens.clone()
    labels[:, 5] = -100
    changed = features.clone()
    changed[:, 5] += 7.0
    with torch.no_grad():
        one = poss(input_ids=tokens, features=features, labels=labels)
        other = poss(input_ids=tokens, features=features, target_features=changed, labels=labels)
        counted = poss(input_ids=tokens, features=features, target_features=changed)
    assert torch.equal(one.loss, other.loss)
    assert torch.equal(one.counts, other.counts)
    assert not torch.allclose(one.loss, counted.loss)


@pytest.mark.parametrize("numbers", [[0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 2, 2, 2, 2, 2]], ids=["left", "packed"])
def test_nothing_predicts_the_first_feature_of_a_document(poss, numbers):
    features, tokens = random_rows(batch=1, rows=9)
    segment_ids = torch.tensor([numbers])
    documents = [numbers.index(number) for number in sorted(set(numbers)) if number]
    with torch.no_grad():
        found = poss(input_ids=tokens, features=features, segment_ids=segment_ids)
        sums, counts = 0, 0
        for start in documents:
            part = slice(start, start + numbers.count(numbers[start]))
            alone = poss(input_ids=tokens[:, part], features=features[:, part])
            sums, counts = sums + alone.loss_sums, counts + alone.counts
    torch.testing.assert_close(found.loss_sums, sums, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.counts, counts)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_parts_of_a_batch_add_up(poss, as_tensor):
    features, tokens = random_rows(batch=3, rows=8)
    labels = tokens.clone()
    labels[0, 3:] = -100
    labels[2, :4] = -100
    items = int((labels[:, 1:] != -100).sum())
    items = torch.tensor(items) if as_tensor else items
    with torch.no_grad():
        whole = poss(input_ids=tokens, features=features, labels=labels).loss
        parts = [
            poss(input_ids=tokens[i], features=features[i], labels=labels[i], num_items_in_batch=items).loss
            for i in (slice(0, 1), slice(1, 3))
        ]
    torch.testing.assert_close(sum(parts), whole)


def test_position_weights_of_another_depth_are_refused(poss):
    features, tokens = random_rows()
    with pytest.raises(ValueError, match="`position_weights` has 2 entries; expected one for each of the 4"):
        poss(input_ids=tokens, features=features, position_weights=[1.0, 0.5])


def test_unknown_losses_are_refused(poss):
    features, tokens = random_rows()
    with pytest.raises(ValueError, match="no loss 'hidden'; expected some of feature, token"):
        poss(input_ids=tokens, features=features, losses={"hidden": 1.0})


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("features", (2, 8, HIDDEN)),
        ("features", (2, 9, 16)),
        ("target_features", (1, 9, HIDDEN)),
        ("features", (9, 32)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(poss, name, shape):
    features, tokens = random_rows()
    inputs = {"features": features, name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=rf"`{name}` has shape .*expected \(2, 9, 32\)"):
        poss(input_ids=tokens, **inputs)


def test_a_single_token_is_refused(poss):
    features, tokens = random_rows(rows=1)
    with pytest.raises(ValueError, match="one token.*two or more"):
        poss(input_ids=tokens, features=features)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_no_numbers_are_refused(poss, value):
    features, tokens = random_rows()
    features[1, 4, 5] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        poss(input_ids=tokens, features=features)


@pytest.mark.parametrize("separate", [False, True])
def test_inputs_that_are_no_numbers_are_refused(poss, separate):
    features, tokens = random_rows()
    broken = features.clone()
    broken[0, 3 if separate else 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        poss(input_ids=tokens, features=broken, target_features=features if separate else None)


# ---- Counts ----


@pytest.mark.parametrize("seed", range(4))
def test_counts_are_those_of_chains_followed_one_by_one(seed):
    generator = torch.Generator().manual_seed(seed)
    batch, positions, rows = 3, 4, 12
    tokens = torch.randint(2, (batch, positions, rows), generator=generator)
    target_tokens = torch.randint(2, (batch, rows), generator=generator)
    counted = torch.rand(batch, rows, generator=generator) < 0.8
    expected = torch.zeros(batch, 4, positions, dtype=torch.long)
    for b in range(batch):
        for k in range(positions):
            expected[b, 0, k] = sum(counted[b].tolist())
            expected[b, 1, k] = sum(
                bool(counted[b, t]) and tokens[b, k, t] == target_tokens[b, t] for t in range(rows)
            )
        for start in range(rows):
            for k in range(positions):
                row = start + k
                if row >= rows or not counted[b, row]:
                    break
                expected[b, 2, k] += 1
                if tokens[b, k, row] != target_tokens[b, row]:
                    break
                expected[b, 3, k] += 1
    assert expected[:, 3].sum() > 0
    assert torch.equal(chain_counts(tokens, target_tokens, counted), expected)


def test_forward_counts_the_tokens_of_its_own_predictions(poss, llama):
    features, tokens = random_rows()
    output = poss(input_ids=tokens, features=features)
    with torch.no_grad():
        drafted = torch.stack([llama.lm_head(prediction).argmax(-1) for prediction in output.predictions], dim=1)
        wanted = llama.lm_head(features[:, 1:]).argmax(-1)
    assert torch.equal(output.counts[:, 1], (drafted == wanted[:, None]).sum(-1))


# ---- The target's head ----

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.5),
        CohereConfig(**SMALL, logit_scale=0.25),
        GraniteConfig(**SMALL, logits_scaling=8.0),
        HyperCLOVAXConfig(**SMALL, logits_scaling=8.0),
        PhiConfig(**SMALL),  # its head has a bias
    ],
    ids=lambda config: config.model_type,
)
def test_logits_are_the_targets(config):
    torch.manual_seed(0)
    target = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.mul_(4) if parameter.dim() > 1 else parameter.add_(0.3)
        output = target(torch.randint(VOCAB, (2, 7)), output_hidden_states=True)
        reference = PosSModel.from_target(target).reference
        logits = reference.logits(output.hidden_states[-1])
    torch.testing.assert_close(logits, output.logits.float(), rtol=1e-5, atol=1e-5)
    raw = target.get_output_embeddings()(output.hidden_states[-1])
    assert torch.allclose(raw, output.logits) == (config.model_type == "phi")
