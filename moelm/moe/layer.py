"""One mixture-of-experts layer: route -> dispatch -> experts -> combine (+ shared experts)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moelm.config import MoEConfig, build
from moelm.moe.experts import Experts
from moelm.moe.types import RouteContext, RouterStats


class MoELayer(nn.Module):
    """y = sum_k gate_k Expert_k(x) + g(x) Shared(x), with g = sigmoid(x . w) or 1 (DeepSeekMoE 2401.06066 eq. 9).

    Statistics are return values: forward writes no buffer and logs nothing, so activation checkpointing, which
    runs it twice, counts once.
    """

    def __init__(self, moe: MoEConfig, d_model: int, shared: nn.Module | None) -> None:
        """`shared`: the fused shared experts, a feed-forward of width `moe.shared_width`, or None."""
        super().__init__()
        self.router = build("router", moe.router, moe, d_model)
        self.dispatcher = build("dispatch", moe.dispatch, moe)
        self.experts = Experts(moe, d_model)
        self.shared = shared
        self.shared_gate = nn.Linear(d_model, 1, bias=False) if moe.shared_gate else None

    def forward(self, x_BLD: Tensor, context: RouteContext) -> tuple[Tensor, RouterStats]:
        routing, stats = self.router(x_BLD, context)
        rows_RD, plan = self.dispatcher.dispatch(x_BLD.flatten(0, 1), routing)
        rows_RD = self.experts(rows_RD, plan.offsets_E)
        y_BLD = self.dispatcher.combine(rows_RD, routing, plan).view(x_BLD.shape)
        if self.shared is not None:
            shared_BLD = self.shared(x_BLD)
            if self.shared_gate is not None:
                shared_BLD = torch.sigmoid(self.shared_gate(x_BLD)) * shared_BLD
            y_BLD = y_BLD + shared_BLD
        return y_BLD, stats
