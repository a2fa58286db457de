"""The `base` router: a balanced assignment of tokens to experts in training, the best expert in evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moelm.config import MoEConfig, register, setting
from moelm.moe.choice import best_ids, choose
from moelm.moe.routing.base import (
    LearnedRouter,
    LearnedRouterConfig,
    count_tokens,
    probabilities,
    token_choice_with_stats,
)
from moelm.moe.types import RouteContext, RouterStats, TokenChoice, count_per_sequence

FIRST_STEP, LAST_STEP = 1.0, 0.01  # of the prices, in standard deviations of the logits


@dataclass
class BalancedAssignmentConfig(LearnedRouterConfig):
    balanced: ClassVar[bool] = True

    # of the auction; 30 leave loads within 1 to 3 %, or 2 tokens, of the mean
    n_iterations: int = setting(30, ge=1, le=10_000)


@register("router", "base", BalancedAssignmentConfig)
class BalancedAssignmentRouter(LearnedRouter):
    """Training: of all assignments that give each expert T K / E tokens, the one with the largest sum of logits (BASE
    layers, Lewis et al. 2021, arXiv 2103.16716, eq. 2), approximately, by an auction of a fixed number of rounds.
    Evaluation: each token's best experts, so it depends on no other token. gate = sigmoid(logit) (eq. 1).

    Balanced over the tokens of one micro-batch on one rank, exactly only where demand comes out equal. No gradient
    flows through the assignment, only through the gates. In training a token's expert depends on the batch, later
    tokens too, as in the paper.
    """

    def __init__(self, config: BalancedAssignmentConfig, moe: MoEConfig, d_model: int) -> None:
        super().__init__(config, moe, d_model)
        self.n_iterations = config.n_iterations

    def route(self, x_TD: Tensor, context: RouteContext) -> tuple[TokenChoice, RouterStats]:
        logits_TE = self.logits(x_TD)
        choice_TE = logits_TE.detach()
        if context.training:
            choice_TE = choice_TE - auction_prices(choice_TE, self.top_k, self.n_iterations, context)
        expert_ids_TK = choose(choice_TE, self.top_k)
        gates_TK = logits_TE.gather(-1, expert_ids_TK).sigmoid() * self.route_scale
        return token_choice_with_stats(
            expert_ids_TK, gates_TK, probabilities(logits_TE), context, logits_TE=logits_TE, is_softmax=True
        )


@torch.no_grad()
def auction_prices(value_TE: Tensor, top_k: int, n_iterations: int, context: RouteContext) -> Tensor:
    """float32 [E]: prices at which every expert is in demand equally when each token buys its K best `value - price`.

    All prices move at once, by the excess of demand over the mean times a falling step: the subgradient method on
    the dual of the assignment problem. Where demand comes out exactly equal, the assignment is the best balanced
    one (weak duality); a fixed number of iterations keeps shapes static and never waits for the device.
    """
    n_experts = value_TE.shape[1]
    mask = context.token_mask_BL
    n_tokens = count_tokens(context).sum().clamp(min=1)
    mean_load = n_tokens * top_k / n_experts
    counted_T1 = value_TE.new_ones(len(value_TE), 1) if mask is None else mask.reshape(-1, 1).to(value_TE.dtype)
    # what all tokens offer an expert alike decides nothing: it is priced in, and steps are measured by the rest
    price_E = (counted_T1 * value_TE).sum(0) / n_tokens
    square = (counted_T1 * (value_TE - price_E).square()).sum()
    unit = (square / (n_tokens * n_experts)).sqrt().clamp(min=1e-20)
    for i in range(n_iterations):
        step = FIRST_STEP * (LAST_STEP / FIRST_STEP) ** (i / max(1, n_iterations - 1))
        ids_TK = best_ids(value_TE - price_E, top_k)
        if mask is not None:
            ids_TK = torch.where(mask.reshape(-1, 1), ids_TK, n_experts)
        demand_E = count_per_sequence(ids_TK, 1, n_experts)[0]
        price_E = price_E + step * unit * (demand_E / mean_load - 1).clamp(max=1)
    return price_E
