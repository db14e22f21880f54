"""Published checkpoints, and what is refused: each file is written here, in the layout that is found in the wild."""

import json
import os
import random
import re
from pathlib import Path

import pytest
import torch
from conftest import make_poss, pretrained_folder
from safetensors.torch import load_file, save_file
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

from hf_poss import PosSModel


VOCAB, HIDDEN, MLP, HEADS, KEY_VALUE_HEADS = 53, 16, 24, 4, 2
HEAD_DIM = HIDDEN // HEADS

# A drafter's config is its target's, with one layer.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_VALUE_HEADS,
    "num_hidden_layers": 1,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def published_weights(layers=1, bias=True, embedding=True, inv_freq=False, dtype=torch.float32):
    """A flat state dict as EAGLE's training script saves it."""
    torch.manual_seed(0)
    shapes = {"fc.weight": (HIDDEN, 2 * HIDDEN)}
    if embedding:
        shapes["embed_tokens.weight"] = (VOCAB, HIDDEN)
    if bias:
        shapes["fc.bias"] = (HIDDEN,)
    for i in range(layers):
        attention, mlp = f"layers.{i}.self_attn", f"layers.{i}.mlp"
        shapes |= {
            f"{attention}.q_proj.weight": (HIDDEN, HIDDEN),
            f"{attention}.k_proj.weight": (KEY_VALUE_HEADS * HEAD_DIM, HIDDEN),
            f"{attention}.v_proj.weight": (KEY_VALUE_HEADS * HEAD_DIM, HIDDEN),
            f"{attention}.o_proj.weight": (HIDDEN, HIDDEN),
            f"{mlp}.gate_proj.weight": (MLP, HIDDEN),
            f"{mlp}.up_proj.weight": (MLP, HIDDEN),
            f"{mlp}.down_proj.weight": (HIDDEN, MLP),
            f"layers.{i}.post_attention_layernorm.weight": (HIDDEN,),
        }
        if inv_freq:
            shapes[f"{attention}.rotary_emb.inv_freq"] = (HEAD_DIM // 2,)
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def write_checkpoint(folder, weights, file_format="safetensors", **config):
    """`file_format` is safetensors or bin, with `sharded-` before it for two files and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    suffix = file_format.removeprefix("sharded-")
    stem = "model" if suffix == "safetensors" else "pytorch_model"

    def save(part, name):
        save_file(part, folder / name) if suffix == "safetensors" else torch.save(part, folder / name)

    if suffix == file_format:
        save(weights, f"{stem}.{suffix}")
        return folder
    weight_map = {key: f"{stem}-0000{1 + index % 2}-of-00002.{suffix}" for index, key in enumerate(weights)}
    for name in set(weight_map.values()):
        save({key: value for key, value in weights.items() if weight_map[key] == name}, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder


def own_names(weights):
    """Those that specialists keep: the embedding is the target's, frequencies are computed."""
    return {key: value for key, value in weights.items() if "embed_tokens" not in key and "inv_freq" not in key}


def assert_same_weights(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


# ---- What is read ----


@pytest.mark.parametrize("file_format", ["safetensors", "bin", "sharded-safetensors", "sharded-bin"])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize(
    "contents",
    [
        {"bias": True, "embedding": True},
        {"bias": False, "embedding": False},
        {"bias": True, "embedding": True, "inv_freq": True, "dtype": torch.bfloat16},
    ],
    ids=["bias", "plain", "frequencies-bf16"],
)
def test_published_layouts(tmp_path, file_format, layers, contents):
    weights = published_weights(layers, **contents)
    folder = write_checkpoint(tmp_path / "PosS2-tiny", weights, file_format)
    poss = PosSModel.from_pretrained(folder)
    assert_same_weights(poss.state_dict(), own_names(weights))
    config = poss.config
    assert (config.positions_per_specialist, config.num_draft_positions, config.num_specialists) == (
        2,
        2 * layers,
        layers,
    )
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (VOCAB, HIDDEN, MLP)
    assert (config.num_attention_heads, config.num_key_value_heads) == (HEADS, KEY_VALUE_HEADS)
    assert config.rms_norm_eps == CONFIG["rms_norm_eps"]
    assert config.fc_bias is contents["bias"]
    exact = 10000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    torch.testing.assert_close(poss.rotary_emb.inv_freq, exact)


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_a_converted_checkpoint_saves_and_comes_back(tmp_path, file_format):
    folder = write_checkpoint(tmp_path / "PosS1-tiny", published_weights(2), file_format)
    poss = PosSModel.from_pretrained(folder)
    poss.save_pretrained(tmp_path / "own")
    back = AutoModel.from_pretrained(tmp_path / "own")
    assert_same_weights(back.state_dict(), poss.state_dict())
    assert (back.config.positions_per_specialist, back.config.num_draft_positions) == (1, 2)


def test_a_config_without_model_type_is_a_llamas(tmp_path):
    folder = write_checkpoint(tmp_path / "PosS1-tiny", published_weights())
    config = {key: value for key, value in CONFIG.items() if key != "model_type"}
    (folder / "config.json").write_text(json.dumps(config))
    assert PosSModel.from_pretrained(folder).config.num_key_value_heads == KEY_VALUE_HEADS


def test_a_dtype_can_be_asked_for(tmp_path):
    weights = published_weights()
    folder = write_checkpoint(tmp_path / "eagle", weights)
    poss = PosSModel.from_pretrained(folder, dtype=torch.bfloat16)
    expected = {name: value.to(torch.bfloat16) for name, value in own_names(weights).items()}
    assert_same_weights(poss.state_dict(), expected)


def test_the_rotary_embedding_is_that_of_the_config(tmp_path):
    folder = write_checkpoint(tmp_path / "eagle", published_weights(), rope_theta=500.0)
    exact = 500.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    torch.testing.assert_close(PosSModel.from_pretrained(folder).rotary_emb.inv_freq, exact)


# ---- Which positions a layer serves ----


@pytest.mark.parametrize(
    ("name", "n"),
    [("PosS1-Llama3-8B-Instruct", 1), ("PosS2-x", 2), ("PosS3-Llama2-13b", 3), ("poss-2-x", 2), ("my_PosS_3", 3)],
)
def test_the_name_tells_positions_per_specialist(tmp_path, name, n):
    poss = PosSModel.from_pretrained(write_checkpoint(tmp_path / name, published_weights(2)))
    assert (poss.config.positions_per_specialist, poss.config.num_draft_positions) == (n, 2 * n)


def test_a_name_in_the_hubs_cache_tells_it_too(tmp_path):
    folder = tmp_path / "models--HINT-lab--PosS3-Llama3-8B-Instruct" / "snapshots" / "0123abc"
    poss = PosSModel.from_pretrained(write_checkpoint(folder, published_weights(2)))
    assert poss.config.positions_per_specialist == 3


def test_a_single_layer_serves_every_position(tmp_path):
    poss = PosSModel.from_pretrained(write_checkpoint(tmp_path / "EAGLE-tiny", published_weights(1)))
    assert poss.config.num_specialists == 1
    assert {poss.config.specialist_index(k) for k in range(1, 12)} == {0}
    assert poss.config.num_draft_positions == 6  # EAGLE-2 drafts six levels deep
    deeper = PosSModel.from_pretrained(tmp_path / "EAGLE-tiny", num_draft_positions=8)
    assert (deeper.config.num_specialists, deeper.config.num_draft_positions) == (1, 8)


@pytest.mark.parametrize(
    ("arguments", "n", "k"),
    [
        ({"positions_per_specialist": 3}, 3, 6),
        ({"positions_per_specialist": 3, "num_draft_positions": 5}, 3, 5),
        ({"num_draft_positions": 3}, 2, 3),
    ],
)
def test_arguments_come_before_the_name(tmp_path, arguments, n, k):
    folder = write_checkpoint(tmp_path / "PosS2-tiny", published_weights(2))
    config = PosSModel.from_pretrained(folder, **arguments).config
    assert (config.positions_per_specialist, config.num_draft_positions) == (n, k)


@pytest.mark.parametrize("name", ["specialists", "possible", "PosS-Llama3"])
def test_several_layers_without_a_word_on_positions_are_refused(tmp_path, name):
    folder = write_checkpoint(tmp_path / name, published_weights(3))
    with pytest.raises(ValueError, match="has 3 layers .*Pass `positions_per_specialist=`"):
        PosSModel.from_pretrained(folder)
    assert PosSModel.from_pretrained(folder, positions_per_specialist=2).config.num_draft_positions == 6


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_draft_positions": 2},
        {"num_draft_positions": 7},
        {"positions_per_specialist": 3, "num_draft_positions": 2},
        {"positions_per_specialist": 0},
        {"positions_per_specialist": -1},
    ],
)
def test_positions_that_the_layers_cannot_serve_are_refused(tmp_path, arguments):
    folder = write_checkpoint(tmp_path / "PosS2-tiny", published_weights(3))
    with pytest.raises(ValueError, match="has 3 layer.*positions_per_specialist.*num_draft_positions"):
        PosSModel.from_pretrained(folder, **arguments)


