"""Tensors of which each rank holds a part: DTensors, as FSDP2 makes them of parameters. Plain tensors pass as whole."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moelm.model.init import whole


def local(tensor: Tensor) -> Tensor:
    """What this rank holds, without a copy; a plain tensor is its own."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def n_holders(tensor: DTensor) -> int:
    """How many ranks hold the same part."""
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return prod(size for size, placement in sizes if placement.is_replicate())


def held_part(tensor: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """What this rank holds, and which part of the whole it is."""
    if not isinstance(tensor, DTensor):
        return whole(tensor)
    mesh, placements = tensor.device_mesh, tensor.placements
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    return local(tensor), tuple(slice(start, start + n) for start, n in zip(offset, shape, strict=True))


def gathered(value: Any, keep: bool) -> Any:
    """The whole tensor on the CPU, of any value but a tensor the value; None where it is not kept.

    All ranks must call it for the same tensors in one order.
    """
    if not isinstance(value, Tensor):
        return value if keep else None
    full = value.full_tensor() if isinstance(value, DTensor) else value
    return full.detach().cpu() if keep else None


def like(full: Any, own: Any) -> Any:
    """The part of `full` that this rank holds of `own`; `full` itself if `own` is not sharded or of another shape."""
    if not isinstance(own, DTensor) or not isinstance(full, Tensor) or full.shape != own.shape:
        return full
    return _sharded(full[held_part(own)[1]], own)


def with_whole_matrices(part: Tensor, own: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """From what this rank holds of something as `own` is: the matrices of which that is a part, and which part.

    Whole experts are not sent; anything else is gathered, so all ranks must call it in one order.
    """
    if not isinstance(own, DTensor):
        return whole(part)
    cut = {getattr(each, "dim", None) for each in own.placements if not each.is_replicate()}
    if own.ndim == 3 and cut == {0}:
        return whole(part)
    return _sharded(part, own).full_tensor(), held_part(own)[1]


def _sharded(part: Tensor, own: DTensor) -> DTensor:
    return DTensor.from_local(
        part, own.device_mesh, own.placements, run_check=False, shape=own.shape, stride=own.stride()
    )
