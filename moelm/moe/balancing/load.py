"""The `load` balancer: evens out the expected load under the router's noise (Shazeer et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moelm.config import ConfigError, MoEConfig, register, setting
from moelm.moe.balancing.base import Balancer, LossConfig
from moelm.moe.balancing.measures import squared_variation
from moelm.moe.types import RouterStats


@dataclass
class LoadConfig(LossConfig):
    coef: float = setting(0.1, ge=0)

    def check(self, key: str, config: MoEConfig) -> None:
        super().check(key, config)
        if "smooth_load_BE" not in config.router.provides:
            problem = f"load needs the expected load under a router's noise, which {config.router.name} does not give"
            raise ConfigError(key, problem, "use the router noisy_top_k, or the balancer importance or switch")


@register("balancer", "load", LoadConfig)
class LoadBalancer(Balancer):
    """L_m = CV(load)^2, load_e = sum over the micro-batch of the probability that expert e is among the top k when its
    own noise is drawn anew (arXiv 1701.06538, eq. 8-11). 0 at balance, E - 1 if one expert has all of it.

    No count: the router gives the smooth load. Gradient flows through it, so also through the logits of experts that
    were not chosen. Not linear in the batch: the losses of micro-batches are averaged, which is not the loss of their
    union.
    """

    def loss(self, stats: RouterStats, window_ME: Tensor | None) -> Tensor:
        return squared_variation(stats.extra["smooth_load_BE"].sum(1))
