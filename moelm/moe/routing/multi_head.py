"""The `multi_head` router: a token's vector is cut into chunks, each routed on its own."""

from __future__ import annotations

from dataclasses import dataclass

from moelm.config import register, setting
from moelm.moe.routing.top_k import TopKConfig, TopKRouter


@dataclass
class MultiHeadConfig(TopKConfig):
    n_heads: int = setting(4, ge=2)  # chunks of d_model / n_heads; experts take that width
    projections: bool = True  # a linear layer before the split and one after the merge

    @property
    def n_chunks(self) -> int:
        return self.n_heads

    @property
    def mixes_chunks(self) -> bool:
        return self.projections


@register("router", "multi_head", MultiHeadConfig)
class MultiHeadRouter(TopKRouter):
    """x -> W_split x -> n_heads chunks, each with its own choice as in `top_k` -> concatenated -> W_merge
    (MH-MoE, arXiv 2404.15045, section 2.2). The layer splits and merges; the router sees chunks for tokens.

    A token makes n_heads x top_k choices among experts of input width d_model / n_heads. Loads, probabilities and
    all losses count chunks.
    """
