"""The loss: cross-entropy of the head's logits, which never exist all at once."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moelm.moe.experts import compute_dtype
from moelm.moe.kernels import HAS_TRITON

IGNORE = -100  # a target that is not predicted
MAX_LOGITS = 2**26  # elements of the logits that may exist at once, beside copies of them in float32
MAX_FUSED_BYTES = 2**29  # of the logits that may exist at once where there are no copies of them


def chunked_cross_entropy(
    x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, max_logits: int = MAX_LOGITS
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over the targets that are not IGNORE, and each token's, detached (0 for IGNORE).

    Tokens go in chunks whose logits stay below `max_logits` elements; with more than one chunk the logits are
    recomputed in backward instead of kept. On CUDA with Triton `FusedCrossEntropy` does it. The softmax is float32.
    """
    if x_TD.is_cuda and HAS_TRITON and torch.is_grad_enabled():
        loss, ce_T = FusedCrossEntropy.apply(x_TD, weight_VD, targets_T, MAX_FUSED_BYTES)
        return loss, ce_T
    chunk = max(1, max_logits // weight_VD.shape[0])
    chunks = zip(x_TD.split(chunk), targets_T.split(chunk), strict=True)
    if x_TD.shape[0] <= chunk or not torch.is_grad_enabled():
        ce_T = torch.cat([_cross_entropy(x, weight_VD, targets) for x, targets in chunks])
    else:
        ce_T = torch.cat(
            [checkpoint(_cross_entropy, x, weight_VD, targets, use_reentrant=False) for x, targets in chunks]
        )
    n_targets = (targets_T != IGNORE).sum().clamp(min=1)
    return ce_T.sum() / n_targets, ce_T.detach()


def _cross_entropy(x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
    logits_TV = F.linear(x_TD, weight_VD)
    return F.cross_entropy(logits_TV.float(), targets_T, ignore_index=IGNORE, reduction="none")


class FusedCrossEntropy(torch.autograd.Function):
    """(mean, of each token) as `chunked_cross_entropy`; the first forward pass over a chunk's logits makes the
    gradients too, and backward only scales them:

        dL/dlogits = (softmax(logits) - onehot(target)) / n_targets, rounded to the compute dtype in the logits' place;
        dL/dx = dL/dlogits W;   dL/dW = dL/dlogits^T x, summed over chunks in float32.

    So each chunk costs the three products that are needed, where recomputation costs four, and one pass of a kernel
    between them. The gradients of x and W are kept from forward to backward.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, max_bytes: int) -> tuple[Tensor, Tensor]:
        from moelm.model.cross_entropy_kernel import cross_entropy_  # here, since triton need not be installed

        dtype = compute_dtype(x_TD)
        inputs_TD, head_VD = x_TD.to(dtype), weight_VD.to(dtype)
        scale = 1 / (targets_T != IGNORE).sum().clamp(min=1).float()
        T, V = x_TD.shape[0], weight_VD.shape[0]
        n_chunks = max(1, math.ceil(T * V * dtype.itemsize / max_bytes))
        chunk = max(1, math.ceil(T / n_chunks))
        ce, grad_x, grad_weight_VD = [], [], None
        with torch.autocast(x_TD.device.type, enabled=False):
            for x_CD, targets_C in zip(inputs_TD.split(chunk), targets_T.split(chunk), strict=True):
                grad_CV = F.linear(x_CD, head_VD)
                ce.append(cross_entropy_(grad_CV, targets_C, scale, IGNORE))
                grad_x.append(grad_CV @ head_VD)
                product_VD = float32_product(grad_CV.T, x_CD)
                grad_weight_VD = product_VD if grad_weight_VD is None else grad_weight_VD.add_(product_VD)
        assert grad_weight_VD is not None
        ctx.save_for_backward(torch.cat(grad_x).to(x_TD.dtype), grad_weight_VD.to(weight_VD.dtype))
        ce_T = torch.cat(ce)
        ctx.mark_non_differentiable(ce_T)
        return ce_T.sum() * scale, ce_T

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        grad_x_TD, grad_weight_VD = ctx.saved_tensors
        return grad_x_TD * grad_loss, grad_weight_VD * grad_loss, None, None


def float32_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, summed and returned in float32."""
    if a.dtype == torch.float32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()
