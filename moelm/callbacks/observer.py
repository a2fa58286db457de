"""What observers share: they see the module after an optimizer step at which scalars are logged."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter

from moelm.training.lightning_module import MoELightningModule


class Observer(Callback):
    """Implement `observe`; reading the device there costs no extra wait, since the step is logged anyway."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, MoELightningModule)
        if pl_module.is_log_step:
            self.observe(pl_module)

    def observe(self, module: MoELightningModule) -> None:
        """Called on every rank, so that it may be collective; write through `module.log_scalars`."""


def writer_of(module: MoELightningModule) -> SummaryWriter | None:
    """TensorBoard's writer on rank zero, for images and text; None elsewhere."""
    logger = module.logger
    if isinstance(logger, TensorBoardLogger) and module.trainer.is_global_zero:
        return logger.experiment  # type: ignore[no-any-return]
    return None
