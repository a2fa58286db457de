"""The `importance` balancer: evens out the gates that experts receive (Shazeer et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moelm.config import ConfigError, MoEConfig, register, setting
from moelm.moe.balancing.base import Balancer, LossConfig
from moelm.moe.balancing.measures import squared_variation
from moelm.moe.types import RouterStats


@dataclass
class ImportanceConfig(LossConfig):
    coef: float = setting(0.1, ge=0)

    def check(self, key: str, config: MoEConfig) -> None:
        super().check(key, config)
        if config.router.equal_gates:
            problem = f"the router {config.router.name} gives all gates the same value, which importance cannot change"
            raise ConfigError(key, problem, "use switch")


@register("balancer", "importance", ImportanceConfig)
class ImportanceBalancer(Balancer):
    """L_m = CV(importance)^2, importance_e = sum over the micro-batch of the gates of expert e (arXiv 1701.06538,
    eq. 6-7). 0 at balance, E - 1 if one expert has all gates.

    Sums the gates of the choices as made, with a selection bias if there is one. Gradient flows through those gates.
    Not linear in the batch: the losses of micro-batches are averaged, which is not the loss of their union.
    """

    def loss(self, stats: RouterStats, window_ME: Tensor | None) -> Tensor:
        return squared_variation(stats.gate_BE.sum(1))
