"""A run that is told to end: a signal sets a flag, the ranks agree on a step, save there together, and end."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import threading
from multiprocessing import active_children
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.utilities import rank_zero_only

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)  # the last: the terminal has gone
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again


class Preempted(Exception):  # noqa: N818 what was asked for is no error
    """The run was told to end, and `step` is saved."""

    def __init__(self, step: int, exit_code: int = EXIT_CODE) -> None:
        super().__init__(f"stopped as asked, step {step} is saved; continue with --resume auto")
        self.exit_code = exit_code


class StopSignals:
    """Takes the place of Lightning's signal connector, whose handlers talk to other ranks.

    `received` is the first of SIGNALS to come; no rank does anything about it before all agree (`lightning_module`).
    A second SIGINT ends the process at once, and so do `within_s` seconds after the first signal, with the stacks of
    all threads. A thread looks after both, since Python runs no handler while the main thread waits for another rank.
    """

    received_sigterm = False  # Lightning would raise by itself

    def __init__(self, within_s: float) -> None:
        self.received: signal.Signals | None = None
        self.within_s = within_s
        self._handlers: dict[signal.Signals, Any] = {}
        self._pipe_before = -1
        self._deadline: threading.Timer | None = None

    def register_signal_handlers(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # where Python sets none
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        threading.Thread(target=self._watch, args=(reader,), daemon=True).start()
        self._pipe, self._pipe_before = writer, signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        heeded = [each for each in SIGNALS if signal.getsignal(each) != signal.SIG_IGN]  # nohup ignores SIGHUP
        self._handlers = {each: signal.signal(each, _do_nothing) for each in heeded}

    def teardown(self) -> None:
        """As it was before."""
        if self._handlers:
            for each, handler in self._handlers.items():
                signal.signal(each, handler)
            signal.set_wakeup_fd(self._pipe_before)
            os.write(self._pipe, b"\0")  # no signal: the thread ends
            os.close(self._pipe)
            self._handlers = {}
        if self._deadline is not None:
            self._deadline.cancel()

    def _watch(self, reader: int) -> None:
        n_interrupts = 0
        while number := os.read(reader, 1)[0]:
            n_interrupts += number == signal.SIGINT
            if n_interrupts == 2:
                end_process(128 + signal.SIGINT)
            if number in SIGNALS and self.received is None:
                self._deadline = threading.Timer(self.within_s, self._give_up)
                self._deadline.daemon = True
                self._deadline.start()
                self.received = signal.Signals(number)
                self._say(
                    f"{self.received.name}: saved within two steps, or batches of a validation, then the run ends"
                )
        os.close(reader)

    def _give_up(self) -> None:
        assert self.received is not None
        print(
            f"{self.received.name} came {self.within_s:g} s ago and the run is not saved (trainer.stop_within_s)",
            file=sys.stderr,
        )
        faulthandler.dump_traceback()
        end_process(1)

    @rank_zero_only
    def _say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


def end_process(code: int) -> None:
    """At once, and what loads data with it, which would wait some seconds more."""
    for worker in active_children():
        worker.kill()
    os._exit(code)


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """Without a handler the process would end; what is to be done follows from the byte in the pipe."""


def received(trainer: pl.Trainer) -> signal.Signals | None:
    """The signal that told this process to end."""
    signals: Any = trainer._signal_connector
    return signals.received if isinstance(signals, StopSignals) else None


def exit_code(trainer: pl.Trainer, code: int = EXIT_CODE) -> int:
    """`code` for the process that the user, torchrun or SLURM started. 0 for one that Lightning started: when such
    a one ends otherwise Lightning kills the process that started it."""
    environment = trainer._accelerator_connector.cluster_environment
    return 0 if isinstance(environment, LightningEnvironment) and trainer.local_rank > 0 else code


def requeue(trainer: pl.Trainer) -> None:
    """Under SLURM, after the signal that says the time is nearly up (--signal=USR1@...): the job is to start again.
    After a SIGTERM it is SLURM's to decide."""
    job = os.environ.get("SLURM_JOB_ID")
    if received(trainer) is not signal.SIGUSR1 or job is None:
        return
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}") for name in ("JOB_ID", "TASK_ID"))
    job = job if array is None else f"{array}_{task}"
    try:
        failed = subprocess.run(["scontrol", "requeue", job], check=False).returncode != 0
    except OSError:
        failed = True
    if failed:
        print(f"scontrol requeue {job} failed: start the job again yourself", file=sys.stderr)
