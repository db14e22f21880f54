"""Files that say with which settings long work was begun, so that it goes on with the same."""

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..hub.provenance import package_versions


__all__ = [
    "UNFINISHED",
    "check_same_settings",
    "deciding_versions",
    "publish",
    "remove_leftovers",
    "unfinished_name",
    "write_json",
]

UNFINISHED = ".part"
# What the numbers and texts of a target may depend on.
_DECIDING = ("hf_poss", "torch", "transformers")


def deciding_versions() -> dict[str, str]:
    """Versions of the packages that a target's output may depend on."""
    return {name: version for name, version in package_versions().items() if name in _DECIDING}


def write_json(path: str | os.PathLike, content: Any, folder: Path | None = None) -> None:
    """Writes a file that is whole or absent, whenever the process is killed and however many write it at once.

    Args:
        path: of the file.
        content: what JSON can say.
        folder: where it lies while it is written; that of `path` by default.
    """
    unfinished = unfinished_name(path, folder)
    with open(unfinished, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
    publish(unfinished, Path(path))


def unfinished_name(path: str | os.PathLike, folder: Path | None = None) -> Path:
    """A name of this process alone for a file that is being written, in `folder` or beside `path`."""
    path = Path(path)
    return (folder or path.parent) / f"{path.name}.{uuid.uuid4().hex}{UNFINISHED}"


def publish(unfinished: Path, path: Path) -> None:
    """Gives a file that was written to the end its name, after it reached the disk."""
    with open(unfinished, "r+b") as file:
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    if os.name == "posix":  # elsewhere folders cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_leftovers(folder: Path, name: str) -> None:
    """Removes what killed processes left of files whose name begins with `name`; for when no other one writes."""
    for path in folder.glob(f"{name}*{UNFINISHED}"):
        path.unlink(missing_ok=True)


def check_same_settings(found: Mapping[str, Any], given: Mapping[str, Any], what: str) -> None:
    """Refuses to go on with other settings.

    Raises:
        ValueError: if a setting differs; each is named with both values.
    """
    differences = [
        f"{name}: {found.get(name)!r} then, {given.get(name)!r} now"
        for name in sorted({*found, *given})
        if found.get(name) != given.get(name)
    ]
    if differences:
        raise ValueError(
            f"{what} was begun with other settings ({'; '.join(differences)}). Go on with those of the start, or "
            "choose another `--output`."
        )
