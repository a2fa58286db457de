"""Append-only files of JSON lines in a run's folder, which survive a kill in the middle of a line and a resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moelm.config import UserError

Record = dict[str, Any]
Shape = dict[str, type]  # the keys of a record and what they hold


def append_record(file: Path, record: Record) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(record, separators=(",", ":")) + "\n")


def read_records(file: Path, *shapes: Shape) -> list[Record]:
    """All of them, each of one of the shapes; nothing where there is no file. A last line that was not written to its
    end is left out.

    Raises UserError for a damaged line.
    """
    return [record for record, _ in _records_with_ends(file, shapes)]


def cut_records(file: Path, keep: Callable[[Record], bool], *shapes: Shape) -> None:
    """Cut the file off before the first record that is not to be kept, and before a line torn by a kill."""
    if not file.exists():
        return
    length = 0
    for record, end in _records_with_ends(file, shapes):
        if not keep(record):
            break
        length = end
    with file.open("r+b") as stream:
        stream.truncate(length)


def _records_with_ends(file: Path, shapes: tuple[Shape, ...]) -> list[tuple[Record, int]]:
    """Each record with the offset of the byte after its line."""
    if file.exists() and not file.is_file():
        raise UserError(f"{file}: is no file\n  remedy: delete it")
    found: list[tuple[Record, int]] = []
    end = 0
    for number, line in enumerate(file.read_bytes().splitlines(keepends=True) if file.exists() else (), start=1):
        if not line.endswith(b"\n"):
            break
        end += len(line)
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or {key: type(value) for key, value in record.items()} not in shapes:
                raise ValueError("it is no record of this file")
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}: line {number} is damaged: {error}\n  remedy: delete that line") from None
        found.append((record, end))
    return found
