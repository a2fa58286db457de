"""The `switch` balancer: the load-balancing loss of Switch Transformers and GShard, per layer and micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moelm.config import register
from moelm.moe.balancing.base import Balancer, LossConfig
from moelm.moe.balancing.measures import mean_over_batch, share_product
from moelm.moe.types import RouterStats


@dataclass
class SwitchConfig(LossConfig):
    first_choice_only: bool = False  # count only the best expert of each token (GShard, Mesh TensorFlow)


@register("balancer", "switch", SwitchConfig)
class SwitchBalancer(Balancer):
    """`switch_aux_loss` of this micro-batch on this rank: the losses of micro-batches are averaged, which is not the
    loss of their union.

    With `first_choice_only` f counts the first choices, as in GShard (arXiv 2006.16668, algorithm 1, l_aux) and Mesh
    TensorFlow. GShard puts 1/E before the sum where this has E, so its value at balance is 1 / E^2 and its
    coefficient is to be divided by E^2 here; Mesh TensorFlow has the scale of this one.
    """

    config: SwitchConfig

    def loss(self, stats: RouterStats, window_ME: Tensor | None) -> Tensor:
        counts_MBE = stats.first_choice_BE if self.config.first_choice_only else stats.load_BE
        return switch_aux_loss(counts_MBE, stats.prob_BE, stats.n_tokens_B)


def switch_aux_loss(load_MBE: Tensor, prob_MBE: Tensor, n_tokens_MB: Tensor) -> Tensor:
    """L_m = E sum_e f_e P_e (Switch, arXiv 2101.03961, eq. 4), f_e = load_e / sum load, P_e = mean probability.

    f is a share of the choices, not of the tokens, so the loss is 1 for any top_k when either f or P is uniform
    (the transformers implementation gives top_k there, and pools the layers, in which imbalances cancel). It counts the
    choices as made, with a selection bias if there is one. Gradient flows through P only. Returns float32 [M].
    """
    return share_product(load_MBE.sum(1), mean_over_batch(prob_MBE, n_tokens_MB))