def test_a_name_that_contradicts_the_layers_gives_way_to_arguments_only(tmp_path):
    folder = write_checkpoint(tmp_path / "PosS2-tiny", published_weights(1))
    with pytest.raises(ValueError, match=r"1 layer.*`positions_per_specialist=2` and `num_draft_positions=4` need 2"):
        PosSModel.from_pretrained(folder, num_draft_positions=4)


# ---- From EAGLE ----


@pytest.mark.parametrize(("n", "k", "specialists"), [(1, 4, 4), (2, 6, 3), (2, 5, 3), (6, 6, 1)])
def test_from_eagle_copies_its_layer(tmp_path, n, k, specialists):
    weights = published_weights(1)
    folder = write_checkpoint(tmp_path / "EAGLE-tiny", weights)
    poss = PosSModel.from_eagle(folder, positions_per_specialist=n, num_draft_positions=k)
    assert (poss.config.num_specialists, len(poss.layers)) == (specialists, specialists)
    assert (poss.config.positions_per_specialist, poss.config.num_draft_positions) == (n, k)
    assert poss.generation_config.num_assistant_tokens == k
    expected = {key: value for key, value in own_names(weights).items() if key.startswith("fc")}
    for index in range(specialists):
        for key, value in weights.items():
            if key.startswith("layers.0."):
                expected[key.replace("layers.0.", f"layers.{index}.")] = value
    assert_same_weights(poss.state_dict(), expected)
    # Copies, not one tensor many times: specialists part ways in training.
    assert len({parameter.data_ptr() for parameter in poss.parameters()}) == len(expected)


