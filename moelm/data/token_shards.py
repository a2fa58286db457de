"""Prepared text on disk: the format, its writer and its reader.

    <folder>/tokenizer.json
    <folder>/manifest.json              the corpus config, counts and checksums, also its own: `prepare.write_manifest`
    <folder>/train.<domain>.00000.bin   token ids, raw little-endian uint16 (uint32 above 65,536 tokens)

A (split, domain) is one stream of tokens: its documents one after the other, each ended by the end-of-text
token, cut into shards of at most `shard_tokens` tokens wherever that falls.
"""

from __future__ import annotations

import bisect
import errno
import hashlib
import itertools
import json
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moelm.config import UserError

FORMAT_VERSION = 1
SPLITS = ("train", "val")
MAX_DOMAINS = 256
DTYPES = {name: np.dtype(name) for name in ("<u2", "<u4")}
BASELINES = ("gzip_bits_per_byte", "xz_bits_per_byte")
NO_TARGET = -100  # what torch's cross-entropy ignores
_VERIFY_AT_OPEN = 2**30  # bytes
_MAX_OPEN_SHARDS = 256  # each holds a file descriptor


class DataError(UserError):
    """Prepared data that is missing, damaged, or of another version."""


def _damaged(problem: str) -> DataError:
    return DataError(f"{problem}\n  remedy: prepare again: python -m data_prep.prepare --config ... --force")


class Counts(NamedTuple):
    documents: int
    tokens: int  # with one end-of-text token a document
    bytes: int  # of the text in UTF-8


class Window(NamedTuple):
    inputs: npt.NDArray[np.int64]  # [L]; the token before each target, end-of-text at the start of the stream
    targets: npt.NDArray[np.int64]  # [L]; NO_TARGET from n_valid on
    n_valid: int
    domain: int  # index in TokenShards.domains


def slug(domain: str) -> str:
    """A file name for any domain; different domains get different ones, also where case does not count."""
    plain = re.sub(r"[^a-z0-9_-]+", "-", domain.lower())[:40]
    if plain == domain and plain:
        return plain
    return f"{plain}-{hashlib.blake2b(domain.encode(), digest_size=4).hexdigest()}"


