"""The `gqa` attention: grouped-query attention through PyTorch's scaled_dot_product_attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelm.config import ConfigError, ModelConfig, register, setting
from moelm.model.attention.base import Attention, AttentionConfig
from moelm.model.rope import rotate, rotation


@dataclass
class GQAConfig(AttentionConfig):
    n_heads: int = setting(8, ge=1)
    n_kv_heads: int | None = setting(None, ge=1)  # null: n_heads (multi-head attention)
    head_dim: int | None = setting(None, ge=2)  # null: d_model / n_heads
    rope_theta: float = setting(10_000.0, gt=0)

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

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    def width(self, d_model: int) -> int:
        """The head dimension Q."""
        return self.head_dim or d_model // self.n_heads

    def flops_per_token(self, d_model: int, seq_len: int) -> int:
        """q k^T and the weighted sum of v: two products over half of seq_len, on average, for each head."""
        return 2 * seq_len * self.n_heads * self.width(d_model)

    def saved_per_token(self, d_model: int) -> int:
        """q, k, v and the heads' output."""
        return 2 * (self.n_heads + self.kv_heads) * self.width(d_model)


class KVCache:
    """Keys and values of the tokens so far, in preallocated tensors [B, H_kv, max_len, Q]."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values, self.length = keys, values, 0

    def append(self, k_BHLQ: Tensor, v_BHLQ: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new ones; return all. Raises ValueError past max_len."""
        end = self.length + k_BHLQ.shape[2]
        if end > self.keys.shape[2]:
            raise ValueError(f"the cache holds {self.keys.shape[2]} tokens, {end} were given")
        self.keys[:, :, self.length : end] = k_BHLQ
        self.values[:, :, self.length : end] = v_BHLQ
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


@register("attention", "gqa", GQAConfig)
class GQA(Attention):
    """softmax(q k^T / sqrt(Q)) v, causal, with RoPE on q and k; query head h reads kv head h // (H / H_kv)."""

    def __init__(self, config: GQAConfig, model: ModelConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads = config.n_heads, config.kv_heads
        self.head_dim, self.rope_theta = config.width(model.d_model), config.rope_theta
        kv_width = self.n_kv_heads * self.head_dim
        self.q = nn.Linear(model.d_model, self.n_heads * self.head_dim, bias=False)
        self.k = nn.Linear(model.d_model, kv_width, bias=False)
        self.v = nn.Linear(model.d_model, kv_width, bias=False)
        self.out = nn.Linear(self.n_heads * self.head_dim, model.d_model, bias=False)

    def rotation(self, positions_L: Tensor) -> tuple[Tensor, Tensor]:
        return rotation(positions_L, self.head_dim, self.rope_theta)

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
        q_BHLQ, k_BHLQ, v_BHLQ = (
            project(x_BLD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for project in (self.q, self.k, self.v)
        )
        q_BHLQ, k_BHLQ = rotate(q_BHLQ, *rotation), rotate(k_BHLQ, *rotation)
        if cache is not None:
            k_BHLQ, v_BHLQ = cache.append(k_BHLQ, v_BHLQ)
        y_BHLQ = F.scaled_dot_product_attention(
            q_BHLQ,
            k_BHLQ,
            v_BHLQ,
            attn_mask=None if mask_BLL is None else mask_BLL.unsqueeze(1),
            is_causal=mask_BLL is None and q_BHLQ.shape[2] > 1,
            enable_gqa=self.n_heads != self.n_kv_heads,
        )
        y_BLD: Tensor = self.out(y_BHLQ.transpose(1, 2).flatten(-2))
        return y_BLD
