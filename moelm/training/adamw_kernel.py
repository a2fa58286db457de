"""AdamW for one large tensor in one pass over memory, as a Triton kernel."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

BLOCK, N_WARPS = 2048, 8


@triton.jit
def _hash(x):
    """As `adamw.hash32`."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _round(x, random):
    """As `adamw.round_at_random`."""
    return ((x.to(tl.uint32, bitcast=True) + random) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit(do_not_specialize=["index"])
def _adamw(
    parameter,
    gradient,
    exp_avg,
    exp_avg_sq,
    working_copy,
    step,
    gradient_scale,
    index,
    lr,
    one_minus_beta1,
    log_beta1,
    beta2,
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
    m = tl.load(exp_avg + start + i, mask).to(tl.float32)
    v = tl.load(exp_avg_sq + start + i, mask).to(tl.float32)
    t = tl.load(step)
    correction1 = (1 - tl.exp(t.to(tl.float64) * log_beta1)).to(tl.float32)  # float32 would lose its digits
    correction2 = (1 - tl.exp(t.to(tl.float64) * log_beta2)).to(tl.float32)
    if gradient_scale is not None:
        scale = tl.load(gradient_scale)
        g *= scale
        mask = i < tl.where(scale == scale, n - start, 0)  # with a NaN nothing is stored
    p -= decay * p
    m += one_minus_beta1 * (g - m)
    v = beta2 * v + one_minus_beta2 * (g * g)
    p -= lr / correction1 * m / (tl.sqrt(v) / tl.sqrt(correction2) + eps)
    tl.store(parameter + start + i, p, mask)
    if working_copy is not None:
        tl.store(working_copy + start + i, p.to(working_copy.dtype.element_ty), mask)
    if exp_avg.dtype.element_ty == tl.bfloat16:
        random = _hash((start + i).to(tl.uint32) ^ _hash(_hash(t.to(tl.uint32)) ^ index.to(tl.uint32)))
        tl.store(exp_avg + start + i, _round(m, random & 0xFFFF), mask)
        tl.store(exp_avg_sq + start + i, _round(v, random >> 16), mask)
    else:
        tl.store(exp_avg + start + i, m, mask)
        tl.store(exp_avg_sq + start + i, v, mask)


def adamw_kernel(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    working_copy: Tensor | None,
    step: Tensor,
    gradient_scale: Tensor | None,
    *,
    index: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """`adamw.adamw_reference` in one kernel; all tensors contiguous.

    An element with float32 moments: 28 bytes (p, m and v read and written, g read), 20 with bfloat16 ones, 2 less for
    a bfloat16 gradient, 2 more for a working copy; about 15 operations, 30 with bfloat16 moments. An H100 has time for
    some 300 operations while it moves 28 bytes, so memory is the bound with float32 moments.
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
        index,
        lr,
        1 - betas[0],
        _log(betas[0]),
        betas[1],
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
