"""The `global_batch` balancer: the Switch loss with the load of all ranks and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moelm.config import register
from moelm.moe.balancing.base import Balancer, LossConfig
from moelm.moe.balancing.measures import mean_over_batch, share_product
from moelm.moe.types import RouterStats


@dataclass
class GlobalBatchConfig(LossConfig):
    pass


@register("balancer", "global_batch", GlobalBatchConfig)
class GlobalBatchBalancer(Balancer):
    """L_m = E sum_e f_e P_e, f_e = share of the choices of all ranks, P_e = mean probability of this micro-batch on
    this rank (Qwen, arXiv 2501.11873). 1 at balance. Counts the choices as made, with a selection bias if there is
    one. Gradient flows through P only.

    Exact with one micro-batch an optimizer step: f is the same everywhere and P enters linearly, so the average of the
    ranks' gradients is the gradient of the loss over the whole batch (of ranks with as many counted tokens as each
    other). Running with accumulation: f of micro-batch i counts micro-batches 1 to i, as the paper's buffer does, since
    the later ones are not known when it is differentiated; the last one's is that of the whole batch.
    """

    scope = "global"

    def loss(self, stats: RouterStats, window_ME: Tensor | None) -> Tensor:
        assert window_ME is not None
        return share_product(window_ME, mean_over_batch(stats.prob_BE, stats.n_tokens_B))
