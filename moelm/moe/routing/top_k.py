"""The `top_k` router: each token takes the k experts that score highest.

With its options it is the router of Mixtral, DBRX, OLMoE, Qwen, DeepSeek v1 / v2 / v3, Moonlight and gpt-oss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelm.config import ConfigError, MoEConfig, NamedConfig, register, setting
from moelm.moe.types import RouteContext, RouterStats, TokenChoice


@dataclass
class TopKConfig(NamedConfig):
    score: str = setting("softmax", allowed=("softmax", "sigmoid"))
    # after_top_k: the k gates sum to 1 (Mixtral, Qwen3, DeepSeek-V3); before_top_k: the scores of all experts do
    normalize_gates: str = setting("none", allowed=("none", "before_top_k", "after_top_k"))
    route_scale: float = setting(1.0, gt=0)  # multiplies the gates, after normalisation
    n_groups: int = setting(1, ge=1)  # experts in this many groups; a token's experts come from the best ones
    top_k_groups: int = setting(1, ge=1)
    group_score: str = setting("max", allowed=("max", "top2_sum"))  # DeepSeek-V2: max; V3: top2_sum
    selection_bias: bool = False  # expert_bias is added to the scores for the choice, never to the gates
    trained_bias: bool = False  # a bias inside the logits, trained by gradient (gpt-oss)

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
class TopKRouter(nn.Module):
    """logits = x W^T (+ b);  scores s = softmax(logits) or sigmoid(logits);
    chosen = TopK(s + expert_bias), within the best groups;  gates = s[chosen], normalised and scaled.

    Everything is float32, whatever autocast says and whatever dtype the model was cast to: under autocast even
    `F.linear(x.float(), w)` comes out in bf16, and near ties then choose other experts.
    Equations: DeepSeek-V3 (arXiv 2412.19437) eq. 12-16; group scores V2 (2405.04434) section 2.2.2.
    """

    def __init__(self, config: TopKConfig, moe: MoEConfig, d_model: int) -> None:
        super().__init__()
        self.config, self.n_experts, self.top_k = config, moe.n_experts, moe.top_k
        self.weight = nn.Parameter(torch.empty(moe.n_experts, d_model))
        self.bias = nn.Parameter(torch.empty(moe.n_experts)) if config.trained_bias else None
        self.expert_bias: Tensor | None
        bias = torch.empty(moe.n_experts, dtype=torch.float32) if config.selection_bias else None
        self.register_buffer("expert_bias", bias)

    def forward(self, x_BLD: Tensor, context: RouteContext) -> tuple[TokenChoice, RouterStats]:
        with torch.autocast(device_type=x_BLD.device.type, enabled=False):
            x_TD = x_BLD.flatten(0, 1).float()
            bias = None if self.bias is None else self.bias.float()
            logits_TE = F.linear(x_TD, self.weight.float(), bias)
            if self.config.score == "softmax":
                scores_TE = prob_TE = logits_TE.softmax(-1)
            else:
                scores_TE = logits_TE.sigmoid()
                prob_TE = scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20)
            expert_ids_TK = self.choose(scores_TE, self.expert_bias)
            unbiased_ids_TK = expert_ids_TK if self.expert_bias is None else self.choose(scores_TE, None)
            source_TE = prob_TE if self.config.normalize_gates == "before_top_k" else scores_TE
            gates_TK = source_TE.gather(-1, expert_ids_TK)
            if self.config.normalize_gates == "after_top_k":
                gates_TK = gates_TK / (gates_TK.sum(-1, keepdim=True) + 1e-20)
            gates_TK = gates_TK * self.config.route_scale
            return token_choice_with_stats(
                logits_TE, prob_TE, expert_ids_TK, unbiased_ids_TK, gates_TK, context, self.n_experts
            )

    def choose(self, scores_TE: Tensor, expert_bias_E: Tensor | None) -> Tensor:
        """The ids [T, K] of the chosen experts, best first; no gradient."""
        with torch.no_grad():
            choice_TE = scores_TE if expert_bias_E is None else scores_TE + expert_bias_E
            if self.config.n_groups > 1:
                choice_TE = self._mask_other_groups(choice_TE)
            ids_TK: Tensor = choice_TE.topk(self.top_k, dim=-1).indices
            return ids_TK

    def _mask_other_groups(self, choice_TE: Tensor) -> Tensor:
        """-inf outside the best groups. Not 0: with a negative bias an excluded expert could win."""
        choice_TGe = choice_TE.unflatten(-1, (self.config.n_groups, -1))
        if self.config.group_score == "max":
            group_TG = choice_TGe.amax(-1)
        else:
            group_TG = choice_TGe.topk(2, dim=-1).values.sum(-1)
        best = group_TG.topk(self.config.top_k_groups, dim=-1).indices
        excluded_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter(-1, best, False)
        masked_TE: Tensor = choice_TGe.masked_fill(excluded_TG.unsqueeze(-1), -torch.inf).flatten(-2)
        return masked_TE

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Keep expert_bias in float32 when the model is cast: a bf16 0.5 does not move by 0.001."""
        bias = self.expert_bias
        super()._apply(fn, recurse)
        if bias is not None and self.expert_bias is not None and self.expert_bias.dtype != torch.float32:
            self.expert_bias = bias.to(device=self.expert_bias.device)
        return self


