"""The seam of the attentions: what the model and the size estimate ask of each, and what they share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moelm.config import NamedConfig


class AttentionConfig(NamedConfig):
    def flops_per_token(self, d_model: int, seq_len: int) -> int:
        """Forward operations of one layer a token beyond its weight matrices, averaged over a causal sequence."""
        raise NotImplementedError

    def saved_per_token(self, d_model: int, compiled: bool) -> int:
        """Elements that one layer keeps for backward a token, beside its input; a float32 copy, which only eager code
        keeps, counts twice."""
        raise NotImplementedError

    def products_per_token(self, d_model: int) -> int:
        """Elements of its products' outputs a token, which selective checkpointing keeps; the last one left out."""
        raise NotImplementedError


class Attention(nn.Module):
    """Built with `(config, model)`: its own section, and the ModelConfig."""

    def rotation(self, positions_L: Tensor) -> tuple[Tensor, Tensor]:
        """What `forward` needs to know of positions; the same for all layers of one section, so made once for them."""
        raise NotImplementedError

    def init_cache(self, batch_size: int, max_len: int, device: torch.device, dtype: torch.dtype) -> Any:
        """What generation remembers of the tokens so far, empty; opaque, with `length`, filled by `forward`."""
        raise NotImplementedError


class KVCache:
    """Two things remembered of each token so far, in preallocated tensors [B, H_kv, max_len, any width]."""

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
