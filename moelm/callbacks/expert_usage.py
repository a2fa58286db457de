"""The `expert_usage` callback: how the tokens of each MoE layer spread over its experts, as numbers and as pictures."""

# ruff: noqa: RUF009  (setting returns a dataclass field)
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from moelm.callbacks.heat_map import Pixels, draw_heat_map
from moelm.callbacks.observer import Observer, domain_loads, image_is_due, write_image, writer_of
from moelm.config import Config, NamedConfig, register, setting
from moelm.moe.load_metrics import (
    dead_experts,
    dropped,
    effective_experts,
    max_violation,
    mutual_information,
)
from moelm.training.lightning_module import MoELightningModule
from moelm.training.statistics import WINDOW

Matrix = npt.NDArray[np.float64]
DEFAULT_PER_LAYER = ["max_violation", "effective_experts", "dead_experts", "logit_rms", "dropped", "bias_range"]
PER_LAYER = (
    *DEFAULT_PER_LAYER,
    *("max_violation_window", "prob_entropy", "top1_margin", "unchosen", "bias_update"),
    *("val_max_violation", "val_effective_experts", "val_dropped", "mutual_information"),
)
MODEL_WIDE = ("max_violation", "max_violation_window", "effective_experts", "dropped", "unchosen", "val_max_violation")


@dataclass
class ExpertUsageConfig(NamedConfig):
    per_layer: list[str] = setting(DEFAULT_PER_LAYER, allowed=PER_LAYER)  # what a router lacks is left out
    image_every_n_steps: int = setting(200, ge=1)  # optimizer steps; drawn at the next log step


@register("callback", "expert_usage", ExpertUsageConfig)
class ExpertUsage(Observer):
    """moe/<name> for the model, moe/layer_XX/<name> by layer; heat maps of load, combine weights and expert bias."""

    def __init__(self, config: ExpertUsageConfig, run: Config) -> None:
        self.per_layer = config.per_layer
        self.every = config.image_every_n_steps
        self.layers = run.model.routed_layers

    def observe(self, module: MoELightningModule) -> None:
        if module.last_step is None or module.last_step.load_ME is None:
            return
        numbers = training_numbers(module)
        values = torch.stack([value_M.double() for value_M in numbers.values()]).tolist()  # one transfer
        self._log(module, dict(zip(numbers, values, strict=True)))
        writer = writer_of(module)
        if writer is not None and image_is_due(module, self.every):
            self._draw(module, writer)

    def observe_validation(self, module: MoELightningModule) -> None:
        if not self.layers:
            return
        load_ME = torch.tensor(module.evaluation["all"].load, dtype=torch.float64)
        numbers = {"val_max_violation": max_violation(load_ME), "val_effective_experts": effective_experts(load_ME)}
        moe = module.config.model.moe
        if moe is not None and moe.dispatch.drops:
            kept_ME = torch.tensor(module.evaluation["all"].kept, dtype=torch.float64)
            numbers["val_dropped"] = dropped(load_ME, kept_ME)
        domains = domain_loads(module)
        if len(domains) > 1 and "mutual_information" in self.per_layer:
            counts_MDE = torch.tensor(list(domains.values()), dtype=torch.float64).transpose(0, 1)
            numbers["mutual_information"] = mutual_information(counts_MDE)
        self._log(module, {name: value_M.tolist() for name, value_M in numbers.items()})

    def _log(self, module: MoELightningModule, numbers: dict[str, list[float]]) -> None:
        scalars = {f"moe/{name}": float(np.mean(numbers[name])) for name in MODEL_WIDE if name in numbers}
        if "dead_experts" in numbers:
            scalars["moe/dead_experts"] = sum(numbers["dead_experts"])
        for i, layer in enumerate(self.layers):
            scalars |= {f"moe/layer_{layer:02d}/{name}": numbers[name][i] for name in self.per_layer if name in numbers}
        module.log_scalars(scalars)

    def _draw(self, module: MoELightningModule, writer: SummaryWriter) -> None:
        last, moe = module.last_step, module.config.model.moe
        assert last is not None
        assert last.load_ME is not None
        assert last.gate_ME is not None
        assert moe is not None
        names, step = [module.config.model.layer_name(layer) for layer in self.layers], module.step
        write_image(writer, "moe/load", load_map(_array(module.recent_load.total()), names, step), step)
        if moe.router.learned:
            write_image(writer, "moe/gate", gate_map(_array(last.gate_ME), _array(last.load_ME), names, step), step)
        bias_ME = module.expert_bias_ME
        if bias_ME is not None:
            write_image(writer, "moe/bias", bias_map(_array(bias_ME), names, step), step)