def test_from_eagle_reads_a_saved_model_of_one_specialist(llama, tmp_path):
    one = make_poss(llama, positions_per_specialist=4, num_draft_positions=4).to(torch.bfloat16)
    one.save_pretrained(tmp_path)
    poss = PosSModel.from_eagle(tmp_path, positions_per_specialist=1, num_draft_positions=2)
    assert poss.dtype == torch.bfloat16
    for layer in poss.layers:
        assert_same_weights(layer.state_dict(), one.layers[0].state_dict())
    assert_same_weights(poss.fc.state_dict(), one.fc.state_dict())


def test_from_eagle_takes_over_what_the_layer_reads_and_drafts(llama, tmp_path):
    shape = {"positions_per_specialist": 2, "num_draft_positions": 2, "feature_layers": [0, 2], "draft_vocab_size": 9}
    one = make_poss(llama, **shape).set_draft_vocabulary(torch.arange(97))
    one.save_pretrained(tmp_path)
    poss = PosSModel.from_eagle(tmp_path, positions_per_specialist=1, num_draft_positions=3)
    assert poss.config.feature_layers == [0, 2]
    assert torch.equal(poss.feature_fc.weight, one.feature_fc.weight)
    assert torch.equal(poss.draft_vocabulary, one.draft_vocabulary)
    other = PosSModel.from_eagle(tmp_path, draft_vocab_size=5)
    assert other.draft_vocabulary.tolist() == [-1] * 5


def test_from_eagle_refuses_several_layers(llama, poss, tmp_path):
    folder = write_checkpoint(tmp_path / "PosS2-tiny", published_weights(2))
    poss.save_pretrained(tmp_path / "own")
    for source in (folder, tmp_path / "own"):
        with pytest.raises(ValueError, match=r"has 2 layers; expected an EAGLE checkpoint of one.*from_pretrained"):
            PosSModel.from_eagle(source)


# ---- Keys and shapes ----


@pytest.mark.parametrize("file_format", ["safetensors", "bin", "sharded-bin"])
@pytest.mark.parametrize(
    "key",
    [
        "fc.weight",
        "layers.0.self_attn.k_proj.weight",
        "layers.1.mlp.down_proj.weight",
        "layers.0.post_attention_layernorm.weight",
    ],
)
def test_a_missing_key_is_named(tmp_path, file_format, key):
    weights = published_weights(2)
    del weights[key]
    folder = write_checkpoint(tmp_path / "PosS2-tiny", weights, file_format)
    with pytest.raises(ValueError, match=f"(?s)missing: {key}"):
        PosSModel.from_pretrained(folder)


