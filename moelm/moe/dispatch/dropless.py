"""The `dropless` dispatcher: every chosen expert computes its token, however uneven the load.

Token choice has exactly K rows a token, so both directions are gathers through one permutation and its inverse:
deterministic, no atomics, static shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moelm.config import MoEConfig, NamedConfig, register
from moelm.moe.types import TokenChoice


@dataclass
class DroplessConfig(NamedConfig):
    pass


class Permutation(NamedTuple):
    """How R = T * K rows lie after dispatch. Rows of the id "none" come last, past offsets_E[-1]."""

    row_of_choice_TK: Tensor  # int64, where choice k of token t went
    choice_of_row_R: Tensor  # int64 t * K + k, the inverse
    valid_TK: Tensor  # bool, False for "none"
    offsets_E: Tensor  # int32 end of each expert's rows


def sort_by_expert(expert_ids_TK: Tensor, n_experts: int) -> Permutation:
    ids_R = expert_ids_TK.flatten()
    order_R = ids_R.argsort(stable=True)
    rows = torch.arange(ids_R.numel(), device=ids_R.device)
    row_of_choice = torch.empty_like(order_R).scatter(0, order_R, rows).view_as(expert_ids_TK)
    counts = torch.zeros(n_experts + 1, dtype=torch.int32, device=ids_R.device)
    counts_E = counts.scatter_add(0, ids_R, torch.ones_like(ids_R, dtype=torch.int32))[:n_experts]
    return Permutation(row_of_choice, order_R, expert_ids_TK != n_experts, counts_E.cumsum(0, dtype=torch.int32))


class _Dispatch(torch.autograd.Function):
    """rows_R = x_T[t(R)]; backward is a gather and a sum over K instead of atomics."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, row_of_choice_TK: Tensor, choice_of_row_R: Tensor, valid_TK: Tensor) -> Tensor:
        ctx.save_for_backward(row_of_choice_TK, valid_TK)
        return x_TD.index_select(0, choice_of_row_R // row_of_choice_TK.shape[1])

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        row_of_choice_TK, valid_TK = ctx.saved_tensors
        return _gather_choices(grad_RD, row_of_choice_TK, valid_TK).sum(1), None, None, None


class _Combine(torch.autograd.Function):
    """y_t = sum_k gate_tk * rows[row(t, k)]; backward of the rows is a gather too."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_RD: Tensor,
        gates_TK: Tensor,
        row_of_choice_TK: Tensor,
        choice_of_row_R: Tensor,
        valid_TK: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(rows_RD, gates_TK, row_of_choice_TK, choice_of_row_R, valid_TK)
        chosen_TKD = _gather_choices(rows_RD, row_of_choice_TK, valid_TK)
        weighted_TKD = chosen_TKD * gates_TK.to(rows_RD.dtype).unsqueeze(-1)
        return weighted_TKD.sum(1, dtype=rows_RD.dtype)  # autocast on CUDA would make it float32

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        rows_RD, gates_TK, row_of_choice_TK, choice_of_row_R, valid_TK = ctx.saved_tensors
        K = gates_TK.shape[1]
        gates_R1 = gates_TK.to(grad_TD.dtype).flatten().index_select(0, choice_of_row_R).unsqueeze(-1)
        grad_RD = grad_TD.index_select(0, choice_of_row_R // K) * gates_R1
        chosen_TKD = _gather_choices(rows_RD, row_of_choice_TK, valid_TK)
        grad_gates_TK = (chosen_TKD * grad_TD.unsqueeze(1)).sum(-1, dtype=torch.float32)
        return grad_RD, grad_gates_TK.to(gates_TK.dtype), None, None, None


def _gather_choices(rows_RD: Tensor, row_of_choice_TK: Tensor, valid_TK: Tensor) -> Tensor:
    """[T, K, D]. Rows of "none" are uninitialised memory: replaced, never multiplied by 0, since 0 x NaN is NaN."""
    chosen_TKD = rows_RD.index_select(0, row_of_choice_TK.flatten()).unflatten(0, row_of_choice_TK.shape)
    return torch.where(valid_TK.unsqueeze(-1), chosen_TKD, 0.0)


@register("dispatch", "dropless", DroplessConfig)
class DroplessDispatcher:
    """Accepts token choice. Holds no parameters."""

    def __init__(self, config: DroplessConfig, moe: MoEConfig) -> None:
        self.n_experts = moe.n_experts

    def dispatch(self, x_TD: Tensor, routing: TokenChoice) -> tuple[Tensor, Permutation]:
        """rows [R, D], sorted by expert, and the plan that `combine` and the experts need."""
        plan = sort_by_expert(routing.expert_ids_TK, self.n_experts)
        rows_RD = _Dispatch.apply(x_TD, plan.row_of_choice_TK, plan.choice_of_row_R, plan.valid_TK)
        return rows_RD, plan

    def combine(self, rows_RD: Tensor, routing: TokenChoice, plan: Permutation) -> Tensor:
        """y [T, D] = sum over k of gate x row."""
        combined: Tensor = _Combine.apply(
            rows_RD, routing.gates_TK, plan.row_of_choice_TK, plan.choice_of_row_R, plan.valid_TK
        )
        return combined
