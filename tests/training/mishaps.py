"""A plugin of two callbacks that disturb a run. `told` sends its process, and those that load its data, a signal at the
moment that TOLD in the environment names: "SIGTERM forward 1" does so on rank 1 (or `all`) before a forward pass. It
writes down which checkpoint there is when a rank ends; each file of weights takes SLOW_S seconds more.
`poisoned` makes the activations of the steps on the rank that POISON names NaN: "3,4 1"; with a third word it
multiplies the last ones by that."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing import active_children
from typing import Any

from lightning.pytorch.callbacks import Callback

from moelm.config import Config, NamedConfig, register
from moelm.training import saving
from moelm.training.checkpoint_io import newest_checkpoint


@register("callback", "told", NamedConfig)
class Told(Callback):
    def __init__(self, config: NamedConfig, run: Config) -> None:
        self.run_folder = run.run_folder

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if "SLOW_S" not in os.environ:
            return
        write = saving.write_weights

        def slow(*arguments: Any) -> None:
            time.sleep(float(os.environ["SLOW_S"]))
            write(*arguments)

        saving.write_weights = slow  # of a process of its own

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        newest = newest_checkpoint(self.run_folder)
        (self.run_folder / f"ended-{trainer.global_rank}").write_text(str(newest and newest.name))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.step == 3:
            self._tell(trainer, "forward")

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.step == 5:
            self._tell(trainer, "validation")

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        if pl_module.step == 6:
            self._tell(trainer, "save")

    def _tell(self, trainer: Any, now: str) -> None:
        name, when, ranks = os.environ.get("TOLD", "SIGTERM never 0").split()
        told = self.run_folder / f"told-{trainer.global_rank}"
        if when == now and ranks in (str(trainer.global_rank), "all") and not told.exists():
            told.write_text(f"{os.getpid()} {time.time()}")
            for pid in (os.getpid(), *(worker.pid for worker in active_children())):  # as Ctrl-C does
                os.kill(pid, getattr(signal, name))
            time.sleep(0.1)  # a thread takes note


@register("callback", "poisoned", NamedConfig)
class Poisoned(Callback):
    def __init__(self, config: NamedConfig, run: Config) -> None:
        self.run_folder = run.run_folder

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        steps, rank, *factor = os.environ.get("POISON", "0 0").split()
        if str(pl_module.step + 1) in steps.split(",") and trainer.global_rank == int(rank) and batch_idx % 2:
            (self.run_folder / "poisoned").write_text(str(time.time()))
            module, by = (
                (pl_module.model.norm, float(factor[0])) if factor else (pl_module.model.embedding, float("nan"))
            )
            self.hook = module.register_forward_hook(lambda module, inputs, output: output * by)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if hasattr(self, "hook"):
            self.hook.remove()
