"""One pre-norm block: attention, then a dense or a mixture-of-experts feed-forward."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from moelm.config import ModelConfig, build
from moelm.model import checkpointing
from moelm.model.attention.base import Attention
from moelm.model.feed_forward import SwiGLU
from moelm.model.norm import make_norm
from moelm.moe.layer import MoELayer
from moelm.moe.types import RouteContext, RouterStats


class Block(nn.Module):
    """x += Dropout(Attention(Norm(x)));  x += Dropout(FFN(Norm(x))), FFN = SwiGLU or MoE by the layer's number."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.attention_norm = make_norm(config)
        self.attention: Attention = build("attention", config.attention_of(layer), config)
        self.feed_forward_norm = make_norm(config)
        self.feed_forward: nn.Module | None = None
        self.moe: MoELayer | None = None
        if config.is_moe_layer(layer):
            assert config.moe is not None
            width = config.moe.shared_width
            shared = SwiGLU(config.d_model, width) if width else None
            self.moe = MoELayer(config.moe, config.d_model, shared)
        else:
            self.feed_forward = SwiGLU(config.d_model, config.feed_forward.d_ff)

    def forward(
        self,
        x_BLD: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask_BLL: Tensor | None,
        context: RouteContext,
        cache: Any = None,
        recompute: str = "none",
    ) -> tuple[Tensor, RouterStats | None]:
        """`recompute`: a mode of `checkpointing.run`."""
        inputs = (x_BLD, rotation, mask_BLL, context, cache)
        output: tuple[Tensor, RouterStats | None] = checkpointing.run(recompute, self._forward, *inputs)
        return output

    def _forward(
        self,
        x_BLD: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask_BLL: Tensor | None,
        context: RouteContext,
        cache: Any,
    ) -> tuple[Tensor, RouterStats | None]:
        y_BLD = self.attention(self.attention_norm(x_BLD), rotation, mask_BLL, cache)
        x_BLD = x_BLD + F.dropout(y_BLD, self.dropout, self.training)
        h_BLD, stats = self.feed_forward_norm(x_BLD), None
        if self.moe is not None:
            h_BLD, stats = self.moe(h_BLD, context)
        elif self.feed_forward is not None:
            h_BLD = self.feed_forward(h_BLD)
        return x_BLD + F.dropout(h_BLD, self.dropout, self.training), stats
