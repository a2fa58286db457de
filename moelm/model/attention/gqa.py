"""The `gqa` attention: grouped-query attention through PyTorch's scaled_dot_product_attention."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelm.config import ConfigError, ModelConfig, register, setting
from moelm.model.attention.base import Attention, AttentionConfig, KVCache
from moelm.model.attention.heads import TurnedHeads
from moelm.model.norm import RMSNorm
from moelm.model.rope import RopeScalingConfig, rotate, rotation
from moelm.moe.experts import compute_dtype
from moelm.moe.kernels import HAS_TRITON


@dataclass
class GQAConfig(AttentionConfig):
    n_heads: int = setting(8, ge=1)
    n_kv_heads: int | None = setting(None, ge=1)  # null: n_heads (multi-head attention)
    head_dim: int | None = setting(None, ge=2)  # null: d_model / n_heads
    rope_theta: float = setting(10_000.0, gt=0)
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    rope_interleaved: bool = False  # which pairs turn together: 2i and 2i + 1, or else i and i + Q/2
    qk_norm: str = setting("none", allowed=("none", "head", "full"))  # RMSNorm of q and k: each head's, or all heads'
    qkv_bias: bool = False
    out_bias: bool = False
    clip_qkv: float | None = setting(None, gt=0)  # q, k and v, after qk_norm, are cut to [-clip_qkv, clip_qkv]
    sinks: bool = False  # a learned logit a head that takes its share of the softmax and adds nothing
    sliding_window: int | None = setting(None, ge=1)  # a token sees this many: itself and those just before it

    def check(self, key: str, config: ModelConfig) -> None:
        if self.head_dim is None and config.d_model % self.n_heads:
            raise ConfigError(
                f"{key}.n_heads", f"{self.n_heads} does not divide d_model = {config.d_model}", "set head_dim"
            )
        if self.n_heads % self.kv_heads:
            raise ConfigError(
                f"{key}.n_kv_heads",
                f"{self.kv_heads} does not divide n_heads = {self.n_heads}",
                "use a divisor",
            )
        if self.width(config.d_model) % 2:
            raise ConfigError(f"{key}.head_dim", f"{self.width(config.d_model)} is odd", "RoPE turns pairs")
        self.rope_scaling.check(f"{key}.rope_scaling")

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    def width(self, d_model: int) -> int:
        """The head dimension Q."""
        return self.head_dim or d_model // self.n_heads

    def flops_per_token(self, d_model: int, seq_len: int) -> int:
        """q k^T and the weighted sum of v: two products over the keys of a token, for each head.

        The keys are seq_len / 2 on average; with a window W they are W - W^2 / (2 seq_len).
        """
        window = min(self.sliding_window or seq_len, seq_len)
        return 2 * self.n_heads * self.width(d_model) * (2 * seq_len * window - window**2) // seq_len

    def saved_per_token(self, d_model: int, compiled: bool) -> int:
        """q, k, v and the heads' output; q and k before a norm; q, k and v before they are cut. Under a mask k and v
        are kept for each query head, and with sinks all four are wider, and the output is kept again as it was cut."""
        n_heads, width = self.n_heads + self.kv_heads, self.width(d_model)
        norm = (1 if compiled else 2) * n_heads if self.qk_norm != "none" else 0
        clip = n_heads + self.kv_heads if self.clip_qkv is not None else 0
        if self.sinks:
            return (norm + clip + self.n_heads) * width + 4 * self.n_heads * (width + 8 - width % 8)
        attended = 4 * self.n_heads if self.sliding_window is not None else 2 * n_heads
        return (attended + norm + clip) * width

    def products_per_token(self, d_model: int) -> int:
        """q, k, v and the heads' output, which sinks widen."""
        width = self.width(d_model)
        return 2 * (self.n_heads + self.kv_heads) * width + (self.n_heads * (8 - width % 8) if self.sinks else 0)


