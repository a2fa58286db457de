"""What all commands share at the terminal: `--plugin`, and that a user's mistake is one message and exit code 2,
never a traceback."""

from __future__ import annotations

import argparse
import errno
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TextIO, cast

from moelm.config import UserError


def make_parser(command: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """A parser for `python -m <command>`; parse with `parse`."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {command}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="MODULE_OR_FILE",
        help="import it first, so that a config can name what it registers; may be given more than once",
    )
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """The arguments, options and overrides in any order, once everything that a config can name is registered."""
    arguments = parser.parse_intermixed_args(argv)
    import_builtins()
    import_plugins(arguments.plugin)
    return arguments


def import_builtins() -> None:
    """Fill the registry: importing a package registers everything in it."""
    import moelm.callbacks
    import moelm.data.sources
    import moelm.model.attention
    import moelm.moe.balancing
    import moelm.moe.dispatch
    import moelm.moe.routing  # noqa: F401


def import_plugins(named: Iterable[str] = ()) -> None:
    """Import what installed packages offer under the entry point `moelm.plugins`, then each of `named`: a module, or
    the path of a .py file. Raises UserError for one that cannot be imported."""
    for entry in entry_points(group="moelm.plugins"):
        _import(f"the entry point moelm.plugins {entry.name!r}", entry.load)
    for name in named:
        load = _import_file if name.endswith(".py") else importlib.import_module
        _import(f"--plugin {name}", partial(load, name))


def _import(what: str, load: Callable[[], object]) -> None:
    try:
        load()
    except Exception as error:  # whatever code from outside raises
        last = traceback.extract_tb(error.__traceback__)[-1]
        problem = f"{what}: cannot be imported: {type(error).__name__}: {error} ({last.filename}, line {last.lineno})"
        remedy = "name a module on Python's path, or the path of a .py file, that can be imported"
        raise UserError(f"{problem}\n  remedy: {remedy}") from error


def _import_file(name: str) -> None:
    file = Path(name).resolve()
    module_name = f"moelm_plugin_{file.stem}"
    if getattr(sys.modules.get(module_name), "__file__", None) == str(file):
        return  # a second command in the same process
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise


class _Console:
    """Standard output or standard error of a command that goes on where nobody reads them any more: the pipe or the
    terminal has gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lost(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lost(error)

    def _lost(self, error: OSError) -> None:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise error
        _silence(self._stream)


def _silence(stream: TextIO) -> None:
    """What is written to it from now on goes nowhere, also what Python flushes on its way out."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def run(main: Callable[[list[str]], None], outlives_console: bool = False) -> None:
    """Call a command's `main` with the command line and end the process as the shell expects. `outlives_console`: what
    it does is not done when nobody reads what it says."""
    if outlives_console:
        sys.stdout, sys.stderr = (cast(TextIO, _Console(stream)) for stream in (sys.stdout, sys.stderr))
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        remedy = f"\n  remedy: {error.remedy}" if error.remedy and "\n  remedy: " not in str(error) else ""
        print(f"error: {error}{remedy}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `... | head` closed the pipe
        _silence(sys.stdout)
        sys.exit(0)
    except OSError as error:
        if error.filename is None:
            raise
        name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
        print(f"error: {name}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