def load_map(recent_ME: Matrix, names: list[str], step: int) -> Pixels:
    return draw_heat_map(
        recent_ME / np.maximum(recent_ME.mean(1, keepdims=True), 1e-20),
        low=0.0,
        high=2.0,
        title=f"Expert load of the last {min(WINDOW, step)} steps, 1 = uniform (step {step})",
        row_names=names,
        marks="dead",
    )


def gate_map(gate_ME: Matrix, load_ME: Matrix, names: list[str], step: int) -> Pixels:
    """Combine weight of a choice over the layer's mean, which the row's name says; NaN without a choice."""
    mean_M = gate_ME.sum(1) / np.maximum(load_ME.sum(1), 1)
    expected_ME = np.where(load_ME > 0, load_ME * mean_M[:, None], np.nan)
    return draw_heat_map(
        gate_ME / np.maximum(expected_ME, 1e-20),
        low=0.0,
        high=2.0,
        title=f"Mean combine weight of a choice in the last batch, 1 = the layer's mean (step {step})",
        row_label="layer: mean weight",
        row_names=[f"{name}: {mean:.2f}" for name, mean in zip(names, mean_M, strict=True)],
        no_data="not chosen",
    )


def bias_map(bias_ME: Matrix, names: list[str], step: int) -> Pixels:
    bound = round_up(float(np.abs(bias_ME).max()))
    title = f"Expert bias (step {step})"
    return draw_heat_map(bias_ME, low=-bound, high=bound, title=title, row_names=names, low_apart=False)


def _array(values_ME: Tensor) -> Matrix:
    array: Matrix = values_ME.double().cpu().numpy()
    return array


def training_numbers(module: MoELightningModule) -> dict[str, Tensor]:
    """Name of PER_LAYER -> [M], on the device: what the run has of it."""
    last, recent_ME = module.last_step, module.recent_load.total()
    assert last is not None
    assert last.load_ME is not None
    numbers = {
        "max_violation": max_violation(last.load_ME),
        "max_violation_window": max_violation(recent_ME),
        "effective_experts": effective_experts(last.load_ME),
        "dead_experts": dead_experts(recent_ME),
    }
    moe = module.config.model.moe
    if moe is not None and moe.dispatch.drops and last.kept_ME is not None:
        numbers["dropped"] = dropped(last.load_ME, last.kept_ME)
    numbers |= last.observed_M
    if "logit_sq" in numbers:
        numbers["logit_rms"] = numbers.pop("logit_sq").sqrt()
    bias_ME = module.expert_bias_ME
    if bias_ME is not None:
        numbers["bias_range"] = bias_ME.amax(-1) - bias_ME.amin(-1)
        if module.bias_update_ME is not None:
            numbers["bias_update"] = module.bias_update_ME.abs().amax(-1)
    return numbers


def round_up(value: float) -> float:
    """The next of ... 0.1, 0.2, 0.5, 1, 2, 5 ...: a scale that changes rarely; 0.001 for less than that."""
    if value <= 0.001:
        return 0.001
    power = 10.0 ** math.floor(math.log10(value))
    return next(bound for factor in (1, 2, 5, 10) if (bound := float(f"{factor * power:.1g}")) >= value * (1 - 1e-6))
