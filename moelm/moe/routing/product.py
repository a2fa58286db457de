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


@op("moelm::router_logits", fake=lambda x_TD, W_ED: W_ED.new_empty(x_TD.shape[0], W_ED.shape[0]))
def _router_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    if kernel_takes(x_TD):
        return kernel.router_logits(x_TD, weight_ED)
    return F.linear(x_TD.float(), weight_ED)


@op(
    "moelm::router_logits_backward", fake=lambda _, x_TD, W_ED: (x_TD.new_empty(x_TD.shape), W_ED.new_empty(W_ED.shape))
)
def _router_logits_backward(grad_TE: Tensor, x_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    """(grad W in bf16, grad^T x in float32)."""
    if kernel_takes(x_TD):
        return kernel.router_logits_backward(grad_TE, x_TD, weight_ED)
    return (grad_TE @ weight_ED).to(x_TD.dtype), grad_TE.T @ x_TD.float()


class _RouterLogits(torch.autograd.Function):
    """float32 [T, E] = x W^T of bf16 x and float32 W. Backward keeps these two and nothing else."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        return _router_logits(x_TD, weight_ED)

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
