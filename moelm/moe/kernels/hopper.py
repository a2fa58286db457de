"""The grouped products on Hopper GPUs: what `products.py` uses there.

One warp of a block fetches tiles by the bulk copy engine and goes on to the block's next tile while two groups of four
warps multiply and store the last one. An H100 reaches 66 to 73 % of its 989 TFLOP/s with D 2048, F 1024, and 54 to 57 %
with half of both (docs/performance.md): more than in torch's grouped product, since results reach memory in whole cache
lines, SwiGLU needs no pass of its own and gradients of weights no cast to float32. Everything is summed in one order:
the same bits every time.

Sizes: rows [R, K] and weights [E, ...] in bfloat16, contiguous, widths a multiple of 8 (16 bytes for the copy engine).
Written in Gluon, the part of Triton in which layouts and barriers are explicit; it has no interpreter.
"""

from __future__ import annotations

from functools import cache, lru_cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from moelm.moe.kernels.launch import Kernel, cdiv
from moelm.moe.kernels.products import ROWS

COLUMNS = 256  # of a tile, in SwiGLU 128 of the gate and as many of up
assert ROWS == 128  # 64 for each group of warps
DEPTH = 64  # summed at a time
STAGES = 4  # tiles in flight: 4 x 48 KiB of the 227 that a block may have
GROUP = 16  # row tiles that go through all columns together, so that both operands stay in L2
OPTIONS = {"num_warps": 4, "maxnreg": 168}  # 65,536 registers for 12 warps; 240 a thread where products are summed

load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # its name from Triton 3.8 on, and before


@gluon.jit
def _tile(index, tiles_ptr, n_row_tiles, n_columns: gl.constexpr, GROUP: gl.constexpr):
    """Expert, first row, end of the expert's rows and column block of a tile; expert -1 for none."""
    first = index // (GROUP * n_columns) * GROUP
    size = gl.minimum(n_row_tiles - first, GROUP)
    index = index % (GROUP * n_columns)
    at = tiles_ptr + 3 * (first + index % size)
    return gl.load(at), gl.load(at + 1), gl.load(at + 2), index // size


@gluon.jit
def _fetch_rows(
    rows_desc,
    weights_desc,
    rows,
    weights,
    full,
    empty,
    tiles_ptr,
    n_row_tiles,
    K: gl.constexpr,
    N: gl.constexpr,
    PER_EXPERT: gl.constexpr,
    SWIGLU: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    BYTES: gl.constexpr,
):
    n_columns: gl.constexpr = (N + BN - 1) // BN
    stage = 0
    phase = 1
    for index in range(gl.program_id(0), n_row_tiles * n_columns, gl.num_programs(0)):
        expert, row, _, column = _tile(index, tiles_ptr, n_row_tiles, n_columns, GROUP)
        if expert >= 0:
            for k in range(0, K, BK):
                mbarrier.wait(empty.index(stage), phase)
                barrier = full.index(stage)
                mbarrier.expect(barrier, BYTES)
                load(rows_desc, [row, k], barrier, rows.index(2 * stage))
                load(rows_desc, [row + 64, k], barrier, rows.index(2 * stage + 1))
                if SWIGLU:
                    load(weights_desc, [expert * PER_EXPERT + k, column * BN], barrier, weights.index(2 * stage))
                    load(
                        weights_desc, [expert * PER_EXPERT + k, N + column * BN], barrier, weights.index(2 * stage + 1)
                    )
                elif TRANSPOSED:
                    load(weights_desc, [expert * PER_EXPERT + column * BN, k], barrier, weights.index(stage))
                else:
                    load(weights_desc, [expert * PER_EXPERT + k, column * BN], barrier, weights.index(stage))
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1


