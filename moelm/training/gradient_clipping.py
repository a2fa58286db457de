"""Clipping gradients by the norm of all of them together."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from moelm.training.adamw import AdamW
from moelm.training.muon import MuonAdamW
from moelm.training.shards import local, n_holders


def clip_gradients(
    optimizer: Optimizer, parameters: Iterable[nn.Parameter], limit: float | None, loss: Tensor | None = None
) -> Tensor:
    """The norm, float32 scalar on the device. In the next step gradients count min(1, limit / (norm + 1e-6)) times.

    moelm's optimizers scale them, and take no step if norm or `loss` is not finite; for others they are scaled here.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = gradient_norm(gradients)
    scale = torch.ones_like(norm) if limit is None else (limit / (norm + 1e-6)).clamp(max=1.0)
    if isinstance(optimizer, AdamW | MuonAdamW):
        optimizer.gradient_scale = torch.where(is_finite(norm, loss), scale, torch.nan)
    elif limit is not None:
        torch._foreach_mul_([local(gradient) for gradient in gradients], scale)
    return norm


def is_finite(norm: Tensor, loss: Tensor | None) -> Tensor:
    """bool scalar on the device, the same on all ranks if both are of all."""
    return norm.isfinite() if loss is None else norm.isfinite() & loss.isfinite()


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """Euclidean norm of all together, summed in float32 whatever their dtypes.

    Of sharded gradients each rank holds a part, which as many others have as there are replicas: the norms of the parts
    are joined by one all-reduce, whatever their meshes. Plain ones are whole on every rank.
    """
    sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    if not sharded:
        return _norm(whole)
    squared = _norm([local(gradient) for gradient in sharded]).double().square() / n_holders(sharded[0])
    dist.all_reduce(squared)
    if whole:
        squared += _norm(whole).double().square()
    return squared.sqrt().float()


def _norm(tensors: list[Tensor]) -> Tensor:
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    norms = [norm for group in by_dtype.values() for norm in torch._foreach_norm(group, 2, dtype=torch.float32)]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm
