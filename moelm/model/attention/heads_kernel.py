"""Norm and RoPE of queries and keys in one pass, forward and backward, as Triton kernels.

A row is one head of one token: the rows of a token lie one after the other, those of q first, then k, then v. Each of
its two halves is a tile's row, since RoPE turns dimension i with dimension i + Q/2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moelm.moe.kernels.launch import Kernel, cdiv, next_power_of_2

BLOCK = 2048  # elements of a tile in the forward pass; half of that in the backward pass, which holds more tiles
SPAN = 8  # tiles of one program in the backward pass, which adds up the gradients of the weights


def turn_heads(
    qkv_BLW: Tensor, weights_2Q: Tensor | None, cos: Tensor, sin: Tensor, n_heads: int, n_kv_heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """What `attention.heads.turn_heads` says. 2 s bytes an element of q and k, whose elements are read once."""
    (B, L, _), n_rows = qkv_BLW.shape, qkv_BLW.shape[0] * qkv_BLW.shape[1] * (n_heads + n_kv_heads)
    Q = 2 * cos.shape[1]
    q_BLHQ, k_BLHQ = (qkv_BLW.new_empty(B, L, heads, Q) for heads in (n_heads, n_kv_heads))
    block_i = next_power_of_2(Q // 2)
    block_r = max(1, BLOCK // block_i)
    _turn_heads[cdiv(n_rows, block_r), 1, 1](
        qkv_BLW.contiguous(),
        qkv_BLW if weights_2Q is None else weights_2Q.contiguous(),
        cos.contiguous(),
        sin.contiguous(),
        q_BLHQ,
        k_BLHQ,
        n_rows,
        L,
        eps,
        n_heads,
        n_kv_heads,
        Q // 2,
        weights_2Q is not None,
        block_r,
        block_i,
    )
    return q_BLHQ, k_BLHQ


@Kernel
@triton.jit(do_not_specialize=["n_rows", "L"])
def _turn_heads(
    qkv_TW,
    weights_2Q,
    cos,
    sin,
    q_THQ,
    k_THQ,
    n_rows,
    L,
    eps,
    H: tl.constexpr,
    H_KV: tl.constexpr,
    HALF: tl.constexpr,
    NORMS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    dtype = q_THQ.dtype.element_ty
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    t, h = row // (H + H_KV), row % (H + H_KV)
    i = tl.arange(0, BLOCK_I)[None, :]
    inside = (row < n_rows)[:, None] & (i < HALF)
    at = qkv_TW + (t.to(tl.int64) * (H + 2 * H_KV) + h)[:, None] * (2 * HALF) + i
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    if NORMS:
        rstd = tl.rsqrt(tl.sum(first * first + second * second, 1) / (2 * HALF) + eps)[:, None]
        weight = weights_2Q + tl.where(h < H, 0, 2 * HALF)[:, None] + i
        first *= rstd * tl.load(weight, mask=inside, other=0.0)
        second *= rstd * tl.load(weight + HALF, mask=inside, other=0.0)
    angle = (t % L)[:, None] * HALF + i
    c, s = tl.load(cos + angle, mask=inside, other=0.0), tl.load(sin + angle, mask=inside, other=0.0)
    turned_first, turned_second = (first * c - second * s).to(dtype), (second * c + first * s).to(dtype)
    is_q = inside & (h < H)[:, None]
    q = q_THQ + (t.to(tl.int64) * H + h)[:, None] * (2 * HALF) + i
    tl.store(q, turned_first, mask=is_q)
    tl.store(q + HALF, turned_second, mask=is_q)
    is_k = inside & (h >= H)[:, None]
    k = k_THQ + (t.to(tl.int64) * H_KV + h - H)[:, None] * (2 * HALF) + i
    tl.store(k, turned_first, mask=is_k)
    tl.store(k + HALF, turned_second, mask=is_k)


def turn_heads_backward(
    grad_q_BLHQ: Tensor,
    grad_k_BLHQ: Tensor,
    grad_v_BLHQ: Tensor,
    qkv_BLW: Tensor | None,
    weights_2Q: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """What `attention.heads.turn_heads_backward` says. Bytes: 3 s an element of q and k, 2 s of v, and a few rows a
    program for the sums of the weights' gradients, which are added in a fixed order."""
    (B, L, H, Q), n_kv_heads = grad_q_BLHQ.shape, grad_k_BLHQ.shape[2]
    n_rows = B * L * (H + 2 * n_kv_heads)
    grad_qkv_BLW = grad_q_BLHQ.new_empty(B, L, (H + 2 * n_kv_heads) * Q)
    block_i = next_power_of_2(Q // 2)
    block_r = max(1, BLOCK // 2 // block_i)
    n_programs = cdiv(n_rows, block_r * SPAN)
    sums_P2Q = cos.new_empty(n_programs, 2, Q, dtype=torch.float32)
    norms = weights_2Q is not None and qkv_BLW is not None
    _turn_heads_backward[n_programs, 1, 1](
        grad_q_BLHQ.contiguous(),
        grad_k_BLHQ.contiguous(),
        grad_v_BLHQ.contiguous(),
        qkv_BLW.contiguous() if qkv_BLW is not None and norms else grad_qkv_BLW,
        weights_2Q.contiguous() if weights_2Q is not None and norms else cos,
        cos.contiguous(),
        sin.contiguous(),
        grad_qkv_BLW,
        sums_P2Q,
        n_rows,
        L,
        eps,
        H,
        n_kv_heads,
        Q // 2,
        norms,
        SPAN,
        block_r,
        block_i,
    )
    return grad_qkv_BLW, sums_P2Q.sum(0) if norms else sums_P2Q.new_zeros(2, Q)


@Kernel
@triton.jit(do_not_specialize=["n_rows", "L"])
def _turn_heads_backward(
    grad_q_THQ,
    grad_k_THQ,
    grad_v_THQ,
    qkv_TW,
    weights_2Q,
    cos,
    sin,
    grad_qkv_TW,
    sums_P2Q,
    n_rows,
    L,
    eps,
    H: tl.constexpr,
    H_KV: tl.constexpr,
    HALF: tl.constexpr,
    NORMS: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    dtype = grad_qkv_TW.dtype.element_ty
    i = tl.arange(0, BLOCK_I)[None, :]
    q_first, q_second = tl.zeros([BLOCK_R, BLOCK_I], tl.float32), tl.zeros([BLOCK_R, BLOCK_I], tl.float32)
    k_first, k_second = tl.zeros([BLOCK_R, BLOCK_I], tl.float32), tl.zeros([BLOCK_R, BLOCK_I], tl.float32)
    for n in range(SPAN):
        row = (tl.program_id(0) * SPAN + n) * BLOCK_R + tl.arange(0, BLOCK_R)
        t, h = row // (H + 2 * H_KV), row % (H + 2 * H_KV)
        inside = (row < n_rows)[:, None] & (i < HALF)
        is_q, is_k = inside & (h < H)[:, None], inside & ((h >= H) & (h < H + H_KV))[:, None]
        is_v = inside & (h >= H + H_KV)[:, None]
        at_q = grad_q_THQ + (t.to(tl.int64) * H + h)[:, None] * (2 * HALF) + i
        at_k = grad_k_THQ + (t.to(tl.int64) * H_KV + h - H)[:, None] * (2 * HALF) + i
        at_v = grad_v_THQ + (t.to(tl.int64) * H_KV + h - H - H_KV)[:, None] * (2 * HALF) + i
        turned_first = tl.load(at_q, mask=is_q, other=0.0) + tl.load(at_k, mask=is_k, other=0.0)
        turned_second = tl.load(at_q + HALF, mask=is_q, other=0.0) + tl.load(at_k + HALF, mask=is_k, other=0.0)
        turned_first, turned_second = turned_first.to(tl.float32), turned_second.to(tl.float32)
        angle = (t % L)[:, None] * HALF + i
        c, s = tl.load(cos + angle, mask=inside, other=0.0), tl.load(sin + angle, mask=inside, other=0.0)
        first, second = turned_first * c + turned_second * s, turned_second * c - turned_first * s
        at = row.to(tl.int64)[:, None] * (2 * HALF) + i
        if NORMS:
            x_first = tl.load(qkv_TW + at, mask=is_q | is_k, other=0.0).to(tl.float32)
            x_second = tl.load(qkv_TW + at + HALF, mask=is_q | is_k, other=0.0).to(tl.float32)
            rstd = tl.rsqrt(tl.sum(x_first * x_first + x_second * x_second, 1) / (2 * HALF) + eps)[:, None]
            x_first *= rstd
            x_second *= rstd
            q_first += tl.where(is_q, first * x_first, 0.0)
            q_second += tl.where(is_q, second * x_second, 0.0)
            k_first += tl.where(is_k, first * x_first, 0.0)
            k_second += tl.where(is_k, second * x_second, 0.0)
            weight = weights_2Q + tl.where(h < H, 0, 2 * HALF)[:, None] + i
            first *= tl.load(weight, mask=inside, other=0.0)
            second *= tl.load(weight + HALF, mask=inside, other=0.0)
            dot = (tl.sum(first * x_first + second * x_second, 1) / (2 * HALF))[:, None]
            first, second = rstd * (first - x_first * dot), rstd * (second - x_second * dot)
        first += tl.load(at_v, mask=is_v, other=0.0).to(tl.float32)
        second += tl.load(at_v + HALF, mask=is_v, other=0.0).to(tl.float32)
        tl.store(grad_qkv_TW + at, first.to(dtype), mask=inside)
        tl.store(grad_qkv_TW + at + HALF, second.to(dtype), mask=inside)
    if NORMS:
        d = tl.arange(0, BLOCK_I)
        sums = sums_P2Q + tl.program_id(0) * (4 * HALF) + d
        tl.store(sums, tl.sum(q_first, 0), mask=d < HALF)
        tl.store(sums + HALF, tl.sum(q_second, 0), mask=d < HALF)
        tl.store(sums + 2 * HALF, tl.sum(k_first, 0), mask=d < HALF)
        tl.store(sums + 3 * HALF, tl.sum(k_second, 0), mask=d < HALF)
