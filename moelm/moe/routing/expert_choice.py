"""The `expert_choice` router: each expert takes the tokens that it scores highest. Not causal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moelm.config import register
from moelm.moe.choice import keep_choice
from moelm.moe.routing.base import (
    LearnedRouter,
    LearnedRouterConfig,
    count_tokens,
    mean_over_tokens,
    means_of_tokens,
    probabilities,
    sum_per_sequence,
)
from moelm.moe.types import ExpertChoice, RouteContext, RouterStats


@dataclass
class ExpertChoiceConfig(LearnedRouterConfig):
    routing: ClassVar[str] = "expert_choice"
    balanced: ClassVar[bool] = True
    caution: ClassVar[str] = (
        "expert_choice is not causal: an expert takes a token in competition with later ones, so the cross-entropy is "
        "not that of a model that could write text, and it looks better than it is"
    )
    no_generation: ClassVar[str] = "expert_choice is not causal: which experts take a token depends on later tokens"


@register("router", "expert_choice", ExpertChoiceConfig)
class ExpertChoiceRouter(LearnedRouter):
    """S = softmax over experts of the logits; expert e takes the C tokens of a sequence with the largest S[:, e], gate
    S[t, e] (Zhou et al. 2022, arXiv 2202.09368, section 3.2). C = L x top_k / E rounded down, at least 1, at most L:
    `top_k` is the paper's capacity factor, the mean number of experts a token gets; some tokens get none. L counts the
    tokens that are not masked.

    NOT CAUSAL: a token competes with those that come after it. Training and validation losses therefore leak the
    future, and generation is refused. The group that competes is one sequence, in evaluation as in training, so a
    token's output does not depend on its neighbours in the batch. Load is equal by construction.
    """

    def route(self, x_TD: Tensor, context: RouteContext) -> tuple[ExpertChoice, RouterStats]:
        B, L = context.token_ids_BL.shape
        E = self.n_experts
        capacity = min(L, max(1, L * self.top_k // E))
        logits_TE = self.logits(x_TD)
        prob_TE = probabilities(logits_TE)
        prob_BEL = prob_TE.unflatten(0, (B, L)).transpose(1, 2)
        preference_BEL = prob_BEL.detach()
        if context.token_mask_BL is not None:
            preference_BEL = preference_BEL.masked_fill(~context.token_mask_BL.unsqueeze(1), -1.0)
        best = preference_BEL.topk(capacity, dim=-1)
        valid_BEC, places_BEC = best.values >= 0, keep_choice(best.indices)
        n_tokens_B = count_tokens(context)
        if context.token_mask_BL is not None:
            capacity_B11 = (n_tokens_B * self.top_k // E).clamp(min=1).view(B, 1, 1)
            valid_BEC = valid_BEC & (torch.arange(capacity, device=x_TD.device) < capacity_B11)
        gates_BEC = torch.where(valid_BEC, prob_BEL.gather(-1, places_BEC), 0.0) * self.route_scale
        sequence_B11 = torch.arange(B, device=x_TD.device).view(B, 1, 1)
        token_ids_BEC = torch.where(valid_BEC, places_BEC + L * sequence_B11, B * L)
        routing = ExpertChoice(token_ids_BEC.transpose(0, 1).flatten(1), gates_BEC.transpose(0, 1).flatten(1))
        load_BE = valid_BEC.sum(-1, dtype=torch.float32)
        chosen_T = torch.zeros(B * L + 1, device=x_TD.device).scatter(0, token_ids_BEC.flatten(), 1.0)[:-1]
        unchosen = mean_over_tokens(1 - chosen_T, context)
        log_z_sq, observed = means_of_tokens(prob_TE, logits_TE, context, is_softmax=True)
        stats = RouterStats(
            load_BE=load_BE,
            kept_BE=load_BE,
            first_choice_BE=load_BE,
            unbiased_load_BE=load_BE,
            prob_BE=sum_per_sequence(prob_TE, context) / n_tokens_B.clamp(min=1).unsqueeze(-1),
            gate_BE=gates_BEC.sum(-1),
            n_tokens_B=n_tokens_B,
            log_z_sq=log_z_sq,
            extra={**observed, "unchosen": unchosen},
        )
        return routing, stats
