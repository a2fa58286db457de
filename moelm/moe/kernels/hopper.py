"""The grouped products on Hopper GPUs, which find the rows of tokens themselves, or take sorted copies of them.

The warps of a block have parts: some fetch tiles into shared memory (the bulk copy engine where rows lie side by side,
16 bytes a thread where they are gathered by token), two groups of four multiply, and where SwiGLU or its gradient
follows two or four more compute it while the tensor cores go on. Each block goes on to its next tile while the last one
is being stored; results reach memory in whole cache lines. docs/performance.md has what they reach. Everything is
summed in one order: the same bits every time.

Tokens [T, D], rows [R, ...] and weights [E, ...] in bfloat16, widths a multiple of 8 (16 bytes for the copy engine);
`choice_of_row_R` and `tiles` as `sorting.py` and `products.py` make them. `spread_RD`, where given, are the tokens as
`rows.spread` sorts them: the copy engine then brings those too. Rows past the last expert's, which must be finite in a
gradient of weights, change nothing.
Written in Gluon, the part of Triton in which layouts and barriers are explicit; it has no interpreter.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, lru_cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from moelm.moe import kernels
from moelm.moe.kernels.launch import Kernel, cdiv
from moelm.moe.kernels.products import ROWS, Tiles

COLUMNS = 256  # of a tile, in SwiGLU 128 of the gate and as many of up
assert ROWS == 128  # 64 for each group of warps
DEPTH = 64  # summed at a time
STAGES = 4  # tiles in flight: 4 x 48 KiB of the 227 that a block may have
GROUP = 16  # row tiles that go through all columns together, so that both operands stay in L2

load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # its name from Triton 3.8 on, and before


# ----------------------------------------------------------------------------- rows times an expert's matrix


@gluon.jit
def _tile(index, tiles_ptr, n_row_tiles, n_columns: gl.constexpr, GROUP: gl.constexpr):
    """Expert, first row, end of the expert's rows and column block of a tile; expert -1 for none."""
    first = index // (GROUP * n_columns) * GROUP
    size = gl.minimum(n_row_tiles - first, GROUP)
    index = index % (GROUP * n_columns)
    at = tiles_ptr + 3 * (first + index % size)
    return gl.load(at), gl.load(at + 1), gl.load(at + 2), index // size


@gluon.jit
def _fetch_weights(
    weights_desc,
    weights,
    barrier,
    stage,
    row,
    k,
    column,
    N: gl.constexpr,
    BN: gl.constexpr,
    SWIGLU: gl.constexpr,
    TRANSPOSED: gl.constexpr,
):
    """The tile of the matrix that begins at `row` of the stack of all."""
    if SWIGLU:
        load(weights_desc, [row + k, column * BN], barrier, weights.index(2 * stage))
        load(weights_desc, [row + k, N + column * BN], barrier, weights.index(2 * stage + 1))
    elif TRANSPOSED:
        load(weights_desc, [row + column * BN, k], barrier, weights.index(stage))
    else:
        load(weights_desc, [row + k, column * BN], barrier, weights.index(stage))


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
    TRANSPOSED: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    """One warp: rows that lie side by side."""
    BYTES: gl.constexpr = 2 * rows_desc.block_type.nbytes + weights_desc.block_type.nbytes
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
                _fetch_weights(
                    weights_desc, weights, barrier, stage, expert * PER_EXPERT, k, column, N, BN, False, TRANSPOSED
                )
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
def _store_halves(out_ptr, tile, row, stop, column, N: gl.constexpr, STRIDE: gl.constexpr):
    """Half of the columns after the other: their way through shared memory then leaves room for the stages."""
    left, right = _split(tile)
    _store(out_ptr, left, row, stop, column, N, STRIDE)
    _store(out_ptr, right, row, stop, column + left.shape[1], N, STRIDE)


@gluon.jit
def _split(tile):
    return tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1).split()


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
    K: gl.constexpr,
    N: gl.constexpr,
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
            for k in range(0, K, BK):
                mbarrier.wait(full.index(stage), phase)
                a = rows.index(2 * stage + HALF)
                b = weights.index(stage)
                acc = warpgroup_mma(a, b.permute((1, 0)) if TRANSPOSED else b, acc, is_async=True)
                acc = warpgroup_mma_wait(1, deps=[acc])
                # one product stays in flight, so it is the stage before whose tiles have been read
                mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES), pred=k > 0)
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES))
            _store_halves(out_ptr, acc.to(gl.bfloat16), row + 64 * HALF, stop, column * BN, N, N)


