"""The `balance` callback: what the balancers do, as losses and as steps of the expert bias."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moelm.callbacks.observer import Observer
from moelm.config import Config, NamedConfig, register
from moelm.training.lightning_module import MoELightningModule


@dataclass
class BalanceConfig(NamedConfig):
    pass


@register("callback", "balance", BalanceConfig)
class Balance(Observer):
    """aux/<balancer> is the weighted part of train/loss, aux/<balancer>_raw its mean over layers before `coef`."""

    def __init__(self, config: BalanceConfig, run: Config) -> None:
        pass

    def observe(self, module: MoELightningModule) -> None:
        step = module.last_step
        if step is None:
            return
        scalars: dict[str, Tensor] = {f"aux/{name}": value for name, value in step.aux.items()}
        scalars |= {f"aux/{name}_raw": value_M.mean() for name, value_M in step.aux_raw_M.items()}
        bias_ME = module.expert_bias_ME
        if bias_ME is not None and module.bias_update_ME is not None:
            for i, layer in enumerate(module.config.model.moe_layers):
                scalars[f"moe/layer_{layer:02d}/bias_range"] = bias_ME[i].max() - bias_ME[i].min()
                scalars[f"moe/layer_{layer:02d}/bias_update"] = module.bias_update_ME[i].abs().max()
        if scalars:
            module.log_scalars(scalars)
