"""The `communication` balancer: evens out what groups of experts are sent, within each sequence (DeepSeek-V2)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moelm.config import register, setting
from moelm.moe.balancing.base import Balancer, GroupLossConfig
from moelm.moe.balancing.measures import mean_over_sequences, share_product
from moelm.moe.types import RouterStats


@dataclass
class CommunicationConfig(GroupLossConfig):
    coef: float = setting(0.02, ge=0)


@register("balancer", "communication", CommunicationConfig)
class CommunicationBalancer(Balancer):
    """L_m = mean over sequences of sum_g f''_g P''_g, f''_g = n_groups / (M T) x tokens sent to group g, P''_g = sum of
    P_e over its experts (DeepSeek-V2, arXiv 2405.04434, eq. 29-31). 1 at balance.

    A token is sent to a group once, however many of its experts it takes. M is the mean number of groups that a token
    of the sequence is sent to, which is the paper's constant, the limit, where each token goes to as many groups as it
    may. Dividing by the limit would make the value smaller than 1 at balance where tokens go to fewer.
    Counts the choices as made, with a selection bias if there is one. Gradient flows through P'' only. A mean over
    sequences, so neither micro-batches nor ranks change it.
    """

    def loss(self, stats: RouterStats, window_ME: Tensor | None) -> Tensor:
        sent_MBG = stats.extra["sent_BG"]
        prob_MBG = stats.prob_BE.unflatten(-1, (sent_MBG.shape[-1], -1)).sum(-1)
        return mean_over_sequences(share_product(sent_MBG, prob_MBG), stats.n_tokens_B)
