"""What a drafter's folder or repository records of the target and the tokenizer that it was trained with."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import cached_file, logging

from ...hub.folder import TOKENIZER_REFERENCE
from ...hub.record import TRAINING_RECORD


__all__ = ["Recorded"]

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Recorded:
    """What is not known is None.

    Args:
        base_model: the target of the training.
        base_model_revision: its commit.
        tokenizer: where the tokenizer of the training lies.
        tokenizer_revision: its commit.
        vocab_size: of the target of the training.
    """

    base_model: str | None = None
    base_model_revision: str | None = None
    tokenizer: str | None = None
    tokenizer_revision: str | None = None
    vocab_size: int | None = None

    @classmethod
    def of(cls, name_or_path: str | None) -> "Recorded":
        """Reads the records beside the specialists of this name, a folder or one on the Hub."""
        training = _read(name_or_path, TRAINING_RECORD)
        tokenizer = _read(name_or_path, TOKENIZER_REFERENCE)
        return cls(
            training.get("base_model"),
            training.get("base_model_revision"),
            tokenizer.get("name_or_path"),
            tokenizer.get("revision"),
            tokenizer.get("vocab_size"),
        )


def _read(name_or_path: str | None, file: str) -> dict[str, Any]:
    if not name_or_path:
        return {}
    try:
        path = cached_file(name_or_path, file, _raise_exceptions_for_missing_entries=False)
        content = {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        logger.warning_once(f"{file} of {name_or_path} cannot be read and is left out: {error}")
        return {}
    return content if isinstance(content, dict) else {}
