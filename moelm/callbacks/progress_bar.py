"""The console during training: one bar of optimizer steps on a terminal, one line a log step elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from moelm.config import Config
from moelm.training.lightning_module import MoELightningModule

SHOWN = (
    ("train/ce", "ce {:.3f}"),
    ("perf/tokens_per_s", "{:,.0f} tokens/s"),
    ("moe/max_violation", "MaxVio {:.2f}"),
)


class StepProgressBar(ProgressBar):
    """Loss, tokens a second, MaxVio and time left; rank zero only. It is always on, and no part of `callbacks`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.total = config.trainer.max_steps
        self.bar: tqdm[Any] | None = None
        self.enabled, self._pending = True, False
        self._started = (0, 0.0)

    def disable(self) -> None:
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = trainer.global_step
        self._started = (step, time.perf_counter())
        if self.enabled and sys.stderr.isatty():
            layout = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
            self.bar = tqdm(total=self.total, initial=step, desc="training", bar_format=layout, dynamic_ncols=True)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, MoELightningModule)
        if self.bar is not None and pl_module.is_step_end:
            self.bar.update(1)
        self._pending |= pl_module.is_log_step

    # The module logs after the callbacks, so its scalars are shown at the next hook.
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._show(pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._show(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, MoELightningModule)
        if self.enabled and not trainer.sanity_checking:
            result = pl_module.evaluation["all"]
            self.say(
                f"step {pl_module.step}: validation ce {result.ce:.4f} nats/token, "
                f"perplexity {result.perplexity:.2f}, {result.bits_per_byte:.3f} bits/byte"
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._show(pl_module)
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _show(self, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, MoELightningModule)
        if not (self._pending and self.enabled):
            return
        self._pending = False
        parts = [text.format(pl_module.latest[tag]) for tag, text in SHOWN if tag in pl_module.latest]
        if self.bar is not None:
            self.bar.set_postfix_str(", ".join(parts))
        else:
            step, (first, since) = pl_module.step, self._started
            left = (time.perf_counter() - since) / max(1, step - first) * (self.total - step)
            self.say(f"step {step}/{self.total}: {', '.join(parts)}, {left:.0f} s left")

    def say(self, line: str) -> None:
        """One line that does not tear the bar."""
        if self.bar is not None:
            tqdm.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)
