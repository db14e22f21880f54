"""Model cards of folders: written from what is recorded there, and never over somebody else's."""

import json
import os
from pathlib import Path

from huggingface_hub import ModelCard
from transformers.utils import logging

from .card_text import KEPT_MARKER, MARKER, CardFacts, describe_loading, draw_plot, render_card
from .folder import CARD, read_config
from .record import TrainingRecord, read_evaluation_record, read_speed_record, read_training_record


__all__ = ["build_card", "is_own_card", "refresh_card", "write_card"]

logger = logging.get_logger(__name__)

PLOT = "acceptance.png"


def write_card(folder: str | os.PathLike, repo_id: str | None = None, force: bool = False) -> Path:
    """Writes `README.md`, and its plot where matplotlib is installed, from the records in `folder`.

    What stands below the last marker of a card that this function wrote stays, as does metadata that it does not set.

    Args:
        folder: holds `config.json` and, where they are known, `training_record.json`, `speed.json` and
            `evaluation_record.json`.
        repo_id: Hub name that the examples load; the name of the folder if not given.
        force: replaces a `README.md` that this function did not write.

    Raises:
        FileExistsError: if there is a `README.md` of somebody else's.
        FileNotFoundError, ValueError: as in [`read_config`] and [`read_training_record`], and if the metadata are not
            valid, see [`check_card`].
    """
    folder = Path(folder)
    path = folder / CARD
    if path.exists() and not force and not is_own_card(path):
        raise FileExistsError(
            f"{path} was not written by hf_poss and may be somebody's work. Move it away, or replace it with --force "
            "(`write_card(..., force=True)`)."
        )
    card = build_card(folder, repo_id)
    unfinished = path.with_name(f".{CARD}.{os.getpid()}")
    card.save(unfinished)
    unfinished.replace(path)
    return path


def refresh_card(folder: str | os.PathLike, repo_id: str | None = None) -> None:
    """[`write_card`], but a `README.md` of somebody else's stays, with one line of log."""
    path = Path(folder) / CARD
    if path.exists() and not is_own_card(path):
        logger.warning_once(f"{path} was not written by hf_poss and stays as it is.")
        return
    write_card(folder, repo_id)


def build_card(folder: str | os.PathLike, repo_id: str | None = None) -> ModelCard:
    """The card of the specialists in `folder`; draws its plot there. Arguments and errors as in [`write_card`]."""
    folder = Path(folder)
    record = read_training_record(folder) or TrainingRecord()
    config = read_config(folder, record.positions_per_specialist, record.num_draft_positions)
    published = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type") != config.model_type
    facts = CardFacts(
        name=repo_id.split("/")[-1] if repo_id else folder.resolve().name,
        config=config,
        repo_id=repo_id or folder.resolve().name,
        record=record,
        speed=read_speed_record(folder),
        evaluation=read_evaluation_record(folder),
        has_code=(folder / "custom_generate" / "generate.py").is_file(),
        loading=describe_loading(config) if published else "",
    )
    facts.plot = PLOT if draw_plot(facts, folder / PLOT) else None
    previous = folder / CARD
    if is_own_card(previous):
        text = previous.read_text(encoding="utf-8")
        facts.kept = text.partition(KEPT_MARKER)[2].strip("\n")
        return render_card(facts, ModelCard(text, ignore_metadata_errors=True).data)
    return render_card(facts)


def is_own_card(path: str | os.PathLike) -> bool:
    """Whether a file is a card that this module wrote."""
    path = Path(path)
    return path.is_file() and MARKER in path.read_text(encoding="utf-8", errors="replace")