@gluon.jit
def _store(out_ptr, tile, row, stop, column, N: gl.constexpr, STRIDE: gl.constexpr):
    """A [64, W] tile, in whole cache lines: as the tensor cores leave it, a thread has four bytes of a row."""
    W: gl.constexpr = tile.shape[1]
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [256 // W, W // 8], [4, 1], [1, 0])
    tile = gl.convert_layout(tile, lines)
    i = gl.arange(0, 64, gl.SliceLayout(1, lines))[:, None]
    j = gl.arange(0, W, gl.SliceLayout(0, lines))[None, :]
    at = out_ptr + row.to(gl.int64) * STRIDE + column + (i * STRIDE + j)
    gl.store(at, tile, mask=(row + i < stop) & (column + j < N))


@gluon.jit
def _multiply_rows(
    HALF: gl.constexpr,
    rows,
    weights,
    full,
    empty,
    tiles_ptr,
    n_row_tiles,
    out_ptr,
    hidden_ptr,
    K: gl.constexpr,
    N: gl.constexpr,
    SWIGLU: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    n_columns: gl.constexpr = (N + BN - 1) // BN
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    stage = 0
    phase = 0
    for index in range(gl.program_id(0), n_row_tiles * n_columns, gl.num_programs(0)):
        expert, row, stop, column = _tile(index, tiles_ptr, n_row_tiles, n_columns, GROUP)
        if expert >= 0:
            acc = gl.zeros([64, BN], gl.float32, layout)
            acc_up = gl.zeros([64, BN], gl.float32, layout)
            for k in range(0, K, BK):
                mbarrier.wait(full.index(stage), phase)
                a = rows.index(2 * stage + HALF)
                if SWIGLU:
                    acc = warpgroup_mma(a, weights.index(2 * stage), acc, is_async=True)
                    acc_up = warpgroup_mma(a, weights.index(2 * stage + 1), acc_up, is_async=True)
                    acc, acc_up = warpgroup_mma_wait(2, deps=[acc, acc_up])
                elif TRANSPOSED:
                    acc = warpgroup_mma(a, weights.index(stage).permute((1, 0)), acc, is_async=True)
                    acc = warpgroup_mma_wait(1, deps=[acc])
                else:
                    acc = warpgroup_mma(a, weights.index(stage), acc, is_async=True)
                    acc = warpgroup_mma_wait(1, deps=[acc])
                # one product stays in flight, so it is the stage before whose tiles have been read
                mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES), pred=k > 0)
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1
            if SWIGLU:
                acc, acc_up = warpgroup_mma_wait(0, deps=[acc, acc_up])
            else:
                acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES))
            row += 64 * HALF
            if SWIGLU:
                gate16 = acc.to(gl.bfloat16)
                up16 = acc_up.to(gl.bfloat16)
                gate = gate16.to(gl.float32)  # as backward will find it
                hidden = gate / (1 + gl.exp(-gate)) * up16.to(gl.float32)
                _store(out_ptr, gate16, row, stop, column * BN, N, 2 * N)
                _store(out_ptr + N, up16, row, stop, column * BN, N, 2 * N)
                _store(hidden_ptr, hidden.to(gl.bfloat16), row, stop, column * BN, N, N)
            else:  # in two halves: their way through shared memory then leaves room for the stages
                tile = acc.to(gl.bfloat16).reshape(64, 2, BN // 2).permute(0, 2, 1)
                left, right = tile.split()
                _store(out_ptr, left, row, stop, column * BN, N, N)
                _store(out_ptr, right, row, stop, column * BN + BN // 2, N, N)


@Kernel
@gluon.jit(do_not_specialize=["n_row_tiles"])
def _rows_product(
    rows_desc,
    weights_desc,
    out_ptr,
    hidden_ptr,
    tiles_ptr,
    n_row_tiles,
    K: gl.constexpr,
    N: gl.constexpr,
    PER_EXPERT: gl.constexpr,
    SWIGLU: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    BK: gl.constexpr = rows_desc.block_type.shape[1]
    EACH: gl.constexpr = 2 if SWIGLU else 1
    rows = gl.allocate_shared_memory(rows_desc.dtype, [STAGES * 2, 64, BK], rows_desc.layout)
    DOWN: gl.constexpr = weights_desc.block_type.shape[0]
    ACROSS: gl.constexpr = weights_desc.block_type.shape[1]
    weights = gl.allocate_shared_memory(weights_desc.dtype, [STAGES * EACH, DOWN, ACROSS], weights_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    BYTES: gl.constexpr = 2 * rows_desc.block_type.nbytes + EACH * weights_desc.block_type.nbytes
    # fmt: off
    gl.warp_specialize([
        (_multiply_rows, (0, rows, weights, full, empty, tiles_ptr, n_row_tiles, out_ptr, hidden_ptr,
                          K, N, SWIGLU, TRANSPOSED, BN, BK, STAGES, GROUP)),
        (_multiply_rows, (1, rows, weights, full, empty, tiles_ptr, n_row_tiles, out_ptr, hidden_ptr,
                          K, N, SWIGLU, TRANSPOSED, BN, BK, STAGES, GROUP)),
        (_fetch_rows, (rows_desc, weights_desc, rows, weights, full, empty, tiles_ptr, n_row_tiles,
                       K, N, PER_EXPERT, SWIGLU, TRANSPOSED, BN, BK, STAGES, GROUP, BYTES)),
    ], [4, 1], [240, 24])
    # fmt: on


@gluon.jit
def _gradient_tile(index, offsets_ptr, n_m: gl.constexpr, n_n: gl.constexpr):
    """Expert, first and last row of it, and the tile of its matrix."""
    expert = index // (n_m * n_n)
    index = index % (n_m * n_n)
    begin = gl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0)
    return expert, begin, gl.load(offsets_ptr + expert), index % n_m, index // n_m


@gluon.jit
def _fetch_pairs(
    a_desc,
    b_desc,
    a,
    b,
    full,
    empty,
    offsets_ptr,
    E,
    n_m: gl.constexpr,
    n_n: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    BYTES: gl.constexpr,
):
    stage = 0
    phase = 1
    for index in range(gl.program_id(0), E * n_m * n_n, gl.num_programs(0)):
        _, begin, end, m, n = _gradient_tile(index, offsets_ptr, n_m, n_n)
        for row in range(begin, end, BK):
            mbarrier.wait(empty.index(stage), phase)
            barrier = full.index(stage)
            mbarrier.expect(barrier, BYTES)
            load(a_desc, [row, m * 128], barrier, a.index(2 * stage))
            load(a_desc, [row, m * 128 + 64], barrier, a.index(2 * stage + 1))
            load(b_desc, [row, n * BN], barrier, b.index(stage))
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1


@gluon.jit
def _multiply_pairs(
    HALF: gl.constexpr,
    a,
    b,
    full,
    empty,
    offsets_ptr,
    out_ptr,
    E,
    M: gl.constexpr,
    N: gl.constexpr,
    n_m: gl.constexpr,
    n_n: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
):
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    stage = 0
    phase = 0
    for index in range(gl.program_id(0), E * n_m * n_n, gl.num_programs(0)):
        expert, begin, end, m, n = _gradient_tile(index, offsets_ptr, n_m, n_n)
        acc = gl.zeros([64, BN], gl.float32, layout)
        for row in range(begin, end, BK):
            mbarrier.wait(full.index(stage), phase)
            a_tile = a.index(2 * stage + HALF)
            if row + BK > end:  # what follows are rows of the next expert
                r = row + gl.arange(0, BK, gl.SliceLayout(1, lines))[:, None]
                a_tile.store(gl.where(r < end, a_tile.load(lines), 0.0))
                fence_async_shared()
            acc = warpgroup_mma(a_tile.permute((1, 0)), b.index(stage), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES), pred=row > begin)
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES), pred=end > begin)
        i = m * 128 + 64 * HALF + gl.arange(0, 64, gl.SliceLayout(1, layout))[:, None]
        j = n * BN + gl.arange(0, BN, gl.SliceLayout(0, layout))[None, :]
        gl.store(out_ptr + expert.to(gl.int64) * (M * N) + i * N + j, acc, mask=(i < M) & (j < N))


