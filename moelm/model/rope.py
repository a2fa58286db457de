"""Rotary position embedding (arXiv 2104.09864), half-split layout: dimension i turns with dimension i + Q/2."""

from __future__ import annotations

import torch
from torch import Tensor


def rotation(positions_L: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [L, Q/2], of the angles position * theta^(-2i / Q)."""
    i = torch.arange(0, head_dim, 2, device=positions_L.device, dtype=torch.float32)
    angles = positions_L.float().unsqueeze(-1) * theta ** (-i / head_dim)
    return angles.cos(), angles.sin()


def rotate(x_BHLQ: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x turned by its position's angles, computed in float32, returned in x's dtype."""
    first, second = x_BHLQ.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x_BHLQ.dtype)
