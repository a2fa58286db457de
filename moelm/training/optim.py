"""Parameter groups, optimizer and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from moelm.config import OptimConfig, ScheduleConfig
from moelm.model.gpt import GPT
from moelm.moe.working_copies import MOST_IN_BFLOAT16
from moelm.training.adamw import AdamW
from moelm.training.muon import MuonAdamW

# Where two matrices are stored as one, and the axis along which they stand side by side: SwiGLU's gate and up
GATE_UP = {"gate_up.weight": 0, "gate_up": -1}


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """AdamW (arXiv 1711.05101) for everything, or Muon (2502.16982) for the matrices and AdamW for the rest.

    The kinds that `no_decay` names are not decayed. Muon takes what Moonlight gives it: every matrix but the embedding
    and the head, so the router's too; stacked experts one by one, gate and up apart.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    matrices: dict[int | None, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        kind = kind_of(name, parameter.ndim)
        if config.optimizer == "muon" and kind == "matrix":
            axis = next((axis for end, axis in GATE_UP.items() if name.endswith(f".{end}")), None)
            matrices.setdefault(axis, []).append(parameter)
        else:
            (free if kind in config.no_decay else decayed).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": free, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    betas = (config.betas[0], config.betas[1])
    if config.optimizer == "muon":
        groups += [{"params": found, "rule": "muon", "halves": axis} for axis, found in matrices.items()]
        return MuonAdamW(
            groups,
            lr=config.lr,
            momentum=config.momentum,
            betas=betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
    return AdamW(
        groups,
        lr=config.lr,
        betas=betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        moments=torch.bfloat16 if config.moments == "bfloat16" else torch.float32,
    )


def parameter_names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """In the order by which the optimizer's state dict numbers them."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def place_gradients(model: GPT, optimizer: Optimizer, n_micro_batches: int, n_replicas: int = 1) -> None:
    """How fused experts get their gradients under bf16 autocast, where the whole model is on each device.

    One micro-batch a step: those of large experts in bfloat16, half the memory, and half of what norm and AdamW read,
    and what replicas send. They are products of bfloat16 factors, rounded then as autocast rounds those of every linear
    layer. Several: in float32, since a sum needs more digits, added in one place. Many replicas: in float32 too, since
    what they send is rounded up to n_replicas - 1 times more on its way; of MOST_IN_BFLOAT16 that adds
    sqrt(8) 2^-9 / sqrt(3) = 0.3 % (relative L2), less than the 0.4 % by which products of bfloat16 factors are off.
    """
    adamw = optimizer if isinstance(optimizer, AdamW) and n_replicas <= MOST_IN_BFLOAT16 else None
    for layer in model.moe_layers:
        weights = layer.experts.gate_up, layer.experts.down
        if layer.experts.backend != "fused":
            continue
        if n_micro_batches > 1:
            layer.experts.sums_in_place = True
        elif adamw is not None and all(adamw.reads_bfloat16(weight) for weight in weights):
            for weight in weights:
                weight.grad_dtype = torch.bfloat16


def kind_of(parameter_name: str, n_dimensions: int) -> str:
    """norm, bias, embedding, head or matrix. A tied head is the embedding. Other vectors and scalars (a temperature)
    count as biases."""
    if parameter_name.endswith("norm.weight"):
        return "norm"
    if parameter_name.endswith("bias") or n_dimensions < 2:
        return "bias"
    if parameter_name == "head.weight":
        return "head"
    return "embedding" if parameter_name.endswith("embedding.weight") else "matrix"


def lr_factor(config: ScheduleConfig, max_steps: int) -> Callable[[int], float]:
    """The factor on `optim.lr` for the optimizer step with the given number, counted from 0.

    Warm-up is linear: (step + 1) / warmup_steps. Then, with p the share of the remaining steps that is done:
    linear 1 - (1 - m) p; cosine m + (1 - m) (1 + cos(pi p)) / 2; wsd 1, then linear to m over the last
    decay_steps; step factor^(number of milestones passed, as fractions of max_steps). m = min_lr_ratio.
    phases: see `_phase_value`; there warm-up rises to the value with which the first phase begins.
    """
    warmup, low = config.warmup_steps, config.min_lr_ratio
    decay = config.decay_steps or max(1, max_steps // 10)

    def factor(step: int) -> float:
        if step < warmup:
            first = _phase_value(config, max_steps, warmup) if config.name == "phases" else 1.0
            return first * (step + 1) / warmup
        if config.name == "phases":
            return _phase_value(config, max_steps, step)
        done = min(1.0, (step - warmup) / max(1, max_steps - warmup))
        if config.name == "linear":
            return 1 - (1 - low) * done
        if config.name == "cosine":
            return low + (1 - low) * (1 + math.cos(math.pi * done)) / 2
        if config.name == "wsd":
            into_decay = min(1.0, max(0.0, (step - (max_steps - decay)) / decay))
            return 1 - (1 - low) * into_decay
        if config.name == "step":
            return float(config.factor ** sum(step >= m * max_steps for m in config.milestones))
        return 1.0

    return factor


def _phase_value(config: ScheduleConfig, max_steps: int, step: int) -> float:
    """constant: `to` from the phase's first step on; linear, cosine: from the value before (at first 1) to `to`.

    A phase ends with step round(until * max_steps), where the next one begins; the first begins after warm-up.
    """
    begin, value = config.warmup_steps, 1.0
    for phase in config.phases:
        end = round(phase.until * max_steps)
        if step < end:
            break
        begin, value = end, phase.to
    if phase.shape == "constant":
        return phase.to
    done = min(1.0, (step - begin) / max(1, end - begin))
    rise = done if phase.shape == "linear" else (1 - math.cos(math.pi * done)) / 2
    return value + (phase.to - value) * rise
