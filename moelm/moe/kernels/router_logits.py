"""The router's product: x W^T in float32 accuracy from bf16 tokens, by three bf16 products.

bf16 tokens are exact. Eight bits at a time, a float32 is the sum of three bf16 parts without any error, so three bf16
products accumulated in float32 are the float32 product. Tensor cores cut off what does not fit into float32, always
towards zero, so their sums are kept short (`BLOCK_D` or `BLOCK_T` terms) and added by ordinary, rounding additions.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from moelm.moe.kernels.launch import Kernel, cdiv, next_power_of_2

BLOCK_D = 64  # terms of a short sum over D
BLOCK_T = 64  # terms of a short sum over T
CHUNK_T = 1024  # tokens, at least, whose share of the weight's gradient one program sums
MAX_CHUNKS = 32
WIDTH_MULTIPLE = 128  # of D: the widest block of it
LITTLE, ENOUGH = 96 * 1024, 200 * 1024  # bytes of a block's shared memory: for 64 experts at a time, for 128


def takes(x_TD: Tensor) -> bool:
    """Whether the width divides into the kernels' blocks, and the device has bf16 products and memory for them."""
    return x_TD.shape[1] % WIDTH_MULTIPLE == 0 and _shared_memory(x_TD.device) >= LITTLE


def router_logits(x_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    """(float32 [T, E] = x W^T, the parts of W) for bf16 x (or float32 that holds bf16 values) and float32 W.

    The parts, high, middle and low, are [3, E', D] in x's dtype, with E' >= E rows.

    2 T D + 4 T E bytes, and 6 E D for each block of tokens from the cache; 6 T D E operations.
    """
    T, D = x_TD.shape
    E = weight_ED.shape[0]
    block_E, stages = _block_of_experts(x_TD, E), _stages(x_TD)
    x_TD, parts_3ED = x_TD.contiguous(), _split_weight(x_TD, weight_ED)
    logits_TE = x_TD.new_empty(T, E, dtype=torch.float32)
    _logits[parts_3ED.shape[1] // block_E, cdiv(T, 128), 1](
        x_TD, parts_3ED, logits_TE, T, E, D, 128, block_E, BLOCK_D, num_warps=8, num_stages=stages
    )
    return logits_TE, parts_3ED


def router_logits_reference(x_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    high_ED = weight_ED.bfloat16().float()
    middle_ED = (weight_ED - high_ED).bfloat16().float()
    parts_3ED = torch.stack([high_ED, middle_ED, weight_ED - high_ED - middle_ED])
    return torch.nn.functional.linear(x_TD.float(), weight_ED), parts_3ED.to(x_TD.dtype)


def router_logits_backward(grad_TE: Tensor, x_TD: Tensor, parts_3ED: Tensor) -> tuple[Tensor, Tensor]:
    """(grad_x in x's dtype = grad W, grad_W float32 = grad^T x) from a float32 gradient and the parts of W.

    grad_x takes two parts of either factor and leaves the product of the lower ones out: an error of 2^-17, a 256th of
    its rounding to bf16. grad_W takes three parts, as forward; its chunks of tokens are added in order.
    4 T D + 8 T E bytes, and 4 T E for each 128 of D and 4 E D for each block of tokens from the cache; 12 T D E
    operations.
    """
    (T, D), E = x_TD.shape, grad_TE.shape[1]
    block_E, stages = _block_of_experts(x_TD, E), _stages(x_TD)
    grad_TE, x_TD = grad_TE.contiguous(), x_TD.contiguous()
    n_padded = parts_3ED.shape[1]
    grad_x_TD = x_TD.new_empty(T, D)
    _grad_x[cdiv(T, 128), 1, 1](
        grad_TE, parts_3ED, grad_x_TD, T, E, n_padded, D, 128, block_E, 64, num_warps=8, num_stages=2
    )
    chunk_T = max(CHUNK_T, next_power_of_2(cdiv(T, MAX_CHUNKS)))
    sums_cED = grad_TE.new_empty(cdiv(T, chunk_T), E, D)
    warps = 8 if block_E == 128 else 4
    _grad_weight[D // 128, n_padded // block_E, sums_cED.shape[0]](
        grad_TE, x_TD, sums_cED, T, E, D, chunk_T, BLOCK_T, block_E, 128, num_warps=warps, num_stages=stages
    )
    return grad_x_TD, sums_cED.sum(0)


def router_logits_backward_reference(grad_TE: Tensor, x_TD: Tensor, parts_3ED: Tensor) -> tuple[Tensor, Tensor]:
    weight_ED = parts_3ED[:, : grad_TE.shape[1]].float().sum(0)
    return (grad_TE @ weight_ED).to(x_TD.dtype), grad_TE.T @ x_TD.float()


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes a block may have; 0 where there are no bf16 products. An interpreter has no limit."""
    if device.type != "cuda":
        return ENOUGH
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 0)) if properties.major >= 8 else 0


def empty_parts(x_TD: Tensor, n_experts: int) -> Tensor:
    block_E = _block_of_experts(x_TD, n_experts)
    return x_TD.new_empty(3, cdiv(n_experts, block_E) * block_E, x_TD.shape[1])


def _block_of_experts(x_TD: Tensor, n_experts: int) -> int:
    largest = 128 if _shared_memory(x_TD.device) >= ENOUGH else 64
    return min(largest, max(16, 1 << (n_experts - 1).bit_length()))


def _stages(x_TD: Tensor) -> int:
    return 3 if _shared_memory(x_TD.device) >= ENOUGH else 2


def _split_weight(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """[3, E', D] in x's dtype: high, middle and low parts; rows of zeros fill the last block of experts."""
    parts_3ED = empty_parts(x_TD, weight_ED.shape[0])
    n_all = parts_3ED.numel() // 3
    _write_parts[cdiv(n_all, 512), 1, 1](weight_ED.contiguous(), parts_3ED, weight_ED.numel(), n_all, 512)
    return parts_3ED


@triton.jit
def _split(value):
    """high + middle + low = value, each with the eight significant bits of bf16."""
    high = value.to(tl.bfloat16)
    rest = value - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    return high, middle, low


@Kernel
@triton.jit
def _write_parts(weight, parts, n, n_all: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    high, middle, low = _split(tl.load(weight + at, mask=at < n, other=0.0))
    dtype = parts.dtype.element_ty
    inside = at < n_all
    tl.store(parts + at, high.to(dtype), mask=inside)
    tl.store(parts + n_all + at, middle.to(dtype), mask=inside)
    tl.store(parts + 2 * n_all + at, low.to(dtype), mask=inside)


@Kernel
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


@Kernel
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


@Kernel
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