@pytest.mark.parametrize(
    "key",
    ["lm_head.weight", "norm.weight", "layers.0.input_layernorm.weight", "layers.0.self_attn.o_proj.bias", "d2t"],
)
def test_an_unexpected_key_is_named(tmp_path, key):
    weights = {**published_weights(), key: torch.ones(HIDDEN)}
    folder = write_checkpoint(tmp_path / "EAGLE-tiny", weights)
    with pytest.raises(ValueError, match=f"unexpected: {key}"):
        PosSModel.from_pretrained(folder)


def test_a_hole_in_the_layers_is_named(tmp_path):
    weights = {key: value for key, value in published_weights(3).items() if not key.startswith("layers.1.")}
    with pytest.raises(ValueError, match=r"missing: layers\.1\."):
        PosSModel.from_pretrained(write_checkpoint(tmp_path / "PosS1-tiny", weights))


def test_an_eagle_3_checkpoint_is_refused(tmp_path):
    weights = {
        "midlayer.self_attn.q_proj.weight": torch.ones(HIDDEN, 2 * HIDDEN),
        "midlayer.hidden_norm.weight": torch.ones(HIDDEN),
        "fc.weight": torch.ones(HIDDEN, 3 * HIDDEN),
        "lm_head.weight": torch.ones(11, HIDDEN),
        "d2t": torch.zeros(11, dtype=torch.long),
        "t2d": torch.zeros(VOCAB, dtype=torch.bool),
    }
    with pytest.raises(ValueError, match="(?s)unexpected: d2t.*midlayer.*EAGLE-3"):
        PosSModel.from_pretrained(write_checkpoint(tmp_path / "EAGLE3-tiny", weights))


def test_a_full_language_model_is_refused(tmp_path):
    config = LlamaConfig(**{**CONFIG, "torch_dtype": None, "num_hidden_layers": 2})
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="(?s)missing: fc.weight.*unexpected: lm_head.weight.*full language models"):
        PosSModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("fc.weight", (HIDDEN, HIDDEN)),
        ("layers.0.self_attn.k_proj.weight", (HIDDEN, HIDDEN)),
        ("layers.0.mlp.up_proj.weight", (MLP + 1, HIDDEN)),
    ],
)
def test_another_shape_is_named(tmp_path, key, shape):
    weights = {**published_weights(), key: torch.ones(shape)}
    with pytest.raises(ValueError, match=f"of another shape: .*{key}"):
        PosSModel.from_pretrained(write_checkpoint(tmp_path / "EAGLE-tiny", weights))


def test_no_weights_at_all_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ValueError, match=r"No weights in .*model\.safetensors.*pytorch_model\.bin"):
        PosSModel.from_pretrained(tmp_path)


# ---- Damaged files, and files with code in them ----


