"""The cards under model_cards/: they parse, their code compiles, and they are what the script writes."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_poss.hub.card import is_own_card
from hf_poss.hub.card_text import check_card


ROOT = Path(__file__).parents[2]
CARDS = sorted(path for path in (ROOT / "model_cards").glob("*.md") if path.name != "README.md")
DRAFTERS = [path for path in CARDS if path.stem != "demo-target"]
# Draft positions and specialists of the published checkpoints (PosS, the authors' repositories).
PUBLISHED = {
    "PosS1-Llama3-8B-Instruct": (7, 7),
    "PosS2-Llama3-8B-Instruct": (8, 4),
    "PosS3-Llama3-8B-Instruct": (12, 4),
    "PosS1-Llama2-13B-Chat": (6, 6),
    "PosS2-Llama2-13B-Chat": (6, 3),
    "PosS3-Llama2-13B-Chat": (6, 2),
}
TARGETS = {
    "Llama3": "meta-llama/Meta-Llama-3-8B-Instruct",
    "Llama2": "meta-llama/Llama-2-13b-chat-hf",
    "demo": "demo-target",
}


def named(paths: list[Path]) -> dict:
    return {"argvalues": paths, "ids": [path.stem for path in paths]}


def test_every_checkpoint_has_its_card_and_its_line():
    assert {path.stem for path in CARDS} == {*PUBLISHED, "demo-poss", "demo-target"}
    index = (ROOT / "model_cards" / "README.md").read_text()
    assert all(f"]({path.name})" in index for path in CARDS)


@pytest.mark.parametrize("path", **named(CARDS))
def test_cards_parse_and_their_code_compiles(path):
    card = ModelCard.load(path)
    check_card(card)
    blocks = re.findall(r"```python\n(.*?)```", card.text, re.S)
    assert blocks
    for block in blocks:
        ast.parse(block)
    for link in re.findall(r"\]\(([^)#:]+)\)", card.text):
        assert (path.parent / link).is_file(), link


@pytest.mark.parametrize("path", **named(DRAFTERS))
def test_drafters_name_their_target(path):
    card = ModelCard.load(path)
    assert card.data.base_model == next(target for key, target in TARGETS.items() if key in path.stem)
    assert card.data.library_name == "hf_poss" and "speculative-decoding" in card.data.tags
    assert is_own_card(path)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoints_tell_whose_figures_they_are(name):
    positions, specialists = PUBLISHED[name]
    card = ModelCard.load(ROOT / "model_cards" / f"{name}.md")
    spans = re.findall(r"^\| \d+ \| (?:\d+ to )?(\d+) \|$", card.text, re.MULTILINE)
    assert len(spans) == specialists and int(spans[-1]) == positions
    assert f'PosSModel.from_pretrained("HINT-lab/{name}"' in card.text
    assert f"positions_per_specialist={name[4]}, num_draft_positions={positions})" in card.text
    assert card.data.eval_results is None and card.text.count("\nNot measured.\n") == 2
    ours, authors = card.text.split("## What the authors report")
    assert "4.83" in authors and "4.83" not in ours and "3.14x" not in ours


def test_the_committed_cards_are_what_the_script_writes(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    source = ROOT / "examples" / "build_model_cards.py"
    spec = importlib.util.spec_from_file_location("build_model_cards", source)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr("sys.argv", [str(source), "--output", str(tmp_path)])
    script.main()
    written = {path.name for path in tmp_path.glob("*.md")}
    assert written == {path.name for path in DRAFTERS}
    for name in written:
        assert (tmp_path / name).read_text() == (ROOT / "model_cards" / name).read_text(), name
    assert (tmp_path / "demo-poss.png").stat().st_size > 5000
