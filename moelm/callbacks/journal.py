"""Append-only files of JSON lines in a run's folder, which survive a kill in the middle of a line and a resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moelm.config import UserError

Record = dict[str, Any]


def append_record(file: Path, record: Record) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(record, separators=(",", ":")) + "\n")


def read_records(file: Path) -> list[Record]:
    """All of them; nothing where there is no file. A last line that was not written to its end is left out.

    Raises UserError for a damaged line.
    """
    return [record for record, _ in _records_with_ends(file)]


def cut_records(file: Path, keep: Callable[[Record], bool]) -> None:
    """Cut the file off before the first record that is not to be kept, and before a line torn by a kill."""
    if not file.exists():
        return
    length = 0
    for record, end in _records_with_ends(file):
        if not keep(record):
            break
        length = end
    with file.open("r+b") as stream:
        stream.truncate(length)


def _records_with_ends(file: Path) -> list[tuple[Record, int]]:
    """Each record with the offset of the byte after its line."""
    found: list[tuple[Record, int]] = []
    end = 0
    for number, line in enumerate(file.read_bytes().splitlines(keepends=True) if file.exists() else (), start=1):
        if not line.endswith(b"\n"):
            break
        end += len(line)
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{file}: line {number} is damaged: {error}\n  remedy: delete that line") from None
        found.append((record, end))
    return found
