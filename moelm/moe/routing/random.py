"""The `random` router, for benchmarks: the cost of a mixture of experts without anything learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moelm.config import register
from moelm.moe.choice import keep_choice
from moelm.moe.routing.base import FixedRouter, FixedRouterConfig, mix
from moelm.moe.types import RouteContext


@dataclass
class RandomConfig(FixedRouterConfig):
    no_generation: ClassVar[str] = "the router random chooses by a token's place in its sequence, which a cache hides"


@register("router", "random", RandomConfig)
class RandomRouter(FixedRouter):
    """K distinct experts a token, uniformly: drawn anew in training, a fixed function of the token's place in its
    sequence in evaluation, which is thereby free of noise."""

    def choose(self, context: RouteContext) -> Tensor:
        B, L = context.token_ids_BL.shape
        device = context.token_ids_BL.device
        if context.training:
            keys_TE = torch.rand(B * L, self.n_experts, device=device)
        else:
            places_LE = torch.arange(L * self.n_experts, device=device).view(L, self.n_experts)
            keys_TE = mix(places_LE).repeat(B, 1)
        ids_TK: Tensor = keep_choice(keys_TE.topk(self.top_k, dim=-1).indices)
        return ids_TK
