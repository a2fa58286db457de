"""Where text comes from: each source turns what its config names into a stream of pieces of documents.

All sources stream in a fixed order, so that a preparation can be repeated and its memory does not grow with
the corpus. A new one is a config class and a generator function with `@register("source", name,
ConfigClass)`.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from moelm.config import ConfigError, NamedConfig, SourceConfig, UserError, register, setting

MAX_PIECE = 2**20  # characters


class Piece(NamedTuple):
    """A document, or a part of at most `MAX_PIECE` characters of a long one; never empty, always valid UTF-8.

    The pieces of one document follow each other; the last one has `ends_document`.
    """

    text: str
    domain: str
    ends_document: bool


def cut(text: str, domain: str) -> Iterator[Piece]:
    """A document as pieces, cut at line ends, or hard where a line is longer than a piece."""
    text, domain, start = encodable(text), encodable(domain), 0
    while len(text) - start > MAX_PIECE:
        end = text.rfind("\n", start, start + MAX_PIECE) + 1 or start + MAX_PIECE
        yield Piece(text[start:end], domain, False)
        start = end
    if text:
        yield Piece(text[start:], domain, True)


def encodable(text: str) -> str:
    """Without halves of surrogate pairs, as JSON escapes can spell them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


# ----------------------------------------------------------------------------------------------- stdlib


_NOT_TEXT_TO_LEARN = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idle_test",
    "pydoc_data",
}


@register("source", "stdlib", NamedConfig)
def read_stdlib(config: NamedConfig) -> Iterator[Piece]:
    """The standard library of the running Python (domain `python`) and the language reference that its
    `help()` shows (domain `docs`): about 12 MB that need no download. They change with Python's version."""
    for folder, subfolders, names in os.walk(sysconfig.get_path("stdlib")):
        subfolders[:] = sorted(set(subfolders) - _NOT_TEXT_TO_LEARN)
        for name in sorted(names):
            if name.endswith(".py"):
                try:
                    text = Path(folder, name).read_text(encoding="utf-8")
                except UnicodeDecodeError:
                    continue
                yield from cut(text, "python")
    from pydoc_data.topics import topics  # half a megabyte of text: loaded only when it is wanted

    for topic in sorted(topics):
        yield from cut(topics[topic], "docs")


# ------------------------------------------------------------------------------------------------ files


@dataclass
class FilesConfig(SourceConfig):
    path: str = ""  # a file or a folder; .gz is unpacked
    pattern: str = "**/*.txt"  # of the files in a folder
    domain: str | None = None  # null: the first folder below `path`, or the name of `path`
    separator: str | None = None  # a line equal to it ends a document ("": an empty line); null: one a file
    made_by: str | None = None  # the command that makes `path`, which is named where `path` is missing

    def check_files(self, key: str) -> None:
        _check_files(key, self.path, self.pattern, made_by=self.made_by)

    def files(self) -> list[Path]:
        return _find_files(self.path, self.pattern)


@register("source", "files", FilesConfig)
def read_files(config: FilesConfig) -> Iterator[Piece]:
    """Plain UTF-8 text, line ends kept as they are."""
    for file in _find_files(config.path, config.pattern):
        domain = config.domain or _domain_of(file, config.path)
        yield from _read_documents(file, domain, config.separator)


def _read_documents(file: Path, domain: str, separator: str | None) -> Iterator[Piece]:
    held: list[str] = []
    n_held, at_line_start = 0, True
    for line in _read_lines(file, limit=MAX_PIECE):
        separates = at_line_start and line.rstrip("\r\n") == separator
        at_line_start = line.endswith("\n")
        if held and (separates or n_held + len(line) > MAX_PIECE):
            yield Piece("".join(held), domain, separates)
            held, n_held = [], 0
        if not separates:
            held.append(line)
            n_held += len(line)
    if held:
        yield Piece("".join(held), domain, True)


# ------------------------------------------------------------------------------------------ tables of rows


@dataclass
class RowsConfig(SourceConfig):
    """A row is a document. One with an empty or null text is left out."""

    path: str = ""
    text_key: str = "text"  # the column with the text
    domain_key: str | None = None  # the column with the domain
    domain: str | None = None  # one domain for all rows; null: from `path`, as for `files`

    def check(self, key: str, config: Any) -> None:
        if self.domain is not None and self.domain_key is not None:
            raise ConfigError(f"{key}.domain", "has no effect beside domain_key", "remove one of them")

    @property
    def columns(self) -> list[str]:
        return [self.text_key] + ([self.domain_key] if self.domain_key else [])


