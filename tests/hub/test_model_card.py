"""Model cards: what they tell, what they keep, and that they invent nothing."""

import ast
import json
import re
import sys

import pytest
from conftest import make_poss, make_target
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from hf_poss import PosSConfig
from hf_poss.hub.card import build_card, refresh_card, write_card
from hf_poss.hub.card_text import CardFacts, check_card, render_card
from hf_poss.hub.markdown import hub_name
from hf_poss.hub.record import SpeedRecord, TrainingRecord, write_speed_record, write_training_record


POS_ACC = [0.91, 0.82, 0.73, 0.64]
RECORD = TrainingRecord(
    base_model="me/target-8b",
    base_model_revision="abc123",
    license="apache-2.0",
    language=["en"],
    datasets=["me/chats"],
    files=["more.jsonl"],
    samples=1234,
    tokens=567890,
    losses={"feature": 1.0, "token": 0.125},
    init_from="me/eagle-8b",
    hyperparameters={"learning_rate": 3e-5, "max_length": 2048},
    metrics={
        "eval_tau": 3.17,
        **{f"eval_pos_acc_{k}": value for k, value in enumerate(POS_ACC, start=1)},
        **{f"eval_accuracy_{k}": value - 0.05 for k, value in enumerate(POS_ACC, start=1)},
        "eval_loss": 77.77,
    },
    eval_samples=33,
    generate_tau=2.89,
    generate_pos_acc=[0.88, 0.77],
    generate_prompts=5,
    generate_settings={"max_new_tokens": 96},
    hardware="4 x A-Card",
    versions={"torch": "2.13.0"},
    command="hf-poss train --target me/target-8b",
    seconds=7260.0,
)
SPEED = SpeedRecord(
    target="me/target-8b",
    plain_rate=40.5,
    poss_rate=99.25,
    speedup=2.45,
    lowest=2.11,
    highest=2.78,
    runs=15,
    tau=3.03,
    pos_acc=[0.87, 0.76],
    prompts=5,
    identical=5,
    settings={"dtype": "bfloat16"},
    hardware="1 x A-Card",
    command="hf-poss card out --target me/target-8b",
)


@pytest.fixture
def folder(tmp_path):
    """A drafter of two specialists as `save_pretrained` leaves it."""
    make_poss(make_target(), num_draft_positions=4).save_pretrained(tmp_path / "PosS2-tiny")
    return tmp_path / "PosS2-tiny"


def figures(text: str) -> set[str]:
    """Numbers with a decimal point, those of links and code apart."""
    return set(
        re.findall(
            r"(?<![\w.])\d+\.\d+(?![\w.])", re.sub(r"arXiv [\d.]+|\(https?://\S+\)|```.*?```", "", text, flags=re.S)
        )
    )


# ---- What it tells ----


def test_a_folder_without_records_gets_a_card(folder):
    card = ModelCard.load(write_card(folder))
    assert card.data.library_name == "hf_poss"
    assert {"poss", "speculative-decoding"} <= set(card.data.tags)
    assert card.data.eval_results is None and card.data.base_model is None and card.data.datasets is None
    assert card.text.count("Not measured.") == 2 and "Not recorded." in card.text
    assert not figures(card.text) - {"5.15"}  # the oldest transformers that works
    assert not (folder / "acceptance.png").exists()


def test_metadata_name_target_data_and_results(folder):
    write_training_record(folder, RECORD)
    data = ModelCard.load(write_card(folder, "me/PosS2-tiny")).data
    assert data.base_model == "me/target-8b" and data.get("base_model_relation") == "adapter"
    assert data.datasets == ["me/chats"]  # what is on the Hub, not the local file
    assert (data.license, data.language) == ("apache-2.0", ["en"])
    assert data.model_name == "PosS2-tiny"
    found = {
        (r.dataset_config, r.metric_type, (r.metric_args or {}).get("position")): r.metric_value
        for r in data.eval_results
    }
    simulated = {("simulated", "pos_acc", k): value for k, value in enumerate(POS_ACC, start=1)}
    assert found == {
        **simulated,
        ("simulated", "tau", None): 3.17,
        ("generate", "tau", None): 2.89,
        ("generate", "pos_acc", 1): 0.88,
        ("generate", "pos_acc", 2): 0.77,
    }


