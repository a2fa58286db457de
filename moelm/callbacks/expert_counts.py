"""The `expert_counts` callback: the exact load of every expert over the whole run, in one small file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from moelm.callbacks.journal import Record, Shape, append_record, cut_records, read_records
from moelm.callbacks.observer import Observer, domain_loads, saved_state
from moelm.config import Config, NamedConfig, register, setting
from moelm.training.lightning_module import MoELightningModule

FILE = "expert_counts.jsonl"
Counts = list[list[int]]  # by MoE layer and expert


@dataclass(frozen=True)
class Interval:
    """Optimizer steps first_step to last_step, counted from 1, both included; all ranks, all micro-batches."""

    first_step: int
    last_step: int
    load: Counts  # choices as made
    kept: Counts  # the same after capacity


@dataclass(frozen=True)
class ExpertCounts:
    intervals: list[Interval]
    validations: dict[int, dict[str, Counts]]  # step -> domain -> choices as made


INTERVAL: Shape = {"first_step": int, "last_step": int, "load": list}
SHAPES: tuple[Shape, ...] = (INTERVAL, INTERVAL | {"kept": list}, {"step": int, "validation": dict})


def read_expert_counts(run_folder: Path) -> ExpertCounts:
    """What `expert_counts` wrote; empty if it did not run. Raises UserError for a damaged file."""
    counts = ExpertCounts([], {})
    for record in read_records(run_folder / FILE, *SHAPES):
        if "validation" in record:
            counts.validations[record["step"]] = record["validation"]
        else:
            counts.intervals.append(Interval(**{"kept": record["load"], **record}))
    return counts


@dataclass
class ExpertCountsConfig(NamedConfig):
    every_n_steps: int = setting(100, ge=1)  # optimizer steps; written at the next log step, and at the last


@register("callback", "expert_counts", ExpertCountsConfig)
class ExpertCountsWriter(Observer):
    """Sums on the device at every step and reads it at log steps. A checkpoint carries the interval that is open."""

    def __init__(self, config: ExpertCountsConfig, run: Config) -> None:
        self.every = config.every_n_steps
        self.file = run.run_folder / FILE
        moe = run.model.moe
        self.drops = moe is not None and moe.dispatch.drops
        self.first_step = 0  # of the open interval; 0: not known before training starts
        self.load_ME: Tensor | None = None
        self.kept_ME: Tensor | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, MoELightningModule)
        done = pl_module.step
        self.first_step = self.first_step or done + 1

        def keep(record: Record) -> bool:
            """Of the part of the run that is continued, and not of the interval that is open again."""
            if "validation" in record:
                return bool(record["step"] <= done)
            return bool(record["last_step"] < self.first_step)

        if trainer.is_global_zero:
            cut_records(self.file, keep, *SHAPES)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, MoELightningModule)
        if pl_module.is_step_end and pl_module.last_step is not None:
            self.load_ME = _sum(self.load_ME, pl_module.last_step.load_ME)
            if self.drops:
                self.kept_ME = _sum(self.kept_ME, pl_module.last_step.kept_ME)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def observe(self, module: MoELightningModule) -> None:
        passed = module.step // self.every > (self.first_step - 1) // self.every
        if passed or module.is_last_step:
            self._close_interval(module)

    def observe_validation(self, module: MoELightningModule) -> None:
        domains = domain_loads(module)
        if domains and module.trainer.is_global_zero:
            append_record(self.file, {"step": module.step, "validation": domains})

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, MoELightningModule)
        self._close_interval(pl_module)  # where something else ended the run early

    def _close_interval(self, module: MoELightningModule) -> None:
        if self.load_ME is not None and module.trainer.is_global_zero:
            record: Record = {"first_step": self.first_step, "last_step": module.step, "load": _counts(self.load_ME)}
            if self.kept_ME is not None and (kept := _counts(self.kept_ME)) != record["load"]:
                record["kept"] = kept
            append_record(self.file, record)
        self.first_step, self.load_ME, self.kept_ME = module.step + 1, None, None

    def state_dict(self) -> dict[str, Any]:
        load_ME, kept_ME = (None if sum_ME is None else sum_ME.cpu() for sum_ME in (self.load_ME, self.kept_ME))
        return {"first_step": self.first_step, "load_ME": load_ME, "kept_ME": kept_ME}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        kinds = {"first_step": int, "load_ME": Tensor | None, "kept_ME": Tensor | None}
        self.first_step, self.load_ME, self.kept_ME = saved_state(state_dict, **kinds)


def _sum(so_far_ME: Tensor | None, more_ME: Tensor | None) -> Tensor | None:
    if so_far_ME is None or more_ME is None:
        return more_ME
    return so_far_ME.to(more_ME.device) + more_ME


def _counts(sum_ME: Tensor) -> Counts:
    counts: Counts = sum_ME.to(torch.int64).tolist()
    return counts