@register("attention", "gqa", GQAConfig)
class GQA(Attention):
    """softmax(q k^T / sqrt(Q)) v, causal, with RoPE on q and k; query head h reads kv head h // (H / H_kv).

    qk_norm: RMSNorm over each head of q and k (Qwen3, arXiv 2505.09388) or over the whole q and the whole k before
    they are split into heads (OLMoE, arXiv 2409.02060). clip_qkv: DBRX. sliding_window: token i sees i - W < j <= i.
    sinks: with s_h learned, the weights are exp(a_j) / (exp(s_h) + sum_j exp(a_j)) (gpt-oss,
    arXiv 2508.10925).
    """

    def __init__(self, config: GQAConfig, model: ModelConfig) -> None:
        super().__init__()
        self.config, self.window = config, config.sliding_window
        self.n_heads, self.n_kv_heads = config.n_heads, config.kv_heads
        self.head_dim = config.width(model.d_model)
        q_width, kv_width = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        self.q = nn.Linear(model.d_model, q_width, bias=config.qkv_bias)
        self.k = nn.Linear(model.d_model, kv_width, bias=config.qkv_bias)
        self.v = nn.Linear(model.d_model, kv_width, bias=config.qkv_bias)
        self.out = nn.Linear(q_width, model.d_model, bias=config.out_bias)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.qk_norm != "none":
            widths = (q_width, kv_width) if config.qk_norm == "full" else (self.head_dim, self.head_dim)
            self.q_norm, self.k_norm = (RMSNorm(width, model.norm_eps) for width in widths)
        self.sinks: nn.Parameter | None = None
        self.initial: dict[str, float] = {}
        if config.sinks:
            self.sinks = nn.Parameter(torch.empty(self.n_heads))
            self.initial = {"sinks": 0.0}

    def rotation(self, positions_L: Tensor) -> tuple[Tensor, Tensor]:
        return rotation(positions_L, self.head_dim, self.config.rope_theta, self.config.rope_scaling)

    def init_cache(self, batch_size: int, max_len: int, device: torch.device, dtype: torch.dtype) -> KVCache:
        shape = (batch_size, self.n_kv_heads, max_len, self.head_dim)
        return KVCache(torch.empty(shape, device=device, dtype=dtype), torch.empty(shape, device=device, dtype=dtype))

    def forward(
        self,
        x_BLD: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask_BLL: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """`mask_BLL`: bool, True = may attend, replaces the causal mask; with a cache its last axis is all keys."""
        if cache is None and self.fuses(x_BLD):
            heads = self.turned_heads(x_BLD, rotation)
        else:
            interleaved = self.config.rope_interleaved
            q_BLHQ = rotate(self.heads(self.q(x_BLD), self.q_norm), *rotation, interleaved)
            k_BLHQ = rotate(self.heads(self.k(x_BLD), self.k_norm), *rotation, interleaved)
            heads = q_BLHQ, k_BLHQ, self.heads(self.v(x_BLD), None)
        q_BHLQ, k_BHLQ, v_BHLQ = (each.transpose(1, 2) for each in heads)
        if cache is not None:
            k_BHLQ, v_BHLQ = cache.append(k_BHLQ, v_BHLQ)
        n_queries, n_keys = q_BHLQ.shape[2], k_BHLQ.shape[2]
        if self.window is not None and self.window < n_keys:
            band_LL = causal_mask(n_queries, n_keys, x_BLD.device, self.window)
            mask_BLL = band_LL.unsqueeze(0) if mask_BLL is None else mask_BLL & band_LL
        if self.sinks is not None:
            if mask_BLL is None:
                mask_BLL = causal_mask(n_queries, n_keys, x_BLD.device).unsqueeze(0)
            q_BHLQ, k_BHLQ, v_BHLQ, mask_BLL = with_sinks(
                q_BHLQ, k_BHLQ, v_BHLQ, mask_BLL, self.sinks * self.head_dim**0.5
            )
        shares_heads = self.n_heads != self.n_kv_heads
        if shares_heads and mask_BLL is not None:  # on CUDA no fused kernel takes a mask and shares heads
            repeats, shares_heads = self.n_heads // self.n_kv_heads, False
            k_BHLQ, v_BHLQ = k_BHLQ.repeat_interleave(repeats, 1), v_BHLQ.repeat_interleave(repeats, 1)
        y_BHLQ = F.scaled_dot_product_attention(
            q_BHLQ,
            k_BHLQ,
            v_BHLQ,
            attn_mask=None if mask_BLL is None else mask_BLL.unsqueeze(1),
            is_causal=mask_BLL is None and n_queries > 1,
            scale=self.head_dim**-0.5,
            enable_gqa=shares_heads,
        )
        y_BLD: Tensor = self.out(y_BHLQ[..., : self.head_dim].transpose(1, 2).flatten(-2))
        return y_BLD

    def fuses(self, x: Tensor) -> bool:
        """Does `turned_heads` take what the config asks for, where autocast casts the weights anyway?"""
        config, casts = self.config, compute_dtype(x) != self.q.weight.dtype
        plain = config.qk_norm != "full" and config.clip_qkv is None and not config.rope_interleaved
        return HAS_TRITON and x.is_cuda and casts and plain

    def turned_heads(self, x_BLD: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """q and k, normed and turned, and v, [B, L, H, Q] each, of one product: k and v alone are too narrow to fill a
        GPU, and x gets one gradient instead of three to be added."""
        layers, dtype = (self.q, self.k, self.v), compute_dtype(x_BLD)
        weight = torch.cat([layer.weight.to(dtype) for layer in layers])
        bias = torch.cat([layer.bias.to(dtype) for layer in layers]) if self.config.qkv_bias else None
        norms_2Q, eps = None, 0.0
        if self.q_norm is not None and self.k_norm is not None:
            norms_2Q, eps = torch.stack([self.q_norm.weight, self.k_norm.weight]).float(), self.q_norm.eps
        qkv_BLW = F.linear(x_BLD, weight, bias)
        heads: tuple[Tensor, Tensor, Tensor] = TurnedHeads.apply(
            qkv_BLW, norms_2Q, *rotation, self.n_heads, self.n_kv_heads, eps
        )
        return heads

    def heads(self, x_BLD: Tensor, norm: RMSNorm | None) -> Tensor:
        """One projection, normed and cut as the config says, [B, L, H, Q]."""
        if norm is not None and self.config.qk_norm == "full":
            x_BLD = norm(x_BLD)
        x_BLHQ: Tensor = x_BLD.unflatten(-1, (-1, self.head_dim))
        if norm is not None and self.config.qk_norm == "head":
            x_BLHQ = norm(x_BLHQ)
        if self.config.clip_qkv is not None:
            x_BLHQ = x_BLHQ.clamp(-self.config.clip_qkv, self.config.clip_qkv)
        return x_BLHQ


def causal_mask(n_queries: int, n_keys: int, device: torch.device, window: int | None = None) -> Tensor:
    """bool [n_queries, n_keys], True = may attend: the queries are the last of the keys."""
    keys = torch.arange(n_keys, device=device)
    queries = keys[n_keys - n_queries :].unsqueeze(-1)
    mask_LL: Tensor = keys <= queries
    if window is not None:
        mask_LL &= keys > queries - window
    return mask_LL


def with_sinks(
    q_BHLQ: Tensor, k_BHLQ: Tensor, v_BHLQ: Tensor, mask_BLL: Tensor, scaled_sinks_H: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and mask with one more key, of value 0, whose product with a query is the sink of the query's head.

    The sink stands in a dimension of its own, where the other keys are 0, so any kernel computes the rest; the width is
    rounded up to a multiple of 8, which fused kernels ask for.
    """
    B, _, L, Q = q_BHLQ.shape
    more = 8 - Q % 8
    sinks_BHL1 = scaled_sinks_H.to(q_BHLQ.dtype).view(1, -1, 1, 1).expand(B, -1, L, -1)
    q_BHLQ = torch.cat([F.pad(q_BHLQ, (0, more - 1)), sinks_BHL1], -1)
    k_BHLQ = F.pad(k_BHLQ, (0, more))
    sink_Q = F.pad(k_BHLQ.new_ones(1), (Q + more - 1, 0))
    k_BHLQ = torch.cat([k_BHLQ, sink_Q.expand(*k_BHLQ.shape[:2], 1, -1)], 2)
    v_BHLQ = F.pad(v_BHLQ, (0, more, 0, 1))
    return q_BHLQ, k_BHLQ, v_BHLQ, F.pad(mask_BLL, (0, 1), value=True)
