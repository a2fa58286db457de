"""The `hash` router: the experts of a token are a fixed function of its id."""

from __future__ import annotations

import torch
from torch import Tensor

from moelm.config import register
from moelm.moe.routing.base import FixedRouter, FixedRouterConfig, mix
from moelm.moe.types import RouteContext


@register("router", "hash", FixedRouterConfig)
class HashRouter(FixedRouter):
    """expert_0 = (id + mix(id div E)) mod E, expert_k = (expert_0 + k * (E div K)) mod E  (Hash layers, Roller et al.
    2021, arXiv 2106.04426: a random hash, the same in all layers, and for K > 1 their multi-hash).

    Balanced by construction: each block of E consecutive ids is spread over all E experts, rotated by a hash of the
    block, so every expert owns the same number of ids. A byte-pair vocabulary is numbered by frequency, so it gets
    about the same number of tokens too; the commonest few ids remain a visible excess.
    """

    def choose(self, context: RouteContext) -> Tensor:
        ids_T1 = context.token_ids_BL.reshape(-1, 1)
        first_T1 = ids_T1 + mix(ids_T1 // self.n_experts)
        offsets_K = torch.arange(self.top_k, device=ids_T1.device) * (self.n_experts // self.top_k)
        return (first_T1 + offsets_K) % self.n_experts
