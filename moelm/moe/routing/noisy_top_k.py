"""The `noisy_top_k` router: learned noise on the logits, in training, spreads the tokens over the experts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelm.config import ConfigError, MoEConfig, register
from moelm.moe.choice import keep_choice
from moelm.moe.routing.base import (
    LearnedRouter,
    LearnedRouterConfig,
    probabilities,
    sum_per_sequence,
    token_choice_with_stats,
)
from moelm.moe.routing.product import float32_linear
from moelm.moe.types import RouteContext, RouterStats, TokenChoice

LEAST_DEVIATION = 0.01  # without it a router that has learned to be sure divides 0 by 0 in the gradient of its load


@dataclass
class NoisyTopKConfig(LearnedRouterConfig):
    @property
    def provides(self) -> tuple[str, ...]:
        return ("smooth_load_BE",)

    def check(self, key: str, config: MoEConfig) -> None:
        if config.top_k == 1:
            problem = "1: the softmax over the kept logits makes every gate 1, so the router would get no gradient"
            raise ConfigError("model.moe.top_k", f"{problem} with {key} noisy_top_k", "set 2 or more")
        if config.top_k >= config.n_experts:
            problem = f"{config.top_k} of {config.n_experts} experts leaves {key} noisy_top_k nothing to choose"
            raise ConfigError("model.moe.top_k", problem, "lower it below n_experts")


@register("router", "noisy_top_k", NoisyTopKConfig)
class NoisyTopKRouter(LearnedRouter):
    """H = logits + N(0, 1) (softplus(x W_noise^T) + 0.01), the noise in training only; chosen = TopK(H);
    gates = softmax of the chosen H (Shazeer et al. 2017, arXiv 1701.06538, eq. 3-5; 0.01 is ours).

    W_noise starts at 0, as there, which is noise of deviation ln 2 + 0.01. `smooth_load_BE` is the load as a
    differentiable expectation (eq. 8-10): sum over tokens of Phi((logit_e - the k-th largest H of the others) /
    deviation_e).
    """

    def __init__(self, config: NoisyTopKConfig, moe: MoEConfig, d_model: int) -> None:
        super().__init__(config, moe, d_model)
        self.noise = nn.Parameter(torch.empty(moe.n_experts, d_model))
        self.initial = {"noise": 0.0}

    def route(self, x_TD: Tensor, context: RouteContext) -> tuple[TokenChoice, RouterStats]:
        logits_TE = self.logits(x_TD)
        deviation_TE = F.softplus(float32_linear(x_TD, self.noise)) + LEAST_DEVIATION
        noisy_TE = logits_TE
        if context.training:
            noisy_TE = logits_TE + torch.randn_like(logits_TE) * deviation_TE
        best = noisy_TE.topk(self.top_k + 1, dim=-1)
        expert_ids_TK = keep_choice(best.indices[:, : self.top_k])
        gates_TK = noisy_TE.gather(-1, expert_ids_TK).softmax(-1) * self.route_scale
        # the k-th largest of the others: for a chosen expert it is number k + 1 of all
        chosen_TE = torch.zeros_like(noisy_TE, dtype=torch.bool).scatter(-1, expert_ids_TK, True)
        rival_TE = torch.where(chosen_TE, best.values[:, -1:], best.values[:, -2:-1])
        smooth_TE = normal_cdf((logits_TE - rival_TE) / deviation_TE)
        return token_choice_with_stats(
            expert_ids_TK,
            gates_TK,
            probabilities(logits_TE),
            context,
            logits_TE=logits_TE,
            is_softmax=True,
            extra={"smooth_load_BE": sum_per_sequence(smooth_TE, context)},
        )


def normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))
