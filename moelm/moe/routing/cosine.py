"""The `cosine` router: tokens and experts compared by angle on a low-dimensional sphere."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelm.config import MoEConfig, register, setting
from moelm.moe.routing.product import float32_linear
from moelm.moe.routing.top_k import TopKConfig, TopKRouter

MAX_SCALE = 100.0  # temperature 0.01: beyond it the softmax is one-hot and the gradient gone


@dataclass
class CosineConfig(TopKConfig):
    d_projection: int | None = setting(None, ge=1)  # null: n_experts / 2, as published
    initial_temperature: float = setting(0.07, gt=0.01)


@register("router", "cosine", CosineConfig)
class CosineRouter(TopKRouter):
    """logit_e = cos(P x, w_e) / temperature, P: d_model -> d_projection, temperature learned (X-MoE, arXiv 2204.09179,
    section 3.2; once at its floor of 0.01 it gets no gradient any more); scores, choice and gates as in `top_k`.

    Low dimension and equal lengths keep the token vectors from collapsing onto the experts' ones.
    """

    def __init__(self, config: CosineConfig, moe: MoEConfig, d_model: int) -> None:
        d_projection = config.d_projection or max(1, moe.n_experts // 2)
        super().__init__(config, moe, d_projection)
        self.projection = nn.Parameter(torch.empty(d_projection, d_model))
        self.log_scale = nn.Parameter(torch.empty(()))
        self.initial = {"log_scale": -math.log(config.initial_temperature)}

    def project(self, x_TD: Tensor) -> Tensor:
        projected_TP = F.normalize(float32_linear(x_TD, self.projection), dim=-1)
        cosine_TE = F.linear(projected_TP, F.normalize(self.weight.float(), dim=-1))
        return cosine_TE * self.log_scale.float().exp().clamp(max=MAX_SCALE)
