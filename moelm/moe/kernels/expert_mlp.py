"""Dispatch, experts and combine as one function of the tokens, and its gradient, composed of kernels.

With r = row(t, k) the row of choice k of token t, and e the expert of that row:

    y_t = sum_k gate_tk h_r W2^e        h_r = silu(gate_r) up_r        (gate_r, up_r) = x_t W1^e

Backward needs x, the gates, the permutation and (gate, up): no sorted copy of the tokens, no output of an expert.
Choices of "none" have rows past offsets_E[-1], which are skipped everywhere: they may hold anything, and R may be less
than T K where `choice_of_row_R` leaves some of them out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moelm.moe.kernels.products import hopper, hopper_tiles
from moelm.moe.kernels.rows import (
    gather_sum,
    gather_sum_reference,
    spread,
    swiglu,
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

    6 R D F operations. Elements moved, without the weights: T D + 3 R F by the first product, R F + R D by the second,
    R D + T D by the sum over a token's rows. With torch's products the tokens are spread over rows first, 2 R D more,
    and SwiGLU reads 2 R F.
    """
    top_k, R = gates_TK.shape[1], choice_of_row_R.shape[0]
    tiles = hopper_tiles(x_TD, R, top_k, down_EFD.shape[1], offsets_E)
    if tiles is None:
        gate_up_R2F = F.grouped_mm(spread(x_TD, row_of_choice_TK)[:R], gate_up_EDF, offs=offsets_E)
        rows_RD = F.grouped_mm(swiglu(gate_up_R2F, offsets_E), down_EFD, offs=offsets_E)
    else:
        gate_up_R2F, h_RF = hopper().up_product(x_TD, choice_of_row_R, top_k, gate_up_EDF, tiles)
        rows_RD = hopper().product(h_RF, down_EFD, tiles)
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
    gate_up_sum_EDF: Tensor | None = None,
    down_sum_EFD: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (in its dtype), gates (float32), gate_up and down (in `dtype`); 0 where no row took part. The sums
    are gradients of earlier tokens, to which those of the weights are added in place.

        grad_h_r = grad_y_t W2^eT      grad_gate_tk = <grad_h_r, h_r>      grad_(gate, up)_r = gate_tk swiglu'(grad_h_r)
        grad_W2^e = sum_r (gate_tk h_r)^T grad_y_t      grad_W1^e = sum_r x_t^T grad_(gate, up)_r
        grad_x_t = sum_k grad_(gate, up)_r W1^eT

    12 R D F operations. Elements moved, counted as in `forward`: T D + 5 R F by the first product and SwiGLU, T D +
    3 R F and (in `dtype`) 3 E D F by the gradients of the weights with T D more, 2 R F + R D by the last product,
    R D + T D by the sum. With torch's products tokens and gradients are spread over rows, 4 R D more, and SwiGLU reads
    the gradient of h, 2 R F.
    """
    top_k, R = gates_TK.shape[1], choice_of_row_R.shape[0]
    tiles = hopper_tiles(x_TD, R, top_k, down_EFD.shape[1], offsets_E, dtype)
    if tiles is None:
        grad_rows_RD = spread(grad_y_TD, row_of_choice_TK)[:R]
        grad_h_RF = F.grouped_mm(grad_rows_RD, down_EFD.mT, offs=offsets_E)
        grad_gate_up_R2F, gated_h_RF, grad_gates_TK = swiglu_backward(
            grad_h_RF, gate_up_R2F, gates_TK, choice_of_row_R, offsets_E
        )
        grad_down_EFD = _added(F.grouped_mm(gated_h_RF.mT, grad_rows_RD, offs=offsets_E).to(dtype), down_sum_EFD)
        del grad_h_RF, gated_h_RF, grad_rows_RD  # before others of their size are made
        rows_RD = spread(x_TD, row_of_choice_TK)[:R]
        grad_gate_up_EDF = F.grouped_mm(rows_RD.mT, grad_gate_up_R2F, offs=offsets_E).to(dtype)
        grad_gate_up_EDF = _added(grad_gate_up_EDF, gate_up_sum_EDF)
        del rows_RD
        grad_rows_RD = F.grouped_mm(grad_gate_up_R2F, gate_up_EDF.mT, offs=offsets_E)
    else:
        grad_y_TD = grad_y_TD.contiguous()
        grad_gate_up_R2F, gated_h_RF, grad_gates_TK = hopper().down_backward(
            grad_y_TD, gates_TK, choice_of_row_R, offsets_E, down_EFD, gate_up_R2F, tiles
        )
        by_token = choice_of_row_R, top_k, offsets_E, tiles, dtype
        grad_down_EFD = hopper().weight_gradient(grad_y_TD, gated_h_RF, *by_token, down_sum_EFD, rows_first=True)
        del gated_h_RF
        grad_gate_up_EDF = hopper().weight_gradient(x_TD, grad_gate_up_R2F, *by_token, gate_up_sum_EDF)
        grad_rows_RD = hopper().product(grad_gate_up_R2F, gate_up_EDF, tiles, transposed=True)
    return gather_sum(grad_rows_RD, row_of_choice_TK, offsets_E), grad_gates_TK, grad_gate_up_EDF, grad_down_EFD


def _added(gradient: Tensor, sum_so_far: Tensor | None) -> Tensor:
    return gradient if sum_so_far is None else sum_so_far.add_(gradient)


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
