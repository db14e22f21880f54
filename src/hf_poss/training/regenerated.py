"""The file that regenerated data goes to, and what lies beside it until it is whole."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .record_files import RecordFiles
from .settings import check_same_settings, write_json


__all__ = ["RegeneratedData", "rows_digest"]


def rows_digest(rows: Iterable[Mapping[str, Any]]) -> str:
    """A digest of all rows of a dataset."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


class RegeneratedData:
    """`NAME.jsonl`, which is there once every record is; `NAME.settings.json`, how they are written; and the folder
    `NAME.parts` with the records of every process.

    Args:
        path: of the jsonl file.

    Raises:
        ValueError: if it has another ending.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if self.path.suffix != ".jsonl":
            raise ValueError(f"`--output` is {path}; expected a name that ends in .jsonl.")
        self.settings_path = self.path.with_suffix(".settings.json")
        self.parts = self.path.with_suffix(".parts")

    @property
    def records(self) -> RecordFiles:
        return RecordFiles(self.parts)

    @property
    def is_whole(self) -> bool:
        return self.path.is_file()

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Begins, or finds the work begun with the same settings.

        Raises:
            ValueError: if it was begun with others, or the file is something else.
        """
        begun = self.is_whole or self.records.are_begun  # looked at first: whoever begins writes the settings first
        if not self.settings_path.is_file():
            if begun:
                raise ValueError(
                    f"{self.path} or {self.parts} is there already, without {self.settings_path.name}, which says how "
                    "it was written. Choose another `--output`."
                )
            write_json(self.settings_path, settings, self.parts)
        check_same_settings(self.settings(), settings, str(self.path))

    def settings(self) -> dict[str, Any]:
        """How the records are written.

        Raises:
            FileNotFoundError: if nothing was begun.
        """
        if not self.settings_path.is_file():
            raise FileNotFoundError(f"No {self.settings_path}: nothing was regenerated to {self.path} yet.")
        return json.loads(self.settings_path.read_text(encoding="utf-8"))

    def join(self, drop_unfinished: bool = False) -> Counter[str]:
        """Writes the file from the parts of all processes, in the order of the dataset; counts of records `written`,
        `unfinished` (an answer without an end) and `skipped` (nothing could be asked).

        Raises:
            ValueError: if records are missing.
        """
        rows, there = self.settings()["rows"], len(self.records.finished())
        if there < rows:
            raise ValueError(f"{there} of {rows} records are there. Run the command that began {self.path} again.")
        counts: Counter[str] = Counter()

        def keep(record: dict[str, Any]) -> bool:
            kind = "skipped" if "skipped" in record else "finished" if record["finished"] else "unfinished"
            counts[kind] += 1
            return kind == "finished" or (kind == "unfinished" and not drop_unfinished)

        counts["written"] = self.records.join(self.path, keep)
        return counts
