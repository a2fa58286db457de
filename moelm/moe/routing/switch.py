"""The `switch` router: one expert a token, its probability as the gate."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moelm.config import ConfigError, MoEConfig, register, setting
from moelm.moe.choice import keep_choice
from moelm.moe.routing.base import LearnedRouter, LearnedRouterConfig, probabilities, token_choice_with_stats
from moelm.moe.types import RouteContext, RouterStats, TokenChoice


@dataclass
class SwitchRouterConfig(LearnedRouterConfig):
    jitter: float = setting(0.01, ge=0, lt=1)

    def check(self, key: str, config: MoEConfig) -> None:
        if config.top_k != 1:
            raise ConfigError("model.moe.top_k", f"{config.top_k}, but {key} switch takes one expert a token", "set 1")


@register("router", "switch", SwitchRouterConfig)
class SwitchRouter(LearnedRouter):
    """p = softmax(logits), expert = argmax p, gate = p[expert] (Switch, arXiv 2101.03961, eq. 1-2).

    The gate is not normalised over the one choice, or it would be 1 and carry no gradient. As published it runs with
    `dispatch: capacity`.
    """

    def route(self, x_TD: Tensor, context: RouteContext) -> tuple[TokenChoice, RouterStats]:
        logits_TE = self.logits(x_TD)
        prob_TE = probabilities(logits_TE)
        expert_ids_T1 = keep_choice(prob_TE.detach().argmax(-1, keepdim=True))
        gates_T1 = prob_TE.gather(-1, expert_ids_T1) * self.route_scale
        return token_choice_with_stats(expert_ids_T1, gates_T1, prob_TE, context, logits_TE=logits_TE, is_softmax=True)
