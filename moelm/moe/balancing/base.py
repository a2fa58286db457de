"""The seam of the balancers: a loss from the statistics of a micro-batch, or a new bias once per optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from moelm.config import ConfigError, MoEConfig, NamedConfig, UserError, setting
from moelm.moe.types import RouterStats


@dataclass
class LossConfig(NamedConfig):
    """The settings of a balancer that is a loss."""

    balances: ClassVar[bool] = True  # it evens out the load; False for a loss that does something else to the router

    coef: float = setting(0.01, ge=0)  # multiplies the loss
    over_layers: str = setting("mean", allowed=("mean", "sum"))  # how the losses of the MoE layers are joined

    def check(self, key: str, config: MoEConfig) -> None:
        router = config.router
        if not router.learned:
            problem = f"the router {router.name} has no weights that {self.name} could move"
            raise ConfigError(key, problem, "set model.moe.balancers=[none]")
        if self.balances and router.balanced:
            problem = f"the router {router.name} loads experts evenly by construction, so {self.name} has no effect"
            raise ConfigError(key, problem, "remove it; model.moe.balancers=[none] if nothing else is listed")


@dataclass
class GroupLossConfig(LossConfig):
    """The settings of a loss over groups of experts, which are those of the router."""

    def check(self, key: str, config: MoEConfig) -> None:
        super().check(key, config)
        if "sent_BG" not in config.router.provides:
            problem = f"{self.name} balances groups of experts, and the router {config.router.name} has none here"
            raise ConfigError(key, problem, "set model.moe.router.n_groups of the router top_k, or use sequence")


class Balancer:
    """Pure: state lives in the routers' `expert_bias` alone."""

    scope = "micro_batch"  # "global": `loss` is given `window_ME`, which costs an all-reduce a micro-batch

    def __init__(self, config: NamedConfig) -> None:
        self.config = config

    def loss(self, stats: RouterStats, window_ME: Tensor | None) -> Tensor | None:
        """The raw loss of each MoE layer, float32 [M], with gradient; None for a balancer without a loss. Its config
        is then a LossConfig.

        `stats` are stacked over layers. `window_ME` is the load summed over ranks and over the micro-batches of
        this optimizer step up to this one; None for the scope "micro_batch".
        """
        return None

    def update_bias(self, bias_ME: Tensor, load_ME: Tensor, step: int) -> Tensor | None:
        """The new expert_bias, float32 [M, E], from the load of the whole optimizer step, float64; None to keep it.
        `step` counts optimizer steps from 0. The config of a balancer that moves it has the ClassVar `moves_bias`."""
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
            if raw_M.shape != stats.load_BE.shape[:1]:
                wanted = f"not [{len(stats.load_BE)}], one number a layer"
                raise UserError(f"the balancer {config.name}: its loss is of shape {list(raw_M.shape)}, {wanted}")
            joined = raw_M.mean() if config.over_layers == "mean" else raw_M.sum()
            losses[config.name] = AuxLoss(raw_M.detach(), config.coef * joined)
    return losses