@Kernel
@gluon.jit(do_not_specialize=["n_row_tiles"])
def _rows_product(
    rows_desc,
    weights_desc,
    out_ptr,
    tiles_ptr,
    n_row_tiles,
    K: gl.constexpr,
    N: gl.constexpr,
    PER_EXPERT: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    BK: gl.constexpr = rows_desc.block_type.shape[1]
    rows = gl.allocate_shared_memory(rows_desc.dtype, [STAGES * 2, 64, BK], rows_desc.layout)
    DOWN: gl.constexpr = weights_desc.block_type.shape[0]
    ACROSS: gl.constexpr = weights_desc.block_type.shape[1]
    weights = gl.allocate_shared_memory(weights_desc.dtype, [STAGES, DOWN, ACROSS], weights_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    # fmt: off
    gl.warp_specialize([
        (_multiply_rows, (0, rows, weights, full, empty, tiles_ptr, n_row_tiles, out_ptr,
                          K, N, TRANSPOSED, BN, BK, STAGES, GROUP)),
        (_multiply_rows, (1, rows, weights, full, empty, tiles_ptr, n_row_tiles, out_ptr,
                          K, N, TRANSPOSED, BN, BK, STAGES, GROUP)),
        (_fetch_rows, (rows_desc, weights_desc, rows, weights, full, empty, tiles_ptr, n_row_tiles,
                       K, N, PER_EXPERT, TRANSPOSED, BN, BK, STAGES, GROUP)),
    ], [4, 1], [240, 24])
    # fmt: on


def product(
    rows_RK: Tensor, w: Tensor, tiles: Tiles, *, transposed: bool = False, out_RN: Tensor | None = None
) -> Tensor:
    """[R, N] rows_r W^e, or with `transposed` rows_r W^eT, for the rows of `tiles`. 2 R K N operations; R K + E K N +
    R N elements moved."""
    (R, K), n = rows_RK.shape, w.shape[1 if transposed else 2]
    out_RN = rows_RK.new_empty(R, n) if out_RN is None else out_RN
    _rows_product[_blocks(tiles.tiles_N3.shape[0] * cdiv(n, COLUMNS), rows_RK.device)](
        _blocks_of(rows_RK, ROWS // 2, DEPTH),
        _blocks_of(w, *((COLUMNS, DEPTH) if transposed else (DEPTH, COLUMNS))),
        out_RN,
        tiles.tiles_N3,
        tiles.tiles_N3.shape[0],
        K,
        n,
        w.shape[1],
        transposed,
        COLUMNS,
        STAGES,
        GROUP,
        num_warps=4,
        maxnreg=168,  # 65,536 registers for 12 warps; 240 a thread where products are summed
    )
    return out_RN


# ------------------------------------------- products of tokens; what comes out is taken over by warps of their own


@gluon.jit
def _gather_rows(
    x_ptr,
    choice_ptr,
    spread_desc,
    weights_desc,
    rows,
    weights,
    full,
    empty,
    tiles_ptr,
    n_row_tiles,
    TOP_K: gl.constexpr,
    K: gl.constexpr,
    N: gl.constexpr,
    PER_EXPERT: gl.constexpr,
    SWIGLU: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    WARPS: gl.constexpr,
):
    """Rows that are found by token, or spread. Where an expert's rows end before the tile does, any others serve.
    Without SwiGLU the matrix is transposed."""
    OF_WEIGHTS: gl.constexpr = (2 if SWIGLU else 1) * weights_desc.block_type.nbytes
    BYTES: gl.constexpr = OF_WEIGHTS if spread_desc is None else OF_WEIGHTS + 2 * spread_desc.block_type.nbytes
    n_columns: gl.constexpr = (N + BN - 1) // BN
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    r = gl.arange(0, 64, gl.SliceLayout(1, lines))
    c = gl.arange(0, BK, gl.SliceLayout(0, lines))[None, :]
    stage = 0
    phase = 1
    for index in range(gl.program_id(0), n_row_tiles * n_columns, gl.num_programs(0)):
        expert, row, stop, column = _tile(index, tiles_ptr, n_row_tiles, n_columns, GROUP)
        if expert >= 0:
            if spread_desc is None:
                upper = gl.load(choice_ptr + row + r, mask=row + r < stop, other=0) // TOP_K
                lower = gl.load(choice_ptr + row + 64 + r, mask=row + 64 + r < stop, other=0) // TOP_K
                upper_ptrs = x_ptr + upper.to(gl.int64)[:, None] * K + c
                lower_ptrs = x_ptr + lower.to(gl.int64)[:, None] * K + c
            for k in range(0, K, BK):
                mbarrier.wait(empty.index(stage), phase)
                barrier = full.index(stage)
                mbarrier.expect(barrier, BYTES)
                if spread_desc is not None:
                    load(spread_desc, [row, k], barrier, rows.index(2 * stage))
                    load(spread_desc, [row + 64, k], barrier, rows.index(2 * stage + 1))
                elif K % BK == 0:
                    async_copy.async_copy_global_to_shared(rows.index(2 * stage), upper_ptrs + k)
                    async_copy.async_copy_global_to_shared(rows.index(2 * stage + 1), lower_ptrs + k)
                else:
                    async_copy.async_copy_global_to_shared(rows.index(2 * stage), upper_ptrs + k, mask=k + c < K)
                    async_copy.async_copy_global_to_shared(rows.index(2 * stage + 1), lower_ptrs + k, mask=k + c < K)
                if spread_desc is None:
                    async_copy.mbarrier_arrive(barrier, increment_count=False)  # once these copies have arrived
                _fetch_weights(
                    weights_desc, weights, barrier, stage, expert * PER_EXPERT, k, column, N, BN, SWIGLU, not SWIGLU
                )
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1


@gluon.jit
def _multiply_tokens(
    HALF: gl.constexpr,
    rows,
    weights,
    results,
    full,
    empty,
    ready,
    taken,
    tiles_ptr,
    n_row_tiles,
    K: gl.constexpr,
    N: gl.constexpr,
    SWIGLU: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    """A half's results are handed over in pieces: 8 of 32 columns, with SwiGLU 2 of 64 of the gate and 2 of up."""
    n_columns: gl.constexpr = (N + BN - 1) // BN
    W: gl.constexpr = 2 * BN if SWIGLU else BN
    # 256 columns read the rows from shared memory half as often, but take more registers than four groups of warps have
    AT_ONCE: gl.constexpr = 256 if SWIGLU else 128
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, AT_ONCE, 16]
    )
    stage = 0
    phase = 0
    handed = 1
    for index in range(gl.program_id(0), n_row_tiles * n_columns, gl.num_programs(0)):
        expert, _, _, _ = _tile(index, tiles_ptr, n_row_tiles, n_columns, GROUP)
        if expert >= 0:
            acc = gl.zeros([64, W], gl.float32, layout)
            for k in range(0, K, BK):
                mbarrier.wait(full.index(stage), phase)
                fence_async_shared()  # what threads have copied, for the tensor cores
                a = rows.index(2 * stage + HALF)
                b = weights.index(stage)
                acc = warpgroup_mma(a, b if SWIGLU else b.permute((1, 0)), acc, is_async=True)
                acc = warpgroup_mma_wait(1, deps=[acc])
                mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES), pred=k > 0)
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES))
            mbarrier.wait(taken.index(HALF), handed)
            left, right = _split(acc.to(gl.bfloat16))
            if SWIGLU:
                _hand_over(results, 4 * HALF, left)
                _hand_over(results, 4 * HALF + 2, right)
            else:
                a, b = _split(left)
                c, d = _split(right)
                _hand_over(results, 8 * HALF, a)
                _hand_over(results, 8 * HALF + 2, b)
                _hand_over(results, 8 * HALF + 4, c)
                _hand_over(results, 8 * HALF + 6, d)
            mbarrier.arrive(ready.index(HALF))
            handed ^= 1


