"""The `z_loss` balancer: keeps router logits small, so that the softmax stays exact and gradients calm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from moelm.config import register, setting
from moelm.moe.balancing.base import Balancer, LossConfig
from moelm.moe.types import RouterStats


@dataclass
class ZLossConfig(LossConfig):
    balances: ClassVar[bool] = False

    coef: float = setting(0.001, ge=0)


@register("balancer", "z_loss", ZLossConfig)
class ZLossBalancer(Balancer):
    """L_m = mean over tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5); (ln E)^2 at zero logits.

    Counts nothing. Gradient flows through the logits. A mean over the tokens of the micro-batch, so those of equal size
    give the same as their union.
    """

    def loss(self, stats: RouterStats, window_ME: Tensor | None) -> Tensor:
        return stats.log_z_sq
