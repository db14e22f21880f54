"""Records that processes append to files of their own, one JSON object a line, and that are joined at the end."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .settings import publish, unfinished_name


__all__ = ["RecordFile", "RecordFiles", "whole_lines"]


class RecordFile:
    """A file that grows by whole records: a half-written last line is cut off when it is opened. A context manager."""

    def __init__(self, path: str | os.PathLike):
        self._file = open(path, "a+b")
        self._file.seek(0)
        self._file.truncate(max((end for _, _, end in whole_lines(self._file, Path(path))), default=0))

    def append(self, record: dict[str, Any]) -> None:
        """Writes a record, which then survives the end of this process."""
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def __enter__(self) -> "RecordFile":
        return self

    def __exit__(self, *exception: Any) -> None:
        os.fsync(self._file.fileno())
        self._file.close()


class RecordFiles:
    """The records of all processes, each a dict with its number as `index`.

    Any process may read while others write: a line counts once it ends.

    Args:
        folder: of the files; made here.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def of_process(self, number: int) -> RecordFile:
        """The file of a process, ready for more."""
        return RecordFile(self.folder / f"process-{number:05d}.jsonl")

    @property
    def are_begun(self) -> bool:
        return any(self.folder.glob("process-*.jsonl"))

    def finished(self) -> set[int]:
        """Numbers of the records that are there."""
        return {record["index"] for record, _, _ in self._records()}

    def join(self, path: str | os.PathLike, keep: Callable[[dict[str, Any]], bool] = lambda record: True) -> int:
        """Writes the records that `keep` accepts to one file, in the order of their numbers, each once; returns how
        many. The file has its name once it is whole; lines are in memory one by one."""
        places = {record["index"]: (file, start) for record, file, start in self._records()}
        count, unfinished = 0, unfinished_name(path, self.folder)
        opened = {file: open(file, "rb") for file in {file for file, _ in places.values()}}
        try:
            with open(unfinished, "wb") as output:
                for index in sorted(places):
                    file, start = places[index]
                    opened[file].seek(start)
                    line = opened[file].readline()
                    if keep(json.loads(line)):
                        output.write(line)
                        count += 1
        finally:
            for file in opened.values():
                file.close()
        publish(unfinished, Path(path))
        return count

    def _records(self) -> Iterator[tuple[dict[str, Any], Path, int]]:
        """Each record with its file and where in it its line begins."""
        for path in sorted(self.folder.glob("process-*.jsonl")):
            with open(path, "rb") as file:
                yield from ((record, path, start) for record, start, _ in whole_lines(file, path))


def whole_lines(file: BinaryIO, path: Path) -> Iterator[tuple[dict[str, Any], int, int]]:
    """The records of an open file, each with the start and the end of its line."""
    start = 0
    for line in file:
        if not line.endswith(b"\n"):
            return
        end = start + len(line)
        try:
            yield json.loads(line), start, end
        except ValueError as error:
            raise ValueError(
                f"{path} is damaged: the line at byte {start} is no JSON. Remove the lines from there on, and run the "
                "command again: it writes what is missing."
            ) from error
        start = end
