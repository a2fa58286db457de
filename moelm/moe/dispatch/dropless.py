"""The `dropless` dispatcher: every chosen expert computes its token, however uneven the load.

Token choice has exactly K rows a token, so both directions are gathers through one permutation and its inverse:
deterministic, no atomics, static shapes. Where experts chose the tokens, a token may have any number of rows, and
they are added in a fixed order (`sum_by_token`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from moelm.config import DispatchConfig, MoEConfig, register
from moelm.moe.kernels import HAS_TRITON
from moelm.moe.ops import op
from moelm.moe.types import ExpertChoice, Routing, TokenChoice

if HAS_TRITON:
    from moelm.moe.kernels import sorting


@dataclass
class DroplessConfig(DispatchConfig):
    accepts: ClassVar[tuple[str, ...]] = ("token_choice", "expert_choice")


class Permutation(NamedTuple):
    """How the rows lie after dispatch. Those of the id "none" come last, past offsets_E[-1]; R = T * K, or fewer where
    some of those are left out."""

    expert_ids_TK: Tensor  # int64, as dispatched: "none" where a dispatcher dropped the choice
    row_of_choice_TK: Tensor  # int32, where choice k of token t went
    choice_of_row_R: Tensor  # int32 t * K + k, the inverse
    valid_TK: Tensor  # bool, False for "none"
    offsets_E: Tensor  # int32 end of each expert's rows


def sort_by_expert(expert_ids_TK: Tensor, n_experts: int) -> Permutation:
    sort = counting_sort if HAS_TRITON and expert_ids_TK.is_cuda else stable_argsort
    row_of_choice_TK, choice_of_row_R, offsets_E = sort(expert_ids_TK, n_experts)
    return Permutation(expert_ids_TK, row_of_choice_TK, choice_of_row_R, expert_ids_TK != n_experts, offsets_E)


def stable_argsort(expert_ids_TK: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    ids_R = expert_ids_TK.flatten()
    order_R = ids_R.argsort(stable=True)
    rows = torch.arange(ids_R.numel(), dtype=torch.int32, device=ids_R.device)
    row_of_choice_TK = torch.empty_like(rows).scatter(0, order_R, rows).view_as(expert_ids_TK)
    counts = torch.zeros(n_experts + 1, dtype=torch.int32, device=ids_R.device)
    counts_E = counts.scatter_add(0, ids_R, torch.ones_like(ids_R, dtype=torch.int32))[:n_experts]
    return row_of_choice_TK, order_R.int(), counts_E.cumsum(0, dtype=torch.int32)


def _empty_permutation(expert_ids_TK: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    ids_R = expert_ids_TK.new_empty(expert_ids_TK.numel(), dtype=torch.int32)
    return ids_R.view(expert_ids_TK.shape), ids_R.clone(), ids_R.new_empty(n_experts)


@op("moelm::counting_sort", fake=_empty_permutation)
def counting_sort(expert_ids_TK: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same in three kernels without atomics."""
    return sorting.sort_by_expert(expert_ids_TK, n_experts)


class Slots(NamedTuple):
    """Rows of expert choice: slot c of expert e is row e * C + c."""

    token_of_row_R: Tensor  # int64; n_tokens means "none"
    offsets_E: Tensor  # int32 end of each expert's rows
    n_tokens: int


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
    """[T, K, D]. Rows of "none" are undefined or left out: replaced, never multiplied by 0, since 0 x NaN is NaN."""
    row_R = row_of_choice_TK.flatten().clamp(max=rows_RD.shape[0] - 1)
    chosen_TKD = rows_RD.index_select(0, row_R).unflatten(0, row_of_choice_TK.shape)
    return torch.where(valid_TK.unsqueeze(-1), chosen_TKD, 0.0)


