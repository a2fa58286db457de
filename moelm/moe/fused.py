"""Dispatch, experts and combine as one op of PyTorch, so that compile and checkpointing see a single step.

The kernels are in `moelm/moe/kernels/expert_mlp.py`, with the equations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moelm.moe.kernels import HAS_TRITON
from moelm.moe.ops import op
from moelm.moe.working_copies import sum_so_far

if HAS_TRITON:
    from moelm.moe.kernels import expert_mlp as kernels


def _empty_results(x_TD: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    _, _, choice_of_row_R, _, gate_up_EDF, _ = others
    return x_TD.new_empty(x_TD.shape), x_TD.new_empty(choice_of_row_R.shape[0], gate_up_EDF.shape[2])


@op("moelm::expert_mlp", fake=_empty_results)
def _expert_mlp(
    x_TD: Tensor,
    gates_TK: Tensor,
    row_of_choice_TK: Tensor,
    choice_of_row_R: Tensor,
    offsets_E: Tensor,
    gate_up_EDF: Tensor,
    down_EFD: Tensor,
) -> tuple[Tensor, Tensor]:
    """(y [T, D], gate_up [R, 2F], which backward needs), in the dtype of x and of both weights."""
    if not len(x_TD):  # on a rank whose experts were sent nothing
        return torch.empty_like(x_TD), x_TD.new_empty(0, gate_up_EDF.shape[2])
    return kernels.forward(x_TD, gates_TK, row_of_choice_TK, choice_of_row_R, offsets_E, gate_up_EDF, down_EFD)


def _empty_gradients(
    grad_y_TD: Tensor, x_TD: Tensor, gates_TK: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, gate_up_EDF, down_EFD, _, dtype = others
    weights = [w.new_empty(w.shape, dtype=dtype) for w in (gate_up_EDF, down_EFD)]
    return x_TD.new_empty(x_TD.shape), gates_TK.new_empty(gates_TK.shape), weights[0], weights[1]


@op("moelm::expert_mlp_backward", fake=_empty_gradients)
def _expert_mlp_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gates, and of both weights in `dtype`: added to `sum_so_far` of the weights, which then is what
    this returns, where there is one."""
    if not len(x_TD):
        grad_gate_up_EDF, grad_down_EFD = (w.new_zeros(w.shape, dtype=dtype) for w in (gate_up_EDF, down_EFD))
        return torch.empty_like(x_TD), torch.empty_like(gates_TK), grad_gate_up_EDF, grad_down_EFD
    inputs = x_TD, gates_TK, row_of_choice_TK, choice_of_row_R, offsets_E, gate_up_EDF, down_EFD
    sums = sum_so_far(gate_up_EDF, dtype), sum_so_far(down_EFD, dtype)
    return kernels.backward(grad_y_TD, *inputs, gate_up_R2F, dtype, *sums)


class _ExpertMLP(torch.autograd.Function):
    """y [T, D] in the dtype of x. Takes each weight twice: what receives the gradient, in its own dtype, and what is
    multiplied, a copy in the dtype of x. gates float32, the permutation as `sort_by_expert` makes it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        gates_TK: Tensor,
        row_of_choice_TK: Tensor,
        choice_of_row_R: Tensor,
        offsets_E: Tensor,
        gate_up_EDF: Tensor,
        down_EFD: Tensor,
        gate_up_copy_EDF: Tensor,  # not *copies: where no gradient is wanted, Dynamo tells by the number of names
        down_copy_EFD: Tensor,  # whether there is a ctx
    ) -> Tensor:
        inputs = x_TD, gates_TK, row_of_choice_TK, choice_of_row_R, offsets_E, gate_up_copy_EDF, down_copy_EFD
        y_TD, gate_up_R2F = _expert_mlp(*inputs)
        ctx.save_for_backward(*inputs, gate_up_R2F)
        ctx.dtype = gate_up_EDF.dtype
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_TD: Tensor) -> tuple[Tensor | None, ...]:
        saved = *ctx.saved_tensors, ctx.dtype
        grad_x_TD, grad_gates_TK, *grad_weights = _expert_mlp_backward(grad_y_TD, *saved)
        return grad_x_TD, grad_gates_TK, None, None, None, *grad_weights, None, None


expert_mlp = _ExpertMLP.apply
