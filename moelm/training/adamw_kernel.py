"""AdamW for one large tensor in one pass over memory, as a Triton kernel."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, N_WARPS = 2048, 8


@triton.jit
def _adamw(
    parameter,
    gradient,
    exp_avg,
    exp_avg_sq,
    working_copy,
    step,
    gradient_scale,
    lr,
    one_minus_beta1,
    log_beta1,
    one_minus_beta2,
    log_beta2,
    eps,
    decay,
    n,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    mask = i < n - start
    p = tl.load(parameter + start + i, mask)
    g = tl.load(gradient + start + i, mask).to(tl.float32)
    m = tl.load(exp_avg + start + i, mask)
    v = tl.load(exp_avg_sq + start + i, mask)
    t = tl.load(step).to(tl.float64)  # 1 - beta^t loses its digits in float32
    correction1 = (1 - tl.exp(t * log_beta1)).to(tl.float32)
    correction2 = (1 - tl.exp(t * log_beta2)).to(tl.float32)
    if gradient_scale is not None:
        g *= tl.load(gradient_scale)
    p -= decay * p
    m += one_minus_beta1 * (g - m)
    v += one_minus_beta2 * (g * g - v)
    p -= lr / correction1 * m / (tl.sqrt(v) / tl.sqrt(correction2) + eps)
    tl.store(parameter + start + i, p, mask)
    tl.store(exp_avg + start + i, m, mask)
    tl.store(exp_avg_sq + start + i, v, mask)
    if working_copy is not None:
        tl.store(working_copy + start + i, p.to(tl.bfloat16), mask)


def adamw_update(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    working_copy: Tensor | None,
    step: Tensor,
    gradient_scale: Tensor | None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """`adamw_reference` by one kernel, in place; tensors contiguous.

    An element: 28 bytes (24 written and read again: parameter and moments; 4 or 2 read: the gradient), 2 more
    written for a working copy; some 15 operations. So memory bounds it: 3 TB/s leave 320 operations in that time.
    """
    n = parameter.numel()
    _adamw[(triton.cdiv(n, BLOCK),)](
        parameter,
        gradient,
        exp_avg,
        exp_avg_sq,
        working_copy,
        step,
        gradient_scale,
        lr,
        1 - betas[0],
        _log(betas[0]),
        1 - betas[1],
        _log(betas[1]),
        eps,
        lr * weight_decay,
        n,
        BLOCK=BLOCK,
        num_warps=N_WARPS,
    )


def _log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf
