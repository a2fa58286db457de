"""Dispatch, experts and combine as one function of the tokens, and its gradient, composed of kernels.

With r = row(t, k) the row of choice k of token t, and e the expert of that row:

    y_t = sum_k gate_tk h_r W2^e        h_r = silu(gate_r) up_r        (gate_r, up_r) = x_t W1^e

Backward needs x, the gates, the permutation and (gate, up): no sorted copy of the tokens, no output of an expert.
Choices of "none" have rows past offsets_E[-1], which are skipped everywhere: they may hold anything.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moelm.moe.kernels.products import product, tile_rows, up_product, weight_gradient
from moelm.moe.kernels.rows import (
    gather_sum,
    gather_sum_reference,
    spread,
    swiglu_backward,
    swiglu_backward_reference,
    swiglu_reference,
)


def forward(
    x_TD: Tensor,
    gates_TK: Tensor,
    row_of_choice_TK: Tensor,
    choice_of_row_R: Tensor,
    offsets_E: Tensor,
    gate_up_EDF: Tensor,
    down_EFD: Tensor,
) -> tuple[Tensor, Tensor]:
    """(y [T, D], gate_up [R, 2F]) in the dtype of x and of both weights; gates float32, the permutation int32.

    6 R D F operations. Elements moved, without the weights: T D + R D to spread the tokens, R D + 3 R F by the first
    product (2 R F more with torch's), R F + R D by the second, R D + T D by the sum over a token's rows.
    """
    rows_RD, tiles = spread(x_TD, row_of_choice_TK, offsets_E, tile_rows(x_TD))
    gate_up_R2F, h_RF = up_product(rows_RD, gate_up_EDF, offsets_E, tiles)
    rows_RD = product(h_RF, down_EFD, offsets_E, tiles)
    return gather_sum(rows_RD, row_of_choice_TK, offsets_E, gates_TK), gate_up_R2F


def backward(
    grad_y_TD: Tensor,
    x_TD: Tensor,
    gates_TK: Tensor,
    row_of_choice_TK: Tensor,
    choice_of_row_R: Tensor,
    offsets_E: Tensor,
    gate_up_EDF: Tensor,
    down_EFD: Tensor,
    gate_up_R2F: Tensor,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (in its dtype), gates (float32), gate_up and down (in `dtype`); 0 where no row took part.

        grad_h_r = grad_y_t W2^eT      grad_gate_tk = <grad_h_r, h_r>      grad_(gate, up)_r = gate_tk swiglu'(grad_h_r)
        grad_W2^e = sum_r (gate_tk h_r)^T grad_y_t      grad_W1^e = sum_r x_t^T grad_(gate, up)_r
        grad_x_t = sum_k grad_(gate, up)_r W1^eT

    12 R D F operations. Elements moved, counted as in `forward`: T D + R D to spread grad_y, R D + R F by the first
    product, 6 R F by SwiGLU, T D + R D to spread x again, 2 R D + 3 R F and (in `dtype`) 3 E D F by the gradients of
    the weights, 2 R F + R D by the last product, R D + T D by the sum.
    """
    grad_rows_RD, tiles = spread(grad_y_TD, row_of_choice_TK, offsets_E, tile_rows(x_TD))
    grad_h_RF = product(grad_rows_RD, down_EFD, offsets_E, tiles, transposed=True)
    grad_gate_up_R2F, gated_h_RF, grad_gates_TK = swiglu_backward(
        grad_h_RF, gate_up_R2F, gates_TK, choice_of_row_R, offsets_E
    )
    grad_down_EFD = weight_gradient(gated_h_RF, grad_rows_RD, offsets_E, tiles, dtype)
    del grad_h_RF, gated_h_RF, grad_rows_RD  # before others of their size are made
    rows_RD, _ = spread(x_TD, row_of_choice_TK)
    grad_gate_up_EDF = weight_gradient(rows_RD, grad_gate_up_R2F, offsets_E, tiles, dtype)
    del rows_RD
    grad_rows_RD = product(grad_gate_up_R2F, gate_up_EDF, offsets_E, tiles, transposed=True)
    return gather_sum(grad_rows_RD, row_of_choice_TK, offsets_E), grad_gates_TK, grad_gate_up_EDF, grad_down_EFD


def forward_reference(
    x_TD: Tensor,
    gates_TK: Tensor,
    row_of_choice_TK: Tensor,
    choice_of_row_R: Tensor,
    offsets_E: Tensor,
    gate_up_EDF: Tensor,
    down_EFD: Tensor,
) -> tuple[Tensor, Tensor]:
    rows_RD = x_TD[choice_of_row_R // gates_TK.shape[1]]
    gate_up_R2F = _product(rows_RD, gate_up_EDF, offsets_E).to(x_TD.dtype)
    rows_RD = _product(swiglu_reference(gate_up_R2F, offsets_E), down_EFD, offsets_E).to(x_TD.dtype)
    return gather_sum_reference(rows_RD, row_of_choice_TK, offsets_E, gates_TK), gate_up_R2F


def backward_reference(
    grad_y_TD: Tensor,
    x_TD: Tensor,
    gates_TK: Tensor,
    row_of_choice_TK: Tensor,
    choice_of_row_R: Tensor,
    offsets_E: Tensor,
    gate_up_EDF: Tensor,
    down_EFD: Tensor,
    gate_up_R2F: Tensor,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    token_of_row_R = choice_of_row_R // gates_TK.shape[1]
    grad_rows_RD = grad_y_TD[token_of_row_R]
    grad_h_RF = _product(grad_rows_RD, down_EFD.mT, offsets_E)
    grad_gate_up_R2F, gated_h_RF, grad_gates_TK = swiglu_backward_reference(
        grad_h_RF, gate_up_R2F, gates_TK, choice_of_row_R, offsets_E
    )
    grad_down_EFD = _sum_of_products(gated_h_RF, grad_rows_RD, offsets_E).to(dtype)
    grad_gate_up_EDF = _sum_of_products(x_TD[token_of_row_R], grad_gate_up_R2F, offsets_E).to(dtype)
    grad_rows_RD = _product(grad_gate_up_R2F, gate_up_EDF.mT, offsets_E).to(x_TD.dtype)
    return (
        gather_sum_reference(grad_rows_RD, row_of_choice_TK, offsets_E),
        grad_gates_TK,
        grad_gate_up_EDF,
        grad_down_EFD,
    )


def _product(rows_RD: Tensor, w_EDF: Tensor, offsets_E: Tensor) -> Tensor:
    """float32 [R, F]: rows[r] @ w[e]; 0 past the last offset."""
    out_RF = torch.zeros(len(rows_RD), w_EDF.shape[2], device=rows_RD.device)
    for e, (start, end) in enumerate(_spans(offsets_E)):
        out_RF[start:end] = rows_RD[start:end].float() @ w_EDF[e].float()
    return out_RF


def _sum_of_products(a_RM: Tensor, b_RN: Tensor, offsets_E: Tensor) -> Tensor:
    """float32 [E, M, N]: sum of a[r]^T b[r] over the rows of each expert."""
    return torch.stack([a_RM[start:end].float().T @ b_RN[start:end].float() for start, end in _spans(offsets_E)])


def _spans(offsets_E: Tensor) -> list[tuple[int, int]]:
    ends = offsets_E.tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))
