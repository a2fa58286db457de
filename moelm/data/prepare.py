"""Text -> token shards: split by document, train or load the tokenizer, tokenise in parallel, write, swap in.

Reading order: `prepare`, `_build`, then the steps as `_build` calls them. A corpus is streamed, never held:
with a tokenizer to train it is read twice, once to sample and once to tokenise. What is being prepared
stays in a folder beside its final place until it is whole, under a lock, so that neither a crash nor a
second process can leave data that is half done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import gzip
import hashlib
import json
import lzma
import os
import platform
import re
import shutil
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import Tokenizer
from tqdm import tqdm

from moelm.config import (
    CorpusConfig,
    SourceConfig,
    TokenizerConfig,
    UserError,
    build,
    check_corpus,
    differences,
    from_dict,
    to_dict,
)
from moelm.data.sampler import hash64
from moelm.data.sources import Piece
from moelm.data.token_shards import (
    FORMAT_VERSION,
    MAX_DOMAINS,
    SPLITS,
    Counts,
    StreamWriter,
    TokenShards,
    hash_file,
    read_manifest,
    sealed,
)
from moelm.data.tokenizer import Sample, check_tokens, load_tokenizer, read_tokenizer, train_tokenizer

_BATCH_BYTES = 4 * 2**20  # of text tokenised in one call; about 50 times as many bytes are held meanwhile
_BATCH_PIECES = 8192
_BATCHES_IN_FLIGHT = 3  # two in the tokenizer, one written
_MAX_BASELINE_BYTES = 32 * 2**20
_FEWEST_TOKENS = 16  # in a split
_SAMPLED = 2**16  # characters that a given tokenizer is tried with
_MOST_LOST = 0.002  # of them, without a word: a normal form may change some


def prepare(corpus: CorpusConfig, *, force: bool = False, progress: bool = True) -> TokenShards:
    """The token shards of `corpus`, made first if they are missing. With `force` they are made again.

    Raises UserError where the folder holds data of another config, or the text cannot be read or split.
    """
    folder = corpus.path.absolute()
    if force or not _is_prepared(folder, corpus):
        with _lock(folder, progress):
            _clean(folder)
            if force or not _is_prepared(folder, corpus):  # another process may have done it meanwhile
                _refuse_foreign(folder)
                stage = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
                check_corpus(corpus, "data.corpus", reads_text=True)
                try:
                    stage.mkdir()
                    _build(corpus, stage, progress)
                    _swap_in(stage, folder)
                except OSError as error:
                    raise UserError(
                        f"writing {folder} failed: {error}\n  remedy: make room, or set another data.corpus.dir"
                    ) from error
                finally:
                    shutil.rmtree(stage, ignore_errors=True)
    shards = TokenShards(folder)
    if corpus.tokenizer.start_of_text is not None:  # which nothing needs before a model is to write
        check_tokens(corpus.tokenizer, read_tokenizer(str(shards.tokenizer_file)), str(shards.tokenizer_file))
    return shards


def prepare_for_tokenizer(corpus: CorpusConfig, tokenizer_file: Path, end_of_text: str) -> TokenShards:
    """The shards of `corpus` in the ids of a given tokenizer, whatever its own section `tokenizer` says: those that
    are there if that tokenizer made them, else made in a folder of their own beside them. Raises UserError."""
    wanted = hash_file(tokenizer_file)
    given = TokenizerConfig(file=str(tokenizer_file), end_of_text=end_of_text)
    for path in (corpus.path, corpus.path.with_name(f"{corpus.path.name}-{wanted[:8]}")):
        placed = dataclasses.replace(corpus, dir=str(path), tokenizer=given)
        if (path / "manifest.json").is_file():
            manifest = read_manifest(path)
            if manifest.get("tokenizer_sha256") != wanted:
                continue
            placed.tokenizer = from_dict(TokenizerConfig, manifest["corpus"]["tokenizer"], "tokenizer")
        break
    return prepare(placed)


def _build(corpus: CorpusConfig, stage: Path, progress: bool) -> None:
    started = time.perf_counter()
    if corpus.tokenizer.file is None:
        sample, total = _sample(corpus, progress)
        tokenizer = train_tokenizer(sample.texts(), corpus.tokenizer)
    else:
        tokenizer, total = load_tokenizer(corpus.tokenizer, corpus.tokenizer.file), None
    (stage / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    tokenising = time.perf_counter()
    writer, beginning = _Writer(corpus, stage, tokenizer), ""
    with _progress_bar("tokenise", progress, total) as bar:
        for pieces, ids in _tokenise(_pieces(corpus), tokenizer):
            writer.write(pieces, ids)
            beginning = beginning or "".join(piece.text for piece in pieces)[:_SAMPLED]
            bar.update(sum(piece.n_bytes for piece in pieces))
    ended = time.perf_counter()
    write_manifest(corpus, writer)
    if progress:
        share = 0.0 if corpus.tokenizer.file is None else _lost(tokenizer, beginning)
        if share > _MOST_LOST:
            lost = f"{corpus.tokenizer.file} gives {share:.1%} of the characters of the text not back"
            print(f"note   {lost}: what is lost costs no bits, so bits per byte are too low", file=sys.stderr)
        documents, tokens, n_bytes = (sum(count) for count in zip(*writer.counts(), strict=True))
        print(
            f"prepared {corpus.path}: {documents:,} documents, {n_bytes / 1e6:.1f} MB, {tokens:,} tokens "
            f"in {time.perf_counter() - started:.1f} s, "
            f"tokenised at {n_bytes / 1e6 / (ended - tokenising):.1f} MB/s",
            file=sys.stderr,
        )


def _lost(tokenizer: Tokenizer, text: str) -> float:
    """The share of the characters that are not there, wherever, when ids are decoded."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    lost = Counter(text) - Counter(tokenizer.decode(ids, skip_special_tokens=False))
    return lost.total() / max(1, len(text))


