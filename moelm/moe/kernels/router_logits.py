"""The router's product, x W^T in float32 accuracy from bf16 tokens, at the speed of bf16 products.

bf16 tokens are exact. Eight bits at a time, a float32 is the sum of three bf16 parts without any error, so three bf16
products accumulated in float32 are the float32 product. Tensor cores cut off what does not fit into float32, always
towards zero, so their sums are kept short (`BLOCK_D` or `BLOCK_T` terms) and added by ordinary, rounding additions.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_D = 64  # terms of a short sum over D
BLOCK_T = 64  # terms of a short sum over T
CHUNK_T = 1024  # tokens, at least, whose share of the weight's gradient one program sums
MAX_CHUNKS = 32


def takes(d_model: int) -> bool:
    """Whether the kernels have a tile for this width."""
    return d_model % 128 == 0


@torch.library.custom_op("moelm::router_logits", mutates_args=())
def router_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """float32 [T, E] = x W^T for bf16 x (or float32 that holds bf16 values) and float32 W.

    2 T D + 4 T E bytes, and 6 E D for each block of tokens from the cache; 6 T D E operations. Backward keeps x and W
    only.
    """
    T, D = x_TD.shape
    E = weight_ED.shape[0]
    x_TD, parts_3ED, block_E = x_TD.contiguous(), _split_weight(x_TD, weight_ED), _block_of_experts(E)
    logits_TE = x_TD.new_empty(T, E, dtype=torch.float32)
    _logits[(parts_3ED.shape[1] // block_E, triton.cdiv(T, 128))](
        x_TD, parts_3ED, logits_TE, T, E, D, 128, block_E, BLOCK_D, num_warps=8, num_stages=3
    )
    return logits_TE


@router_logits.register_fake
def _(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    return x_TD.new_empty(x_TD.shape[0], weight_ED.shape[0], dtype=torch.float32)


@torch.library.custom_op("moelm::router_logits_backward", mutates_args=())
def router_logits_backward(grad_TE: Tensor, x_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    """(grad_x in x's dtype = grad W, grad_W float32 = grad^T x) from a float32 gradient.

    grad_x takes two parts of either factor and leaves low x low out, which is 2^-17 of it, a 256th of its rounding to
    bf16. grad_W takes three parts, as forward, and its chunks of tokens are added in order.
    4 T D + 4 T E (1 + D / 128) bytes, most of the gradient's from the cache; 12 T D E operations.
    """
    T, D = x_TD.shape
    E = weight_ED.shape[0]
    grad_TE, x_TD, parts_3ED = grad_TE.contiguous(), x_TD.contiguous(), _split_weight(x_TD, weight_ED)
    n_padded, block_E = parts_3ED.shape[1], _block_of_experts(E)
    grad_x_TD = x_TD.new_empty(T, D)
    _grad_x[(triton.cdiv(T, 128),)](
        grad_TE, parts_3ED, grad_x_TD, T, E, n_padded, D, 128, block_E, 64, num_warps=8, num_stages=2
    )
    chunk_T = max(CHUNK_T, triton.next_power_of_2(triton.cdiv(T, MAX_CHUNKS)))
    sums_cED = weight_ED.new_empty(triton.cdiv(T, chunk_T), E, D)
    warps = 8 if block_E == 128 else 4
    _grad_weight[(D // 128, n_padded // block_E, len(sums_cED))](
        grad_TE, x_TD, sums_cED, T, E, D, chunk_T, BLOCK_T, block_E, 128, num_warps=warps, num_stages=3
    )
    return grad_x_TD, sums_cED.sum(0)


@router_logits_backward.register_fake
def _(grad_TE: Tensor, x_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    return x_TD.new_empty(x_TD.shape), weight_ED.new_empty(weight_ED.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor, Tensor]:
    grads: tuple[Tensor, Tensor] = router_logits_backward(grad_TE, *ctx.saved_tensors)
    return grads


router_logits.register_autograd(_backward, setup_context=_save_for_backward)


def _block_of_experts(n_experts: int) -> int:
    return min(128, max(16, 1 << (n_experts - 1).bit_length()))


def _split_weight(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """[3, E', D] in x's dtype: high, middle and low parts; rows of zeros fill the last block of experts."""
    E, D = weight_ED.shape
    n_padded = triton.cdiv(E, _block_of_experts(E)) * _block_of_experts(E)
    parts_3ED = x_TD.new_empty(3, n_padded, D)
    n_all = n_padded * D
    _write_parts[(triton.cdiv(n_all, 512),)](weight_ED.contiguous(), parts_3ED, E * D, n_all, 512)
    return parts_3ED


@triton.jit
def _split(value):
    """high + middle + low = value, each with the eight significant bits of bf16."""
    high = value.to(tl.bfloat16)
    rest = value - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    return high, middle, low


@triton.jit
def _write_parts(weight, parts, n, n_all: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    high, middle, low = _split(tl.load(weight + at, mask=at < n, other=0.0))
    dtype = parts.dtype.element_ty
    inside = at < n_all
    tl.store(parts + at, high.to(dtype), mask=inside)
    tl.store(parts + n_all + at, middle.to(dtype), mask=inside)
    tl.store(parts + 2 * n_all + at, low.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["T"])
def _logits(
    x_TD,
    parts_3ED,
    logits_TE,
    T,
    E: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One block of tokens by one block of experts; E' = the number of programs along experts x BLOCK_E."""
    t = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    d = tl.arange(0, BLOCK_D)
    n_part = tl.num_programs(0) * BLOCK_E * D
    x_at = x_TD + t[:, None] * D + d[None, :]
    high_at = parts_3ED + e[None, :] * D + d[:, None]
    there = (t < T)[:, None]
    logits = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for first in range(0, D, BLOCK_D):
        x = tl.load(x_at + first, mask=there, other=0.0)
        short = tl.dot(x, tl.load(high_at + 2 * n_part + first))
        short = tl.dot(x, tl.load(high_at + n_part + first), short)
        short = tl.dot(x, tl.load(high_at + first), short)
        logits += short
    tl.store(logits_TE + t[:, None] * E + e[None, :], logits, mask=there & (e < E)[None, :])


@triton.jit
def _grad_parts(grad_TE, t, e, T, E: tl.constexpr, dtype: tl.constexpr):
    at = grad_TE + t[:, None] * E + e[None, :]
    high, middle, _ = _split(tl.load(at, mask=(t < T)[:, None] & (e < E)[None, :], other=0.0))
    return high.to(dtype), middle.to(dtype)


@triton.jit(do_not_specialize=["T"])
def _grad_x(
    grad_TE,
    parts_3ED,
    grad_x_TD,
    T,
    E: tl.constexpr,
    PADDED_E: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One block of tokens by all of D."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    block_e = tl.arange(0, BLOCK_E)
    dtype: tl.constexpr = grad_x_TD.dtype.element_ty
    if PADDED_E == BLOCK_E:
        grad_high, grad_middle = _grad_parts(grad_TE, t, block_e, T, E, dtype)
    for first_d in range(0, D, BLOCK_D):
        d = first_d + tl.arange(0, BLOCK_D)
        grad_x = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        for first_e in range(0, PADDED_E, BLOCK_E):
            e = first_e + block_e
            if PADDED_E > BLOCK_E:
                grad_high, grad_middle = _grad_parts(grad_TE, t, e, T, E, dtype)
            high_at = parts_3ED + e[:, None] * D + d[None, :]
            high = tl.load(high_at)
            grad_x = tl.dot(grad_middle, high, grad_x)
            grad_x = tl.dot(grad_high, tl.load(high_at + PADDED_E * D), grad_x)
            grad_x = tl.dot(grad_high, high, grad_x)
        tl.store(grad_x_TD + t[:, None] * D + d[None, :], grad_x.to(dtype), mask=(t < T)[:, None])


@triton.jit(do_not_specialize=["T"])
def _grad_weight(
    grad_TE,
    x_TD,
    sums_cED,
    T,
    E: tl.constexpr,
    D: tl.constexpr,
    CHUNK_T: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One block of experts by one block of D, summed over one chunk of tokens."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    chunk = tl.program_id(2)
    known = (e < E)[None, :]
    total = tl.zeros([BLOCK_E, BLOCK_D], tl.float32)
    for first in range(0, CHUNK_T, BLOCK_T):
        t = chunk.to(tl.int64) * CHUNK_T + first + tl.arange(0, BLOCK_T)
        there = (t < T)[:, None]
        grad = tl.load(grad_TE + t[:, None] * E + e[None, :], mask=there & known, other=0.0)
        x = tl.load(x_TD + t[:, None] * D + d[None, :], mask=there, other=0.0)
        high, middle, low = _split(grad)
        short = tl.dot(tl.trans(low).to(x.dtype), x)
        short = tl.dot(tl.trans(middle).to(x.dtype), x, short)
        short = tl.dot(tl.trans(high).to(x.dtype), x, short)
        total += short
    at = (chunk * E + e[:, None]) * D + d[None, :]
    tl.store(sums_cED + at, total, mask=(e < E)[:, None])
