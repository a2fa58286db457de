"""Dispatch, experts and combine as one op of PyTorch, so that compile and checkpointing see a single step.

The kernels are in `moelm/moe/kernels/expert_mlp.py`, with the equations. `expert_mlp_around` is the same between the
journeys of tokens to other ranks and back, which products of the tokens that stay overlap, and in the backward pass
those for the gradients of weights.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moelm.moe.dispatch import expert_parallel as journeys
from moelm.moe.kernels import HAS_TRITON
from moelm.moe.ops import op
from moelm.moe.working_copies import sum_of

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
    *_, gate_up_EDF, down_EFD, _, dtype, in_place = others
    empty = _nothing if in_place else _empty
    weights = [empty(weight, dtype) for weight in (gate_up_EDF, down_EFD)]
    return x_TD.new_empty(x_TD.shape), gates_TK.new_empty(gates_TK.shape), weights[0], weights[1]


def _empty(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.new_empty(weight.shape, dtype=dtype)


def _nothing(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """In the place of a gradient, whose shape autograd wants to see."""
    return weight.new_empty((), dtype=dtype).expand(weight.shape)


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
    in_place: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gates, and of both weights in `dtype`; `in_place` adds these to the `sum_of` the weights, and
    returns nothing in their place."""
    weights = gate_up_EDF, down_EFD
    sums = [sum_of(weight) if in_place else None for weight in weights]
    if len(x_TD):
        inputs = x_TD, gates_TK, row_of_choice_TK, choice_of_row_R, offsets_E, *weights, gate_up_R2F
        grad_x_TD, grad_gates_TK, *grads = kernels.backward(grad_y_TD, *inputs, dtype, *sums)
    else:
        grad_x_TD, grad_gates_TK = torch.empty_like(x_TD), torch.empty_like(gates_TK)
        zeros = [weight.new_zeros(weight.shape, dtype=dtype) for weight in weights]
        grads = [kernels.added(zero, to) for zero, to in zip(zeros, sums, strict=True)]
    if in_place:
        grads = [_nothing(weight, dtype) for weight in weights]
    return grad_x_TD, grad_gates_TK, grads[0], grads[1]


