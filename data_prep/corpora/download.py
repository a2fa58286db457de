"""Packages by name into a folder of downloads, each checked against its sha256, without installing or running any.

The package lists that apt needs are kept there too, so neither root nor a change to the machine's own lists is needed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from data_prep.corpora.recipe import Package
from moelm.config import UserError
from moelm.data.token_shards import hash_file


class Download(NamedTuple):
    """A package's archive in the folder of downloads, or still to be fetched to there."""

    package: Package
    version: str
    file: Path
    sha256: str

    def is_there(self) -> bool:
        return self.file.is_file() and hash_file(self.file) == self.sha256


def find(packages: Sequence[Package], cache: Path) -> list[Download]:
    """Which version of each package there is, in the order of `packages`. Raises UserError if one is not found."""
    for folder in (cache / "apt/lists/partial", cache / "apt/archives/partial"):
        folder.mkdir(parents=True, exist_ok=True)
    debian = _find_debian([package.name for package in packages if package.sdist is None], cache)
    found = []
    for package in packages:
        if package.sdist is None:
            file_name, sha256 = debian[package.name]
            version = unquote(file_name.split("_")[1])
        else:
            version, sha256 = package.sdist
            file_name = f"{package.name}-{version}.tar.gz"
        found.append(Download(package, version, cache / file_name, sha256))
    return found


def fetch(download: Download, cache: Path) -> None:
    """Make its file be there. What arrives is checked and then moved in place, so a part of it never counts."""
    if download.is_there():
        return
    with tempfile.TemporaryDirectory(dir=cache, prefix="partial-") as stage:
        arrived = Path(stage, download.file.name)
        if download.package.sdist is None:
            _apt(cache, "download", f"{download.package.name}={download.version}", folder=Path(stage))
        else:
            _fetch_sdist(download, arrived)
        if not arrived.is_file() or hash_file(arrived) != download.sha256:
            raise UserError(
                f"{download.package.name}: what was downloaded is not the file with sha256 {download.sha256}\n"
                f"  remedy: try again, or leave it out: --without {download.package.name}"
            )
        os.replace(arrived, download.file)


# ------------------------------------------------------------------------------------------------- Debian


def _find_debian(names: Sequence[str], cache: Path) -> dict[str, tuple[str, str]]:
    """File name and sha256 of each package."""
    if not names:
        return {}
    if not any((cache / "apt/lists").glob("*_Packages*")):
        print("loading the package lists", file=sys.stderr)
        _apt(cache, "update")
        if not any((cache / "apt/lists").glob("*_Packages*")):
            raise UserError("apt-get update loaded no package list\n  remedy: check the network and apt's sources")
    listed = _apt(cache, "download", "--print-uris", *names)
    found = {}
    for line in listed.splitlines():
        match = re.fullmatch(r"'\S+' (([^_/\s]+)_\S+\.deb) \d+ SHA256:([0-9a-f]{64})", line.strip())
        if match is not None:
            found[match[2]] = (match[1], match[3])
    missing = [name for name in names if name not in found]
    if missing:
        raise _not_found(missing)
    return found


def _not_found(names: Sequence[str]) -> UserError:
    return UserError(
        f"apt finds no package {', '.join(names)} (the recipe is for Debian 12)\n"
        f"  remedy: leave out what this machine does not offer: --without {' '.join(names)}"
    )


def _apt(cache: Path, *arguments: str, folder: Path | None = None) -> str:
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise UserError(
            "there is no apt-get and dpkg-deb on this machine, through which Debian's packages come\n"
            "  remedy: build the corpus on Debian 12 or in a container of it, and copy the folder; or take another "
            "corpus, such as configs/data/tinystories.yaml"
        )
    own = cache.absolute() / "apt"
    options = [f"Dir::State::Lists={own / 'lists'}", f"Dir::Cache={own}", "APT::Sandbox::User=root"]
    command = ["apt-get", "-qq", *(part for option in options for part in ("-o", option)), *arguments]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"})
    if ended.returncode != 0 and arguments[0] != "update":  # an update may fail for a source that is not needed
        missing = re.findall(r"Unable to locate package (\S+)|Package '(\S+)' has no installation", ended.stderr)
        if missing:
            raise _not_found([one or other for one, other in missing])
        raise UserError(
            f"apt-get {' '.join(arguments[:2])} failed: {_errors(ended.stderr)}\n"
            f"  remedy: check the network and the room on the disk; if the package lists are old, remove {own}"
        )
    return ended.stdout


def _errors(output: str) -> str:
    lines = [line for line in output.splitlines() if line.startswith("E:")] or output.splitlines()
    return "; ".join(lines[-2:]) or "it says no reason"


# -------------------------------------------------------------------------------------- Python source archives


def _fetch_sdist(download: Download, arrived: Path) -> None:
    """`pip download` would run the package's setup.py to learn its metadata. So pip, which knows the user's index, is
    only asked where the archive is."""
    name = download.package.name
    remedy = f"  remedy: check the network and pip's index, or leave it out: --without {name}"
    command = [sys.executable, "-m", "pip", "index", "versions", name, "-vv", "--disable-pip-version-check"]
    ended = subprocess.run([*command, "--no-binary", ":all:"], capture_output=True, text=True)
    found = re.search(rf"Found link (\S+/{re.escape(download.file.name)})", ended.stdout + ended.stderr)
    if found is None:
        said = (ended.stderr.strip().splitlines() or ["it says no reason"])[-1]
        raise UserError(f"pip finds no {download.file.name}: {said}\n{remedy}")
    try:
        with urllib.request.urlopen(found[1], timeout=60) as response:
            content = response.read()
    except (OSError, HTTPException) as error:  # not found, no answer, an answer that ends too early
        raise UserError(f"{download.file.name} cannot be downloaded: {error}\n{remedy}") from None
    arrived.write_bytes(content)
