"""What lies around the grouped products: rows to the experts, SwiGLU between, rows back to their tokens.

All of it is bound by memory, so each kernel touches every byte once; the counts below leave out the few bytes a row
of gates and indices. s is the size of an element: rows are bfloat16 or float32, sums are float32, in a fixed order.
Rows past offsets_E[-1] belong to no expert and may hold anything, NaN too: they are skipped, never multiplied by 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from moelm.moe.kernels.launch import Kernel, cdiv, next_power_of_2

BLOCK = 2048  # elements of a tile: 16 a thread of 4 warps, two 16-byte loads in bfloat16


def spread(x_TD: Tensor, row_of_choice_TK: Tensor) -> Tensor:
    """[R, D]: rows[row(t, k)] = x_t; rows of "none" are copies of their token too. (1 + K) T D s bytes: a token is read
    once."""
    (T, D), K = x_TD.shape, row_of_choice_TK.shape[1]
    rows_RD = x_TD.new_empty(T * K, D)
    block_d = min(BLOCK, next_power_of_2(D))
    block_t = BLOCK // block_d
    _spread[cdiv(T, block_t), cdiv(D, block_d), 1](
        x_TD.contiguous(), row_of_choice_TK.contiguous(), rows_RD, T, K, D, block_t, block_d
    )
    return rows_RD


def spread_reference(x_TD: Tensor, row_of_choice_TK: Tensor) -> Tensor:
    token_of_row_R = row_of_choice_TK.flatten().argsort() // row_of_choice_TK.shape[1]
    return x_TD.index_select(0, token_of_row_R)


@Kernel
@triton.jit(do_not_specialize=["T"])
def _spread(
    x_TD,
    row_of_choice_TK,
    rows_RD,
    T,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (t < T)[:, None] & (d < D)[None, :]
    x = tl.load(x_TD + t.to(tl.int64)[:, None] * D + d[None, :], mask=inside)
    for k in tl.static_range(K):
        row = tl.load(row_of_choice_TK + t * K + k, mask=t < T, other=0).to(tl.int64)
        tl.store(rows_RD + row[:, None] * D + d[None, :], x, mask=inside)


def gather_sum(
    rows_RD: Tensor,
    row_of_choice_TK: Tensor,
    offsets_E: Tensor,
    gates_TK: Tensor | None = None,
    out_TD: Tensor | None = None,
) -> Tensor:
    """y [T, D] in the type of the rows: y_t = sum_k gate_tk rows[row(t, k)], added in the order of k. Written to
    `out_TD`, contiguous, if it is given.

    No gates means 1. (K + 1) T D s bytes.
    """
    (T, K), D = row_of_choice_TK.shape, rows_RD.shape[1]
    y_TD = rows_RD.new_empty(T, D) if out_TD is None else out_TD
    if not T:
        return y_TD
    block_d = min(BLOCK // 2, next_power_of_2(D))
    block_t = BLOCK // 2 // block_d
    grid = cdiv(T, block_t), cdiv(D, block_d), 1
    _gather_sum[grid](
        rows_RD.contiguous(),
        row_of_choice_TK.contiguous(),
        offsets_E,
        None if gates_TK is None else gates_TK.contiguous(),
        y_TD,
        T,
        K,
        D,
        offsets_E.numel(),
        block_t,
        block_d,
    )
    return y_TD


def gather_sum_reference(
    rows_RD: Tensor,
    row_of_choice_TK: Tensor,
    offsets_E: Tensor,
    gates_TK: Tensor | None = None,
    out_TD: Tensor | None = None,
) -> Tensor:
    chosen_TKD = rows_RD.float()[row_of_choice_TK]
    if gates_TK is not None:
        chosen_TKD = chosen_TKD * gates_TK.unsqueeze(-1)
    used_TK = row_of_choice_TK < offsets_E[-1]
    y_TD = torch.where(used_TK.unsqueeze(-1), chosen_TKD, 0.0).sum(1).to(rows_RD.dtype)
    return y_TD if out_TD is None else out_TD.copy_(y_TD)


@Kernel
@triton.jit(do_not_specialize=["T"])
def _gather_sum(
    rows_RD,
    row_of_choice_TK,
    offsets_E,
    gates_TK,
    y_TD,
    T,
    K: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n_used = tl.load(offsets_E + E - 1)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    y = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for k in tl.static_range(K):
        row = tl.load(row_of_choice_TK + t * K + k, mask=t < T, other=n_used).to(tl.int64)
        used = row < n_used
        inside = used[:, None] & (d < D)[None, :]
        chosen = tl.load(rows_RD + row[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        if gates_TK is None:
            y += chosen
        else:
            y += tl.load(gates_TK + t * K + k, mask=used, other=0.0).to(tl.float32)[:, None] * chosen
    inside = (t < T)[:, None] & (d < D)[None, :]
    tl.store(y_TD + t.to(tl.int64)[:, None] * D + d[None, :], y.to(y_TD.dtype.element_ty), mask=inside)


def swiglu(gate_up_RF: Tensor, offsets_E: Tensor) -> Tensor:
    """h [R, F] = silu(gate) up for gate_up [R, 2F], rounded once (arXiv 2002.05202). Unused rows are not written.

    3 R F s bytes.
    """
    R, F2 = gate_up_RF.shape
    h_RF = gate_up_RF.new_empty(R, F2 // 2)
    block_r, block_f = 8, 256  # of wider rows a power of two would leave more lanes idle
    grid = cdiv(R, block_r), cdiv(F2 // 2, block_f), 1
    _swiglu[grid](gate_up_RF.contiguous(), offsets_E, h_RF, F2 // 2, offsets_E.numel(), block_r, block_f)
    return h_RF


def swiglu_reference(gate_up_RF: Tensor, offsets_E: Tensor) -> Tensor:
    gate_RF, up_RF = gate_up_RF.float().chunk(2, -1)
    return (F.silu(gate_RF) * up_RF).to(gate_up_RF.dtype)


@Kernel
@triton.jit
def _swiglu(
    gate_up_RF, offsets_E, h_RF, F: tl.constexpr, E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr
):
    n_used = tl.load(offsets_E + E - 1)
    if tl.program_id(0) * BLOCK_R >= n_used:
        return
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = (r < n_used)[:, None] & (f < F)[None, :]
    at = gate_up_RF + r.to(tl.int64)[:, None] * (2 * F) + f[None, :]
    gate = tl.load(at, mask=inside).to(tl.float32)
    up = tl.load(at + F, mask=inside).to(tl.float32)
    h = gate * tl.sigmoid(gate) * up
    tl.store(h_RF + r.to(tl.int64)[:, None] * F + f[None, :], h.to(h_RF.dtype.element_ty), mask=inside)


def swiglu_backward(
    grad_h_RF: Tensor, gate_up_RF: Tensor, gates_TK: Tensor, choice_of_row_R: Tensor, offsets_E: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_gate_up [R, 2F], gated_h [R, F], grad_gates [T, K] float32) of y_t = sum_k gate_tk W h_r, r = row(t, k).

    grad_h = dy_t W^T lacks the gate. With h = silu(gate) up, rounded, and s = sigmoid(gate):
    grad_gates = <grad_h, h>, 0 for "none", anything for a choice without a row; gated_h = gate_tk h, which the gradient
    of W needs;
    grad_gate_up = gate_tk grad_h (up s (1 + gate (1 - s)), gate s). Unused rows come out 0, so that a sum over rows may
    run past the end.

    6 R F s bytes: a program owns whole rows, so no sum crosses programs.
    """
    R, n_wide = grad_h_RF.shape
    grad_gate_up_RF, gated_h_RF = gate_up_RF.new_empty(R, 2 * n_wide), grad_h_RF.new_empty(R, n_wide)
    grad_gates_TK = gates_TK.new_empty(gates_TK.shape, dtype=torch.float32)
    block_r, block_f = 4, 256
    _swiglu_backward[cdiv(R, block_r), 1, 1](
        grad_h_RF.contiguous(),
        gate_up_RF.contiguous(),
        gates_TK.contiguous(),
        choice_of_row_R.contiguous(),
        offsets_E,
        grad_gate_up_RF,
        gated_h_RF,
        grad_gates_TK,
        R,
        n_wide,
        offsets_E.numel(),
        block_r,
        block_f,
    )
    return grad_gate_up_RF, gated_h_RF, grad_gates_TK


