"""The K best of a few scores: K rounds of a maximum in registers, where a library sorts or selects by radix."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def takes(n_experts: int, k: int) -> bool:
    """Whether a row fits into registers and K rounds over it are few."""
    return n_experts <= 1024 and k <= 16


def top_k(scores_TE: Tensor, k: int) -> Tensor:
    """int64 [T, K]: where the k largest float32 scores of each row are, best first, of equals the lower index first.
    NaN is larger than all else, as in torch.sort. No gradient.

    4 T E + 8 T K bytes; about 5 K T E operations on 64-bit integers.
    """
    T, E = scores_TE.shape
    ids_TK = scores_TE.new_empty(T, k, dtype=torch.int64)
    block_E = triton.next_power_of_2(E)
    block_T = max(1, 2048 // block_E)
    _top_k[(triton.cdiv(T, block_T),)](scores_TE.contiguous(), ids_TK, T, E, k, block_T, block_E, num_warps=4)
    return ids_TK


def top_k_reference(scores_TE: Tensor, k: int) -> Tensor:
    return scores_TE.sort(dim=-1, stable=True, descending=True).indices[:, :k]


@triton.jit(do_not_specialize=["T"])
def _top_k(scores_TE, ids_TK, T, E: tl.constexpr, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr):
    """Each score becomes an integer of its order, followed by its index from behind, so no two are equal."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    inside = (t < T)[:, None] & (e < E)[None, :]
    scores = tl.load(scores_TE + t[:, None] * E + e[None, :], mask=inside, other=0.0)
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)  # -0 is 0
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(scores != scores, 0x7FFFFFFF, order)
    keys = (order.to(tl.int64) << 32) | (BLOCK_E - 1 - e)[None, :]
    least = -0x8000000000000000
    keys = tl.where((e < E)[None, :], keys, least)
    for k in tl.static_range(K):
        best = tl.max(keys, 1)
        tl.store(ids_TK + t * K + k, BLOCK_E - 1 - (best & 0xFFFFFFFF), mask=t < T)
        keys = tl.where(keys == best[:, None], least, keys)
