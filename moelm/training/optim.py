"""Parameter groups, optimizer and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import Optimizer

from moelm.config import OptimConfig, ScheduleConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """AdamW (arXiv 1711.05101) with two groups: decayed, and the kinds that `no_decay` names."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (free if kind_of(name, parameter.ndim) in config.no_decay else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        fused=True,  # one kernel; on the CPU too
    )


def kind_of(parameter_name: str, n_dimensions: int) -> str:
    """norm, bias, embedding or matrix. A tied head is the embedding; an untied one is a matrix. Other vectors and
    scalars (a temperature) count as biases."""
    if parameter_name.endswith("norm.weight"):
        return "norm"
    if parameter_name.endswith("bias") or n_dimensions < 2:
        return "bias"
    return "embedding" if parameter_name.endswith("embedding.weight") else "matrix"


def lr_factor(config: ScheduleConfig, max_steps: int) -> Callable[[int], float]:
    """The factor on `optim.lr` for the optimizer step with the given number, counted from 0.

    Warm-up is linear: (step + 1) / warmup_steps. Then, with p the share of the remaining steps that is done:
    linear 1 - (1 - m) p; cosine m + (1 - m) (1 + cos(pi p)) / 2; wsd 1, then linear to m over the last
    decay_steps; step factor^(number of milestones passed, as fractions of max_steps). m = min_lr_ratio.
    """
    warmup, low = config.warmup_steps, config.min_lr_ratio
    decay = config.decay_steps or max(1, max_steps // 10)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
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
