"""What each sequence sends to each expert, counted by comparison: on a GPU, adding a one where each choice points would
be hundreds of thousands of atomic additions to a few addresses."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moelm.moe.kernels.launch import Kernel, cdiv, next_power_of_2
from moelm.moe.ops import op

SPAN = 512  # choices a program


@op("moelm::sums_of_choices", fake=lambda ids, _, B, E: ids.new_empty(3, B, E, dtype=torch.float32))
def _sums_of_choices(expert_ids_TK: Tensor, gates_TK: Tensor | None, n_sequences: int, n_experts: int) -> Tensor:
    """12 T K (1 + 2 E / SPAN) bytes, T K E comparisons; one order of summation."""
    T, K = expert_ids_TK.shape
    n_choices = T * K // n_sequences
    n_spans = cdiv(n_choices, SPAN)
    gates_TK = None if gates_TK is None else gates_TK.contiguous()
    sums_s3BE = expert_ids_TK.new_empty(n_spans, 3, n_sequences, n_experts, dtype=torch.float32)
    block_E = next_power_of_2(n_experts)
    block = min(SPAN, max(1, 4096 // block_E))
    _sums[n_spans, n_sequences, 1](
        expert_ids_TK.contiguous(), gates_TK, sums_s3BE, n_choices, n_experts, K, SPAN, block, block_E
    )
    return sums_s3BE.sum(0)


class _SumsOfChoices(torch.autograd.Function):
    """float32 [3, B, E] for each sequence and expert: how often it was chosen, how often first, the sum of its gates
    (0 without gates).

    int64 ids, n_experts for "none", which adds nothing; float32 gates, to which alone gradient flows, each getting that
    of its sum.
    """

    @staticmethod
    def forward(ctx: Any, expert_ids_TK: Tensor, gates_TK: Tensor | None, n_sequences: int, n_experts: int) -> Tensor:
        ctx.save_for_backward(expert_ids_TK)
        ctx.n_experts = n_experts
        return _sums_of_choices(expert_ids_TK, gates_TK, n_sequences, n_experts)

    @staticmethod
    def backward(ctx: Any, grad_3BE: Tensor) -> tuple[Tensor | None, ...]:
        (ids_TK,) = ctx.saved_tensors
        ids_Bx = ids_TK.view(grad_3BE.shape[1], -1)
        grad_Bx = grad_3BE[2].gather(1, ids_Bx.clamp(max=ctx.n_experts - 1))
        return None, torch.where(ids_Bx < ctx.n_experts, grad_Bx, 0.0).view_as(ids_TK), None, None


sums_of_choices = _SumsOfChoices.apply


def sums_of_choices_reference(expert_ids_TK: Tensor, gates_TK: Tensor, n_sequences: int, n_experts: int) -> Tensor:
    chosen_TKE = expert_ids_TK.unsqueeze(-1) == torch.arange(n_experts, device=expert_ids_TK.device)
    gates_TKE = torch.where(chosen_TKE, gates_TK.unsqueeze(-1), 0.0)
    sums_3TE = torch.stack([chosen_TKE.sum(1), chosen_TKE[:, 0], gates_TKE.sum(1)])
    sums_3BE: Tensor = sums_3TE.unflatten(1, (n_sequences, -1)).sum(2)
    return sums_3BE


@Kernel
@triton.jit(do_not_specialize=["n_choices"])
def _sums(
    ids_TK,
    gates_TK,
    sums_s3BE,
    n_choices,
    E: tl.constexpr,
    K: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One span of one sequence's choices."""
    span, sequence, B = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    e = tl.arange(0, BLOCK_E)
    chosen = tl.zeros([BLOCK, BLOCK_E], tl.float32)
    first_chosen = tl.zeros([BLOCK, BLOCK_E], tl.float32)
    gate_sum = tl.zeros([BLOCK, BLOCK_E], tl.float32)
    for start in range(0, SPAN, BLOCK):
        choice = span * SPAN + start + tl.arange(0, BLOCK)
        at = sequence.to(tl.int64) * n_choices + choice
        ids = tl.load(ids_TK + at, mask=choice < n_choices, other=E).to(tl.int32)
        here = ids[:, None] == e[None, :]
        chosen += tl.where(here, 1.0, 0.0)
        first_chosen += tl.where(here & (choice % K == 0)[:, None], 1.0, 0.0)
        if gates_TK is not None:
            gates = tl.load(gates_TK + at, mask=choice < n_choices, other=0.0)
            gate_sum += tl.where(here, gates[:, None], 0.0)
    out = sums_s3BE + (span * 3 * B + sequence) * E + e
    tl.store(out, tl.sum(chosen, 0), mask=e < E)
    tl.store(out + B * E, tl.sum(first_chosen, 0), mask=e < E)
    tl.store(out + 2 * B * E, tl.sum(gate_sum, 0), mask=e < E)
