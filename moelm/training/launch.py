"""Processes of one run end together."""

from __future__ import annotations

import os
import threading
import time


def end_with_launcher(every_s: float = 1.0) -> None:
    """In a process that Lightning or torchrun started as a rank: end when that launcher is gone.

    A rank that waits for another inside of a collective hears no signal that only sets a flag, and would keep its
    device for as long as the collective's time limit.
    """
    if "LOCAL_RANK" not in os.environ:
        return
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(every_s)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
