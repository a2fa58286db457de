"""The `balance` callback: what the balancers add to the loss."""

from __future__ import annotations

from dataclasses import dataclass

from moelm.callbacks.observer import Observer
from moelm.config import Config, NamedConfig, register
from moelm.training.lightning_module import MoELightningModule


@dataclass
class BalanceConfig(NamedConfig):
    raw: bool = False  # aux/<balancer>_raw too: the mean over layers before `coef`


@register("callback", "balance", BalanceConfig)
class Balance(Observer):
    """aux/<balancer> is the weighted part of train/loss."""

    def __init__(self, config: BalanceConfig, run: Config) -> None:
        self.raw = config.raw

    def observe(self, module: MoELightningModule) -> None:
        step = module.last_step
        if step is None or not step.aux:
            return
        scalars = {f"aux/{name}": value for name, value in step.aux.items()}
        if self.raw:
            scalars |= {f"aux/{name}_raw": value_M.mean() for name, value_M in step.aux_raw_M.items()}
        module.log_scalars(scalars)
