"""The `none` balancer: experts are left as they are loaded."""

from __future__ import annotations

from dataclasses import dataclass

from moelm.config import ConfigError, MoEConfig, NamedConfig, register
from moelm.moe.balancing.base import Balancer


@dataclass
class NoneConfig(NamedConfig):
    def check(self, key: str, config: MoEConfig) -> None:
        others = [balancer.name for balancer in config.balancers if balancer.name != self.name]
        if others:
            raise ConfigError(key, f"none contradicts {', '.join(others)}", "remove one or the other")


@register("balancer", "none", NoneConfig)
class NoneBalancer(Balancer):
    """No loss and no bias: what `balancers` says where it would otherwise be the default. It stands alone."""
