"""The product of a router: float32 accuracy, whatever the tokens' dtype."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moelm.moe.kernels import HAS_TRITON
from moelm.moe.ops import op

if HAS_TRITON:
    from moelm.moe.kernels import router_logits as kernel

log = logging.getLogger(__name__)


def float32_linear(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """float32 [T, E] = x W^T as a float32 product has it. bf16 tokens on CUDA are kept for backward as they are."""
    if x_TD.is_cuda and x_TD.dtype == torch.bfloat16:
        logits_TE: Tensor = router_logits(x_TD, weight_ED.float())
        return logits_TE
    return F.linear(x_TD.float(), weight_ED.float())


def _empty_logits(x_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    E = weight_ED.shape[0]
    parts = kernel.empty_parts(x_TD, E) if kernel_takes(x_TD) else weight_ED.new_empty(weight_ED.shape)
    return weight_ED.new_empty(x_TD.shape[0], E), parts


@op("moelm::router_logits", fake=_empty_logits)
def _router_logits(x_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    """(float32 [T, E], W as backward multiplies by it: the kernel's parts, or a copy)."""
    if kernel_takes(x_TD):
        return kernel.router_logits(x_TD, weight_ED)
    return F.linear(x_TD.float(), weight_ED), weight_ED.clone()


def _empty_gradients(grad_TE: Tensor, x_TD: Tensor, parts: Tensor) -> tuple[Tensor, Tensor]:
    return x_TD.new_empty(x_TD.shape), grad_TE.new_empty(grad_TE.shape[1], x_TD.shape[1])


@op("moelm::router_logits_backward", fake=_empty_gradients)
def _router_logits_backward(grad_TE: Tensor, x_TD: Tensor, parts: Tensor) -> tuple[Tensor, Tensor]:
    """(grad W in x's dtype, grad^T x in float32)."""
    if kernel_takes(x_TD):
        return kernel.router_logits_backward(grad_TE, x_TD, parts)
    return (grad_TE @ parts).to(x_TD.dtype), grad_TE.T @ x_TD.float()


class _RouterLogits(torch.autograd.Function):
    """float32 [T, E] = x W^T of bf16 x and float32 W. Backward keeps x, which others keep too, and a copy of W."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        logits_TE, parts = _router_logits(x_TD, weight_ED)
        ctx.save_for_backward(x_TD, parts)
        return logits_TE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor, Tensor]:
        return _router_logits_backward(grad_TE, *ctx.saved_tensors)


router_logits = _RouterLogits.apply


def kernel_takes(x_TD: Tensor) -> bool:
    takes = HAS_TRITON and kernel.takes(x_TD)
    if not takes:
        _say_that_float32_is_used(x_TD.shape[1])
    return takes


@cache  # one line for all layers
def _say_that_float32_is_used(d_model: int) -> None:
    reason = "no bf16 products or too little shared memory on this device"
    if d_model % 128:
        reason = f"its width {d_model} is no multiple of 128"
    log.warning("router: products in float32, since %s", reason if HAS_TRITON else "triton is not installed")
