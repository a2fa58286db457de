"""The `reinforce` router: the choice is an action, learned by policy gradient from the token's own loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelm.config import MoEConfig, register, setting
from moelm.moe.choice import choose
from moelm.moe.routing.base import LearnedRouter, LearnedRouterConfig, probabilities, token_choice_with_stats
from moelm.moe.types import RouteContext, RouterStats, TokenChoice


@dataclass
class ReinforceConfig(LearnedRouterConfig):
    equal_gates: ClassVar[bool] = True

    policy_coef: float = setting(0.1, ge=0)  # multiplies the policy-gradient loss
    baseline_coef: float = setting(0.01, ge=0)  # multiplies the baseline's squared error


@register("router", "reinforce", ReinforceConfig)
class ReinforceRouter(LearnedRouter):
    """Training: K experts drawn without replacement from softmax(logits), by Gumbel noise; evaluation: the K most
    probable. Gates are 1 / K, so the cross-entropy reaches the router by the policy gradient alone:

        L = - mean_t A_t log p(choice_t) + mean_t (b_t - CE_t)^2,   A_t = (b_t - CE_t) / its rms

    with the reward -CE_t, the cross-entropy of predicting the next token at t, and b_t a learned linear baseline of
    the router's input (Williams 1992; in routed language models RL-R, Clark et al. 2022, arXiv 2202.01169). A is
    detached and scaled to a root mean square of 1 over the micro-batch; the baseline sends no gradient into the
    model. Mean over the MoE layers. A token's choice also changes later tokens' losses, through attention, which
    this ignores.
    """

    def __init__(self, config: ReinforceConfig, moe: MoEConfig, d_model: int) -> None:
        super().__init__(config, moe, d_model)
        self.policy_coef, self.baseline_coef = config.policy_coef, config.baseline_coef
        self.baseline = nn.Linear(d_model, 1)

    def route(self, x_TD: Tensor, context: RouteContext) -> tuple[TokenChoice, RouterStats]:
        logits_TE = self.logits(x_TD)
        choice_TE = logits_TE.detach()
        if context.training:
            choice_TE = choice_TE - torch.empty_like(choice_TE).exponential_().log()
        expert_ids_TK = choose(choice_TE, self.top_k)
        log_prob_T = log_prob_of_draw(logits_TE, expert_ids_TK)
        baseline_T1 = F.linear(x_TD.detach().float(), self.baseline.weight.float(), self.baseline.bias.float())
        baseline_T = baseline_T1.squeeze(-1)
        if context.token_mask_BL is not None:
            mask_T = context.token_mask_BL.flatten()
            log_prob_T, baseline_T = torch.where(mask_T, log_prob_T, 0.0), torch.where(mask_T, baseline_T, 0.0)
        shape = context.token_ids_BL.shape
        return token_choice_with_stats(
            expert_ids_TK,
            logits_TE.new_full(expert_ids_TK.shape, self.route_scale / self.top_k),
            probabilities(logits_TE),
            context,
            logits_TE=logits_TE,
            is_softmax=True,
            extra={"log_prob_BL": log_prob_T.view(shape), "baseline_BL": baseline_T.view(shape)},
        )

    def loss(self, stats: RouterStats, ce_BL: Tensor, predicted_BL: Tensor) -> Tensor:
        """Scalar, a mean over the tokens that predict something."""
        n_targets = predicted_BL.sum().clamp(min=1)
        error_MBL = torch.where(predicted_BL, stats.extra["baseline_BL"] - ce_BL, 0.0)
        advantage_MBL = error_MBL.detach()
        rms_M11 = (advantage_MBL.square().sum((1, 2), keepdim=True) / n_targets).sqrt().clamp(min=1e-6)
        policy_M = -(advantage_MBL / rms_M11 * stats.extra["log_prob_BL"]).sum((1, 2)) / n_targets
        baseline_M = error_MBL.square().sum((1, 2)) / n_targets
        return (self.policy_coef * policy_M + self.baseline_coef * baseline_M).mean()


def log_prob_of_draw(logits_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
    """float32 [T]: log-probability of drawing these experts in this order without replacement (Plackett-Luce):
    sum_k logit[e_k] - logsumexp of the logits of those not drawn before."""
    total_T = logits_TE.new_zeros(logits_TE.shape[0])
    left_TE = logits_TE
    for ids_T1 in expert_ids_TK.split(1, dim=-1):
        total_T = total_T + (left_TE.gather(-1, ids_T1).squeeze(-1) - left_TE.logsumexp(-1))
        left_TE = left_TE.scatter(-1, ids_T1, -torch.inf)
    return total_T
