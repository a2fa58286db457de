"""Clipping gradients by the norm of all of them together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from moelm.training.adamw import AdamW
from moelm.training.muon import MuonAdamW
from moelm.training.shards import local, n_holders


def clip_gradients(
    optimizer: Optimizer,
    parameters: Iterable[nn.Parameter],
    limit: float | None,
    loss: Tensor | None = None,
    norms: Sequence[Tensor] | None = None,
) -> Tensor:
    """The norm, float32 scalar on the device. In the next step gradients count min(1, limit / (norm + 1e-6)) times.
    `norms` are the `tensor_norms` of the gradients, if they are known.

    moelm's optimizers scale them, and take no step if norm or `loss` is not finite; for others they are scaled here.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = gradient_norm(gradients, norms)
    scale = torch.ones_like(norm) if limit is None else (limit / (norm + 1e-6)).clamp(max=1.0)
    if isinstance(optimizer, AdamW | MuonAdamW):
        optimizer.gradient_scale = torch.where(is_finite(norm, loss), scale, torch.nan)
    elif limit is not None:
        torch._foreach_mul_([local(gradient) for gradient in gradients], scale)
    return norm


def is_finite(norm: Tensor, loss: Tensor | None) -> Tensor:
    """bool scalar on the device, the same on all ranks if both are of all."""
    return norm.isfinite() if loss is None else norm.isfinite() & loss.isfinite()


def gradient_norm(gradients: Sequence[Tensor], norms: Sequence[Tensor] | None = None) -> Tensor:
    """Euclidean norm of all together, summed in float32 whatever their dtypes. `norms` as in `clip_gradients`.

    Of sharded gradients each rank holds a part, which as many others have as there are replicas: the norms of the parts
    are joined by one all-reduce, whatever their meshes. Plain ones are whole on every rank.
    """
    norms = tensor_norms(gradients) if norms is None else norms
    sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    if not sharded:
        return _joined(norms)
    each = list(zip(gradients, norms, strict=True))
    parts = _joined([norm for gradient, norm in each if isinstance(gradient, DTensor)])
    squared = parts.double().square() / n_holders(sharded[0])
    dist.all_reduce(squared)
    if len(sharded) < len(gradients):
        whole = _joined([norm for gradient, norm in each if not isinstance(gradient, DTensor)])
        squared += whole.double().square()
    return squared.sqrt().float()


def tensor_norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Of each by itself, in their order, float32 scalars; of a sharded one, of the part that this rank has."""
    by_dtype: dict[torch.dtype, list[int]] = {}
    for i, tensor in enumerate(tensors):
        by_dtype.setdefault(tensor.dtype, []).append(i)
    norms: dict[int, Tensor] = {}
    for places in by_dtype.values():
        group = [local(tensors[i]) for i in places]
        norms |= zip(places, torch._foreach_norm(group, 2, dtype=torch.float32), strict=True)
    return [norms[i] for i in range(len(tensors))]


def _joined(norms: Sequence[Tensor]) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(torch.stack(list(norms)))
    return norm