def cut_in_half(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("file_format", ["safetensors", "bin", "sharded-safetensors", "sharded-bin"])
def test_a_truncated_file_is_refused(tmp_path, file_format):
    folder = write_checkpoint(tmp_path / "EAGLE-tiny", published_weights(), file_format)
    cut_in_half(max(folder.glob("*model*"), key=lambda file: (file.suffix != ".json", file.name)))
    with pytest.raises(ValueError, match="EAGLE-tiny cannot be read.*truncated.*Download it again"):
        PosSModel.from_pretrained(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    "contents", [b"", b"\x00" * 64, b"<!DOCTYPE html>\n<html>Not found</html>", bytes(range(256))]
)
def test_garbage_is_refused(tmp_path, name, contents):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(ValueError, match="cannot be read.*Download it again"):
        PosSModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_damaged_bin_file_loads_or_is_refused_with_advice(tmp_path, zipped):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    file = tmp_path / "pytorch_model.bin"
    torch.save(published_weights(), file, _use_new_zipfile_serialization=zipped)
    whole, chance, refused = file.read_bytes(), random.Random(0), 0
    for _ in range(40):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[chance.randrange(1500)] = chance.randrange(256)
        file.write_bytes(damaged)
        try:
            PosSModel.from_pretrained(tmp_path)
        except ValueError as error:
            assert re.search("Download it again|download it again|expected a dict", str(error)), error
            refused += 1
    assert refused > 20


def test_a_damaged_index_is_refused(poss, tmp_path):
    folder = write_checkpoint(tmp_path / "EAGLE-tiny", published_weights(), "sharded-safetensors")
    poss.save_pretrained(tmp_path / "own", max_shard_size="12KB")
    for source in (folder, tmp_path / "own"):
        cut_in_half(source / "model.safetensors.index.json")
        with pytest.raises(ValueError, match="cannot be read.*Download it again"):
            PosSModel.from_pretrained(source)


def test_a_lost_config_is_refused(poss, tmp_path):
    folder = write_checkpoint(tmp_path / "EAGLE-tiny", published_weights())
    poss.save_pretrained(tmp_path / "own")
    for source in (folder, tmp_path / "own"):
        (source / "config.json").unlink()
        with pytest.raises(ValueError, match=r"No config\.json in"):
            PosSModel.from_pretrained(source)


class Malice:
    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return (Path.touch, (Path(self.file),))


class SystemCall(Malice):
    def __reduce__(self):
        return (os.system, (f"touch {self.file}",))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("malice", [Malice, SystemCall])
def test_code_in_a_bin_file_is_never_run(tmp_path, malice, zipped):
    trace = tmp_path / "trace"
    weights = {**published_weights(), "fc.bias": malice(trace)}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    torch.save(weights, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="more than tensors, which is never executed.*safetensors"):
        PosSModel.from_pretrained(tmp_path)
    assert not trace.exists()
    # The trap works: unpickling without care leaves the trace.
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert trace.exists()


@pytest.mark.parametrize(
    "contents", [[torch.ones(2)], torch.ones(2), {"fc.weight": 3}, {"state_dict": {"fc.weight": torch.ones(2)}}]
)
def test_a_bin_file_of_something_else_is_refused(tmp_path, contents):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    torch.save(contents, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="expected a dict of tensors by name"):
        PosSModel.from_pretrained(tmp_path)


# ---- Our own layout ----


@pytest.mark.parametrize("key", ["fc.bias", "fc.weight", "layers.1.self_attn.v_proj.weight"])
def test_a_saved_model_that_lost_a_key_is_refused(poss, tmp_path, key):
    poss.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[key]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"missing: {key}"):
        PosSModel.from_pretrained(tmp_path)


def test_a_saved_model_with_a_key_too_many_is_refused(poss, tmp_path):
    poss.save_pretrained(tmp_path)
    weights = {**load_file(tmp_path / "model.safetensors"), "layers.2.extra.weight": torch.ones(2)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"unexpected: layers\.2\.extra\.weight"):
        PosSModel.from_pretrained(tmp_path)


def test_a_saved_model_of_another_shape_is_refused(poss, tmp_path):
    poss.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["intermediate_size"] += 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"of another shape: .*layers\.0\.mlp\.down_proj\.weight"):
        PosSModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("max_shard_size", ["1GB", "12KB"])
def test_a_truncated_saved_model_is_refused(poss, tmp_path, max_shard_size):
    poss.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    cut_in_half(max(tmp_path.glob("*.safetensors")))
    with pytest.raises(ValueError, match="cannot be read.*truncated.*Download it again"):
        PosSModel.from_pretrained(tmp_path)


def test_loading_info_is_given_where_asked_for(poss, tmp_path):
    poss.save_pretrained(tmp_path)
    model, info = PosSModel.from_pretrained(tmp_path, output_loading_info=True)
    assert_same_weights(model.state_dict(), poss.state_dict())
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


# ---- Real files ----


def test_a_trained_checkpoint(stories):
    folder = pretrained_folder("PosS2-stories260k")
    poss = PosSModel.from_pretrained(folder)
    raw = load_file(folder / "model.safetensors")
    assert_same_weights(poss.state_dict(), own_names(raw))
    config = poss.config
    assert (config.positions_per_specialist, config.num_draft_positions, config.num_specialists) == (2, 6, 3)
    poss.attach(stories[0])


def test_a_trained_eagle_checkpoint():
    folder = pretrained_folder("eagle-stories260k")
    poss = PosSModel.from_eagle(folder, positions_per_specialist=2, num_draft_positions=6)
    raw = load_file(folder / "model.safetensors")
    for layer in poss.layers:
        for name, value in layer.state_dict().items():
            assert torch.equal(value, raw[f"layers.0.{name}"])