def hash_file(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_json(file: Path) -> Any:
    """Raises OSError and ValueError, also for what is no regular file, such as a link to a device without end."""
    if file.exists() and not file.is_file():
        raise OSError(errno.EINVAL, "is no file", str(file))
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """With the sha256 of all else in it, so that a manifest is checked like what it names."""
    return {**manifest, "sha256": _hash_of(manifest)}


def is_sealed(manifest: dict[str, Any]) -> bool:
    """True also without a sha256, as an older moelm wrote it."""
    return manifest.get("sha256", "") in ("", _hash_of({key: manifest[key] for key in manifest.keys() - {"sha256"}}))


def _hash_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# ----------------------------------------------------------------------------------------------- writer


class StreamWriter:
    """Appends to the token stream of one (split, domain). Holds no file open: there may be hundreds."""

    def __init__(self, folder: Path, split: str, domain: str, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self.folder = folder
        self.stem = f"{split}.{slug(domain)}"
        self.dtype = dtype
        self.shard_tokens = shard_tokens
        self.documents = self.tokens = self.bytes = 0
        self.shards: list[dict[str, Any]] = []
        self._sha256 = hashlib.sha256()

    def append(self, ids: npt.NDArray[Any], documents: int, n_bytes: int) -> None:
        self.documents += documents
        self.tokens += len(ids)
        self.bytes += n_bytes
        while len(ids):
            if not self.shards or self.shards[-1]["tokens"] == self.shard_tokens:
                self.shards.append({"file": f"{self.stem}.{len(self.shards):05d}.bin", "tokens": 0, "sha256": ""})
                self._sha256 = hashlib.sha256()
            shard = self.shards[-1]
            part, ids = np.split(ids, [self.shard_tokens - shard["tokens"]])
            data = part.astype(self.dtype, copy=False).tobytes()
            with open(self.folder / shard["file"], "ab") as stream:
                stream.write(data)
            self._sha256.update(data)
            shard["tokens"] += len(part)
            shard["sha256"] = self._sha256.hexdigest()

    def entry(self) -> dict[str, Any]:
        """What the manifest says of this stream."""
        return {key: getattr(self, key) for key in ("documents", "tokens", "bytes", "shards")}


# ----------------------------------------------------------------------------------------------- reader


def read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / "manifest.json"
    try:
        manifest = read_json(file)
    except FileNotFoundError:
        raise _damaged(f"{file}: no such file, so there is no prepared data") from None
    except (OSError, ValueError) as error:
        raise _damaged(f"{file}: cannot be read: {error}") from None
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise _damaged(f"{file}: format version {version}, but this moelm reads version {FORMAT_VERSION}")
    if not is_sealed(manifest):
        raise _damaged(f"{file}: is damaged (its content does not match its own sha256)")
    return dict(manifest)


class _Stream:
    def __init__(self, domain: int, entry: dict[str, Any]) -> None:
        self.domain = domain
        self.counts = Counts(*(whole_number(entry[key]) for key in Counts._fields))
        self.files = [str(shard["file"]) for shard in entry["shards"]]
        self.starts = [0, *itertools.accumulate(whole_number(shard["tokens"]) for shard in entry["shards"])]
        if self.starts[-1] != self.counts.tokens:
            raise ValueError(f"{self.counts.tokens} tokens in shards of {self.starts[-1]}")


def whole_number(value: Any) -> int:
    """Raises ValueError for anything else, and for a negative one."""
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


class TokenShards:
    """Windows of prepared text. The files are memory-mapped at the first use in each process.

    Opening compares names, sizes and the tokenizer with the manifest, and the checksums of all shards where
    they hold at most 1 GiB together; `verify()` compares them whatever the size. Raises DataError.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        try:
            self.vocab_size = whole_number(self.manifest["vocab_size"])
            self.end_of_text_id = whole_number(self.manifest["end_of_text_id"])
            said = {name: self.manifest["baselines"].get(name) for name in BASELINES}
            self.baselines = {name: None if value is None else float(value) for name, value in said.items()}
            self._dtype = DTYPES[self.manifest["dtype"]]
            splits = self.manifest["splits"]
            self.domains: list[str] = sorted({domain for split in SPLITS for domain in splits[split]})
            self._streams = {
                split: [_Stream(self.domains.index(domain), splits[split][domain]) for domain in sorted(splits[split])]
                for split in SPLITS
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _damaged(f"{self.folder / 'manifest.json'}: is damaged: {error!r}") from None
        self._maps: dict[str, np.memmap[Any, Any]] = {}
        self._window_starts = cache(self._count_windows)
        self._check_files()

    # ------------------------------------------------------------------------------------------ checks

    def _shards(self) -> list[dict[str, Any]]:
        return [
            shard for split in SPLITS for entry in self.manifest["splits"][split].values() for shard in entry["shards"]
        ]

    def _check_files(self) -> None:
        expected = {shard["file"]: shard["tokens"] * self._dtype.itemsize for shard in self._shards()}
        for name, n_bytes in expected.items():
            file = self.folder / name
            if Path(name).name != name:
                raise _damaged(f"{self.folder / 'manifest.json'}: names {name!r}, which is no file of the folder")
            if not file.is_file():
                raise _damaged(f"{file}: no such file, but manifest.json names it")
            if file.stat().st_size != n_bytes:
                raise _damaged(f"{file}: {file.stat().st_size} bytes, but manifest.json says {n_bytes}")
        if not self.tokenizer_file.is_file():
            raise _damaged(f"{self.tokenizer_file}: no such file")
        if hash_file(self.tokenizer_file) != self.manifest["tokenizer_sha256"]:
            raise _damaged(f"{self.tokenizer_file}: not the tokenizer that made this data (its sha256 differs)")
        if sum(expected.values()) <= _VERIFY_AT_OPEN:
            self.verify()

    def verify(self) -> None:
        """Compare the sha256 of every shard with the manifest."""
        for shard in self._shards():
            if hash_file(self.folder / shard["file"]) != shard["sha256"]:
                raise _damaged(f"{self.folder / shard['file']}: is damaged (its sha256 is not the manifest's)")

    # ----------------------------------------------------------------------------------------- content

    @property
    def fingerprint(self) -> str:
        """The same for the same tokens in the same shards, wherever they lie."""
        return hashlib.sha256(json.dumps(self.manifest["splits"], sort_keys=True).encode()).hexdigest()

    @property
    def tokenizer_file(self) -> Path:
        return self.folder / "tokenizer.json"

    def split_counts(self, split: str) -> dict[str, Counts]:
        return {self.domains[stream.domain]: stream.counts for stream in self._streams[split]}

    def n_windows(self, split: str, seq_len: int) -> int:
        """Training takes whole windows only; validation fills up the last one of a domain, so that it
        predicts every token of the split exactly once."""
        return self._window_starts(split, seq_len)[-1]

    def _count_windows(self, split: str, seq_len: int) -> list[int]:
        """The number of windows before each stream, and of all."""
        rest = 0 if split == "train" else seq_len - 1
        return [
            0,
            *itertools.accumulate((stream.counts.tokens + rest) // seq_len for stream in self._streams[split]),
        ]

    def window(self, split: str, index: int, seq_len: int) -> Window:
        """Raises DataError on a token id outside the vocabulary, which would index past the embedding."""
        starts = self._window_starts(split, seq_len)
        if not 0 <= index < starts[-1]:
            raise IndexError(f"window {index} of {starts[-1]}")
        i = bisect.bisect_right(starts, index) - 1
        stream = self._streams[split][i]
        first = (index - starts[i]) * seq_len
        n_valid = min(seq_len, stream.counts.tokens - first)
        tokens = self._read(stream, max(first - 1, 0), first + n_valid)
        inputs = np.full(seq_len, self.end_of_text_id, dtype=np.int64)
        targets = np.full(seq_len, NO_TARGET, dtype=np.int64)
        targets[:n_valid] = tokens[-n_valid:]
        if first == 0:
            inputs[1:n_valid] = tokens[:-1]
        else:
            inputs[:n_valid] = tokens[:-1]
        return Window(inputs, targets, n_valid, stream.domain)

    def _read(self, stream: _Stream, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Tokens [start, stop) of a stream, from as many shards as they lie in."""
        parts = []
        shard = bisect.bisect_right(stream.starts, start) - 1
        while start < stop:
            offset = start - stream.starts[shard]
            n = min(stop, stream.starts[shard + 1]) - start
            part = self._map(stream.files[shard])[offset : offset + n]
            if part.max() >= self.vocab_size:
                bad = offset + int(np.argmax(part >= self.vocab_size))
                raise _damaged(
                    f"{self.folder / stream.files[shard]}: token id {part[bad - offset]} at token offset "
                    f"{bad} is outside the vocabulary of {self.vocab_size}"
                )
            parts.append(part)
            start, shard = start + n, shard + 1
        return np.concatenate(parts, dtype=np.int64)

    def _map(self, file: str) -> np.memmap[Any, Any]:
        if file not in self._maps:
            if len(self._maps) >= _MAX_OPEN_SHARDS:
                self._maps.pop(next(iter(self._maps)))
            self._maps[file] = np.memmap(self.folder / file, dtype=self._dtype, mode="r")
        return self._maps[file]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_maps", "_window_starts")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._maps = {}
        self._window_starts = cache(self._count_windows)
