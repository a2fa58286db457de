"""Clipping gradients by the norm of all of them together."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moelm.training.adamw import AdamW


def clip_gradients(optimizer: Optimizer, parameters: Iterable[nn.Parameter], limit: float | None) -> Tensor:
    """The norm, float32 scalar on the device. In the next step gradients count min(1, limit / (norm + 1e-6)) times.

    `AdamW` scales them itself, for other optimizers they are scaled here, in place.
    """
    if not isinstance(optimizer, AdamW):
        return nn.utils.clip_grad_norm_(parameters, float("inf") if limit is None else limit)
    norm = gradient_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if limit is not None:
        optimizer.gradient_scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    return norm


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """Euclidean norm of all together, summed in float32 whatever their dtypes."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        by_dtype.setdefault(gradient.dtype, []).append(gradient)
    norms = [norm for group in by_dtype.values() for norm in torch._foreach_norm(group, 2, dtype=torch.float32)]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm
