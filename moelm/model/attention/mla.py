"""The `mla` attention: multi-head latent attention (DeepSeek-V2, arXiv 2405.04434; also DeepSeek-V3, Moonlight)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelm.config import ConfigError, ModelConfig, register, setting
from moelm.model.attention.base import Attention, AttentionConfig, KVCache
from moelm.model.norm import RMSNorm
from moelm.model.rope import RopeScalingConfig, rotate, rotation


@dataclass
class MLAConfig(AttentionConfig):
    n_heads: int = setting(8, ge=1)
    q_latent_dim: int | None = setting(None, ge=1)  # null: q comes from x in one product
    kv_latent_dim: int = setting(128, ge=1)
    nope_head_dim: int = setting(32, ge=1)  # dimensions of a head of q and k without positions
    rope_head_dim: int = setting(16, ge=2)  # and with; of k they are one head that all share
    v_head_dim: int = setting(32, ge=1)
    latent_norm_eps: float = setting(1e-6, gt=0)  # DeepSeek's code keeps 1e-6 whatever the model's norm_eps is
    rope_theta: float = setting(10_000.0, gt=0)
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    rope_interleaved: bool = True  # which pairs turn together: 2i and 2i + 1, or else i and i + P/2

    def check(self, key: str, config: ModelConfig) -> None:
        if self.rope_head_dim % 2:
            raise ConfigError(f"{key}.rope_head_dim", f"{self.rope_head_dim} is odd", "RoPE turns pairs")
        self.rope_scaling.check(f"{key}.rope_scaling")

    @property
    def qk_head_dim(self) -> int:
        """The head dimension Q of queries and keys."""
        return self.nope_head_dim + self.rope_head_dim

    @property
    def scale(self) -> float:
        """What q k^T is multiplied by: 1 / sqrt(Q), times the square of YaRN's m(factor, mscale_all_dim)."""
        mscale = self.rope_scaling.mscale_all_dim
        magnitude = 1.0 if mscale is None else self.rope_scaling.magnitude(mscale)
        return float(self.qk_head_dim**-0.5 * magnitude * magnitude)

    def flops_per_token(self, d_model: int, seq_len: int) -> int:
        """q k^T and the weighted sum of v: two products over half of seq_len, on average, for each head."""
        return seq_len * self.n_heads * (self.qk_head_dim + self.v_head_dim)

    def saved_per_token(self, d_model: int, compiled: bool) -> int:
        """q, k, v and the heads' output; each latent before and after its norm."""
        latents = (2 if compiled else 3) * ((self.q_latent_dim or 0) + self.kv_latent_dim)
        return latents + 2 * self.n_heads * (self.qk_head_dim + self.v_head_dim)

    def products_per_token(self, d_model: int) -> int:
        """q, the latents and the shared part of k, the heads' parts of k and v, and their output."""
        latents = (self.q_latent_dim or 0) + self.kv_latent_dim + self.rope_head_dim
        return latents + self.n_heads * (self.qk_head_dim + self.nope_head_dim + 2 * self.v_head_dim)


@register("attention", "mla", MLAConfig)
class MLA(Attention):
    """Attention whose keys and values come from one short vector a token; P of the Q dimensions know positions.

    [c', r] = W_compress x;  c = RMSNorm(c');  [k'_h, v_h] = W_expand,h c;  k_h = [k'_h, RoPE(r)], r the same for all
    heads;  q_h = [q'_h, RoPE(q''_h)] of W_q x, or of W_q RMSNorm(W_q,compress x) where q has a latent too;
    softmax(scale q k^T) v, causal.

    The cache holds the latent c after its norm and the rotated key, not the keys and values of the heads, which are
    made anew from it at each step.
    """

    def __init__(self, config: MLAConfig, model: ModelConfig) -> None:
        super().__init__()
        self.config = config
        q_width = config.n_heads * config.qk_head_dim
        self.q_compress: nn.Linear | None = None
        self.q_latent_norm: RMSNorm | None = None
        if config.q_latent_dim is not None:
            self.q_compress = nn.Linear(model.d_model, config.q_latent_dim, bias=False)
            self.q_latent_norm = RMSNorm(config.q_latent_dim, config.latent_norm_eps)
        self.q = nn.Linear(config.q_latent_dim or model.d_model, q_width, bias=False)
        self.kv_compress = nn.Linear(model.d_model, config.kv_latent_dim + config.rope_head_dim, bias=False)
        self.kv_latent_norm = RMSNorm(config.kv_latent_dim, config.latent_norm_eps)
        kv_width = config.n_heads * (config.nope_head_dim + config.v_head_dim)
        self.kv_expand = nn.Linear(config.kv_latent_dim, kv_width, bias=False)
        self.out = nn.Linear(config.n_heads * config.v_head_dim, model.d_model, bias=False)

    def rotation(self, positions_L: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        return rotation(positions_L, config.rope_head_dim, config.rope_theta, config.rope_scaling)

    def init_cache(self, batch_size: int, max_len: int, device: torch.device, dtype: torch.dtype) -> KVCache:
        latent, key = (
            torch.empty((batch_size, 1, max_len, width), device=device, dtype=dtype)
            for width in (self.config.kv_latent_dim, self.config.rope_head_dim)
        )
        return KVCache(latent, key)

    def forward(
        self,
        x_BLD: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask_BLL: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """`mask_BLL`: bool, True = may attend, replaces the causal mask; with a cache its last axis is all keys."""
        config, q_from = self.config, x_BLD
        if self.q_compress is not None and self.q_latent_norm is not None:
            q_from = self.q_latent_norm(self.q_compress(x_BLD))
        q_BLHQ = self.q(q_from).unflatten(-1, (config.n_heads, -1))
        q_nope_BLHN, q_rope_BLHP = q_BLHQ.split((config.nope_head_dim, config.rope_head_dim), -1)
        q_rope_BLHP = rotate(q_rope_BLHP, *rotation, config.rope_interleaved)
        compressed_BL1C = self.kv_compress(x_BLD).unsqueeze(2)
        latent_BL1C, k_rope_BL1P = compressed_BL1C.split((config.kv_latent_dim, config.rope_head_dim), -1)
        latent_BL1C = self.kv_latent_norm(latent_BL1C)
        k_rope_BL1P = rotate(k_rope_BL1P, *rotation, config.rope_interleaved)
        if cache is not None:
            both = cache.append(latent_BL1C.transpose(1, 2), k_rope_BL1P.transpose(1, 2))
            latent_BL1C, k_rope_BL1P = (each.transpose(1, 2) for each in both)
        expanded_BLHE = self.kv_expand(latent_BL1C.squeeze(2)).unflatten(-1, (config.n_heads, -1))
        k_nope_BLHN, v_BLHV = expanded_BLHE.split((config.nope_head_dim, config.v_head_dim), -1)
        y_BHLV = F.scaled_dot_product_attention(
            torch.cat([q_nope_BLHN, q_rope_BLHP], -1).transpose(1, 2),
            torch.cat([k_nope_BLHN, k_rope_BL1P.expand(-1, -1, config.n_heads, -1)], -1).transpose(1, 2),
            v_BLHV.transpose(1, 2),
            attn_mask=None if mask_BLL is None else mask_BLL.unsqueeze(1),
            is_causal=mask_BLL is None and x_BLD.shape[1] > 1,
            scale=config.scale,
        )
        y_BLD: Tensor = self.out(y_BHLV.transpose(1, 2).flatten(-2))
        return y_BLD