_PATTERNS = {"jsonl": ("**/*.jsonl", "**/*.jsonl.gz"), "parquet": ("**/*.parquet",)}


@dataclass
class RowFilesConfig(RowsConfig):
    made_by: str | None = None  # the command that makes `path`, which is named where `path` is missing

    def check_files(self, key: str) -> None:
        _check_files(key, self.path, *_PATTERNS[self.name], made_by=self.made_by)

    def files(self) -> list[Path]:
        return _find_files(self.path, *_PATTERNS[self.name])


@register("source", "jsonl", RowFilesConfig)
def read_jsonl(config: RowFilesConfig) -> Iterator[Piece]:
    """One JSON object a line, in a file or in all `*.jsonl` and `*.jsonl.gz` of a folder."""
    for file in _find_files(config.path, *_PATTERNS["jsonl"]):
        domain = config.domain or _domain_of(file, config.path)
        for number, line in enumerate(_read_lines(file), 1):
            if line.isspace():
                continue
            where = f"{file}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: not valid JSON: {error}\n  remedy: correct the line") from None
            if not isinstance(row, dict):
                raise UserError(f"{where}: {type(row).__name__}, not an object\n  remedy: write {{...}} a line")
            yield from _row_pieces(row, config, domain, where)


@register("source", "parquet", RowFilesConfig)
def read_parquet(config: RowFilesConfig) -> Iterator[Piece]:
    """A file or all `*.parquet` of a folder, a few rows at a time."""
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    for path in _find_files(config.path, *_PATTERNS["parquet"]):
        domain = config.domain or _domain_of(path, config.path)
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                _check_columns(config, file.schema_arrow.names, str(path))
                n_rows = 0
                for batch in file.iter_batches(batch_size=256, columns=config.columns):
                    for row in batch.to_pylist():
                        n_rows += 1
                        yield from _row_pieces(row, config, domain, f"{path}, row {n_rows}")
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path}: cannot be read: {_first_line(error)}\n  remedy: replace the file") from None


@dataclass
class DatasetConfig(RowsConfig):
    """`path` is what `datasets.load_dataset` takes, or a folder written by `save_to_disk`."""

    subset: str | None = None  # also called the configuration of a data set
    split: str = "train"
    streaming: bool = True  # read while downloading; false: download all of it first
    data_files: list[str] = field(default_factory=list)  # for path: json, csv, text or parquet
    max_bytes: int | None = setting(None, ge=1)  # of text: the document that reaches it is the last; null: all
    document_start: str | None = None  # a regex: rows join to documents, each begins with one that matches; null: a row

    def check(self, key: str, config: Any) -> None:
        super().check(key, config)
        if not self.path:
            raise ConfigError(f"{key}.path", "is empty", "name a data set or a folder")
        try:
            re.compile(self.document_start or "")
        except re.error as error:
            raise ConfigError(f"{key}.document_start", f"{self.document_start!r}: {error}", "correct it") from None


@register("source", "dataset", DatasetConfig)
def read_dataset(config: DatasetConfig) -> Iterator[Piece]:
    """Anything the `datasets` library reads, without running code that a data set brings."""
    pieces = _read_dataset_rows(config)
    if config.document_start is not None:
        pieces = _join_rows(pieces, re.compile(config.document_start))
    n_bytes = 0
    for piece in pieces:
        yield piece
        n_bytes += len(piece.text.encode())
        if config.max_bytes is not None and n_bytes >= config.max_bytes and piece.ends_document:
            break


def _join_rows(rows: Iterator[Piece], document_start: re.Pattern[str]) -> Iterator[Piece]:
    held: Piece | None = None
    for piece in rows:
        if held is not None:
            yield held._replace(ends_document=held.ends_document and document_start.match(piece.text) is not None)
        held = piece
    if held is not None:
        yield held


