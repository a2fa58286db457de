"""The seam of the attentions: what the model and the size estimate ask of each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moelm.config import NamedConfig


class AttentionConfig(NamedConfig):
    def flops_per_token(self, d_model: int, seq_len: int) -> int:
        """Forward operations of one layer a token beyond its weight matrices, averaged over a causal sequence."""
        raise NotImplementedError

    def saved_per_token(self, d_model: int) -> int:
        """Elements that one layer keeps for backward a token, beside its input."""
        raise NotImplementedError


class Attention(nn.Module):
    def rotation(self, positions_L: Tensor) -> tuple[Tensor, Tensor]:
        """What `forward` needs to know of positions; the same for all layers, so made once a forward pass."""
        raise NotImplementedError

    def init_cache(self, batch_size: int, max_len: int, device: torch.device, dtype: torch.dtype) -> Any:
        """What generation remembers of the tokens so far, empty; opaque, with `length`, filled by `forward`."""
        raise NotImplementedError