@Kernel
@gluon.jit
def _weight_gradient(
    a_desc,
    b_desc,
    out_ptr,
    offsets_ptr,
    E,
    M: gl.constexpr,
    N: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
):
    BK: gl.constexpr = a_desc.block_type.shape[0]
    n_m: gl.constexpr = (M + 127) // 128
    n_n: gl.constexpr = (N + BN - 1) // BN
    a = gl.allocate_shared_memory(a_desc.dtype, [STAGES * 2, BK, 64], a_desc.layout)
    b = gl.allocate_shared_memory(b_desc.dtype, [STAGES, BK, BN], b_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    BYTES: gl.constexpr = 2 * a_desc.block_type.nbytes + b_desc.block_type.nbytes
    # fmt: off
    gl.warp_specialize([
        (_multiply_pairs, (0, a, b, full, empty, offsets_ptr, out_ptr, E, M, N, n_m, n_n, BN, BK, STAGES)),
        (_multiply_pairs, (1, a, b, full, empty, offsets_ptr, out_ptr, E, M, N, n_m, n_n, BN, BK, STAGES)),
        (_fetch_pairs, (a_desc, b_desc, a, b, full, empty, offsets_ptr, E, n_m, n_n, BN, BK, STAGES, BYTES)),
    ], [4, 1], [240, 24])
    # fmt: on


def rows_product(
    rows_RK: Tensor, w: Tensor, tiles: Tensor, n: int, *, swiglu: bool = False, transposed: bool = False
) -> tuple[Tensor, Tensor]:
    """`products.product` and `products.up_product` (then n = F and the second is h, else it is the first again)."""
    R, K = rows_RK.shape
    out = rows_RK.new_empty(R, 2 * n if swiglu else n)
    hidden = rows_RK.new_empty(R, n) if swiglu else out
    columns = COLUMNS // 2 if swiglu else COLUMNS
    _rows_product[_blocks(tiles.shape[0] * cdiv(n, columns), rows_RK.device)](
        _blocks_of(rows_RK, ROWS // 2, DEPTH),
        _blocks_of(w, *((columns, DEPTH) if transposed else (DEPTH, columns))),
        out,
        hidden,
        tiles,
        tiles.shape[0],
        K,
        n,
        w.shape[1],
        swiglu,
        transposed,
        columns,
        STAGES,
        GROUP,
        **OPTIONS,
    )
    return out, hidden


def weight_gradient(a_RM: Tensor, b_RN: Tensor, offsets_E: Tensor) -> Tensor:
    """`products.weight_gradient`."""
    E, M, N = offsets_E.numel(), a_RM.shape[1], b_RN.shape[1]
    out_EMN = a_RM.new_empty(E, M, N, dtype=torch.float32)
    n_tiles = E * cdiv(M, ROWS) * cdiv(N, COLUMNS)
    a, b = _blocks_of(a_RM, DEPTH, ROWS // 2), _blocks_of(b_RN, DEPTH, COLUMNS)
    _weight_gradient[_blocks(n_tiles, a_RM.device)](a, b, out_EMN, offsets_E, E, M, N, COLUMNS, STAGES, **OPTIONS)
    return out_EMN


def _blocks_of(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A matrix, or a stack of them below each other, in blocks for the copy engine."""
    blocks = object.__new__(TensorDescriptor)
    blocks.__dict__.update(_blocks_of_shape(matrix.shape, rows, columns).__dict__, base=matrix.contiguous())
    return blocks


@lru_cache(1024)
def _blocks_of_shape(shape: torch.Size, rows: int, columns: int) -> TensorDescriptor:
    """The same without memory: what its constructor checks takes longer than a launch."""
    matrix = torch.empty(shape, dtype=torch.bfloat16, device="meta").flatten(0, -2)
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16)
    return TensorDescriptor.from_tensor(matrix, [rows, columns], layout)


@cache
def _n_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _blocks(n_tiles: int, device: torch.device) -> tuple[int, int, int]:
    return min(n_tiles, _n_processors(device)), 1, 1
