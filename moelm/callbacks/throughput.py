"""The `throughput` callback: tokens a second, and the share of the chip's peak that they are."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from moelm.config import Config, NamedConfig, register
from moelm.training.lightning_module import MoELightningModule

# Dense bf16 matrix products without sparsity, FLOP/s, from the vendors' data sheets; the first name that fits.
PEAK_BF16 = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}


def peak_flops(device_name: str) -> float | None:
    """None for a chip that is not in the table: no figure is better than a wrong one."""
    others = r"laptop|\bMIG\b|H200 NVL|4090 D"  # the same name, another chip or a part of one
    if re.search(others, device_name, re.IGNORECASE):
        return None
    fits = (peak for name, peak in PEAK_BF16.items() if re.search(rf"\b{name}\b", device_name, re.IGNORECASE))
    return next(fits, None)


def mfu(tokens_per_s: float, flops: int, peak: float, n_devices: int) -> float:
    """Model FLOPs utilisation: tokens/s x training FLOPs a token of the active parameters / peak of all devices."""
    return tokens_per_s * flops / (peak * n_devices)


@dataclass
class ThroughputConfig(NamedConfig):
    pass


@register("callback", "throughput", ThroughputConfig)
class Throughput(Callback):
    """perf/tokens_per_s between two log steps, without validation and saving, from the end of the first step on;
    perf/mfu under bf16-mixed on a known chip; perf/peak_memory_gib on CUDA."""

    def __init__(self, config: ThroughputConfig, run: Config) -> None:
        self.batch_tokens = run.optim.batch_tokens
        self.mixed = run.trainer.precision == "bf16-mixed"
        self._mark: tuple[int, float] | None = None  # step and training time of the last log

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, MoELightningModule)
        first = self._mark is None and pl_module.is_step_end
        if not (pl_module.is_log_step or first):
            return
        device = pl_module.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now, step = time.perf_counter() - pl_module.paused_s, pl_module.step
        if self._mark is not None:
            tokens_per_s = (step - self._mark[0]) * self.batch_tokens / (now - self._mark[1])
            scalars = {"perf/tokens_per_s": tokens_per_s}
            peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
            if peak is not None and self.mixed:
                scalars["perf/mfu"] = mfu(tokens_per_s, pl_module.flops_per_token, peak, trainer.world_size)
            if device.type == "cuda":
                scalars["perf/peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
            pl_module.log_scalars(scalars)
        self._mark = (step, now)
