"""Dispatch, experts and combine as one op of PyTorch, so that compile and checkpointing see a single step.

The kernels are in `moelm/moe/kernels/expert_mlp.py`, with the equations. The op takes each weight twice: the parameter,
which receives the gradient in its own dtype, and what is multiplied, a copy of it in the dtype of the tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("moelm::expert_mlp", mutates_args=())
def expert_mlp(
    x_TD: Tensor,
    gates_TK: Tensor,
    row_of_choice_TK: Tensor,
    choice_of_row_R: Tensor,
    offsets_E: Tensor,
    gate_up_EDF: Tensor,
    down_EFD: Tensor,
    gate_up_copy_EDF: Tensor,
    down_copy_EFD: Tensor,
) -> tuple[Tensor, Tensor]:
    """(y [T, D], gate_up [R, 2F], which is kept for backward and has no gradient), in the dtype of x and the copies.

    gates float32; the permutation int32, as `sort_by_expert` makes it.
    """
    from moelm.moe.kernels import expert_mlp as kernels  # here, since triton need not be installed

    permutation = row_of_choice_TK, choice_of_row_R, offsets_E
    return kernels.forward(x_TD, gates_TK, *permutation, gate_up_copy_EDF, down_copy_EFD)


@expert_mlp.register_fake
def _(
    x_TD: Tensor,
    gates_TK: Tensor,
    row_of_choice_TK: Tensor,
    choice_of_row_R: Tensor,
    offsets_E: Tensor,
    gate_up_EDF: Tensor,
    *others: Tensor,
) -> tuple[Tensor, Tensor]:
    return x_TD.new_empty(x_TD.shape), x_TD.new_empty(choice_of_row_R.shape[0], gate_up_EDF.shape[2])


@torch.library.custom_op("moelm::expert_mlp_backward", mutates_args=())
def expert_mlp_backward(
    grad_y_TD: Tensor,
    x_TD: Tensor,
    gates_TK: Tensor,
    row_of_choice_TK: Tensor,
    choice_of_row_R: Tensor,
    offsets_E: Tensor,
    gate_up_copy_EDF: Tensor,
    down_copy_EFD: Tensor,
    gate_up_R2F: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gates, and of both weights in `dtype`."""
    from moelm.moe.kernels import expert_mlp as kernels

    permutation = row_of_choice_TK, choice_of_row_R, offsets_E
    weights = gate_up_copy_EDF, down_copy_EFD
    return kernels.backward(grad_y_TD, x_TD, gates_TK, *permutation, *weights, gate_up_R2F, dtype)


@expert_mlp_backward.register_fake
def _(
    grad_y_TD: Tensor,
    x_TD: Tensor,
    gates_TK: Tensor,
    row_of_choice_TK: Tensor,
    choice_of_row_R: Tensor,
    offsets_E: Tensor,
    gate_up_copy_EDF: Tensor,
    down_copy_EFD: Tensor,
    gate_up_R2F: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights = [w.new_empty(w.shape, dtype=dtype) for w in (gate_up_copy_EDF, down_copy_EFD)]
    return x_TD.new_empty(x_TD.shape), gates_TK.new_empty(gates_TK.shape), weights[0], weights[1]


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    *tokens_and_permutation, gate_up_EDF, _, gate_up_copy_EDF, down_copy_EFD = inputs
    gate_up_R2F = output[1]
    ctx.dtype = gate_up_EDF.dtype
    ctx.mark_non_differentiable(gate_up_R2F)
    ctx.set_materialize_grads(False)  # or it would get a gradient of its size, full of zeros
    ctx.save_for_backward(*tokens_and_permutation, gate_up_copy_EDF, down_copy_EFD, gate_up_R2F)


def _backward(ctx: Any, grad_y_TD: Tensor, _: None) -> tuple[Tensor | None, ...]:
    grad_x_TD, grad_gates_TK, *grad_weights = expert_mlp_backward(grad_y_TD, *ctx.saved_tensors, ctx.dtype)
    return grad_x_TD, grad_gates_TK, None, None, None, *grad_weights, None, None


expert_mlp.register_autograd(_backward, setup_context=_save_for_backward)