@op("moelm::sum_by_token", fake=lambda rows_RD, _, n_tokens: rows_RD.new_empty(n_tokens, rows_RD.shape[1]))
def _sum_by_token(rows_RD: Tensor, token_of_row_R: Tensor, n_tokens: int) -> Tensor:
    """An op because inductor would make it atomics on CUDA."""
    y_TD = rows_RD.new_zeros(n_tokens + 1, rows_RD.shape[1])
    if rows_RD.is_cuda:  # index_add is atomic there, an accumulating index_put sorts
        y_TD.index_put_((token_of_row_R,), rows_RD, accumulate=True)
    else:
        y_TD.index_add_(0, token_of_row_R, rows_RD)
    return y_TD[:n_tokens].clone()


def _rows_of_tokens(x_TD: Tensor, token_of_row_R: Tensor) -> Tensor:
    """[R, D]; 0 for rows of "none"."""
    n_tokens = x_TD.shape[0]
    rows_RD = x_TD.index_select(0, token_of_row_R.clamp(max=n_tokens - 1))
    return torch.where((token_of_row_R < n_tokens).unsqueeze(-1), rows_RD, 0.0)


class _SumByToken(torch.autograd.Function):
    """y_t = sum of the rows of token t, in the order of the rows: the same value every time. Rows of the id
    n_tokens ("none") are left out, whatever they hold. Backward is `_rows_of_tokens`."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, token_of_row_R: Tensor, n_tokens: int) -> Tensor:
        ctx.save_for_backward(token_of_row_R)
        return _sum_by_token(rows_RD, token_of_row_R, n_tokens)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        return _rows_of_tokens(grad_TD, *ctx.saved_tensors), None, None


sum_by_token = _SumByToken.apply


class _Spread(torch.autograd.Function):
    """rows_R = x_T[t(R)]; backward is `sum_by_token`."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_of_row_R: Tensor) -> Tensor:
        ctx.save_for_backward(token_of_row_R)
        ctx.n_tokens = x_TD.shape[0]
        return _rows_of_tokens(x_TD, token_of_row_R)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        (token_of_row_R,) = ctx.saved_tensors
        return sum_by_token(grad_RD, token_of_row_R, ctx.n_tokens), None


@register("dispatch", "dropless", DroplessConfig)
class DroplessDispatcher:
    """Accepts token choice and expert choice. Holds no parameters."""

    def __init__(self, config: DispatchConfig, moe: MoEConfig) -> None:
        self.n_experts = moe.n_experts

    def kept(self, routing: TokenChoice, training: bool) -> Tensor:
        """The expert ids [T, K], "none" for the choices that are dropped: here none is."""
        return routing.expert_ids_TK

    def plan(self, routing: Routing, n_tokens: int) -> Permutation | Slots:
        """Where the rows lie; all that fused experts need of a dispatcher."""
        if isinstance(routing, ExpertChoice):
            ids_EC = routing.token_ids_EC
            ends_E = torch.arange(1, ids_EC.shape[0] + 1, dtype=torch.int32, device=ids_EC.device) * ids_EC.shape[1]
            return Slots(ids_EC.flatten(), ends_E, n_tokens)
        return sort_by_expert(routing.expert_ids_TK, self.n_experts)

    def spread(self, x_TD: Tensor, plan: Permutation | Slots) -> Tensor:
        """rows [R, D], sorted by expert."""
        if isinstance(plan, Slots):
            rows_RD: Tensor = _Spread.apply(x_TD, plan.token_of_row_R)
        else:
            rows_RD = _Dispatch.apply(x_TD, plan.row_of_choice_TK, plan.choice_of_row_R, plan.valid_TK)
        return rows_RD

    def combine(self, rows_RD: Tensor, routing: Any, plan: Permutation | Slots) -> Tensor:
        """y [T, D] = the sum over a token's rows of gate x row; 0 for a token without."""
        if isinstance(plan, Slots):
            gates_R1 = routing.gates_EC.flatten().to(rows_RD.dtype).unsqueeze(-1)
            summed: Tensor = sum_by_token(rows_RD * gates_R1, plan.token_of_row_R, plan.n_tokens)
            return summed
        combined: Tensor = _Combine.apply(
            rows_RD, routing.gates_TK, plan.row_of_choice_TK, plan.choice_of_row_R, plan.valid_TK
        )
        return combined
