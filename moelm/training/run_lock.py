"""One run in a folder at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from moelm.config import ConfigError

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold `folder`, which is made if it is missing, for the first rank of a run. Raises ConfigError where another
    process holds it, with who that is.

    A POSIX lock on `run.lock` in it. The kernel, or the server of a shared file system, gives it up when the process is
    gone, however it ended, so nobody has to guess from a process id or an old heartbeat whether its holder lives, and a
    run that was killed can be continued at once. What the process forks does not hold it. The file says who holds it,
    and goes with the run; one that a kill left means nothing.
    """
    file = folder / "run.lock"
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(file)
    except OSError as error:
        problem = f"{folder}: nothing can be written there: {error.strerror}"
        raise ConfigError("run.dir", problem, "name a folder that can be, or make room") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink()  # before it is given up, or it could be another's
            for path in missing:
                path.rmdir()  # if nothing came of the run
        os.close(descriptor)


def _locked(file: Path) -> int:
    """Its descriptor, which must stay open: to close any one of a file gives up a POSIX lock."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 1000)
            if error.errno in NO_LOCKS:
                print(f"note   {file.parent}: has no file locks, so a second run in it is not noticed", file=sys.stderr)
                return descriptor
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise _held(file, holder) from None
            raise
        with contextlib.suppress(FileNotFoundError):
            if os.stat(file).st_ino == os.fstat(descriptor).st_ino:
                break
        os.close(descriptor)  # its holder removed it in between
    now = datetime.now().astimezone().isoformat(" ", "seconds")
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": now}).encode())
    return descriptor


def _held(file: Path, holder: bytes) -> ConfigError:
    try:
        said = json.loads(holder)
        who = f"process {said['pid']} on {said['host']}, since {said['since']}"
    except (ValueError, KeyError, TypeError):  # it is just being written
        who = "another process"
    remedy = "wait for it or end it, or choose another run.name"
    return ConfigError("run.name", f"the run {file.parent} is being trained by {who}", remedy)
