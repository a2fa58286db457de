"""The `loss_free` balancer: a bias on the choice instead of a loss, stepped once per optimizer step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moelm.config import ConfigError, MoEConfig, NamedConfig, register, setting
from moelm.moe.balancing.base import Balancer


@dataclass
class LossFreeConfig(NamedConfig):
    moves_bias: ClassVar[bool] = True  # without such a balancer a router's selection_bias is refused

    rate: float = setting(0.001, gt=0)  # step of the bias, in units of the router's scores
    rule: str = setting("sign", allowed=("sign", "proportional"))  # of the step: +-rate, or rate x relative shortage
    centred: bool = True  # subtract the mean step, so that the bias does not drift (Moonlight)
    stop_step: int | None = setting(None, ge=1)  # from this optimizer step on the bias stands still (DeepSeek-V3)

    def check(self, key: str, config: MoEConfig) -> None:
        if not getattr(config.router, "selection_bias", False):
            problem = f"loss_free moves a bias that the router {config.router.name!r} does not use"
            can = hasattr(config.router, "selection_bias")
            remedy = "set model.moe.router.selection_bias=true" if can else "remove it, or use a router such as top_k"
            raise ConfigError(key, problem, remedy)
        if self.rule == "proportional" and not self.centred:
            problem = "false has no effect with rule: proportional, whose steps have the mean 0"
            raise ConfigError(f"{key}.centred", problem, "remove it")


@register("balancer", "loss_free", LossFreeConfig)
class LossFreeBalancer(Balancer):
    """b_e += rate * (s_e - mean(s)), s_e = sign(mean load - load_e)  (arXiv 2408.15664, algorithm 1; centred as in
    Moonlight, 2502.16982). Counts the choices as made, biased, over the whole batch of the optimizer step. No gradient.

    `rule: proportional` has s_e = 1 - load_e / mean load, the variant of the paper's ablation without the sign, here
    relative to the mean so that the rate does not depend on the size of the batch; its mean is 0 by itself.
    `stop_step`: DeepSeek-V3 (2412.19437, section 4.2) sets the rate to 0 for its last 500B tokens.
    """

    config: LossFreeConfig

    def update_bias(self, bias_ME: Tensor, load_ME: Tensor, step: int) -> Tensor | None:
        if self.config.stop_step is not None and step >= self.config.stop_step:
            return None
        # sum against E x load, exact in float64: CUDA's mean is a product with 1/E, which misses an equal load
        total_M1 = load_ME.sum(-1, keepdim=True)
        shortage_ME = total_M1 - load_ME.shape[-1] * load_ME
        if self.config.rule == "sign":
            step_ME = torch.sign(shortage_ME).float()
        else:
            step_ME = (shortage_ME / total_M1.clamp(min=1)).float()
        if self.config.centred:
            step_ME = step_ME - step_ME.mean(-1, keepdim=True)
        return bias_ME + self.config.rate * step_ME