def swiglu_backward_reference(
    grad_h_RF: Tensor, gate_up_RF: Tensor, gates_TK: Tensor, choice_of_row_R: Tensor, offsets_E: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = gate_up_RF.dtype
    gate_R1 = gates_TK.flatten()[choice_of_row_R].unsqueeze(1)
    unused_R1 = (torch.arange(len(gate_R1), device=gate_R1.device) >= offsets_E[-1]).unsqueeze(1)
    gate_R1, gate_up_RF, grad_h_RF = (each.masked_fill(unused_R1, 0.0) for each in (gate_R1, gate_up_RF, grad_h_RF))
    x_RF, up_RF = gate_up_RF.float().chunk(2, -1)
    s_RF = x_RF.sigmoid()
    h_RF = (x_RF * s_RF * up_RF).to(dtype).float()
    grad_gate_R = (grad_h_RF.float() * h_RF).sum(1)
    grad_RF = gate_R1 * grad_h_RF.float()
    grad_gate_up_RF = torch.cat([grad_RF * up_RF * s_RF * (1 + x_RF * (1 - s_RF)), grad_RF * x_RF * s_RF], 1)
    grad_gates = grad_gate_R.new_zeros(gates_TK.numel()).scatter_(0, choice_of_row_R.long(), grad_gate_R)
    return grad_gate_up_RF.to(dtype), (gate_R1 * h_RF).to(dtype), grad_gates.view_as(gates_TK)


@Kernel
@triton.jit(do_not_specialize=["R"])
def _swiglu_backward(
    grad_h_RF,
    gate_up_RF,
    gates_R,
    choice_of_row_R,
    offsets_E,
    grad_gate_up_RF,
    gated_h_RF,
    grad_gates_R,
    R,
    F: tl.constexpr,
    E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    dtype = gated_h_RF.dtype.element_ty
    n_used = tl.load(offsets_E + E - 1)
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    choice = tl.load(choice_of_row_R + r, mask=r < R, other=0)
    used = r < n_used
    gate_r = tl.load(gates_R + choice, mask=used, other=0.0).to(tl.float32)[:, None]
    dot = tl.zeros([BLOCK_R, BLOCK_F], tl.float32)
    at_1F = r.to(tl.int64)[:, None] * F + tl.arange(0, BLOCK_F)[None, :]
    at_2F = r.to(tl.int64)[:, None] * (2 * F) + tl.arange(0, BLOCK_F)[None, :]
    for first in range(0, F, BLOCK_F):
        within = (first + tl.arange(0, BLOCK_F) < F)[None, :]
        inside = used[:, None] & within
        written = (r < R)[:, None] & within
        grad_h = tl.load(grad_h_RF + at_1F + first, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_up_RF + at_2F + first, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up_RF + at_2F + (first + F), mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        h = (silu * up).to(dtype).to(tl.float32)
        dot += grad_h * h
        tl.store(gated_h_RF + at_1F + first, (gate_r * h).to(dtype), mask=written)
        grad_h *= gate_r
        grad_gate = grad_h * up * (sigmoid + silu * (1 - sigmoid))
        tl.store(grad_gate_up_RF + at_2F + first, grad_gate.to(dtype), mask=written)
        tl.store(grad_gate_up_RF + at_2F + (first + F), (grad_h * silu).to(dtype), mask=written)
    tl.store(grad_gates_R + choice, tl.sum(dot, 1), mask=r < R)
