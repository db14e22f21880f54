"""The tokenizer of specialists is their target's: a folder names it and holds no copy."""

import json
import os
from pathlib import Path

from ..configuration_poss import PosSConfig
from .folder import TOKENIZER_REFERENCE
from .record import TrainingRecord


__all__ = ["write_tokenizer_reference"]


def write_tokenizer_reference(folder: str | os.PathLike, config: PosSConfig, record: TrainingRecord) -> Path:
    """Writes `tokenizer_reference.json`: where the tokenizer lies (`name_or_path`), the commit that training saw
    (`revision`), and the size of the target's vocabulary (`vocab_size`); null where it is not known."""
    name = record.tokenizer or record.base_model or config.target_name_or_path
    reference = {
        "name_or_path": name,
        "revision": None if record.tokenizer else record.base_model_revision,
        "vocab_size": config.vocab_size,
    }
    path = Path(folder) / TOKENIZER_REFERENCE
    path.write_text(json.dumps(reference, indent=2) + "\n", encoding="utf-8")
    return path
