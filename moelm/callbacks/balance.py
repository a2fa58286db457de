"""The `balance` callback: what the balancers add to the loss."""

from __future__ import annotations

from dataclasses import dataclass

from moelm.callbacks.observer import Observer
from moelm.config import Config, NamedConfig, register
from moelm.training.lightning_module import MoELightningModule


@dataclass
class BalanceConfig(NamedConfig):
    raw: bool = False  # aux/<balancer>_raw too: the mean over layers before `coef`
    raw_per_layer: bool = False  # and aux/layer_XX/<balancer>_raw


@register("callback", "balance", BalanceConfig)
class Balance(Observer):
    """aux/<balancer> is the weighted part of train/loss."""

    def __init__(self, config: BalanceConfig, run: Config) -> None:
        self.config, self.layers = config, run.model.routed_layers

    def observe(self, module: MoELightningModule) -> None:
        step = module.last_step
        if step is None or not step.aux:
            return
        scalars = {f"aux/{name}": value for name, value in step.aux.items()}
        for name, raw_M in step.aux_raw_M.items():
            if self.config.raw:
                scalars[f"aux/{name}_raw"] = raw_M.mean()
            if self.config.raw_per_layer:
                scalars |= {f"aux/layer_{self.layers[i]:02d}/{name}_raw": raw for i, raw in enumerate(raw_M.unbind())}
        module.log_scalars(scalars)
