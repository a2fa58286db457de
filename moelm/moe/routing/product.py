"""The products of a router: float32 accuracy, whatever the tokens' dtype."""

from __future__ import annotations

import logging
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from moelm.moe.kernels import HAS_TRITON

if HAS_TRITON:
    from moelm.moe.kernels import router_logits as kernel

log = logging.getLogger(__name__)


def float32_linear(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """float32 [T, E] = x W^T as a float32 product has it. bf16 tokens on CUDA are multiplied, and kept for backward, as
    they are; all others as float32."""
    if HAS_TRITON and x_TD.is_cuda and x_TD.dtype == torch.bfloat16:
        if kernel.takes(x_TD.shape[1]):
            logits_TE: Tensor = kernel.router_logits(x_TD, weight_ED.float())
            return logits_TE
        _say_that_float32_is_used(x_TD.shape[1])
    return F.linear(x_TD.float(), weight_ED.float())


@cache  # one line for all layers
def _say_that_float32_is_used(d_model: int) -> None:
    log.warning("router: a float32 product, since its width %d is no multiple of 128", d_model)
