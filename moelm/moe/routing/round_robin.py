"""The `round_robin` router, for benchmarks: perfectly even loads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moelm.config import register
from moelm.moe.routing.base import FixedRouter, FixedRouterConfig
from moelm.moe.types import RouteContext


@dataclass
class RoundRobinConfig(FixedRouterConfig):
    no_generation: ClassVar[str] = "the router round_robin deals the tokens of a batch out in order"


@register("router", "round_robin", RoundRobinConfig)
class RoundRobinRouter(FixedRouter):
    """Choice k of token t goes to expert (t K + k) mod E, t counted over the batch."""

    def choose(self, context: RouteContext) -> Tensor:
        n_choices = context.token_ids_BL.numel() * self.top_k
        choices_R = torch.arange(n_choices, device=context.token_ids_BL.device)
        return (choices_R % self.n_experts).view(-1, self.top_k)