@gluon.jit
def _hand_over(results, first: gl.constexpr, tile):
    left, right = _split(tile)
    results.index(first).store(left)
    results.index(first + 1).store(right)


@gluon.jit
def _sigmoid(x):
    """Four instructions, good to 2^-22; `1 / (1 + gl.exp(-x))` takes twelve, to be right where float32 underflows."""
    return gl.inline_asm_elementwise(
        "{ .reg .f32 e; mul.f32 e, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 e, e; add.f32 e, e, 0f3F800000; "
        "rcp.approx.ftz.f32 $0, e; }",
        "=f,f",
        [x],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _swiglu(
    results,
    ready,
    taken,
    tiles_ptr,
    gate_up_ptr,
    hidden_ptr,
    n_row_tiles,
    N: gl.constexpr,
    BN: gl.constexpr,
    GROUP: gl.constexpr,
):
    """Two warps: h of gate and up, 64 columns at a time."""
    n_columns: gl.constexpr = (N + BN - 1) // BN
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [2, 1], [1, 0])
    i = gl.arange(0, 64, gl.SliceLayout(1, lines))[:, None]
    j = gl.arange(0, 64, gl.SliceLayout(0, lines))[None, :]
    phase = 0
    for index in range(gl.program_id(0), n_row_tiles * n_columns, gl.num_programs(0)):
        expert, row, stop, column = _tile(index, tiles_ptr, n_row_tiles, n_columns, GROUP)
        if expert >= 0:
            for half in range(2):
                first = row + 64 * half
                gate_out = gate_up_ptr + first.to(gl.int64) * (2 * N) + column * BN
                up_out = gate_out + N
                hidden_out = hidden_ptr + first.to(gl.int64) * N + column * BN
                mbarrier.wait(ready.index(half), phase)
                for q in range(BN // 64):
                    c = 64 * q + j
                    inside = (first + i < stop) & (column * BN + c < N)
                    gate16 = results.index(4 * half + q).load(lines)
                    up16 = results.index(4 * half + 2 + q).load(lines)
                    gate = gate16.to(gl.float32)  # as backward will find it
                    hidden = gate * _sigmoid(gate) * up16.to(gl.float32)
                    gl.store(gate_out + i * (2 * N) + c, gate16, mask=inside)
                    gl.store(up_out + i * (2 * N) + c, up16, mask=inside)
                    gl.store(hidden_out + i * N + c, hidden.to(gl.bfloat16), mask=inside)
                mbarrier.arrive(taken.index(half))
            phase ^= 1


@Kernel
@gluon.jit(do_not_specialize=["n_row_tiles"])
def _up_product(
    x_ptr,
    choice_ptr,
    spread_desc,
    weights_desc,
    gate_up_ptr,
    hidden_ptr,
    tiles_ptr,
    n_row_tiles,
    TOP_K: gl.constexpr,
    K: gl.constexpr,
    N: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    ROWS_LAYOUT: gl.constexpr,
    WEIGHTS_LAYOUT: gl.constexpr,
):
    rows = gl.allocate_shared_memory(weights_desc.dtype, [STAGES * 2, 64, BK], ROWS_LAYOUT)
    weights = gl.allocate_shared_memory(weights_desc.dtype, [STAGES, BK, 2 * BN], WEIGHTS_LAYOUT)
    halves = weights._reinterpret(weights_desc.dtype, [STAGES * 2, BK, BN], weights_desc.layout)  # of the gate, of up
    results = gl.allocate_shared_memory(weights_desc.dtype, [8, 64, 64], ROWS_LAYOUT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        # the copy engine, and each thread that gathers
        mbarrier.init(full.index(i), count=65 if spread_desc is None else 1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(taken.index(i), count=1)
    # fmt: off
    gl.warp_specialize([
        (_multiply_tokens, (0, rows, weights, results, full, empty, ready, taken, tiles_ptr, n_row_tiles,
                            K, N, True, BN, BK, STAGES, GROUP)),
        (_multiply_tokens, (1, rows, weights, results, full, empty, ready, taken, tiles_ptr, n_row_tiles,
                            K, N, True, BN, BK, STAGES, GROUP)),
        (_swiglu, (results, ready, taken, tiles_ptr, gate_up_ptr, hidden_ptr, n_row_tiles, N, BN, GROUP)),
        (_gather_rows, (x_ptr, choice_ptr, spread_desc, weights_desc, rows, halves, full, empty, tiles_ptr,
                        n_row_tiles, TOP_K, K, N, K, True, BN, BK, STAGES, GROUP, 2)),
    ], [4, 2, 2], [168, 160, 160])
    # fmt: on


def up_product(
    x_TD: Tensor,
    choice_of_row_R: Tensor,
    top_k: int,
    gate_up_EDF: Tensor,
    tiles: Iterable[Tiles],
    spread_RD: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(gate_up [R, 2F], h [R, F]): gate_up_r = x_t W^e, and h = silu(gate) up of them once they are rounded. One launch
    for each of the `tiles`, which together have all rows.

    4 R D F operations; T D + 2 E D F elements read, most rows R D from L2, 3 R F written.
    """
    R, D, n = choice_of_row_R.shape[0], x_TD.shape[1], gate_up_EDF.shape[2] // 2
    gate_up_R2F, h_RF = x_TD.new_empty(R, 2 * n), x_TD.new_empty(R, n)
    columns = COLUMNS // 2
    for tiles_N3, _ in tiles:
        _up_product[_blocks(tiles_N3.shape[0] * cdiv(n, columns), x_TD.device)](
            x_TD.contiguous(),
            choice_of_row_R,
            None if spread_RD is None else _blocks_of(spread_RD, ROWS // 2, DEPTH),
            _blocks_of(gate_up_EDF, DEPTH, columns),
            gate_up_R2F,
            h_RF,
            tiles_N3,
            tiles_N3.shape[0],
            top_k,
            D,
            n,
            columns,
            DEPTH,
            STAGES - 1,  # what is handed over needs the room of one
            GROUP // 2,
            _layout(ROWS // 2, DEPTH),
            _layout(DEPTH, COLUMNS),
            num_warps=4,
            maxnreg=168,
        )
    return gate_up_R2F, h_RF


@gluon.jit
def _fetch_gate_up(gate_up_desc, pieces, loaded, row, turn, column, N: gl.constexpr, BN: gl.constexpr):
    """The gate and up that a turn of a tile needs, two turns ahead: loads into registers would be waited for sooner."""
    TURNS: gl.constexpr = BN // 32
    stage = turn % 2
    at = column * BN + turn % TURNS * 32
    mbarrier.expect(loaded.index(stage), 2 * gate_up_desc.block_type.nbytes)
    load(gate_up_desc, [row + turn // TURNS * 64, at], loaded.index(stage), pieces.index(2 * stage))
    load(gate_up_desc, [row + turn // TURNS * 64, N + at], loaded.index(stage), pieces.index(2 * stage + 1))


@gluon.jit
def _swiglu_backward(
    results,
    pieces,
    ready,
    taken,
    loaded,
    tiles_ptr,
    offsets_ptr,
    gates_ptr,
    choice_ptr,
    gate_up_desc,
    grad_gate_up_ptr,
    gated_h_ptr,
    grad_gates_ptr,
    n_row_tiles,
    n_rows,
    E,
    N: gl.constexpr,
    BN: gl.constexpr,
    GROUP: gl.constexpr,
):
    """Four warps, as `rows.swiglu_backward`, on the gradient of h as it comes out: a turn for 32 columns of a half."""
    n_columns: gl.constexpr = (N + BN - 1) // BN
    TURNS: gl.constexpr = BN // 32
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    dots: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [4, 1], [1, 0])
    r = gl.arange(0, 64, gl.SliceLayout(1, lines))
    i = r[:, None]
    j = gl.arange(0, 32, gl.SliceLayout(0, lines))[None, :]
    n_used = gl.load(offsets_ptr + E - 1)
    phase = 0
    for index in range(gl.program_id(0), n_row_tiles * n_columns, gl.num_programs(0)):
        expert, row, stop, column = _tile(index, tiles_ptr, n_row_tiles, n_columns, GROUP)
        if expert >= 0:
            _fetch_gate_up(gate_up_desc, pieces, loaded, row, 0, column, N, BN)
            _fetch_gate_up(gate_up_desc, pieces, loaded, row, 1, column, N, BN)
            end = gl.where(stop == n_used, n_rows, stop)  # 0 in rows of nobody, which the sums over rows may reach
            for half in range(2):
                first = row + 64 * half
                used = first + r < stop
                choice = gl.load(choice_ptr + first + r, mask=used, other=0)
                scale = gl.load(gates_ptr + choice, mask=used, other=0.0)[:, None]
                dot = gl.zeros([64, 4], gl.float32, dots)
                at_2N = first.to(gl.int64) * (2 * N) + column * BN
                at_N = first.to(gl.int64) * N + column * BN
                mbarrier.wait(ready.index(half), phase)
                for q in range(TURNS):
                    c = 32 * q + j
                    inside = (first + i < stop) & (column * BN + c < N)
                    mbarrier.wait(loaded.index(q % 2), q // 2 % 2)
                    g = gl.where(inside, pieces.index(q % 2 * 2).load(lines).to(gl.float32), 0.0)
                    u = gl.where(inside, pieces.index(q % 2 * 2 + 1).load(lines).to(gl.float32), 0.0)
                    grad = gl.where(inside, results.index(TURNS * half + q).load(lines).to(gl.float32), 0.0)
                    if TURNS * half + q + 2 < 2 * TURNS:
                        _fetch_gate_up(gate_up_desc, pieces, loaded, row, TURNS * half + q + 2, column, N, BN)
                    s = _sigmoid(g)
                    silu = g * s
                    h = (silu * u).to(gl.bfloat16).to(gl.float32)
                    dot += gl.convert_layout(gl.sum(gl.reshape(grad * h, [64, 4, 8]), 2), dots)
                    written = (first + i < end) & (column * BN + c < N)
                    gl.store(gated_h_ptr + at_N + i * N + c, (scale * h).to(gl.bfloat16), mask=written)
                    grad = grad * scale
                    grad_gate = grad * u * (s + silu * (1 - s))
                    gl.store(grad_gate_up_ptr + at_2N + i * (2 * N) + c, grad_gate.to(gl.bfloat16), mask=written)
                    at_up = grad_gate_up_ptr + at_2N + N
                    gl.store(at_up + i * (2 * N) + c, (grad * silu).to(gl.bfloat16), mask=written)
                mbarrier.arrive(taken.index(half))
                dot_64 = gl.convert_layout(gl.sum(dot, 1), gl.SliceLayout(1, lines))
                gl.store(grad_gates_ptr + choice * n_columns + column, dot_64, mask=used)
            phase ^= 1


@Kernel
@gluon.jit(do_not_specialize=["n_row_tiles", "n_rows", "E"])
def _down_backward(
    grad_y_ptr,
    choice_ptr,
    spread_desc,
    weights_desc,
    tiles_ptr,
    offsets_ptr,
    gates_ptr,
    gate_up_desc,
    grad_gate_up_ptr,
    gated_h_ptr,
    grad_gates_ptr,
    n_row_tiles,
    n_rows,
    E,
    TOP_K: gl.constexpr,
    K: gl.constexpr,
    N: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    ROWS_LAYOUT: gl.constexpr,
):
    rows = gl.allocate_shared_memory(weights_desc.dtype, [STAGES * 2, 64, BK], ROWS_LAYOUT)
    weights = gl.allocate_shared_memory(weights_desc.dtype, [STAGES, BN, BK], weights_desc.layout)
    results = gl.allocate_shared_memory(weights_desc.dtype, [16, 64, 32], gate_up_desc.layout)
    pieces = gl.allocate_shared_memory(weights_desc.dtype, [4, 64, 32], gate_up_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    loaded = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=129 if spread_desc is None else 1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(taken.index(i), count=1)
        mbarrier.init(loaded.index(i), count=1)
    # fmt: off
    gl.warp_specialize([
        (_multiply_tokens, (0, rows, weights, results, full, empty, ready, taken, tiles_ptr, n_row_tiles,
                            K, N, False, BN, BK, STAGES, GROUP)),
        (_multiply_tokens, (1, rows, weights, results, full, empty, ready, taken, tiles_ptr, n_row_tiles,
                            K, N, False, BN, BK, STAGES, GROUP)),
        (_swiglu_backward, (results, pieces, ready, taken, loaded, tiles_ptr, offsets_ptr, gates_ptr, choice_ptr,
                            gate_up_desc, grad_gate_up_ptr, gated_h_ptr, grad_gates_ptr, n_row_tiles, n_rows, E,
                            N, BN, GROUP)),
        (_gather_rows, (grad_y_ptr, choice_ptr, spread_desc, weights_desc, rows, weights, full, empty, tiles_ptr,
                        n_row_tiles, TOP_K, K, N, N, False, BN, BK, STAGES, GROUP, 4)),
    ], [4, 4, 4], [160, 144, 48])
    # fmt: on


def down_backward(
    grad_y_TD: Tensor,
    gates_TK: Tensor,
    choice_of_row_R: Tensor,
    offsets_E: Tensor,
    down_EFD: Tensor,
    gate_up_R2F: Tensor,
    tiles: Iterable[Tiles],
    spread_RD: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`rows.swiglu_backward` of grad_h_r = grad_y_t W^eT, which is never stored: (grad_gate_up [R, 2F], gated_h [R, F],
    grad_gates [T, K] float32). One launch for each of the `tiles`, which together have all rows.

    2 R D F operations; T D + E F D + 2 R F elements read, most rows R D from L2, 3 R F written.
    """
    D, R, n = grad_y_TD.shape[1], choice_of_row_R.shape[0], down_EFD.shape[1]
    grad_gate_up_R2F, gated_h_RF = torch.empty_like(gate_up_R2F), gate_up_R2F.new_empty(R, n)
    n_columns = cdiv(n, COLUMNS)
    grad_gates_TKc = torch.zeros(*gates_TK.shape, n_columns, device=gates_TK.device)  # those of no row stay 0
    for tiles_N3, _ in tiles:
        _down_backward[_blocks(tiles_N3.shape[0] * n_columns, grad_y_TD.device)](
            grad_y_TD.contiguous(),
            choice_of_row_R,
            None if spread_RD is None else _blocks_of(spread_RD, ROWS // 2, DEPTH),
            _blocks_of(down_EFD, COLUMNS, DEPTH),
            tiles_N3,
            offsets_E,
            gates_TK.contiguous(),
            _blocks_of(gate_up_R2F, ROWS // 2, COLUMNS // 8),
            grad_gate_up_R2F,
            gated_h_RF,
            grad_gates_TKc,
            tiles_N3.shape[0],
            R,
            offsets_E.shape[0],
            gates_TK.shape[1],
            D,
            n,
            COLUMNS,
            DEPTH,
            STAGES - 1,
            GROUP,
            _layout(ROWS // 2, DEPTH),
            num_warps=4,
            maxnreg=128,
        )
    return grad_gate_up_R2F, gated_h_RF, grad_gates_TKc.squeeze(-1) if n_columns == 1 else grad_gates_TKc.sum(-1)


# ------------------------------------------------------------------------------------ gradients of weights


@gluon.jit
def _gradient_tile(index, offsets_ptr, experts_ptr, n_m: gl.constexpr, n_n: gl.constexpr):
    """Expert, first and last row of it, and the tile of its matrix. The longest sums come first."""
    expert = gl.load(experts_ptr + index // (n_m * n_n))
    index = index % (n_m * n_n)
    begin = gl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0)
    return expert, begin, gl.load(offsets_ptr + expert), index % n_m, index // n_m


@gluon.jit
def _gather_tokens(
    tokens_ptr,
    token,
    inside,
    m,
    n,
    a,
    b,
    stage,
    GATHER_A: gl.constexpr,
    STRIDE: gl.constexpr,
    BN: gl.constexpr,
    lines: gl.constexpr,
):
    """A step's part of some tokens, 0 where they are not `inside`."""
    WIDTH: gl.constexpr = 64 if GATHER_A else BN
    column = (m * 128 if GATHER_A else n * BN) + gl.arange(0, WIDTH, gl.SliceLayout(0, lines))[None, :]
    ptrs = tokens_ptr + token.to(gl.int64)[:, None] * STRIDE + column
    inside = inside[:, None]
    if GATHER_A:
        async_copy.async_copy_global_to_shared(a.index(2 * stage), ptrs, mask=inside & (column < STRIDE))
        inside &= column + 64 < STRIDE
        async_copy.async_copy_global_to_shared(a.index(2 * stage + 1), ptrs + 64, mask=inside)
    else:
        async_copy.async_copy_global_to_shared(b.index(stage), ptrs, mask=inside & (column < STRIDE))


@gluon.jit
def _fetch_and_gather_pairs(
    tokens_ptr,
    choice_ptr,
    spread_desc,
    rows_desc,
    a,
    b,
    full,
    empty,
    offsets_ptr,
    experts_ptr,
    E,
    TOP_K: gl.constexpr,
    GATHER_A: gl.constexpr,
    M: gl.constexpr,
    N: gl.constexpr,
    n_m: gl.constexpr,
    n_n: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Four warps. What they gather is 0 past an expert's rows; what the copy engine brings there is of others. So of
    tokens that are spread it brings all but the last rows of an expert."""
    WIDTH: gl.constexpr = 64 if GATHER_A else BN
    STRIDE: gl.constexpr = M if GATHER_A else N
    BYTES: gl.constexpr = (1 if GATHER_A else 2) * rows_desc.block_type.nbytes
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    r = gl.arange(0, BK, gl.SliceLayout(1, lines))
    stage = 0
    phase = 1
    for index in range(gl.program_id(0), E * n_m * n_n, gl.num_programs(0)):
        _, begin, end, m, n = _gradient_tile(index, offsets_ptr, experts_ptr, n_m, n_n)
        token = begin + r
        if spread_desc is None:
            token = gl.load(choice_ptr + begin + r, mask=begin + r < end, other=0) // TOP_K
        for row in range(begin, end, BK):
            after = token + BK
            if spread_desc is None:  # those of the next step, so that it need not wait for memory twice
                after = gl.load(choice_ptr + row + BK + r, mask=row + BK + r < end, other=0) // TOP_K
            mbarrier.wait(empty.index(stage), phase)
            barrier = full.index(stage)
            inside = row + r < end
            if spread_desc is None or row + BK > end:
                _gather_tokens(tokens_ptr, token, inside, m, n, a, b, stage, GATHER_A, STRIDE, BN, lines)
                mbarrier.expect(barrier, BYTES)
            else:
                mbarrier.expect(barrier, BYTES + (2 if GATHER_A else 1) * spread_desc.block_type.nbytes)
                if GATHER_A:
                    load(spread_desc, [row, m * 128], barrier, a.index(2 * stage))
                    load(spread_desc, [row, m * 128 + 64], barrier, a.index(2 * stage + 1))
                else:
                    load(spread_desc, [row, n * BN], barrier, b.index(stage))
            async_copy.mbarrier_arrive(barrier, increment_count=False)
            if GATHER_A:
                load(rows_desc, [row, n * BN], barrier, b.index(stage))
            else:
                load(rows_desc, [row, m * 128], barrier, a.index(2 * stage))
                load(rows_desc, [row, m * 128 + 64], barrier, a.index(2 * stage + 1))
            token = after
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
    experts_ptr,
    out_ptr,
    has_begun_ptr,
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
    stage = 0
    phase = 0
    for index in range(gl.program_id(0), E * n_m * n_n, gl.num_programs(0)):
        expert, begin, end, m, n = _gradient_tile(index, offsets_ptr, experts_ptr, n_m, n_n)
        acc = gl.zeros([64, BN], gl.float32, layout)
        for row in range(begin, end, BK):
            mbarrier.wait(full.index(stage), phase)
            fence_async_shared()
            acc = warpgroup_mma(a.index(2 * stage + HALF).permute((1, 0)), b.index(stage), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES), pred=row > begin)
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES), pred=end > begin)
        out = out_ptr + expert.to(gl.int64) * (M * N)
        row = m * 128 + 64 * HALF
        if out_ptr.dtype.element_ty == gl.float32:  # a quarter of a cache line a thread is enough
            i = row + gl.arange(0, 64, gl.SliceLayout(1, layout))[:, None]
            j = n * BN + gl.arange(0, BN, gl.SliceLayout(0, layout))[None, :]
            inside = (i < M) & (j < N)
            if has_begun_ptr is not None:
                acc += gl.load(out + i * N + j, mask=inside & (gl.load(has_begun_ptr) != 0), other=0.0)
            gl.store(out + i * N + j, acc, mask=inside)
        else:
            _store_halves(out, acc.to(gl.bfloat16), row, M, n * BN, N, N)


@Kernel
@gluon.jit(do_not_specialize=["E"])
def _weight_gradient(
    tokens_ptr,
    choice_ptr,
    spread_desc,
    rows_desc,
    out_ptr,
    has_begun_ptr,
    offsets_ptr,
    experts_ptr,
    E,
    TOP_K: gl.constexpr,
    GATHER_A: gl.constexpr,
    M: gl.constexpr,
    N: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    A_LAYOUT: gl.constexpr,
    B_LAYOUT: gl.constexpr,
):
    n_m: gl.constexpr = (M + 127) // 128
    n_n: gl.constexpr = (N + BN - 1) // BN
    a = gl.allocate_shared_memory(rows_desc.dtype, [STAGES * 2, BK, 64], A_LAYOUT)
    b = gl.allocate_shared_memory(rows_desc.dtype, [STAGES, BK, BN], B_LAYOUT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=129)
        mbarrier.init(empty.index(i), count=2)
    # fmt: off
    gl.warp_specialize([
        (_multiply_pairs, (0, a, b, full, empty, offsets_ptr, experts_ptr, out_ptr,
                           has_begun_ptr, E, M, N, n_m, n_n, BN, BK, STAGES)),
        (_multiply_pairs, (1, a, b, full, empty, offsets_ptr, experts_ptr, out_ptr,
                           has_begun_ptr, E, M, N, n_m, n_n, BN, BK, STAGES)),
        (_fetch_and_gather_pairs, (tokens_ptr, choice_ptr, spread_desc, rows_desc, a, b, full, empty, offsets_ptr,
                                   experts_ptr, E, TOP_K, GATHER_A, M, N, n_m, n_n, BN, BK, STAGES)),
    ], [4, 4], [208, 88])
    # fmt: on


def weight_gradient(
    tokens_TM: Tensor,
    rows_RN: Tensor,
    choice_of_row_R: Tensor,
    top_k: int,
    offsets_E: Tensor,
    tiles: Tiles,
    dtype: torch.dtype,
    to: tuple[Tensor, Tensor] | None = None,
    spread_RM: Tensor | None = None,
    *,
    rows_first: bool = False,
) -> Tensor:
    """[E, M, N] in `dtype`, float32 or bfloat16: the sum of token_r^T row_r over the rows of each expert; with
    `rows_first` [E, N, M], row_r^T token_r. Added to the first of `to`, float32, if the second, bool scalar, says that
    a sum has begun there, else in its place. Rows right behind the last offset must be finite.

    2 R M N operations; R N + T M elements read, most of R M from L2, E M N written, and for a sum read.
    """
    E, M, N = offsets_E.shape[0], tokens_TM.shape[1], rows_RN.shape[1]
    if rows_first:
        M, N = N, M
    out_EMN = tokens_TM.new_empty(E, M, N, dtype=dtype) if to is None else to[0]
    _weight_gradient[_blocks(E * cdiv(M, ROWS) * cdiv(N, COLUMNS), tokens_TM.device)](
        tokens_TM.contiguous() if spread_RM is None else spread_RM,
        choice_of_row_R,
        None if spread_RM is None else _blocks_of(spread_RM, DEPTH, COLUMNS if rows_first else ROWS // 2),
        _blocks_of(rows_RN, DEPTH, ROWS // 2 if rows_first else COLUMNS),
        out_EMN,
        None if to is None else to[1],
        offsets_E,
        tiles.experts_E,
        E,
        top_k,
        not rows_first,
        M,
        N,
        COLUMNS,
        DEPTH,
        STAGES,
        _layout(DEPTH, ROWS // 2),
        _layout(DEPTH, COLUMNS),
        num_warps=4,
        maxnreg=168,
    )
    return out_EMN


# ------------------------------------------------------------------------------------------------ launches


def _blocks_of(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A matrix, or a stack of them below each other, in blocks for the copy engine."""
    blocks = object.__new__(TensorDescriptor)
    blocks.__dict__.update(_blocks_of_shape(matrix.shape, rows, columns).__dict__, base=matrix.contiguous())
    return blocks


@lru_cache(1024)
def _blocks_of_shape(shape: torch.Size, rows: int, columns: int) -> TensorDescriptor:
    """The same without memory: what its constructor checks takes longer than a launch."""
    matrix = torch.empty(shape, dtype=torch.bfloat16, device="meta").flatten(0, -2)
    return TensorDescriptor.from_tensor(matrix, [rows, columns], _layout(rows, columns))


@cache
def _layout(rows: int, columns: int) -> gl.NVMMASharedLayout:
    """Of a tile in shared memory, as the copy engine and the tensor cores want it."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16)


@cache
def _n_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _blocks(n_tiles: int, device: torch.device) -> tuple[int, int, int]:
    return min(n_tiles, kernels.rounds * _n_processors(device)), 1, 1