class _ExpertMLP(torch.autograd.Function):
    """y [T, D] in the dtype of x. Takes each weight twice: what receives the gradient, in its own dtype, and what is
    multiplied, a copy in the dtype of x. gates float32, the permutation as `sort_by_expert` makes it. `in_place`: the
    gradients of the weights are added to their `GradientSum`.
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
        in_place: bool,
    ) -> Tensor:
        inputs = x_TD, gates_TK, row_of_choice_TK, choice_of_row_R, offsets_E, gate_up_copy_EDF, down_copy_EFD
        y_TD, gate_up_R2F = _expert_mlp(*inputs)
        ctx.save_for_backward(*inputs, gate_up_R2F)
        ctx.rest = gate_up_EDF.dtype, in_place
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_TD: Tensor) -> tuple[Tensor | None, ...]:
        grads = _expert_mlp_backward(grad_y_TD, *ctx.saved_tensors, *ctx.rest)
        grad_x_TD, grad_gates_TK, *grad_weights = grads
        return grad_x_TD, grad_gates_TK, None, None, None, *grad_weights, None, None, None


expert_mlp = _ExpertMLP.apply


# ---------------------------------------------------------- between two journeys (moe/dispatch/expert_parallel.py)
#
# Gates and rows are those of the plan, of the tokens of all ranks: the first N and R of them are of received ones.


def _others(tensor_SD: Tensor, landing_SD: Tensor, split: journeys.Split, group: str) -> kernels.Others:
    """Those of the journey of `tensor_SD`; when they leave, that of `landing_SD` begins."""
    return kernels.Others(
        split.stay,
        split.rows_stay,
        partial(journeys.end, tensor_SD),
        partial(journeys.begin_sending_back, landing_SD, split, group),
    )


def _empty_up(packed_SD: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, gate_up_EDF, _, N, R, _ = others
    F2 = gate_up_EDF.shape[2]
    x_ND, gate_up_R2F, h_RF = (packed_SD.new_empty(shape) for shape in ((N, packed_SD.shape[1]), (R, F2), (R, F2 // 2)))
    return x_ND, gate_up_R2F, h_RF


@op("moelm::expert_mlp_arriving", fake=_empty_up, recordable=False)
def _arriving(
    packed_SD: Tensor,
    x_TD: Tensor,
    token_of_row_S: Tensor,
    gates_VK: Tensor,
    row_of_choice_VK: Tensor,
    choice_of_row: Tensor,
    offsets_E: Tensor,
    gate_up_EDF: Tensor,
    splits: Tensor | None,
    n_tokens: int,
    n_rows: int,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(x [N, D], gate_up [R, 2F], h [R, F]) of `expert_mlp`: ends the journey of `send`."""
    x_ND = journeys.resume(packed_SD, x_TD, token_of_row_S, splits, group)
    if not n_tokens:
        journeys.end(packed_SD)
        return x_ND, x_ND.new_empty(0, gate_up_EDF.shape[2]), x_ND.new_empty(0, gate_up_EDF.shape[2] // 2)
    batch = gates_VK[:n_tokens], row_of_choice_VK[:n_tokens], choice_of_row[:n_rows], offsets_E
    split = journeys.split_of(splits, group, len(packed_SD), gates_VK.shape[1])
    others = _others(packed_SD, packed_SD, split, group)
    return x_ND, *kernels.up(x_ND, *batch, gate_up_EDF, others)


@op(
    "moelm::expert_mlp_leaving",
    fake=lambda h_RF, *others: h_RF.new_empty(others[-2], others[4].shape[2]),
    recordable=False,
)
def _leaving(
    h_RF: Tensor,
    gates_VK: Tensor,
    row_of_choice_VK: Tensor,
    choice_of_row: Tensor,
    offsets_E: Tensor,
    down_EFD: Tensor,
    splits: Tensor | None,
    n_rows: int,
    group: str,
) -> Tensor:
    """[S, D], which will hold what comes back, as of `send_back`."""
    split = journeys.split_of(splits, group, n_rows, gates_VK.shape[1])
    landing_SD = h_RF.new_empty(n_rows, down_EFD.shape[2])
    others = _others(landing_SD, landing_SD, split, group)
    if split.tokens:
        permutation = row_of_choice_VK[: split.tokens], choice_of_row[: len(h_RF)], offsets_E
        kernels.down(h_RF, gates_VK[: split.tokens], *permutation, down_EFD, others, landing_SD[: split.stay])
    else:
        others.leave(landing_SD[:0])
    return landing_SD


def _empty_gradients_around(
    grad_SD: Tensor, x_ND: Tensor, gates_VK: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, gate_up_EDF, down_EFD, _, _, _, dtype = others
    weights = [w.new_empty(w.shape, dtype=dtype) for w in (gate_up_EDF, down_EFD)]
    return grad_SD.new_empty(grad_SD.shape), gates_VK.new_empty(gates_VK.shape), weights[0], weights[1]


@op("moelm::expert_mlp_backward_around", fake=_empty_gradients_around, recordable=False)
def _backward_around(
    grad_SD: Tensor,
    x_ND: Tensor,
    gates_VK: Tensor,
    row_of_choice_VK: Tensor,
    choice_of_row: Tensor,
    offsets_E: Tensor,
    gate_up_EDF: Tensor,
    down_EFD: Tensor,
    gate_up_R2F: Tensor,
    splits: Tensor | None,
    group: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `packed_SD`, which are on their way, of gates, anything for those without a row, and of both weights
    in `dtype`. Ends the journey of `grad_SD`."""
    split = journeys.split_of(splits, group, len(grad_SD), gates_VK.shape[1])
    landing_SD = torch.empty_like(grad_SD)
    grad_y_ND = journeys.resume(grad_SD, None, None, splits, group)
    others = _others(grad_SD, landing_SD, split, group)
    if not len(x_ND):
        others.arrive()
        others.leave(grad_y_ND)
        grad_gate_up_EDF, grad_down_EFD = (w.new_zeros(w.shape, dtype=dtype) for w in (gate_up_EDF, down_EFD))
        return landing_SD, torch.empty_like(gates_VK), grad_gate_up_EDF, grad_down_EFD
    # all gates, so that their gradients have the shape of the plan
    batch = gates_VK, row_of_choice_VK[: len(x_ND)], choice_of_row[: len(gate_up_R2F)], offsets_E
    inputs = grad_y_ND, x_ND, *batch, gate_up_EDF, down_EFD, gate_up_R2F
    return landing_SD, *kernels.backward_around(*inputs, dtype, others, landing_SD[: split.stay])


class _ExpertMLPAround(torch.autograd.Function):
    """landing [S, D], for `gather_home`, of packed [S, D], from `send` with the two after it; else as `_ExpertMLP`."""

    @staticmethod
    def forward(
        ctx: Any,
        packed_SD: Tensor,
        x_TD: Tensor,
        token_of_row_S: Tensor,
        gates_VK: Tensor,
        row_of_choice_VK: Tensor,
        choice_of_row: Tensor,
        offsets_E: Tensor,
        gate_up_EDF: Tensor,
        down_EFD: Tensor,
        gate_up_copy_EDF: Tensor,
        down_copy_EFD: Tensor,
        splits: Tensor | None,
        n_tokens: int,
        n_rows: int,
        group: str,
    ) -> Tensor:
        batch = gates_VK, row_of_choice_VK, choice_of_row, offsets_E
        sent = packed_SD, x_TD, token_of_row_S
        x_ND, gate_up_R2F, h_RF = _arriving(*sent, *batch, gate_up_copy_EDF, splits, n_tokens, n_rows, group)
        landing_SD = _leaving(h_RF, *batch, down_copy_EFD, splits, packed_SD.shape[0], group)
        ctx.save_for_backward(x_ND, *batch, gate_up_copy_EDF, down_copy_EFD, gate_up_R2F, splits)
        ctx.rest = group, gate_up_EDF.dtype
        return landing_SD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor | None, ...]:
        grad_packed_SD, grad_gates_VK, *grad_weights = _backward_around(grad_SD, *ctx.saved_tensors, *ctx.rest)
        of_sent, of_batch = (grad_packed_SD, None, None), (grad_gates_VK, None, None, None)
        return *of_sent, *of_batch, *grad_weights, None, None, None, None, None, None


expert_mlp_around = _ExpertMLPAround.apply