# ------------------------------------------------------------------------------------------ text and split


class _SplitPiece(NamedTuple):
    text: str
    domain: str
    ends_document: bool
    split: str
    n_bytes: int


def _pieces(corpus: CorpusConfig) -> Iterator[_SplitPiece]:
    """All sources, one after the other. A document is held out iff a hash of the seed and of its number, a
    uniform number in [0, 1), is below `val_fraction`: it does not depend on what comes after."""
    domains: set[str] = set()
    document, n_written = 0, 0
    for source in corpus.sources:
        for piece in build("source", source):
            assert isinstance(piece, Piece)
            domains.add(piece.domain)
            if len(domains) > MAX_DOMAINS:
                raise UserError(
                    f"source {source.name!r}: more than {MAX_DOMAINS} domains, as {sorted(domains)[:3]}\n"
                    "  remedy: set `domain` of the source, which puts all of it into one"
                )
            held_out = hash64(corpus.seed, document) / 2**64 < corpus.val_fraction
            n_bytes = len(piece.text) if piece.text.isascii() else len(piece.text.encode())
            yield _SplitPiece(*piece, SPLITS[held_out], n_bytes)
            n_written += n_bytes
            document += piece.ends_document
    if n_written == 0:
        raise UserError("the corpus holds no text\n  remedy: check `sources`")


def _progress_bar(what: str, progress: bool, total: int | None = None) -> Any:
    return tqdm(
        desc=what,
        total=total,
        unit="B",
        unit_scale=True,
        disable=None if progress else True,
        file=sys.stderr,
        leave=False,
    )


def _sample(corpus: CorpusConfig, progress: bool) -> tuple[Sample, int]:
    """What the tokenizer is trained on, and the bytes of the corpus. Held-out documents take no part."""
    sample, total = Sample(corpus.tokenizer.train_bytes, corpus.seed), 0
    with _progress_bar("sample for the tokenizer", progress) as bar:
        for piece in _pieces(corpus):
            total += piece.n_bytes
            bar.update(piece.n_bytes)
            if piece.split == "train":
                sample.add(piece.text, piece.domain, piece.n_bytes)
    return sample, total


# --------------------------------------------------------------------------------------- tokenise and write


