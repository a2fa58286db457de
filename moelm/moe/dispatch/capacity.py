"""The `capacity` dispatcher: an expert, or a group of them, takes at most C choices of a batch, others are dropped.

A dropped choice adds nothing: the token passes by the residual connection. Dropping turns the choice into "none", so
shapes stay static and the rest is the dropless dispatcher.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moelm.config import ConfigError, DispatchConfig, MoEConfig, register, setting
from moelm.moe.choice import keep_choice
from moelm.moe.dispatch.dropless import DroplessDispatcher
from moelm.moe.types import TokenChoice


@dataclass
class CapacityConfig(DispatchConfig):
    drops: ClassVar[bool] = True

    capacity_factor: float = setting(1.25, gt=0)  # in training: C = ceil(factor x T x K / E) for T unmasked tokens
    eval_capacity_factor: float = setting(2.0, gt=0)
    of: str = setting("expert", allowed=("expert", "group"))  # group: of the router's, such as those on one device
    drop: str = setting("position", allowed=("position", "probability"))  # who goes first when an expert is full
    eval_dispatch: str = setting("capacity", allowed=("capacity", "dropless"))  # dropless: independent of the batch

    @property
    def no_generation(self) -> str:
        if self.eval_dispatch == "dropless":
            return ""
        return "with capacity in evaluation a token's output depends on the other tokens of its batch"

    def check(self, key: str, config: MoEConfig) -> None:
        super().check(key, config)
        if self.of == "group" and "sent_BG" not in config.router.provides:
            problem = f"group: the router {config.router.name} has no groups of experts here"
            raise ConfigError(f"{key}.of", problem, "set model.moe.router.n_groups of the router top_k, or use expert")
        if self.drop == "probability" and config.router.equal_gates:
            problem = f"probability has no effect with the router {config.router.name}, whose gates are all the same"
            raise ConfigError(f"{key}.drop", problem, "use position")
        default = CapacityConfig().eval_capacity_factor
        if self.eval_dispatch == "dropless" and self.eval_capacity_factor != default:
            raise ConfigError(
                f"{key}.eval_capacity_factor", "has no effect with eval_dispatch: dropless", "remove one of them"
            )


@register("dispatch", "capacity", CapacityConfig)
class CapacityDispatcher(DroplessDispatcher):
    """Accepts token choice. T, and so C, is that of one micro-batch on one rank, without masked tokens. With `of:
    group` C is n_groups times smaller than T x K, and bounds what the experts of a group take together: with as many
    groups as ranks that share the experts, what a rank receives of another (DeepSeek-V2, 2405.04434, 2.2.4).

    All first choices go before all second ones (GShard, arXiv 2006.16668, algorithm 1). Among equals `position`
    prefers the earlier token of the batch; `probability` the token with the larger gate (batch-prioritised
    routing, V-MoE, 2106.05974, algorithm 2), for which tokens that come later matter: it is not causal.
    """

    def __init__(self, config: CapacityConfig, moe: MoEConfig) -> None:
        super().__init__(config, moe)
        self.config = config
        n_groups: int = getattr(moe.router, "n_groups", 1)
        self.n_together = 1 if config.of == "expert" else moe.n_experts // n_groups  # experts with one capacity

    def kept(self, routing: TokenChoice, training: bool) -> Tensor:
        if not training and self.config.eval_dispatch == "dropless":
            return routing.expert_ids_TK
        config = self.config
        factor = config.capacity_factor if training else config.eval_capacity_factor
        n_sets = self.n_experts // self.n_together
        n_tokens = (routing.expert_ids_TK < self.n_experts).any(-1).sum()  # a masked one chooses nothing
        capacity = expert_capacity(factor, n_tokens, routing.expert_ids_TK.shape[1], n_sets)
        by_gate_T = routing.gates_TK.detach().amax(-1) if config.drop == "probability" else None
        set_TK = routing.expert_ids_TK // self.n_together  # n_sets for "none"
        kept_TK = drop_over_capacity(set_TK, by_gate_T, capacity, n_sets)
        ids_TK: Tensor = keep_choice(torch.where(kept_TK < n_sets, routing.expert_ids_TK, self.n_experts))
        return ids_TK


def expert_capacity(factor: float, n_tokens: Tensor, top_k: int, n_experts: int) -> Tensor:
    """C = ceil(factor x T x K / E) (Switch, arXiv 2101.03961, eq. 3), at least 1; E may be groups of experts. int64
    scalar on the device of `n_tokens`."""
    return (factor * n_tokens.double() * top_k / n_experts).ceil().long().clamp(min=1)


@torch.no_grad()
def drop_over_capacity(
    expert_ids_TK: Tensor, priority_T: Tensor | None, capacity: int | Tensor, n_experts: int
) -> Tensor:
    """The ids [T, K] with "none" for each choice past the first `capacity` of its expert.

    Order: by k, then by `priority_T`, largest first, then by position; without `priority_T` by k, then by position.
    """
    T, K = expert_ids_TK.shape
    order_T = None if priority_T is None else priority_T.argsort(stable=True, descending=True)
    ordered_TK = expert_ids_TK if order_T is None else expert_ids_TK.index_select(0, order_T)
    ids_R = ordered_TK.T.reshape(-1)  # k-major: all first choices, then all second ones
    by_expert_R = ids_R.argsort(stable=True)
    counts = torch.zeros(n_experts + 1, dtype=torch.int64, device=ids_R.device)
    counts = counts.scatter_add(0, ids_R, torch.ones_like(ids_R))
    starts = counts.cumsum(0) - counts
    place_R = torch.arange(T * K, device=ids_R.device) - starts.index_select(0, ids_R.index_select(0, by_expert_R))
    rank_R = torch.empty_like(place_R).scatter(0, by_expert_R, place_R)  # place among the choices of its expert
    kept_TK = torch.where(rank_R < capacity, ids_R, n_experts).view(K, T).T
    if order_T is None:
        return kept_TK.contiguous()
    return torch.empty_like(kept_TK).scatter(0, order_T.unsqueeze(-1).expand(T, K), kept_TK)
