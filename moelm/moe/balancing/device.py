"""The `device` balancer: evens out groups of experts, within each sequence (DeepSeek-V2)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moelm.config import register, setting
from moelm.moe.balancing.base import Balancer, GroupLossConfig
from moelm.moe.balancing.measures import mean_over_sequences, share_product
from moelm.moe.types import RouterStats


@dataclass
class DeviceConfig(GroupLossConfig):
    coef: float = setting(0.05, ge=0)


@register("balancer", "device", DeviceConfig)
class DeviceBalancer(Balancer):
    """L_m = mean over sequences of sum_g f'_g P'_g, f'_g = mean of f_e and P'_g = sum of P_e over the experts of group
    g, f_e = E / (K T) x choices of e (DeepSeek-V2, arXiv 2405.04434, eq. 26-28). 1 at balance, whatever the balance
    within the groups; n_groups if one group gets everything.

    A device of the paper is a group of the router. Counts the choices that would have been made without expert_bias,
    as `sequence` does. Gradient flows through P' only. A mean over sequences, so neither micro-batches nor ranks
    change it.
    """

    def loss(self, stats: RouterStats, window_ME: Tensor | None) -> Tensor:
        groups = (stats.extra["sent_BG"].shape[-1], -1)
        # the mean of f_e over a group is n_groups x the group's share of the choices
        load_MBG = stats.unbiased_load_BE.unflatten(-1, groups).sum(-1)
        prob_MBG = stats.prob_BE.unflatten(-1, groups).sum(-1)
        return mean_over_sequences(share_product(load_MBG, prob_MBG), stats.n_tokens_B)
