"""The `gshard` router: two experts a token, the second one taken at random in proportion to its weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moelm.config import ConfigError, MoEConfig, register, setting
from moelm.moe.choice import choose, keep_choice
from moelm.moe.routing.base import LearnedRouter, LearnedRouterConfig, probabilities, token_choice_with_stats
from moelm.moe.types import RouteContext, RouterStats, TokenChoice


@dataclass
class GShardConfig(LearnedRouterConfig):
    second_expert: str = setting("random", allowed=("random", "all"))  # all: never left out

    def check(self, key: str, config: MoEConfig) -> None:
        if config.top_k != 2:
            raise ConfigError("model.moe.top_k", f"{config.top_k}, but {key} gshard takes two experts a token", "set 2")


@register("router", "gshard", GShardConfig)
class GShardRouter(LearnedRouter):
    """g1, g2 = the two largest of softmax(logits), divided by g1 + g2; in training the second expert is used with
    probability min(1, 2 g2), else it is "none" (GShard, arXiv 2006.16668, algorithm 1).

    Where it is left out, the first gate stays g1 / (g1 + g2). Evaluation always uses both, so it is free of noise. As
    published it runs with `dispatch: capacity`, in which all first choices go before all second ones.
    """

    def __init__(self, config: GShardConfig, moe: MoEConfig, d_model: int) -> None:
        super().__init__(config, moe, d_model)
        self.random_second = config.second_expert == "random"

    def route(self, x_TD: Tensor, context: RouteContext) -> tuple[TokenChoice, RouterStats]:
        logits_TE = self.logits(x_TD)
        prob_TE = probabilities(logits_TE)
        expert_ids_TK = choose(prob_TE, 2)
        gates_TK = prob_TE.gather(-1, expert_ids_TK)
        gates_TK = gates_TK / (gates_TK.sum(-1, keepdim=True) + 1e-20)
        if self.random_second and context.training:
            second_T = keep_choice(2 * gates_TK[:, 1].detach() > torch.rand(x_TD.shape[0], device=x_TD.device))
            taken_TK = torch.stack([torch.ones_like(second_T), second_T], -1)
            expert_ids_TK = torch.where(taken_TK, expert_ids_TK, self.n_experts)
            gates_TK = torch.where(taken_TK, gates_TK, 0.0)
        return token_choice_with_stats(
            expert_ids_TK, gates_TK * self.route_scale, prob_TE, context, logits_TE=logits_TE, is_softmax=True
        )