def test_every_figure_is_one_of_the_records(folder):
    write_training_record(folder, RECORD)
    write_speed_record(folder, SPEED)
    text = ModelCard.load(write_card(folder)).text
    recorded = {
        f"{value:.2f}" for value in (*RECORD.metrics.values(), 2.89, 0.88, 0.77, 3.03, 0.87, 0.76, 2.45, 2.11, 2.78)
    }
    assert figures(text) <= recorded | {"0.125", "5.15", "40.5", "99.2"}
    assert "77.77" not in text
    for told in (
        "1,234",
        "567,890",
        "feature 1, token 0.125",
        "3e-05",
        "2 h 1 min",
        "4 x A-Card",
        "[me/eagle-8b](https://huggingface.co/me/eagle-8b)",
        "`abc123`",
        "`more.jsonl`",
        "2.45x, median of 15 paired runs (lowest 2.11x, highest 2.78x)",
        "5 of 5",
        "1 x A-Card",
        "hf-poss train --target me/target-8b",
        "hf-poss card out --target me/target-8b",
    ):
        assert told in text, told


def test_the_table_has_rates_where_they_were_measured(folder):
    write_training_record(folder, RECORD)
    lines = ModelCard.load(write_card(folder)).text.splitlines()
    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith(("| pos-acc", "| top-1"))
    ]
    assert table == [
        ["top-1 accuracy (simulated, 33 samples)", "0.86", "0.77", "0.68", "0.59", ""],
        ["pos-acc (simulated, 33 samples)", "0.91", "0.82", "0.73", "0.64", "3.17"],
        ["pos-acc (generate, 5 prompts)", "0.88", "0.77", "", "", "2.89"],
    ]


def test_spans_are_those_that_the_config_deals():
    config = PosSConfig(positions_per_specialist=3, num_draft_positions=7, hidden_size=32, num_attention_heads=4)
    text = render_card(CardFacts("x", config, "x")).text
    spans = re.findall(r"^\| (\d+) \| (\d+)(?: to (\d+))? \|$", text, re.MULTILINE)
    dealt = {k: int(s) for s, first, last in spans for k in range(int(first), int(last or first) + 1)}
    assert dealt == {k: config.specialist_index(k) + 1 for k in range(1, 8)}


def test_only_what_is_finite_is_told(folder):
    write_training_record(folder, {"metrics": {"eval_tau": float("nan"), "eval_pos_acc_1": float("nan")}})
    card = ModelCard.load(write_card(folder))
    assert card.data.eval_results is None and "nan" not in card.text.lower()
    assert "## Acceptance\n\nNot measured." in card.text


def test_every_code_block_compiles(folder):
    write_training_record(folder, RECORD)
    blocks = re.findall(r"```python\n(.*?)```", build_card(folder, "me/PosS2-tiny").text, re.S)
    assert len(blocks) == 2
    for block in blocks:
        ast.parse(block)
    assert 'PosSModel.from_pretrained("me/PosS2-tiny"' in blocks[0]
    assert 'AutoModelForCausalLM.from_pretrained("me/target-8b"' in blocks[0]
    assert 'custom_generate="me/PosS2-tiny", trust_remote_code=True' in blocks[1]


def test_a_folder_without_code_does_not_offer_it(folder):
    (folder / "custom_generate" / "generate.py").unlink()
    card = build_card(folder)
    assert "custom_generate" not in card.text and "custom_generate" not in card.data.tags


def test_specialists_made_of_adapters_ask_for_peft(folder, tmp_path):
    make_poss(make_target(), num_draft_positions=2, specialist_adapter={"r": 2}).save_pretrained(tmp_path / "lora")
    assert "pip install peft" in build_card(tmp_path / "lora").text
    assert "peft" not in build_card(folder).text


def test_a_path_of_this_machine_is_no_base_model(tmp_path):
    target = make_target()
    target.save_pretrained(tmp_path / "private" / "target-ft")
    target.config.name_or_path = str(tmp_path / "private" / "target-ft")
    make_poss(target, num_draft_positions=2).save_pretrained(tmp_path / "poss")
    card = ModelCard.load(write_card(tmp_path / "poss"))
    assert card.data.base_model is None
    assert "`target-ft`" in card.text and str(tmp_path) not in card.content
    assert 'AutoModelForCausalLM.from_pretrained("TARGET"' in card.text


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("me/x", True),
        ("gpt2", True),
        ("/models/x", False),
        ("../x", False),
        ("a/b/c", False),
        ("a b", False),
        (None, False),
    ],
)
def test_names_on_the_hub_are_told_from_paths(name, is_one):
    assert hub_name(name) == (name if is_one else None)


def test_text_of_records_does_not_break_the_table(folder):
    write_training_record(
        folder, {"hardware": "a | b\n| c | d |", "hyperparameters": {"note": "x|y"}, "command": "a\n```\nb"}
    )
    text = write_card(folder).read_text()
    rows = [line for line in text.splitlines() if line.startswith(("| Hardware", "| Note"))]
    assert rows == [r"| Note | x\|y |", r"| Hardware | a \| b \| c \| d \| |"]
    assert text.count("```") % 2 == 0