def _read_dataset_rows(config: DatasetConfig) -> Iterator[Piece]:
    where = f"data set {config.path!r}"
    domain = config.domain or config.subset or Path(config.path).name
    try:
        rows = _open_dataset(config)
        if rows.column_names is not None:
            _check_columns(config, rows.column_names, where)
            rows = rows.select_columns(config.columns)
        for number, row in enumerate(rows, 1):
            yield from _row_pieces(row, config, domain, f"{where}, row {number}")
    except UserError:
        raise
    except Exception as error:  # of any type: what the builder of this data set or its download raises
        raise UserError(
            f"{where}: cannot be read: {type(error).__name__}: {_first_line(error)}\n"
            "  remedy: check path, subset, split and data_files, and the network"
        ) from error


def _open_dataset(config: DatasetConfig) -> Any:
    import datasets  # type: ignore[import-untyped]

    folder = Path(config.path)
    if not any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return datasets.load_dataset(
            config.path,
            config.subset,
            split=config.split,
            streaming=config.streaming,
            data_files=config.data_files or None,
        )
    saved = datasets.load_from_disk(config.path)
    if not isinstance(saved, datasets.DatasetDict):
        return saved
    if config.split not in saved:
        raise UserError(f"data set {config.path!r}: no split {config.split!r}\n  allowed: {', '.join(saved)}")
    return saved[config.split]


def _row_pieces(row: Mapping[str, Any], config: RowsConfig, domain: str, where: str) -> Iterator[Piece]:
    _check_columns(config, row, where)
    text = row[config.text_key]
    if config.domain_key is not None and row[config.domain_key] is not None:
        domain = row[config.domain_key]
        if isinstance(domain, dict | list):
            problem = f"{config.domain_key!r} is {type(domain).__name__}, not the name of a domain"
            raise UserError(f"{where}: {problem}\n  remedy: set domain_key{_others(row, config)}")
        domain = str(domain)
    if not isinstance(text, str | None):
        problem = f"{config.text_key!r} is {type(text).__name__}, not text"
        raise UserError(f"{where}: {problem}\n  remedy: set text_key{_others(row, config)}")
    yield from cut(text or "", domain)


def _check_columns(config: RowsConfig, columns: Iterable[str], where: str) -> None:
    for setting_name, column in (("text_key", config.text_key), ("domain_key", config.domain_key)):
        if column is not None and column not in columns:
            raise UserError(
                f"source {config.name}, {where}: no column {column!r}\n"
                f"  remedy: set {setting_name} to one of: {_names(columns)}"
            )


def _others(row: Mapping[str, Any], config: RowsConfig) -> str:
    others = row.keys() - {*config.columns}
    return f" to one of: {_names(others)}" if others else " to another column"


def _names(columns: Iterable[str]) -> str:
    return ", ".join(sorted(map(repr, columns)))


# ------------------------------------------------------------------------------------------- files on disk


def _find_files(path: str, *patterns: str) -> list[Path]:
    if Path(path).is_file():
        return [Path(path)]
    return sorted({file for pattern in patterns for file in Path(path).glob(pattern) if file.is_file()})


def _check_files(key: str, path: str, *patterns: str, made_by: str | None) -> None:
    if not path or not Path(path).exists():
        remedy = "paths are relative to where you are" if made_by is None else f"make it first: {made_by}"
        raise ConfigError(f"{key}.path", f"{path!r}: no such file or folder", remedy)
    try:
        found = _find_files(path, *patterns)
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(f"{key}.pattern", f"{patterns[0]!r}: {error}", "for example **/*.txt") from None
    if not found:
        raise ConfigError(f"{key}.path", f"{path!r} holds no file that matches {' or '.join(patterns)}", "correct it")


def _domain_of(file: Path, path: str) -> str:
    if Path(path).is_file():
        return file.name.split(".")[0]
    below = file.relative_to(path).parts
    return below[0] if len(below) > 1 else Path(path).resolve().name


def _read_lines(file: Path, limit: int = -1) -> Iterator[str]:
    """Lines with their ends; one longer than `limit` characters comes in parts."""
    n_read = 0
    try:
        open_file = gzip.open if file.suffix == ".gz" else open
        with open_file(file, "rt", encoding="utf-8-sig", newline="\n") as stream:
            while line := stream.readline(limit):
                n_read += 1
                yield line
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: not UTF-8 text after line {n_read}: {error.reason}\n  remedy: convert the file, or leave it out"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}: cannot be read: {error}\n  remedy: replace the file") from None


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
