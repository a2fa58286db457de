"""Normalisation: what `model.norm` chooses from. Both compute in float32 and round once: to the autocast dtype where
autocast is on, since a norm's output feeds products of matrices, else to x's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelm.config import ModelConfig
from moelm.moe.experts import compute_dtype


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(compute_dtype(x))


class LayerNorm(nn.Module):
    """(x - mean(x)) / sqrt(var(x) + eps) * weight (arXiv 1607.06450), without bias, as in DBRX."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.weight.shape, self.weight.float(), None, self.eps).to(compute_dtype(x))


NORMS: dict[str, type[RMSNorm] | type[LayerNorm]] = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}


def make_norm(config: ModelConfig) -> RMSNorm | LayerNorm:
    """A norm over the residual stream, uninitialised."""
    return NORMS[config.norm](config.d_model, config.norm_eps)
