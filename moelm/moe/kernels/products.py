"""Grouped products with the rows' movement and the activation inside: what lies around them costs no pass over memory.

A tile of rows belongs to one expert. Rows are found through the permutation while they are loaded, so the tokens are
never copied into sorted order; SwiGLU and its derivative are computed on the accumulators before they are stored.
Sums run in one order: the same bits every time. Rows past offsets_E[-1] belong to no expert: they are neither read nor
written. Rows and weights are bfloat16; float32 works in the interpreter alone, where no tile has to fit a GPU.

Rows that are sorted already (those of another device, say) are the case K = 1 with choice_of_row_R = 0 ... R - 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moelm.moe.kernels import INTERPRETED

# The fastest on an H100 over the shapes of OLMoE, Qwen3-30B and Mixtral
UP_PRODUCT = {"BM": 128, "BN": 128, "BK": 64, "GROUP": 8, "num_warps": 8, "num_stages": 4}
DOWN_BACKWARD = {"BM": 128, "BN": 256, "BK": 64, "GROUP": 16, "PARTS": 4, "num_warps": 8, "num_stages": 4}
WEIGHT_GRADIENT = {"BM": 128, "BN": 128, "BK": 64, "GROUP": 8, "num_warps": 4, "num_stages": 3}
if INTERPRETED:  # small tiles, of which small tests have several
    UP_PRODUCT |= {"BM": 16, "BN": 16, "BK": 32}
    DOWN_BACKWARD |= {"BM": 16, "BN": 16, "BK": 32}
    WEIGHT_GRADIENT |= {"BM": 32, "BN": 32, "BK": 16}
WIDEN = tl.constexpr(INTERPRETED)


def row_tiles(offsets_E: Tensor, n_rows: int, block: int) -> Tensor:
    """int32 [tiles, 3]: (expert, first row, end of the expert's rows) of each tile of at most `block` rows; -1 for an
    expert says that the tile has none. As many as `n_rows` rows can need, so that the host need not know the load."""
    E = offsets_E.numel()
    n_tiles = min(n_rows, n_rows // block + E)
    tiles = offsets_E.new_empty(n_tiles, 3)
    if n_tiles:
        _row_tiles[(n_tiles,)](offsets_E, tiles, E, triton.next_power_of_2(E), block)
    return tiles


def up_product(
    x_TD: Tensor, gate_up_EDF: Tensor, choice_of_row_R: Tensor, top_k: int, offsets_E: Tensor
) -> tuple[Tensor, Tensor]:
    """(gate_up [R, 2F], h [R, F]): gate_up_r = x_t W^e with t = choice_of_row[r] // K, and h = silu(gate) up of them
    once they are rounded.

    4 R D F operations; reads R D (again for each block of columns, from L2), writes 3 R F elements.
    """
    R, (D, F2) = choice_of_row_R.numel(), gate_up_EDF.shape[1:]
    gate_up_R2F, h_RF = x_TD.new_empty(R, F2), x_TD.new_empty(R, F2 // 2)
    tiles = row_tiles(offsets_E, R, UP_PRODUCT["BM"])
    if len(tiles):
        grid = (len(tiles) * triton.cdiv(F2 // 2, UP_PRODUCT["BN"]),)
        weights = TensorDescriptor.from_tensor(gate_up_EDF.contiguous(), [1, UP_PRODUCT["BK"], UP_PRODUCT["BN"]])
        _up_product[grid](
            x_TD.contiguous(),
            weights,
            gate_up_R2F,
            h_RF,
            choice_of_row_R,
            tiles,
            len(tiles),
            top_k,
            D,
            F2 // 2,
            **UP_PRODUCT,
        )
    return gate_up_R2F, h_RF


def down_backward(
    grad_y_TD: Tensor,
    down_EFD: Tensor,
    gate_up_R2F: Tensor,
    gates_TK: Tensor,
    choice_of_row_R: Tensor,
    offsets_E: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_gate_up [R, 2F], gated_h [R, F], grad_gates float32 [T, K]) of y_t = sum_k gate_tk h_r W^e, r = row(t, k).

    With grad_h_r = grad_y_t W^eT and s = sigmoid(gate): grad_gates = <grad_h, h>, 0 for "none"; gated_h = gate_tk h,
    which the gradient of W needs; grad_gate_up = gate_tk grad_h (up s (1 + gate (1 - s)), gate s).

    2 R D F operations; reads R D (again for each block of columns, from L2) and 2 R F, writes 3 R F elements.
    """
    R, (F, D) = choice_of_row_R.numel(), down_EFD.shape[1:]
    grad_gate_up_R2F, gated_h_RF = torch.empty_like(gate_up_R2F), gate_up_R2F.new_empty(R, F)
    n_columns = triton.cdiv(F, DOWN_BACKWARD["BN"])
    parts_nTK = torch.zeros(n_columns, *gates_TK.shape, dtype=torch.float32, device=gates_TK.device)
    tiles = row_tiles(offsets_E, R, DOWN_BACKWARD["BM"])
    if len(tiles):
        weights = TensorDescriptor.from_tensor(down_EFD.contiguous(), [1, DOWN_BACKWARD["BN"], DOWN_BACKWARD["BK"]])
        _down_backward[(len(tiles) * n_columns,)](
            grad_y_TD.contiguous(),
            weights,
            gate_up_R2F,
            grad_gate_up_R2F,
            gated_h_RF,
            parts_nTK,
            gates_TK.contiguous(),
            choice_of_row_R,
            tiles,
            len(tiles),
            R,
            gates_TK.shape[1],
            D,
            F,
            **DOWN_BACKWARD,
        )
    return grad_gate_up_R2F, gated_h_RF, parts_nTK.sum(0) if n_columns > 1 else parts_nTK[0]


def weight_gradient(
    a_RM: Tensor,
    b_RN: Tensor,
    choice_of_row_R: Tensor,
    top_k: int,
    offsets_E: Tensor,
    dtype: torch.dtype,
    *,
    gather_a: bool = False,
    gather_b: bool = False,
) -> Tensor:
    """[E, M, N]: the sum over the rows r of expert e of a_r^T b_r, float32 until it is written in `dtype`; 0 for an
    idle expert. What is gathered is [T, .], and its row r is that of the token choice_of_row[r] // K.

    2 R M N operations; reads R (M + N) elements (again for each block, from L2), writes E M N.
    """
    M, N, E = a_RM.shape[1], b_RN.shape[1], offsets_E.numel()
    grad_EMN = a_RM.new_empty(E, M, N, dtype=dtype)
    n_tiles = triton.cdiv(M, WEIGHT_GRADIENT["BM"]) * triton.cdiv(N, WEIGHT_GRADIENT["BN"])
    _weight_gradient[(E * n_tiles,)](
        a_RM.contiguous(),
        b_RN.contiguous(),
        grad_EMN,
        choice_of_row_R,
        offsets_E,
        top_k,
        M,
        N,
        gather_a,
        gather_b,
        **WEIGHT_GRADIENT,
    )
    return grad_EMN


@triton.jit
def _dot(a, b, total):
    if WIDEN:  # the interpreter would multiply the bits of bfloat16 as integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total)


@triton.jit
def _row_tiles(offsets_ptr, tiles_ptr, n_experts, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    tile = tl.program_id(0)
    e = tl.arange(0, EXPERTS)
    end = tl.load(offsets_ptr + e, mask=e < n_experts, other=0)
    start = tl.load(offsets_ptr + e - 1, mask=(e > 0) & (e < n_experts), other=0)
    n = tl.where(e < n_experts, tl.cdiv(end - start, BLOCK), 0)
    last = tl.cumsum(n, 0)
    expert = tl.sum((last <= tile).to(tl.int32))
    mine = e == expert
    row = tl.sum(tl.where(mine, start + (tile - last + n) * BLOCK, 0))
    stop = tl.sum(tl.where(mine, end, 0))
    tl.store(tiles_ptr + 3 * tile, tl.where(expert < n_experts, expert, -1))
    tl.store(tiles_ptr + 3 * tile + 1, row)
    tl.store(tiles_ptr + 3 * tile + 2, stop)


@triton.jit
def _tile(pid, tiles_ptr, n_row_tiles, n_column_tiles, GROUP: tl.constexpr):
    """Tiles in groups of GROUP row tiles times all column tiles, so that what is read again is still in L2."""
    per_group = GROUP * n_column_tiles
    first = pid // per_group * GROUP
    size = tl.minimum(n_row_tiles - first, GROUP)
    m = first + pid % per_group % size
    n = pid % per_group // size
    expert = tl.load(tiles_ptr + 3 * m)
    row = tl.load(tiles_ptr + 3 * m + 1)
    stop = tl.load(tiles_ptr + 3 * m + 2)
    return expert, row, stop, n


@triton.jit(do_not_specialize=["n_row_tiles"])
def _up_product(
    x_ptr,
    w_desc,
    gate_up_ptr,
    h_ptr,
    choice_ptr,
    tiles_ptr,
    n_row_tiles,
    TOP_K: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    expert, row, stop, n = _tile(tl.program_id(0), tiles_ptr, n_row_tiles, tl.cdiv(F, BN), GROUP)
    if expert < 0:
        return
    rows = row + tl.arange(0, BM)
    token = tl.load(choice_ptr + rows, mask=rows < stop, other=0) // TOP_K
    k = tl.arange(0, BK)
    x_ptrs = x_ptr + token.to(tl.int64)[:, None] * D + k[None, :]
    gate = tl.zeros((BM, BN), tl.float32)
    up = tl.zeros((BM, BN), tl.float32)
    for d in tl.range(0, D, BK):
        if D % BK == 0:
            x = tl.load(x_ptrs + d)
        else:
            x = tl.load(x_ptrs + d, mask=(d + k < D)[None, :], other=0.0)
        w_gate = w_desc.load([expert, d, n * BN]).reshape(BK, BN)
        w_up = w_desc.load([expert, d, F + n * BN]).reshape(BK, BN)
        gate = _dot(x, w_gate, gate)
        up = _dot(x, w_up, up)
    i = tl.arange(0, BM)[:, None]
    j = tl.arange(0, BN)[None, :]
    mask = (row + i < stop) & (n * BN + j < F)
    base = row.to(tl.int64) * (2 * F) + n * BN
    gate = gate.to(gate_up_ptr.dtype.element_ty)
    up = up.to(gate_up_ptr.dtype.element_ty)
    tl.store(gate_up_ptr + base + i * (2 * F) + j, gate, mask=mask)
    tl.store(gate_up_ptr + base + F + i * (2 * F) + j, up, mask=mask)
    g = gate.to(tl.float32)
    h = g * tl.sigmoid(g) * up.to(tl.float32)
    tl.store(h_ptr + row.to(tl.int64) * F + n * BN + i * F + j, h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _halves(tile, BM: tl.constexpr, BN: tl.constexpr):
    """The left and the right half of a tile's columns: an epilogue on one half at a time needs half the registers."""
    return tile.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()


@triton.jit
def _swiglu_backward_tile(
    grad_h,
    row,
    stop,
    column,
    scale,
    gate_up_ptr,
    grad_gate_up_ptr,
    gated_h_ptr,
    F: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Returns sum over the columns of grad_h * h."""
    i = tl.arange(0, BM)[:, None]
    j = tl.arange(0, BN)[None, :]
    mask = (row + i < stop) & (column + j < F)
    base = row.to(tl.int64) * (2 * F) + column
    wide = i * (2 * F) + j
    g = tl.load(gate_up_ptr + base + wide, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(gate_up_ptr + base + F + wide, mask=mask, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    silu = g * s
    h = (silu * u).to(gated_h_ptr.dtype.element_ty).to(tl.float32)
    grad_gate = tl.sum(grad_h * h, 1)
    tl.store(
        gated_h_ptr + row.to(tl.int64) * F + column + i * F + j,
        (scale[:, None] * h).to(gated_h_ptr.dtype.element_ty),
        mask=mask,
    )
    grad_h = grad_h * scale[:, None]
    grad_g = grad_h * u * (s + silu * (1 - s))
    tl.store(grad_gate_up_ptr + base + wide, grad_g.to(grad_gate_up_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_gate_up_ptr + base + F + wide, (grad_h * silu).to(grad_gate_up_ptr.dtype.element_ty), mask=mask)
    return grad_gate


@triton.jit(do_not_specialize=["n_row_tiles", "n_choices"])
def _down_backward(
    dy_ptr,
    w_desc,
    gate_up_ptr,
    grad_gate_up_ptr,
    gated_h_ptr,
    grad_gate_ptr,
    gates_ptr,
    choice_ptr,
    tiles_ptr,
    n_row_tiles,
    n_choices,
    TOP_K: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
):
    expert, row, stop, n = _tile(tl.program_id(0), tiles_ptr, n_row_tiles, tl.cdiv(F, BN), GROUP)
    if expert < 0:
        return
    rows = row + tl.arange(0, BM)
    choice = tl.load(choice_ptr + rows, mask=rows < stop, other=0)
    k = tl.arange(0, BK)
    dy_ptrs = dy_ptr + (choice // TOP_K).to(tl.int64)[:, None] * D + k[None, :]
    grad_h = tl.zeros((BM, BN), tl.float32)
    for d in tl.range(0, D, BK):
        if D % BK == 0:
            dy = tl.load(dy_ptrs + d)
        else:
            dy = tl.load(dy_ptrs + d, mask=(d + k < D)[None, :], other=0.0)
        w = w_desc.load([expert, n * BN, d]).reshape(BN, BK)
        grad_h = _dot(dy, w.T, grad_h)
    choice = tl.load(choice_ptr + rows, mask=rows < stop, other=0)
    scale = tl.load(gates_ptr + choice, mask=rows < stop, other=0.0)
    if PARTS == 1:
        grad_gate = _swiglu_backward_tile(
            grad_h, row, stop, n * BN, scale, gate_up_ptr, grad_gate_up_ptr, gated_h_ptr, F, BM, BN
        )
    elif PARTS == 2:
        left, right = _halves(grad_h, BM, BN)
        grad_gate = _swiglu_backward_tile(
            left, row, stop, n * BN, scale, gate_up_ptr, grad_gate_up_ptr, gated_h_ptr, F, BM, BN // 2
        )
        grad_gate += _swiglu_backward_tile(
            right, row, stop, n * BN + BN // 2, scale, gate_up_ptr, grad_gate_up_ptr, gated_h_ptr, F, BM, BN // 2
        )
    else:
        left, right = _halves(grad_h, BM, BN)
        a, b = _halves(left, BM, BN // 2)
        c, d = _halves(right, BM, BN // 2)
        grad_gate = _swiglu_backward_tile(
            a, row, stop, n * BN, scale, gate_up_ptr, grad_gate_up_ptr, gated_h_ptr, F, BM, BN // 4
        )
        grad_gate += _swiglu_backward_tile(
            b, row, stop, n * BN + BN // 4, scale, gate_up_ptr, grad_gate_up_ptr, gated_h_ptr, F, BM, BN // 4
        )
        grad_gate += _swiglu_backward_tile(
            c, row, stop, n * BN + BN // 2, scale, gate_up_ptr, grad_gate_up_ptr, gated_h_ptr, F, BM, BN // 4
        )
        grad_gate += _swiglu_backward_tile(
            d, row, stop, n * BN + 3 * BN // 4, scale, gate_up_ptr, grad_gate_up_ptr, gated_h_ptr, F, BM, BN // 4
        )
    tl.store(grad_gate_ptr + n * n_choices + choice, grad_gate, mask=rows < stop)


@triton.jit
def _weight_gradient(
    a_ptr,
    b_ptr,
    grad_ptr,
    choice_ptr,
    offsets_ptr,
    TOP_K: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    GATHER_A: tl.constexpr,
    GATHER_B: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    n_m: tl.constexpr = (M + BM - 1) // BM
    n_n: tl.constexpr = (N + BN - 1) // BN
    pid = tl.program_id(0)
    expert = pid // (n_m * n_n)
    pid = pid % (n_m * n_n)
    first = pid // (GROUP * n_n) * GROUP
    size = tl.minimum(n_m - first, GROUP)
    m = (first + pid % (GROUP * n_n) % size) * BM + tl.arange(0, BM)
    n = pid % (GROUP * n_n) // size * BN + tl.arange(0, BN)
    begin = tl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets_ptr + expert)
    acc = tl.zeros((BM, BN), tl.float32)
    k = tl.arange(0, BK)
    for start in tl.range(begin, end, BK):
        rows = start + k
        inside = rows < end
        a_rows = rows
        b_rows = rows
        if GATHER_A:
            a_rows = tl.load(choice_ptr + rows, mask=inside, other=0) // TOP_K
        if GATHER_B:
            b_rows = tl.load(choice_ptr + rows, mask=inside, other=0) // TOP_K
        if M % BM == 0:
            a_mask = inside[:, None]
        else:
            a_mask = inside[:, None] & (m < M)[None, :]
        if N % BN == 0:
            b_mask = inside[:, None]
        else:
            b_mask = inside[:, None] & (n < N)[None, :]
        a = tl.load(a_ptr + a_rows.to(tl.int64)[:, None] * M + m[None, :], mask=a_mask, other=0.0)
        b = tl.load(b_ptr + b_rows.to(tl.int64)[:, None] * N + n[None, :], mask=b_mask, other=0.0)
        acc = _dot(a.T, b, acc)
    out = grad_ptr + expert.to(tl.int64) * (M * N) + m[:, None] * N + n[None, :]
    mask = (m < M)[:, None] & (n < N)[None, :]
    tl.store(out, acc.to(grad_ptr.dtype.element_ty), mask=mask)
