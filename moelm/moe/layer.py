"""One mixture-of-experts layer: route -> dispatch -> experts -> combine (+ shared experts)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moelm.config import MoEConfig, build
from moelm.moe.dispatch.dropless import Permutation, Slots
from moelm.moe.dispatch.expert_parallel import ExpertParallel
from moelm.moe.experts import Experts, compute_dtype
from moelm.moe.types import RouteContext, RouterStats, Routing, TokenChoice, count_per_sequence


class MoELayer(nn.Module):
    """y = sum_k gate_k Expert_k(x) + g(x) Shared(x), with g = sigmoid(x . w) or 1 (DeepSeekMoE 2401.06066 eq. 9).

    Statistics are return values: forward writes no buffer and logs nothing, so activation checkpointing, which
    runs it twice, counts once. A router that splits tokens into chunks makes "token" mean "chunk" everywhere between
    the split and the merge, in the statistics too.
    """

    def __init__(self, moe: MoEConfig, d_model: int, shared: nn.Module | None) -> None:
        """`shared`: the fused shared experts, a feed-forward of width `moe.shared_width`, or None."""
        super().__init__()
        self.n_chunks = moe.router.n_chunks
        d_chunk = d_model // self.n_chunks
        mixes = moe.router.mixes_chunks
        self.split = nn.Linear(d_model, d_model, bias=False) if mixes else nn.Identity()
        self.merge = nn.Linear(d_model, d_model, bias=False) if mixes else nn.Identity()
        self.router = build("router", moe.router, moe, d_chunk)
        self.dispatcher = build("dispatch", moe.dispatch, moe)
        self.experts = Experts(moe, d_chunk)
        self.exchange: ExpertParallel | None = None  # where other ranks hold some of the experts
        self.shared = shared
        self.shared_gate = nn.Linear(d_model, 1, bias=False) if moe.shared_gate else None

    def forward(self, x_BLD: Tensor, context: RouteContext) -> tuple[Tensor, RouterStats]:
        B = x_BLD.shape[0]
        chunk_BLD, context = self._split(x_BLD, context)
        routing, stats = self.router(chunk_BLD, context)
        x_TD = chunk_BLD.flatten(0, 1)
        if isinstance(routing, TokenChoice):
            ids_TK = self.dispatcher.kept(routing, context.training)
            if ids_TK is not routing.expert_ids_TK:
                kept_BE = count_per_sequence(ids_TK, B, stats.load_BE.shape[-1])
                stats = RouterStats(stats.load_BE, kept_BE, *stats[2:])  # torch 2.11 cannot compile `_replace` here
                routing = TokenChoice(ids_TK, routing.gates_TK)
        if self.exchange is None or not isinstance(routing, TokenChoice):
            y_TD = self._mix(x_TD, routing, self.dispatcher.plan(routing, len(x_TD)))
            shared_BLD = self._share(x_BLD)
        else:
            journey = self.exchange.send(x_TD.to(compute_dtype(x_TD)), routing)
            shared_BLD = self._share(x_BLD)  # while they travel
            if self.experts.fuses(x_TD):
                landing_SD = self.experts.mix_journey(journey, self.exchange.group)
            else:
                landing_SD = self.exchange.send_back(self._mix(*self.exchange.receive(journey)), journey)
            y_TD = self.exchange.bring_home(landing_SD, journey)
        y_BLD = self.merge(y_TD.view(x_BLD.shape))
        return y_BLD if shared_BLD is None else y_BLD + shared_BLD, stats

    def _mix(self, x_TD: Tensor, routing: Routing, plan: Permutation | Slots) -> Tensor:
        """y [T, D] = sum_k gate_k Expert_k(x), over the experts that are here."""
        if self.experts.fuses(x_TD):
            assert isinstance(routing, TokenChoice)
            assert isinstance(plan, Permutation)
            return self.experts.mix(x_TD, routing.gates_TK, plan)
        rows_RD = self.dispatcher.spread(x_TD, plan)
        y_TD: Tensor = self.dispatcher.combine(self.experts(rows_RD, plan.offsets_E), routing, plan)
        return y_TD

    def _share(self, x_BLD: Tensor) -> Tensor | None:
        """What the shared experts add."""
        if self.shared is None:
            return None
        shared_BLD: Tensor = self.shared(x_BLD)
        if self.shared_gate is None:
            return shared_BLD
        return torch.sigmoid(self.shared_gate(x_BLD)) * shared_BLD

    def _split(self, x_BLD: Tensor, context: RouteContext) -> tuple[Tensor, RouteContext]:
        """[B, L, D] -> [B, L * n_chunks, D / n_chunks], and each chunk's context is its token's."""
        n = self.n_chunks
        if n == 1:
            return x_BLD, context
        mask_BL = context.token_mask_BL
        repeated = RouteContext(
            context.token_ids_BL.repeat_interleave(n, 1),
            None if mask_BL is None else mask_BL.repeat_interleave(n, 1),
            context.training,
        )
        return self.split(x_BLD).unflatten(-1, (n, -1)).flatten(1, 2), repeated
