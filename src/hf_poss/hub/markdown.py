"""Values as Markdown: names, numbers, cells of tables."""

import os
import re
from collections.abc import Iterable
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id


__all__ = ["cell", "cells", "count", "duration", "grouped", "hub_name", "is_repo_id", "linked", "listed", "shell"]


def hub_name(name: str | None) -> str | None:
    """`name` if it can be one on the Hub; None for paths of this machine and other text."""
    return name if name and not os.path.exists(name) and is_repo_id(name) else None


def is_repo_id(name: Any) -> bool:
    """Whether the Hub would take a name, `name` or `owner/name`."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def cells(rows: Iterable[tuple[str, Any]]) -> list[tuple[str, str]]:
    """Rows of a table that have something to tell, as text that does not break it."""
    return [(title, cell(value)) for title, value in rows if value not in (None, "", [], {})]


def cell(value: Any) -> str:
    """A value as text of one line that does not break a table."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def listed(values: dict[str, Any] | None) -> str:
    """Names and their values, in a line."""
    return ", ".join(
        f"{name} {', '.join(map(str, value)) if isinstance(value, list) else cell(value)}"
        for name, value in (values or {}).items()
    )


def linked(name: str) -> str:
    """A link to `owner/name` on the Hub; of a path the last part, as code."""
    if "/" in name and hub_name(name):
        return f"[{name}](https://huggingface.co/{name})"
    return f"`{os.path.basename(os.path.normpath(name))}`"


def count(number: int, noun: str) -> str:
    """1 prompt, 2 prompts."""
    return f"{grouped(number)} {noun}{'' if number == 1 else 's'}"


def grouped(number: int | None) -> str | None:
    """1,234."""
    return None if number is None else f"{number:,}"


def duration(seconds: float) -> str:
    """A time as one reads it: 90 s, 12 min, 3 h 5 min."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def shell(command: str | None) -> str | None:
    """A command as it can stand in a block of code."""
    return None if not command else command.replace("```", "'''")
