"""What all commands share at the terminal: a user's mistake is one message and exit code 2, never a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from moelm.config import UserError


def import_builtins() -> None:
    """Fill the registry: importing a package registers everything in it."""
    import moelm.callbacks
    import moelm.data.sources
    import moelm.model.attention
    import moelm.moe.balancing
    import moelm.moe.dispatch
    import moelm.moe.routing  # noqa: F401


def run(main: Callable[[list[str]], None]) -> None:
    """Call a command's `main` with the command line and end the process as the shell expects."""
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `... | head` closed the pipe; Python would flush once more on its way out
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
