"""A run that stands still ends by itself and says where it stood."""

from __future__ import annotations

import faulthandler
import sys
import threading
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from moelm.training.preemption import end_process

PATIENCE_S = 3600.0  # for what takes long in a run that is well
STEPS_TO_COMPILE = 2
BATCHES_TO_COMPILE = 2  # of validations


class StallWatch(Callback):
    """Ends the process with exit code 1 and the stacks of all its threads when no micro-batch and no batch of a
    validation ends for `timeout_s`; a launcher then ends the other ranks. It may be PATIENCE_S while blocks are
    compiled, in the first steps and the first batches of a validation of this process, and from the beginning of a save
    to the end of the next batch, since ranks that write nothing wait for those that do.

    Each tick of its thread counts for no more than it was to take, so a process that is suspended does not seem to
    stand still.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._where = ""
        self._limit_s = PATIENCE_S
        self._n_ended = 0  # batches of both kinds
        self._n_validated = 0
        self._first_step = 0
        self._over: threading.Event | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._first_step = trainer.global_step
        self._over = threading.Event()
        self._batch_ended(trainer, True)
        threading.Thread(target=self._watch, args=(self._over,), name="stall watch", daemon=True).start()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self._batch_ended(trainer, trainer.global_step - self._first_step < STEPS_TO_COMPILE)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._batch_ended(trainer, self._n_validated < BATCHES_TO_COMPILE)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self._n_validated += 1
        self._batch_ended(trainer, self._n_validated < BATCHES_TO_COMPILE)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        self._batch_ended(trainer, True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._batch_ended(trainer, True)  # a save beside training is waited for

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._end_watch()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._end_watch()

    def _end_watch(self) -> None:
        if self._over is not None:
            self._over.set()

    def _batch_ended(self, trainer: pl.Trainer, patient: bool) -> None:
        self._where = f"rank {trainer.global_rank}, step {trainer.global_step}"
        self._limit_s = max(self.timeout_s, PATIENCE_S) if patient else self.timeout_s
        self._n_ended += 1

    def _watch(self, over: threading.Event) -> None:
        tick_s, idle_s, n_ended = min(1.0, self.timeout_s / 20), 0.0, -1
        while not over.wait(tick_s):
            idle_s = idle_s + tick_s if n_ended == self._n_ended else 0.0
            n_ended = self._n_ended
            if idle_s > self._limit_s:
                print(
                    f"{self._where}: no batch has ended for {self._limit_s:g} s (trainer.stall_timeout_s; null: never "
                    "mind), so the run ends; this is where its threads stand:",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback()
                end_process(1)
