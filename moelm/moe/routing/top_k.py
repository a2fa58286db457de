"""The `top_k` router: each token takes the k experts that score highest.

With its options it is the router of Mixtral, DBRX, OLMoE, Qwen, DeepSeek v1 / v2 / v3, Moonlight and gpt-oss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moelm.config import ConfigError, MoEConfig, register, setting
from moelm.moe.choice import best_ids, choose
from moelm.moe.routing.base import (
    LearnedRouter,
    LearnedRouterConfig,
    probabilities,
    sum_per_sequence,
    token_choice_with_stats,
)
from moelm.moe.types import RouteContext, RouterStats, TokenChoice


@dataclass
class TopKConfig(LearnedRouterConfig):
    score: str = setting("softmax", allowed=("softmax", "sigmoid"))
    # after_top_k: the k gates sum to 1 (Mixtral, Qwen3, DeepSeek-V3); before_top_k: the scores of all experts do
    normalize_gates: str = setting("none", allowed=("none", "before_top_k", "after_top_k"))
    n_groups: int = setting(1, ge=1)  # experts in this many groups; a token's experts come from the best ones
    top_k_groups: int = setting(1, ge=1)
    group_score: str = setting("max", allowed=("max", "top2_sum"))  # DeepSeek-V2: max; V3: top2_sum
    selection_bias: bool = False  # expert_bias is added to the scores for the choice, never to the gates

    @property
    def provides(self) -> tuple[str, ...]:
        return ("sent_BG",) if self.n_groups > 1 else ()

    def check(self, key: str, config: MoEConfig) -> None:
        if config.top_k == 1 and self.normalize_gates == "after_top_k":
            raise ConfigError(
                f"{key}.normalize_gates",
                "after_top_k with top_k = 1 makes every gate 1, so the router would get no gradient",
                "use none, or top_k >= 2",
            )
        if self.score == "softmax" and self.normalize_gates == "before_top_k":
            raise ConfigError(
                f"{key}.normalize_gates",
                "before_top_k has no effect on softmax scores, which sum to 1",
                "use none or after_top_k, or score: sigmoid",
            )
        if config.n_experts % self.n_groups:
            raise ConfigError(
                f"{key}.n_groups",
                f"{self.n_groups} does not divide n_experts = {config.n_experts}",
                "use a divisor",
            )
        if self.top_k_groups > self.n_groups:
            raise ConfigError(
                f"{key}.top_k_groups",
                f"{self.top_k_groups} is more than n_groups = {self.n_groups}",
                "lower it",
            )
        group_size = config.n_experts // self.n_groups
        if config.top_k > self.top_k_groups * group_size:
            raise ConfigError(
                f"{key}.top_k_groups",
                f"{self.top_k_groups} groups of {group_size} experts hold fewer than top_k = {config.top_k}",
                "raise top_k_groups",
            )
        if self.group_score == "top2_sum" and self.n_groups == 1:
            raise ConfigError(f"{key}.group_score", "has no effect with n_groups = 1", "use max, or set n_groups")
        if self.group_score == "top2_sum" and group_size < 2:
            raise ConfigError(f"{key}.group_score", "top2_sum needs two experts in a group", "lower n_groups")


@register("router", "top_k", TopKConfig)
class TopKRouter(LearnedRouter):
    """scores s = softmax(logits) or sigmoid(logits);
    chosen = TopK(s + expert_bias), within the best groups;  gates = s[chosen], normalised and scaled.

    Equations: DeepSeek-V3 (arXiv 2412.19437) eq. 12-16; group scores V2 (2405.04434) section 2.2.2.
    """

    def __init__(self, config: TopKConfig, moe: MoEConfig, d_model: int) -> None:
        super().__init__(config, moe, d_model)
        self.config = config
        if config.selection_bias:
            self.expert_bias = torch.empty(moe.n_experts, dtype=torch.float32)

    def route(self, x_TD: Tensor, context: RouteContext) -> tuple[TokenChoice, RouterStats]:
        logits_TE = self.logits(x_TD)
        if self.config.score == "softmax":
            scores_TE = prob_TE = probabilities(logits_TE)
        else:
            scores_TE = logits_TE.sigmoid()
            prob_TE = scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20)
        expert_ids_TK = self.choose(scores_TE, self.expert_bias)
        unbiased_ids_TK = None if self.expert_bias is None else self.choose(scores_TE, None)
        source_TE = prob_TE if self.config.normalize_gates == "before_top_k" else scores_TE
        gates_TK = source_TE.gather(-1, expert_ids_TK)
        if self.config.normalize_gates == "after_top_k":
            gates_TK = gates_TK / (gates_TK.sum(-1, keepdim=True) + 1e-20)
        return token_choice_with_stats(
            expert_ids_TK,
            gates_TK * self.route_scale,
            prob_TE,
            context,
            logits_TE=logits_TE,
            is_softmax=self.config.score == "softmax",
            unbiased_ids_TK=unbiased_ids_TK,
            extra=self._group_stats(expert_ids_TK, context),
        )

    def choose(self, scores_TE: Tensor, expert_bias_E: Tensor | None) -> Tensor:
        """The ids [T, K] of the chosen experts, best first, kept under activation checkpointing; no gradient."""
        with torch.no_grad():
            choice_TE = scores_TE if expert_bias_E is None else scores_TE + expert_bias_E
            if self.config.n_groups > 1:
                choice_TE = self._mask_other_groups(choice_TE)
            return choose(choice_TE, self.top_k)

    def _mask_other_groups(self, choice_TE: Tensor) -> Tensor:
        """-inf outside the best groups. Not 0: with a negative bias an excluded expert could win."""
        choice_TGe = choice_TE.unflatten(-1, (self.config.n_groups, -1))
        if self.config.group_score == "max":
            group_TG = choice_TGe.amax(-1)
        else:
            group_TG = choice_TGe.gather(-1, best_ids(choice_TGe, 2)).sum(-1)
        best = best_ids(group_TG, self.config.top_k_groups)
        excluded_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter(-1, best, False)
        masked_TE: Tensor = choice_TGe.masked_fill(excluded_TG.unsqueeze(-1), -torch.inf).flatten(-2)
        return masked_TE

    def _group_stats(self, expert_ids_TK: Tensor, context: RouteContext) -> dict[str, Tensor]:
        """How many tokens each group of experts is sent (DeepSeek-V2 eq. 30 counts a token once a device)."""
        n_groups = self.config.n_groups
        if n_groups == 1:
            return {}
        groups_TK = expert_ids_TK // (self.n_experts // n_groups)
        sent_TG = torch.zeros(groups_TK.shape[0], n_groups, device=groups_TK.device).scatter(1, groups_TK, 1.0)
        return {"sent_BG": sum_per_sequence(sent_TG, context)}