def test_a_published_checkpoint_gets_a_card(folder, tmp_path):
    """Its folder has the config of its target and a flat file; positions are told by its name."""
    source = tmp_path / "PosS1-tiny"
    source.mkdir()
    save_file(load_file(folder / "model.safetensors"), source / "model.safetensors")
    make_target().config.save_pretrained(source)
    card = ModelCard.load(write_card(source))
    assert "2 position specialists" in card.text
    assert "positions_per_specialist=1, num_draft_positions=2" in card.text
    renamed = source.rename(tmp_path / "drafter")
    with pytest.raises(ValueError, match="positions_per_specialist"):
        build_card(renamed)
    write_training_record(renamed, {"positions_per_specialist": 3, "num_draft_positions": 5})
    assert "| 2 | 4 to 5 |" in build_card(renamed).text


# ---- The plot ----


def test_the_plot_is_drawn_and_shown(folder):
    pytest.importorskip("matplotlib")
    write_training_record(folder, RECORD)
    text = write_card(folder).read_text()
    assert "](acceptance.png)" in text
    first = (folder / "acceptance.png").read_bytes()
    assert first.startswith(b"\x89PNG") and len(first) > 5000
    assert write_card(folder).read_text() == text  # the same records, the same card
    assert (folder / "acceptance.png").read_bytes() == first


def test_without_matplotlib_the_card_has_the_table_only(folder, monkeypatch, warnings_seen):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    write_training_record(folder, RECORD)
    for _ in range(2):
        text = write_card(folder).read_text()
    assert "acceptance.png" not in text and "| pos-acc (simulated, 33 samples) |" in text
    assert not (folder / "acceptance.png").exists()
    assert len(warnings_seen()) == 1 and "hf-poss[hub]" in warnings_seen()[0]


# ---- What it keeps ----


def test_a_card_of_somebody_else_is_not_overwritten(folder, warnings_seen):
    (folder / "README.md").write_text("# Mine\n")
    with pytest.raises(FileExistsError, match="--force"):
        write_card(folder)
    refresh_card(folder)
    assert (folder / "README.md").read_text() == "# Mine\n"
    assert "stays as it is" in warnings_seen()[0]
    write_card(folder, force=True)
    assert "# PosS2-tiny" in (folder / "README.md").read_text()


def test_what_was_written_by_hand_stays(folder):
    path = write_card(folder)
    card = ModelCard.load(path)
    card.data.license, card.data.tags, card.data["thumbnail"] = "mit", [*card.data.tags, "mine"], "x.png"
    card.text += "\n## Thanks\n\nTo {{ nobody }}.\n"
    card.save(path)
    write_training_record(folder, RECORD)
    again = ModelCard.load(write_card(folder))
    assert again.text.endswith("\n## Thanks\n\nTo {{ nobody }}.\n")
    assert again.data.get("thumbnail") == "x.png" and "mine" in again.data.tags
    assert again.data.license == "apache-2.0"  # recorded, so the record decides
    assert write_card(folder).read_text() == path.read_text()


def test_results_that_are_no_longer_recorded_go(folder):
    write_training_record(folder, RECORD)
    write_card(folder)
    (folder / "training_record.json").unlink()
    card = ModelCard.load(write_card(folder))
    assert card.data.eval_results is None and card.data.base_model is None and card.data.datasets is None
    assert "Not measured" in card.text


# ---- What is refused ----


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ("tags: [poss]", "library_name"),
        ("library_name: hf_poss\nbase_model: a/b/c", "base_model.*a/b/c"),
        ("library_name: hf_poss\ndatasets: [my data]", "datasets.*my data"),
        ("library_name: hf_poss\nlicense: 2", "license"),
        ("library_name: hf_poss\nlanguage: [no]", "language"),  # YAML reads Norwegian as False
    ],
)
def test_metadata_that_the_hub_would_refuse(metadata, problem):
    with pytest.raises(ValueError, match=problem):
        check_card(ModelCard(f"---\n{metadata}\n---\n"))


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="No config.json .*no such folder"):
        write_card(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="the folder has none"):
        write_card(tmp_path)
    make_target().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="position specialists"):
        write_card(tmp_path)
    assert not (tmp_path / "README.md").exists()


def test_norwegian_is_written_so_that_it_is_read(folder):
    write_training_record(folder, {"language": ["no"]})
    assert ModelCard.load(write_card(folder)).data.language == ["no"]
    assert json.loads((folder / "training_record.json").read_text())["language"] == ["no"]
