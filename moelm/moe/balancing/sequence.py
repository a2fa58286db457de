"""The `sequence` balancer: the expert-level loss of DeepSeek-V2 and V3, within each sequence."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moelm.config import register, setting
from moelm.moe.balancing.base import Balancer, LossConfig
from moelm.moe.balancing.measures import mean_over_sequences, share_product
from moelm.moe.types import RouterStats


@dataclass
class SequenceConfig(LossConfig):
    coef: float = setting(0.0001, ge=0)  # DeepSeek-V3; V2 0.003


@register("balancer", "sequence", SequenceConfig)
class SequenceBalancer(Balancer):
    """L_m = mean over sequences of sum_e f_e P_e, f_e = E / (K T) x choices of e, P_e = mean probability, T the tokens
    of the sequence (DeepSeek-V2, arXiv 2405.04434, eq. 23-25; V3, 2412.19437, eq. 17-20). 1 at balance.

    Counts the choices that would have been made without expert_bias (V3 eq. 18). Gradient flows through P only. A mean
    over sequences, so neither micro-batches nor ranks change it.
    """

    def loss(self, stats: RouterStats, window_ME: Tensor | None) -> Tensor:
        return mean_over_sequences(share_product(stats.unbiased_load_BE, stats.prob_BE), stats.n_tokens_B)
