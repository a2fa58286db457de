"""The seam of the balancers: a loss from the statistics of a micro-batch, or a new bias once per optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from moelm.config import NamedConfig, setting
from moelm.moe.types import RouterStats


@dataclass
class LossConfig(NamedConfig):
    """The settings of a balancer that is a loss."""

    coef: float = setting(0.01, ge=0)  # multiplies the loss
    over_layers: str = setting("mean", allowed=("mean", "sum"))  # how the losses of the MoE layers are joined


class Balancer:
    """Pure: state lives in the routers' `expert_bias` alone."""

    def __init__(self, config: NamedConfig) -> None:
        self.config = config

    def loss(self, stats: RouterStats, window_ME: Tensor | None) -> Tensor | None:
        """The raw loss of each MoE layer, float32 [M], with gradient; None for a balancer without a loss. Its config
        is then a LossConfig.

        `stats` are stacked over layers. `window_ME` is the load summed over ranks and over the micro-batches of
        this optimizer step, given only to balancers that need it.
        """
        return None

    def update_bias(self, bias_ME: Tensor, load_ME: Tensor) -> Tensor | None:
        """The new expert_bias, float32 [M, E], from the load of the whole optimizer step; None to keep it."""
        return None


class AuxLoss(NamedTuple):
    raw_M: Tensor  # before coef, one value a layer; detached
    weighted: Tensor  # scalar that is added to the cross-entropy; with gradient


def auxiliary_losses(
    balancers: Sequence[Balancer], stats: RouterStats, window_ME: Tensor | None = None
) -> dict[str, AuxLoss]:
    """Balancer name -> its loss: coef x (mean or sum over the MoE layers of the raw loss)."""
    losses = {}
    for balancer in balancers:
        raw_M = balancer.loss(stats, window_ME)
        if raw_M is not None:
            config = balancer.config
            assert isinstance(config, LossConfig)
            joined = raw_M.mean() if config.over_layers == "mean" else raw_M.sum()
            losses[config.name] = AuxLoss(raw_M.detach(), config.coef * joined)
    return losses
