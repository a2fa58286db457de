"""The files inside a Debian package or a Python source archive, streamed: nothing is unpacked to disk or run.

So a path that points outside, a link or a device in an archive has no effect: paths are only labels here.
"""

from __future__ import annotations

import contextlib
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from data_prep.corpora.to_text import MAX_BYTES
from moelm.config import UserError


def read_files(archive: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Path and content of the regular files whose path is `wanted`, in the order of the archive.

    Raises UserError where the archive is damaged, a file is larger than `MAX_BYTES`, or a path leads outside.
    """
    remedy = f"remedy: remove {archive}, so that it is downloaded again"
    try:
        with _open(archive) as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts:
                    raise UserError(f"{archive.name}: the path {member.name!r} leads outside of it\n  {remedy}")
                if not member.isfile() or not wanted(str(path)):
                    continue
                if member.size > MAX_BYTES:
                    raise UserError(f"{archive.name}: {path} is larger than {MAX_BYTES >> 20} MiB\n  {remedy}")
                stream = tar.extractfile(member)
                assert stream is not None  # as it is for every regular file
                yield str(path), stream.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{archive.name}: not a whole archive: {error}\n  {remedy}") from None


@contextlib.contextmanager
def _open(archive: Path) -> Iterator[tarfile.TarFile]:
    if archive.suffix != ".deb":
        with tarfile.open(archive, "r|*") as tar:
            yield tar
        return
    # It decompresses what the format allows, by now also zstd, and runs no script of the package.
    command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as unpacker:
        assert unpacker.stdout is not None
        assert unpacker.stderr is not None
        try:
            with tarfile.open(fileobj=unpacker.stdout, mode="r|") as tar:
                yield tar
            unpacker.stdout.read()  # the padding after the last file
            if unpacker.wait() != 0:
                raise tarfile.ReadError(unpacker.stderr.read().decode("utf-8", "replace").partition("\n")[0])
        finally:
            unpacker.kill()  # has no effect on one that has ended
