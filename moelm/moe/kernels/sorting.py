"""Rows in the order of experts: a stable counting sort of T * K expert ids, with no atomic in global memory (those of
a block's histogram add integers, in any order the same) and no word to the host.

Three launches: count each block's choices by expert; sum the counts of the blocks before; sort each block in
registers, from which every choice knows its row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moelm.moe.kernels.launch import Kernel, cdiv, next_power_of_2

BLOCK = 1024  # choices a program
SUMMED = 256  # blocks whose counts are summed at once


def sort_by_expert(expert_ids_TK: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(row_of_choice [T, K], choice_of_row [R], offsets [E]), all int32, for int64 ids in 0 ... n_experts.

    Choice t * K + k lies in row row_of_choice[t, k]; rows are in the order of experts and then of choices, and those
    of the id n_experts ("none") last. offsets are the ends of the experts' rows.

    24 R bytes (the ids are read twice), 24 bytes a block and expert; log^2(BLOCK) / 2 comparisons a choice.
    """
    ids_TK = expert_ids_TK.contiguous()
    R, n_bins = ids_TK.numel(), next_power_of_2(n_experts + 1)
    n_blocks = max(1, cdiv(R, BLOCK))  # one even without a choice: it writes the offsets
    row_of_choice_TK = torch.empty_like(ids_TK, dtype=torch.int32)
    choice_of_row_R = ids_TK.new_empty(R, dtype=torch.int32)
    offsets_E = ids_TK.new_empty(n_experts, dtype=torch.int32)
    counts_bE = ids_TK.new_empty(n_blocks, n_bins, dtype=torch.int32)
    before_bE = torch.empty_like(counts_bE)
    total_E = ids_TK.new_empty(n_bins, dtype=torch.int32)
    _count[n_blocks, 1, 1](ids_TK, counts_bE, R, n_experts, n_bins, BLOCK)
    block_e = min(16, n_bins)
    _sum_blocks[n_bins // block_e, 1, 1](counts_bE, before_bE, total_E, n_blocks, n_bins, block_e, SUMMED)
    _place[n_blocks, 1, 1](
        ids_TK, counts_bE, before_bE, total_E, row_of_choice_TK, choice_of_row_R, offsets_E, R, n_experts, n_bins, BLOCK
    )
    return row_of_choice_TK, choice_of_row_R, offsets_E


def sort_by_expert_reference(expert_ids_TK: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    ids_R = expert_ids_TK.flatten()
    choice_of_row_R = ids_R.argsort(stable=True)
    row_of_choice_TK = choice_of_row_R.argsort().view_as(expert_ids_TK)
    offsets_E = ids_R.bincount(minlength=n_experts + 1)[:n_experts].cumsum(0)
    return row_of_choice_TK.int(), choice_of_row_R.int(), offsets_E.int()


@Kernel
@triton.jit(do_not_specialize=["R"])
def _count(ids_R, counts_bE, R, n_experts: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr):
    choice = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_R + choice, mask=choice < R, other=n_experts).to(tl.int32)
    tl.store(counts_bE + tl.program_id(0) * BINS + tl.arange(0, BINS), tl.histogram(ids, BINS))


@Kernel
@triton.jit(do_not_specialize=["n_blocks"])
def _sum_blocks(
    counts_bE, before_bE, total_E, n_blocks, BINS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_B: tl.constexpr
):
    """before[b] = sum of counts[:b], total = sum of counts, for BLOCK_E experts."""
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_E], tl.int32)
    first = 0
    while first < n_blocks:  # a `for` over an argument fails in the interpreter with NumPy 2.4
        b = first + tl.arange(0, BLOCK_B)
        at = b[:, None] * BINS + e[None, :]
        inside = (b < n_blocks)[:, None]
        counts = tl.load(counts_bE + at, mask=inside, other=0)
        tl.store(before_bE + at, total[None, :] + tl.cumsum(counts, 0) - counts, mask=inside)
        total += tl.sum(counts, 0)
        first += BLOCK_B
    tl.store(total_E + e, total)


@Kernel
@triton.jit(do_not_specialize=["R"])
def _place(
    ids_R,
    counts_bE,
    before_bE,
    total_E,
    row_of_choice_R,
    choice_of_row_R,
    offsets_E,
    R,
    n_experts: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    e = tl.arange(0, BINS)
    total = tl.load(total_E + e)
    ends = tl.cumsum(total, 0)
    if block == 0:
        tl.store(offsets_E + e, ends, mask=e < n_experts)
    counts = tl.load(counts_bE + block * BINS + e)
    first_row = ends - total + tl.load(before_bE + block * BINS + e)
    first_here = tl.cumsum(counts, 0) - counts
    here = tl.arange(0, BLOCK)
    ids = tl.load(ids_R + block * BLOCK + here, mask=block * BLOCK + here < R, other=n_experts).to(tl.int32)
    keys = tl.sort(ids * BLOCK + here)  # no two are equal, so the order is stable
    row = here + tl.gather(first_row - first_here, keys // BLOCK, 0)
    choice = block * BLOCK + keys % BLOCK
    tl.store(choice_of_row_R + row, choice, mask=choice < R)
    tl.store(row_of_choice_R + choice, row, mask=choice < R)
