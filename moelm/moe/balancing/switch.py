"""The `switch` balancer: the load-balancing loss of Switch Transformers, per layer and micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moelm.config import register
from moelm.moe.balancing.base import Balancer, LossConfig
from moelm.moe.types import RouterStats


@dataclass
class SwitchConfig(LossConfig):
    pass


@register("balancer", "switch", SwitchConfig)
class SwitchBalancer(Balancer):
    def loss(self, stats: RouterStats, window_ME: Tensor | None) -> Tensor:
        return switch_aux_loss(stats.load_BE, stats.prob_BE, stats.n_tokens_B)


def switch_aux_loss(load_MBE: Tensor, prob_MBE: Tensor, n_tokens_MB: Tensor) -> Tensor:
    """L_m = E sum_e f_e P_e (Switch, arXiv 2101.03961, eq. 4), f_e = load_e / sum load, P_e = mean probability.

    f is a share of the choices, not of the tokens, so the loss is 1 for any top_k when either f or P is uniform
    (the transformers implementation gives top_k there, and pools the layers, in which imbalances cancel). It counts the
    choices as made, with a selection bias if there is one. Gradient flows through P only. Returns float32 [M].
    """
    n_experts = load_MBE.shape[-1]
    load_ME = load_MBE.sum(1)
    f_ME = load_ME / load_ME.sum(-1, keepdim=True).clamp(min=1)
    weight_MB1 = (n_tokens_MB / n_tokens_MB.sum(-1, keepdim=True).clamp(min=1)).unsqueeze(-1)
    p_ME = (prob_MBE * weight_MB1).sum(1)
    return n_experts * (f_ME * p_ME).sum(-1)
