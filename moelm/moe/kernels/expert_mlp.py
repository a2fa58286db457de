"""Dispatch, experts and combine as one function of the tokens, and its gradient, composed of kernels.

With r = row(t, k) the row of choice k of token t, and e the expert of that row:

    y_t = sum_k gate_tk h_r W2^e        h_r = silu(gate_r) up_r        (gate_r, up_r) = x_t W1^e

Backward needs x, the gates, the permutation and (gate, up): no sorted copy of the tokens, no output of an expert.
Choices of "none" have rows past offsets_E[-1], which are skipped everywhere: they may hold anything, and R may be less
than T K where `choice_of_row_R` leaves some of them out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moelm.moe.kernels.products import Here, Tiles, hopper, hopper_tiles, spread_if_wide
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
    R D + T D by the sum over a token's rows. For wide experts, and with torch's products, the tokens are spread over
    rows first, 2 R D more; with torch's SwiGLU reads 2 R F.
    """
    top_k, R = gates_TK.shape[1], choice_of_row_R.shape[0]
    tiles = hopper_tiles(x_TD, R, top_k, down_EFD.shape[1], offsets_E)
    if tiles is None:
        gate_up_R2F = F.grouped_mm(spread(x_TD, row_of_choice_TK)[:R], gate_up_EDF, offs=offsets_E)
        rows_RD = F.grouped_mm(swiglu(gate_up_R2F, offsets_E), down_EFD, offs=offsets_E)
    else:
        x_RD = spread_if_wide(x_TD, row_of_choice_TK, down_EFD.shape[1])
        gate_up_R2F, h_RF = hopper().up_product(x_TD, choice_of_row_R, top_k, gate_up_EDF, tiles, x_RD)
        del x_RD
        rows_RD = hopper().product(h_RF, down_EFD, *tiles)
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
    gate_up_sum: tuple[Tensor, Tensor] | None = None,
    down_sum: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (in its dtype), gates (float32), gate_up and down (in `dtype`); 0 where no row took part. With
    sums (a float32 total, and a bool scalar: has it begun?) those of the weights are added there or begin it, and the
    totals are returned.

        grad_h_r = grad_y_t W2^eT      grad_gate_tk = <grad_h_r, h_r>      grad_(gate, up)_r = gate_tk swiglu'(grad_h_r)
        grad_W2^e = sum_r (gate_tk h_r)^T grad_y_t      grad_W1^e = sum_r x_t^T grad_(gate, up)_r
        grad_x_t = sum_k grad_(gate, up)_r W1^eT

    12 R D F operations. Elements moved, counted as in `forward`: T D + 5 R F by the first product and SwiGLU, T D +
    3 R F and (in `dtype`) 3 E D F by the gradients of the weights with T D more, 2 R F + R D by the last product,
    R D + T D by the sum. For wide experts, and with torch's products, tokens and gradients are spread over rows, 4 R D
    more; with torch's SwiGLU reads the gradient of h, 2 R F.
    """
    top_k, R = gates_TK.shape[1], choice_of_row_R.shape[0]
    tiles = hopper_tiles(x_TD, R, top_k, down_EFD.shape[1], offsets_E, dtype)
    if tiles is None:
        grad_rows_RD = spread(grad_y_TD, row_of_choice_TK)[:R]
        grad_h_RF = F.grouped_mm(grad_rows_RD, down_EFD.mT, offs=offsets_E)
        grad_gate_up_R2F, gated_h_RF, grad_gates_TK = swiglu_backward(
            grad_h_RF, gate_up_R2F, gates_TK, choice_of_row_R, offsets_E
        )
        grad_down_EFD = added(F.grouped_mm(gated_h_RF.mT, grad_rows_RD, offs=offsets_E).to(dtype), down_sum)
        del grad_h_RF, gated_h_RF, grad_rows_RD  # before others of their size are made
        rows_RD = spread(x_TD, row_of_choice_TK)[:R]
        grad_gate_up_EDF = F.grouped_mm(rows_RD.mT, grad_gate_up_R2F, offs=offsets_E).to(dtype)
        grad_gate_up_EDF = added(grad_gate_up_EDF, gate_up_sum)
        del rows_RD
        grad_rows_RD = F.grouped_mm(grad_gate_up_R2F, gate_up_EDF.mT, offs=offsets_E)
    else:
        grad_y_TD = grad_y_TD.contiguous()
        spread_RD = spread_if_wide(grad_y_TD, row_of_choice_TK, down_EFD.shape[1])
        grad_gate_up_R2F, gated_h_RF, grad_gates_TK = hopper().down_backward(
            grad_y_TD, gates_TK, choice_of_row_R, offsets_E, down_EFD, gate_up_R2F, tiles, spread_RD
        )
        by_token = choice_of_row_R, top_k, offsets_E, tiles[0], dtype
        grad_down_EFD = hopper().weight_gradient(grad_y_TD, gated_h_RF, *by_token, down_sum, spread_RD, rows_first=True)
        del gated_h_RF, spread_RD  # before another of its size is made
        spread_RD = spread_if_wide(x_TD, row_of_choice_TK, down_EFD.shape[1])
        grad_gate_up_EDF = hopper().weight_gradient(x_TD, grad_gate_up_R2F, *by_token, gate_up_sum, spread_RD)
        del spread_RD
        grad_rows_RD = hopper().product(grad_gate_up_R2F, gate_up_EDF, *tiles, transposed=True)
    return gather_sum(grad_rows_RD, row_of_choice_TK, offsets_E), grad_gates_TK, grad_gate_up_EDF, grad_down_EFD


def added(gradient: Tensor, to: tuple[Tensor, Tensor] | None) -> Tensor:
    if to is None:
        return gradient
    total, has_begun = to
    return total.copy_(torch.where(has_begun, total + gradient, gradient))


# ------------------------------------------------------------------ where some of the tokens come from other ranks


class Others(NamedTuple):
    """Tokens of other ranks, behind the first `n_here`. While they travel those that are here are worked on."""

    n_here: int
    n_rows_here: int  # choices of the first `n_here` that have an expert here
    arrive: Callable[[], object]  # once called, they are there for what is launched then
    leave: Callable[[Tensor], None]  # takes what they go home with, [T - n_here, D]


def up(
    x_TD: Tensor,
    gates_TK: Tensor,
    row_of_choice_TK: Tensor,
    choice_of_row_R: Tensor,
    offsets_E: Tensor,
    gate_up_EDF: Tensor,
    others: Others,
) -> tuple[Tensor, Tensor]:
    """(gate_up [R, 2F], h [R, F]): the first product of `forward`, with x whose others arrive meanwhile."""
    R, d_expert = choice_of_row_R.shape[0], gate_up_EDF.shape[2] // 2
    tiles = _tiles_around(x_TD, gates_TK, choice_of_row_R, offsets_E, d_expert, None, others)
    if tiles is not None:
        found: tuple[Tensor, Tensor] = hopper().up_product(
            x_TD, choice_of_row_R, gates_TK.shape[1], gate_up_EDF, _as_they_arrive(tiles, others)
        )
        return found
    others.arrive()
    gate_up_R2F = F.grouped_mm(spread(x_TD, row_of_choice_TK)[:R], gate_up_EDF, offs=offsets_E)
    return gate_up_R2F, swiglu(gate_up_R2F, offsets_E)


def down(
    h_RF: Tensor,
    gates_TK: Tensor,
    row_of_choice_TK: Tensor,
    choice_of_row_R: Tensor,
    offsets_E: Tensor,
    down_EFD: Tensor,
    others: Others,
    out_XD: Tensor,
) -> None:
    """The rest of `forward`; `out_XD` [n_here, D] gets y of the tokens that are here. The others leave before those are
    worked on."""
    like_TD = h_RF.new_empty(()).expand(len(gates_TK), down_EFD.shape[2])
    tiles = _tiles_around(like_TD, gates_TK, choice_of_row_R, offsets_E, h_RF.shape[1], None, others)
    n_here = others.n_here
    if tiles is not None:
        rows_RD = hopper().product(h_RF, down_EFD, tiles[1])
        others.leave(gather_sum(rows_RD, row_of_choice_TK[n_here:], offsets_E, gates_TK[n_here:]))
        hopper().product(h_RF, down_EFD, tiles[0], out_RN=rows_RD)
    else:
        rows_RD = F.grouped_mm(h_RF, down_EFD, offs=offsets_E)
        others.leave(gather_sum(rows_RD, row_of_choice_TK[n_here:], offsets_E, gates_TK[n_here:]))
    gather_sum(rows_RD, row_of_choice_TK[:n_here], offsets_E, gates_TK[:n_here], out_XD)


def backward_around(
    grad_y_TD: Tensor,
    x_TD: Tensor,
    gates_TK: Tensor,
    row_of_choice_TK: Tensor,
    choice_of_row_R: Tensor,
    offsets_E: Tensor,
    gate_up_EDF: Tensor,
    down_EFD: Tensor,
    gate_up_R2F: Tensor,
    dtype: torch.dtype,
    others: Others,
    out_XD: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`backward`, with grad_y whose others arrive meanwhile, and leave with their gradients of x before those of the
    weights are computed. That of x for the tokens that are here is written to `out_XD`, the rest returned."""
    arguments = grad_y_TD, x_TD, gates_TK, row_of_choice_TK, choice_of_row_R, offsets_E, gate_up_EDF, down_EFD
    d_expert = down_EFD.shape[1]
    tiles = _tiles_around(x_TD, gates_TK, choice_of_row_R, offsets_E, d_expert, dtype, others)
    if tiles is None:
        others.arrive()
        grad_x_TD, *grads = backward(*arguments, gate_up_R2F, dtype)
        others.leave(grad_x_TD[others.n_here :])
        out_XD.copy_(grad_x_TD[: others.n_here])
        return grads[0], grads[1], grads[2]
    grad_gate_up_R2F, gated_h_RF, grad_gates_TK = hopper().down_backward(
        grad_y_TD, gates_TK, choice_of_row_R, offsets_E, down_EFD, gate_up_R2F, _as_they_arrive(tiles, others)
    )
    rows_RD = hopper().product(grad_gate_up_R2F, gate_up_EDF, tiles[1], transposed=True)
    others.leave(gather_sum(rows_RD, row_of_choice_TK[others.n_here :], offsets_E))
    by_token = choice_of_row_R, gates_TK.shape[1], offsets_E, tiles[0], dtype
    grad_down_EFD = hopper().weight_gradient(grad_y_TD, gated_h_RF, *by_token, rows_first=True)
    del gated_h_RF
    grad_gate_up_EDF = hopper().weight_gradient(x_TD, grad_gate_up_R2F, *by_token)
    hopper().product(grad_gate_up_R2F, gate_up_EDF, tiles[0], transposed=True, out_RN=rows_RD)
    gather_sum(rows_RD, row_of_choice_TK[: others.n_here], offsets_E, out_TD=out_XD)
    return grad_gates_TK, grad_gate_up_EDF, grad_down_EFD


def _tiles_around(
    x_TD: Tensor,
    gates_TK: Tensor,
    choice_of_row_R: Tensor,
    offsets_E: Tensor,
    d_expert: int,
    dtype: torch.dtype | None,
    others: Others,
) -> list[Tiles] | None:
    top_k = gates_TK.shape[1]
    here = Here(choice_of_row_R, others.n_here * top_k, others.n_rows_here)
    return hopper_tiles(x_TD, choice_of_row_R.shape[0], top_k, d_expert, offsets_E, dtype, here)


def _as_they_arrive(tiles: list[Tiles], others: Others) -> Iterator[Tiles]:
    yield tiles[0]
    others.arrive()
    yield tiles[1]


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