def _tokenise(
    pieces: Iterable[_SplitPiece], tokenizer: Tokenizer
) -> Iterator[tuple[list[_SplitPiece], list[npt.NDArray[np.uint32]]]]:
    """Batches of pieces with their ids, in order. Rust threads encode; reading, the conversion of ids and
    writing happen meanwhile. Text that spells a special token is encoded as the text that it is."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else it warns in each data worker forked later
    tokenizer.encode_special_tokens = True

    def encode(batch: list[_SplitPiece]) -> list[npt.NDArray[np.uint32]]:
        encodings = tokenizer.encode_batch_fast([piece.text for piece in batch], add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    waiting: deque[tuple[list[_SplitPiece], Future[list[npt.NDArray[np.uint32]]]]] = deque()
    with ThreadPoolExecutor(_BATCHES_IN_FLIGHT - 1) as pool:
        for batch in _batches(pieces):
            waiting.append((batch, pool.submit(encode, batch)))
            if len(waiting) == _BATCHES_IN_FLIGHT:
                oldest, ids = waiting.popleft()
                yield oldest, ids.result()
        for oldest, ids in waiting:
            yield oldest, ids.result()


def _batches(pieces: Iterable[_SplitPiece]) -> Iterator[list[_SplitPiece]]:
    batch: list[_SplitPiece] = []
    n_bytes = 0
    for piece in pieces:
        batch.append(piece)
        n_bytes += piece.n_bytes
        if n_bytes >= _BATCH_BYTES or len(batch) >= _BATCH_PIECES:
            yield batch
            batch, n_bytes = [], 0
    if batch:
        yield batch


class _Writer:
    """Sorts batches into the streams of their split and domain; keeps the held-out text for the baselines."""

    def __init__(self, corpus: CorpusConfig, folder: Path, tokenizer: Tokenizer) -> None:
        self.folder = folder
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.end_of_text_id = tokenizer.token_to_id(corpus.tokenizer.end_of_text)
        self.dtype = np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")
        self.shard_tokens = corpus.shard_tokens
        self.streams: dict[tuple[str, str], StreamWriter] = {}
        self.val_text: dict[str, list[str]] | None = {}  # None: too much of it
        self._val_bytes = 0

    def write(self, pieces: list[_SplitPiece], ids: list[npt.NDArray[np.uint32]]) -> None:
        end_of_text = np.array([self.end_of_text_id], dtype=np.uint32)
        parts: dict[tuple[str, str], list[npt.NDArray[np.uint32]]] = {}
        documents: dict[tuple[str, str], int] = {}
        n_bytes: dict[tuple[str, str], int] = {}
        for piece, piece_ids in zip(pieces, ids, strict=True):
            key = (piece.split, piece.domain)
            parts.setdefault(key, []).append(piece_ids)
            if piece.ends_document:
                parts[key].append(end_of_text)
            documents[key] = documents.get(key, 0) + piece.ends_document
            n_bytes[key] = n_bytes.get(key, 0) + piece.n_bytes
            if piece.split == "val":
                self._keep(piece)
        for (split, domain), arrays in parts.items():
            key = (split, domain)
            if key not in self.streams:
                self.streams[key] = StreamWriter(self.folder, split, domain, self.dtype, self.shard_tokens)
            self.streams[key].append(np.concatenate(arrays), documents[key], n_bytes[key])

    def _keep(self, piece: _SplitPiece) -> None:
        self._val_bytes += piece.n_bytes
        if self._val_bytes > _MAX_BASELINE_BYTES:
            self.val_text = None
        if self.val_text is not None:
            self.val_text.setdefault(piece.domain, []).append(piece.text)

    def counts(self) -> list[Counts]:
        return [Counts(one.documents, one.tokens, one.bytes) for one in self.streams.values()]

    def baselines(self) -> dict[str, float | None]:
        """What general compressors make of the held-out text; null above 32 MiB."""
        if self.val_text is None:
            return {"gzip_bits_per_byte": None, "xz_bits_per_byte": None}
        text = "".join(text for domain in sorted(self.val_text) for text in self.val_text[domain]).encode()
        lzma_filter = {"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": max(2**12, len(text))}
        return {
            "gzip_bits_per_byte": 8 * len(gzip.compress(text, 9)) / len(text),
            "xz_bits_per_byte": 8 * len(lzma.compress(text, filters=[lzma_filter])) / len(text),
        }


def write_manifest(corpus: CorpusConfig, writer: _Writer) -> None:
    """Raises UserError if a split is too small to train or to validate on."""
    splits: dict[str, dict[str, Any]] = {split: {} for split in SPLITS}
    for split, domain in sorted(writer.streams):
        splits[split][domain] = writer.streams[split, domain].entry()
    for split, entries in splits.items():
        tokens = sum(entry["tokens"] for entry in entries.values())
        if tokens < _FEWEST_TOKENS:
            documents = sum(entry["documents"] for entries in splits.values() for entry in entries.values())
            raise UserError(
                f"the {split} split gets {tokens} tokens of {documents} documents "
                f"(val_fraction = {corpus.val_fraction:g}, seed = {corpus.seed})\n"
                "  remedy: change val_fraction or seed, or cut the text into more documents; "
                "the source `files` has `separator` for it"
            )
    manifest = {
        "format_version": FORMAT_VERSION,
        "corpus": to_dict(corpus),
        "made_of": made_of(corpus),
        "made_with": {"python": platform.python_version(), "tokenizers": tokenizers.__version__},
        "tokenizer_sha256": hash_file(writer.folder / "tokenizer.json"),
        "vocab_size": writer.vocab_size,
        "dtype": writer.dtype.str,
        "end_of_text_id": writer.end_of_text_id,
        "splits": splits,
        "baselines": writer.baselines(),
    }
    (writer.folder / "manifest.json").write_text(json.dumps(sealed(manifest), indent=1) + "\n", encoding="utf-8")


def made_of(corpus: CorpusConfig) -> str | None:
    """A hash of the names and sizes of the files that text is read from, and of the tokenizer's file. None where some
    of them are not on this machine."""
    sources = [source.files() for source in corpus.sources if isinstance(source, SourceConfig)]
    file = None if corpus.tokenizer.file is None else Path(corpus.tokenizer.file)
    if [] in sources or (file is not None and not file.is_file()):
        return None
    lines = [f"{each.name} {each.stat().st_size}" for files in sources for each in files or []]
    lines += [] if file is None else [hash_file(file)]
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def why_stale(corpus: CorpusConfig, shards: TokenShards) -> str | None:
    """What to tell the user of shards that were made of other text, or with another tokenizer file, than the config's
    are now. None where they were not, or where that is not known."""
    before, now = shards.manifest.get("made_of"), made_of(corpus)
    if before is None or now is None or before == now:
        return None
    return (
        f"{shards.folder} was made of other files than are there now (their names or sizes, or the tokenizer's file, "
        "have changed) and is used as it is; python -m data_prep.prepare --config ... --force makes it again, but runs "
        "that were trained on it cannot go on then: to keep them, give the new text another data.corpus.name"
    )


# ---------------------------------------------------------------------------------------- the folder on disk


def _is_prepared(folder: Path, corpus: CorpusConfig) -> bool:
    """Raises UserError if the folder holds data that another config made."""
    if not (folder / "manifest.json").is_file():
        return False
    made_from = read_manifest(folder).get("corpus")
    wanted = json.loads(json.dumps(to_dict(corpus)))
    differing = differences(made_from, wanted, ignore=("dir", "tokenizer.start_of_text"))
    if differing:
        listed = "\n".join(
            f"  {key}: {there!r} on disk, {here!r} in the config" for key, (there, here) in differing.items()
        )
        raise UserError(
            f"data.corpus: {folder} was prepared with another config:\n{listed}\n"
            "  remedy: set another data.corpus.dir or name, or replace the data: "
            "python -m data_prep.prepare --config ... --force"
        )
    return True


@contextlib.contextmanager
def _lock(folder: Path, progress: bool) -> Iterator[None]:
    """One process at a time; the kernel releases the lock of one that dies. The file beside the folder stays:
    to remove it while another process waits for it would let a third one in."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        stream = open(folder.with_name(f"{folder.name}.lock"), "w")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"cannot write beside {folder}: {error}\n  remedy: set data.corpus.dir") from None
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress:
                print(f"another process prepares {folder}; waiting for it", file=sys.stderr)
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _clean(folder: Path) -> None:
    """Under the lock, what others left beside the folder is of processes that were killed."""
    for path in list(folder.parent.iterdir()):
        left = re.fullmatch(rf"{re.escape(folder.name)}\.(tmp|old)-\d+", path.name)  # a user's own has no process id
        if left is None:
            continue
        if left[1] == "old" and not folder.exists():
            path.rename(folder)  # killed between the two steps of _swap_in
        else:
            shutil.rmtree(path, ignore_errors=True)


def _refuse_foreign(folder: Path) -> None:
    if not folder.exists():
        return
    ours = ("manifest.json", "tokenizer.json")
    if not folder.is_dir() or any(f.name not in ours and f.suffix != ".bin" for f in folder.iterdir()):
        raise UserError(
            f"data.corpus.dir: {folder} holds other things than prepared data, so it is left alone\n"
            "  remedy: set another data.corpus.dir, or remove it yourself"
        )


def _swap_in(stage: Path, folder: Path) -> None:
    old = folder.with_name(f"{folder.name}.old-{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    stage.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