def token_choice_with_stats(
    logits_TE: Tensor,
    prob_TE: Tensor,
    expert_ids_TK: Tensor,
    unbiased_ids_TK: Tensor,
    gates_TK: Tensor,
    context: RouteContext,
    n_experts: int,
) -> tuple[TokenChoice, RouterStats]:
    """Masked tokens get the id "none" and a gate of 0 and are counted nowhere; the rest is counted per sequence.

    `prob_TE` are probabilities over experts (rows sum to 1), for the balancers.
    """
    B, L = context.token_ids_BL.shape
    mask_BL = context.token_mask_BL
    log_z_sq_T = logits_TE.logsumexp(-1).square()
    if mask_BL is None:
        n_tokens_B = torch.full((B,), float(L), device=logits_TE.device)
        log_z_sq = log_z_sq_T.mean()
        prob_BE = prob_TE.unflatten(0, (B, L)).mean(1)
    else:
        mask_T1 = mask_BL.reshape(-1, 1)
        none = torch.full_like(expert_ids_TK, n_experts)
        expert_ids_TK = torch.where(mask_T1, expert_ids_TK, none)
        unbiased_ids_TK = torch.where(mask_T1, unbiased_ids_TK, none)
        gates_TK = torch.where(mask_T1, gates_TK, 0.0)
        n_tokens_B = mask_BL.sum(1, dtype=torch.float32)
        log_z_sq = torch.where(mask_T1[:, 0], log_z_sq_T, 0.0).sum() / n_tokens_B.sum().clamp(min=1)
        prob_BLE = torch.where(mask_T1, prob_TE, 0.0).unflatten(0, (B, L))
        prob_BE = prob_BLE.sum(1) / n_tokens_B.clamp(min=1).unsqueeze(-1)
    load_BE = count_per_sequence(expert_ids_TK, B, n_experts)
    dense_TE = gates_TK.new_zeros(B * L, n_experts + 1).scatter(1, expert_ids_TK, gates_TK)
    stats = RouterStats(
        load_BE=load_BE,
        kept_BE=load_BE,
        first_choice_BE=count_per_sequence(expert_ids_TK[:, :1], B, n_experts),
        unbiased_load_BE=load_BE
        if unbiased_ids_TK is expert_ids_TK
        else count_per_sequence(unbiased_ids_TK, B, n_experts),
        prob_BE=prob_BE,
        gate_BE=dense_TE[:, :n_experts].unflatten(0, (B, L)).sum(1),  # no atomics: the same sum every time
        n_tokens_B=n_tokens_B,
        log_z_sq=log_z_sq,
        extra={},
    )
    return TokenChoice(expert_ids_TK, gates_TK), stats


def count_per_sequence(expert_ids_TK: Tensor, n_sequences: int, n_experts: int) -> Tensor:
    """float32 [B, E]: how often each expert was chosen in each sequence; "none" is not counted."""
    ids_Bx = expert_ids_TK.reshape(n_sequences, -1)
    ones_Bx = torch.ones_like(ids_Bx, dtype=torch.float32)
    return ones_Bx.new_zeros(n_sequences, n_experts + 1).scatter_add(1, ids_Bx, ones_Bx)[:, :n_experts]
