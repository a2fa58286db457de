"""What observers share: the two moments at which they look, and where what they see is written."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Sequence
from typing import Any, TypeVar

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
from torch.utils.tensorboard import SummaryWriter

from moelm.callbacks.heat_map import Pixels
from moelm.callbacks.progress_bar import StepProgressBar
from moelm.config import Config, ConfigError
from moelm.training.lightning_module import MoELightningModule
from moelm.training.weight_files import CheckpointError

T = TypeVar("T")
Counts = npt.NDArray[np.float64]
LEAST_EXPECTED = 5.0  # counts by chance below which a ratio to them is noise


class Observer(Callback):
    """Implement `observe` or `observe_validation`. Both are called on every rank, so they may be collective; write
    through `module.log_scalars` and `writer_of`. Reading the device there costs no extra wait."""

    def observe(self, module: MoELightningModule) -> None:
        """After an optimizer step at which scalars are logged."""

    def observe_validation(self, module: MoELightningModule) -> None:
        """After a validation, when `module.evaluation` is new."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, MoELightningModule)
        if pl_module.is_log_step:
            self.observe(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, MoELightningModule)
        if not trainer.sanity_checking:
            started = time.perf_counter()
            self.observe_validation(pl_module)
            pl_module.paused_s += time.perf_counter() - started


def saved_state(state: dict[str, Any], **kinds: Any) -> list[Any]:
    """The values under the keys `kinds`, each of which must be of its kind. Raises CheckpointError."""
    for key, kind in kinds.items():
        if key not in state or not isinstance(state[key], kind):
            raise CheckpointError(f"the saved state of a callback is damaged: {key} is {state.get(key)!r:.80}")
    return [state[key] for key in kinds]


def writer_of(module: MoELightningModule) -> SummaryWriter | None:
    """TensorBoard's writer on rank zero, for images and text; None elsewhere."""
    logger = module.logger
    if isinstance(logger, TensorBoardLogger) and module.trainer.is_global_zero:
        return logger.experiment  # type: ignore[no-any-return]
    return None


def write_image(writer: SummaryWriter, tag: str, image: Pixels, step: int) -> None:
    """uint8 [height, width, 3]. `SummaryWriter.add_image` takes twice the time, which it spends on conversions."""
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, "PNG", compress_level=3)
    height, width, _ = image.shape
    proto = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encoded.getvalue())
    writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=proto)]), step)


def say(module: MoELightningModule, line: str) -> None:
    """One line on rank zero's console, above the progress bar if there is one."""
    bar = module.trainer.progress_bar_callback
    if not module.trainer.is_global_zero:
        return
    if isinstance(bar, StepProgressBar):
        bar.say(line)
    else:
        print(line, file=sys.stderr, flush=True)


def image_is_due(module: MoELightningModule, every: int) -> bool:
    """At a log step: is it the first one, the last one, or the next after a multiple of `every` steps? A function of
    the step alone, so that a resumed run draws what the uninterrupted one would have drawn."""
    trainer = module.config.trainer
    first = module.step <= trainer.log_every_n_steps
    return first or module.is_last_step or module.step % every < trainer.log_every_n_steps


def validation_image_is_due(module: MoELightningModule, every: int) -> bool:
    """At a validation: is it the last one, or the next after a multiple of `every` steps?"""
    return module.is_last_step or module.step % every < module.config.data.val_every_n_steps


def domain_loads(module: MoELightningModule) -> dict[str, list[list[int]]]:
    """The choices of the last validation by domain, then by MoE layer and expert; empty for a dense model."""
    return {name: result.load for name, result in module.evaluation.items() if name != "all" and result.load}


def check_layers(key: str, layers: Sequence[int] | None, run: Config) -> None:
    """Raises ConfigError for layers that a callback was asked to show and cannot."""
    if layers is not None and (not layers or len(set(layers)) < len(layers)):
        raise ConfigError(f"{key}.layers", f"{list(layers)} is empty or repeats itself", "name each once, or null")
    for layer in layers or ():
        if layer not in run.model.routed_layers:
            remedy = f"choose from {run.model.routed_layers}, or null"
            raise ConfigError(f"{key}.layers", f"layer {layer} has no experts", remedy)


def spread(items: Sequence[T], n: int) -> list[T]:
    """n of them at even distances, the first and the last among them; all if there are no more."""
    if len(items) <= n:
        return list(items)
    return [items[round(i * (len(items) - 1) / (n - 1))] for i in range(n)]


def ratio_to_chance(seen: Counts, chance: Counts) -> Counts:
    """seen / chance, of any one shape; NaN where chance alone would give fewer than LEAST_EXPECTED."""
    enough = chance >= LEAST_EXPECTED
    return np.where(enough, seen / np.where(enough, chance, 1.0), np.nan)
