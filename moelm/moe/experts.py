"""The routed experts: stacked weights, and the three ways to multiply rows by them.

`loop` is the reference that nobody can doubt; `grouped` is one product for all experts; `fused` is that with
dispatch, activation and combine in one op. All are tested equal.
Weights are `[E, in, out]`, gate and up side by side in one tensor, so that one product serves both.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moelm.config import MoEConfig, grouped_widths_fit, why_not_fused
from moelm.moe.dispatch.dropless import Permutation
from moelm.moe.dispatch.expert_parallel import Journey
from moelm.moe.fused import expert_mlp, expert_mlp_around
from moelm.moe.kernels import HAS_TRITON, INTERPRETED
from moelm.moe.ops import op
from moelm.moe.working_copies import refreshed, stand_in, sum_gradients_in_place

log = logging.getLogger(__name__)


@op("moelm::grouped_mm", fake=lambda x_RD, w_EDF, _: x_RD.new_empty(x_RD.shape[0], w_EDF.shape[2]))
def _grouped_mm(x_RD: Tensor, w_EDF: Tensor, offsets_E: Tensor) -> Tensor:
    """An op because the float32 product cannot be traced on CPU."""
    if not len(x_RD):  # on a rank whose experts were sent nothing
        return x_RD.new_empty(0, w_EDF.shape[2])
    return F.grouped_mm(x_RD, w_EDF, offs=offsets_E)


@op(
    "moelm::grouped_mm_backward", fake=lambda _, x_RD, w_EDF, __: (torch.empty_like(x_RD), w_EDF.new_empty(w_EDF.shape))
)
def _grouped_mm_backward(grad_RF: Tensor, x_RD: Tensor, w_EDF: Tensor, offsets_E: Tensor) -> tuple[Tensor, Tensor]:
    if not len(x_RD):
        return torch.empty_like(x_RD), w_EDF.new_zeros(w_EDF.shape)
    grad_RF = grad_RF.contiguous()  # an expanded gradient is refused by the kernel
    grad_x = F.grouped_mm(grad_RF, w_EDF.transpose(-2, -1), offs=offsets_E)
    grad_w = F.grouped_mm(x_RD.transpose(-2, -1), grad_RF, offs=offsets_E)
    return grad_x, grad_w


class _GroupedMM(torch.autograd.Function):
    """out[r] = x[r] @ w[e] for the rows r of expert e: offsets_E[e - 1] <= r < offsets_E[e].

    x [R, D] and w [E, D, F] of one dtype (float32 or bfloat16), offsets int32. Rows past the last offset come
    out uninitialised, in the gradient of x too.
    """

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, w_EDF: Tensor, offsets_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_RD, w_EDF, offsets_E)
        return _grouped_mm(x_RD, w_EDF, offsets_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RF: Tensor) -> tuple[Tensor, Tensor, None]:
        return *_grouped_mm_backward(grad_RF, *ctx.saved_tensors), None


grouped_mm = _GroupedMM.apply


@op("moelm::sum_by_expert", fake=lambda rows_RF, offsets_E: rows_RF.new_empty(offsets_E.shape[0], rows_RF.shape[1]))
def sum_by_expert(rows_RF: Tensor, offsets_E: Tensor) -> Tensor:
    """[E, F], the sum of each expert's rows: 0 for an idle expert, rows past the last offset left out.

    A grouped product with a matrix of ones, so it sums as the gradient of the weights does: in float32 for
    bfloat16 rows, in one order, without atomics and without asking the device for the offsets.
    """
    if not len(rows_RF):
        return rows_RF.new_zeros(offsets_E.shape[0], rows_RF.shape[1])
    rows_RF = rows_RF.contiguous()
    ones_8R = rows_RF.new_ones(rows_RF.shape[0], 8).T  # 8 of them: the product takes no narrower matrix
    return F.grouped_mm(ones_8R, rows_RF, offs=offsets_E)[:, 0].clone()


class _AddBias(torch.autograd.Function):
    """rows_r + bias^e for the rows r of expert e; backward of the bias is `sum_by_expert`."""

    @staticmethod
    def forward(ctx: Any, rows_RF: Tensor, bias_EF: Tensor, offsets_E: Tensor) -> Tensor:
        ctx.save_for_backward(offsets_E)
        return rows_RF + bias_EF.index_select(0, expert_of_row(offsets_E, rows_RF.shape[0]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RF: Tensor) -> tuple[Tensor, Tensor, None]:
        (offsets_E,) = ctx.saved_tensors
        return grad_RF, sum_by_expert(grad_RF, offsets_E), None


def expert_of_row(offsets_E: Tensor, n_rows: int) -> Tensor:
    """int64 [R]: how many experts end at or before each row; the last expert for rows past the last offset."""
    rows_R = torch.arange(n_rows, dtype=offsets_E.dtype, device=offsets_E.device)
    ids_R = torch.searchsorted(offsets_E, rows_R, right=True)
    return ids_R.clamp(max=offsets_E.shape[0] - 1)


def grouped_linear(x_RD: Tensor, w_EDF: Tensor, bias_EF: Tensor | None, offsets_E: Tensor) -> Tensor:
    """x[r] @ w[e] + bias[e] for the rows r of expert e, one product for all. Rows past the last offset: undefined."""
    y_RF: Tensor = grouped_mm(x_RD, w_EDF, offsets_E)
    return y_RF if bias_EF is None else _AddBias.apply(y_RF, bias_EF, offsets_E)


def loop_linear(x_RD: Tensor, w_EDF: Tensor, bias_EF: Tensor | None, offsets_E: Tensor) -> Tensor:
    """The same function, one expert after the other. Rows past the last offset come out 0."""
    ends = offsets_E.tolist()
    blocks = [x_RD[start:end] @ w for start, end, w in zip([0, *ends], ends, w_EDF, strict=False)]
    if bias_EF is not None:
        blocks = [block + bias for block, bias in zip(blocks, bias_EF, strict=True)]
    return torch.cat([*blocks, x_RD.new_zeros(x_RD.shape[0] - ends[-1], w_EDF.shape[2])])


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202)."""
    return F.silu(gate) * up


def clamped_swiglu(gate: Tensor, up: Tensor, limit: float, alpha: float) -> Tensor:
    """(up' + 1) * gate' * sigmoid(alpha gate') with gate' = min(gate, limit) and up' within +- limit (gpt-oss)."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(alpha * gate))


class Experts(nn.Module):
    """y_r = W_down^e act(W_gate^e x_r, W_up^e x_r) for rows sorted by expert e, act = SwiGLU or clamped SwiGLU; with
    `bias` one is added to each of the three products.

    An idle expert gets a zero gradient, not None, so the optimizer still decays its weights: the price of one
    stacked parameter, which never hangs FSDP or trips DDP.

    The fused kernels multiply bfloat16 copies of float32 weights: buffers that no checkpoint holds, kept up to date by
    `refresh`. Gradients of weights then have the weights' `grad_dtype`, float32 or bfloat16; with `sums_in_place` those
    of a step's micro-batches are added where one tensor stays for them.
    """

    def __init__(self, moe: MoEConfig, d_in: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(moe.n_experts, d_in, 2 * moe.d_expert))
        self.down = nn.Parameter(torch.empty(moe.n_experts, moe.d_expert, d_in))
        bias = moe.experts.bias
        self.gate_up_bias = nn.Parameter(torch.empty(moe.n_experts, 2 * moe.d_expert)) if bias else None
        self.down_bias = nn.Parameter(torch.empty(moe.n_experts, d_in)) if bias else None
        self.activation: Callable[[Tensor, Tensor], Tensor] = swiglu
        if moe.experts.activation == "clamped_swiglu":
            limit, alpha = moe.experts.clamp_limit, moe.experts.clamp_alpha
            self.activation = partial(clamped_swiglu, limit=limit, alpha=alpha)
        self.gate_up_copy: Tensor | None
        self.down_copy: Tensor | None
        self.register_buffer("gate_up_copy", None, persistent=False)
        self.register_buffer("down_copy", None, persistent=False)
        self.stand_ins: tuple[Tensor, ...] = ()  # for the weights, where autograd is not to touch their gradients
        self.sums_in_place = False
        self.keeps_copies = True  # False: where the weights arrive in the dtype that is multiplied
        self.held: dict[str, Tensor] = {}  # what is multiplied in the place of parameters, by name; see `hold`
        self.backend = fastest_backend(moe, d_in) if moe.experts.backend == "auto" else moe.experts.backend

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to the last forward pass, and could not be copied."""
        return {**super().__getstate__(), "stand_ins": (), "held": {}}

    def fuses(self, x: Tensor) -> bool:
        """Do tokens like `x` go through `mix`? Else the fused backend is the grouped one."""
        on_gpu = x.is_cuda and compute_dtype(x) == torch.bfloat16
        return self.backend == "fused" and (on_gpu or (INTERPRETED and not x.is_cuda))

    def mix(self, x_TD: Tensor, gates_TK: Tensor, plan: Permutation) -> Tensor:
        """y_t [T, D] = sum_k gate_tk Expert_k(x_t): dispatch, experts and combine at once, in the compute dtype.

        Where this is compiled, `refresh` must have run before, outside; else it runs here.
        """
        x_TD = x_TD.to(compute_dtype(x_TD))
        permutation = plan.row_of_choice_TK, plan.choice_of_row_R, plan.offsets_E
        weights = self._weights_and_copies(x_TD.dtype)
        in_place = self.sums_in_place and len(self.stand_ins) > 0  # torch 2.11 compiles no bool(tuple)
        y_TD: Tensor = expert_mlp(x_TD, gates_TK.float(), *permutation, *weights, in_place)
        return y_TD

    def mix_journey(self, journey: Journey, group: str) -> Tensor:
        """`mix` of what the ranks of `group` send each other: [S, D], which is on its way back."""
        sent, plan = (journey.packed_SD, journey.x_TD, journey.token_of_row_S), journey.plan
        batch = journey.gates_VK, plan.row_of_choice_TK, plan.choice_of_row_R, plan.offsets_E
        weights = self._weights_and_copies(journey.x_TD.dtype)
        sizes = journey.splits, journey.n_tokens, journey.n_rows
        landing_SD: Tensor = expert_mlp_around(*sent, *batch, *weights, *sizes, group)
        return landing_SD

    def _weights_and_copies(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """gate_up and down twice: what receives the gradient, and what is multiplied."""
        if not torch.compiler.is_compiling():
            self.refresh()
        weights = self.stand_ins or (self._weight("gate_up"), self._weight("down"))
        copies = [
            weight.detach().to(dtype) if copy is None or weight.dtype == dtype else copy
            for weight, copy in zip(weights, (self.gate_up_copy, self.down_copy), strict=True)
        ]
        return *weights, *copies

    def refresh(self) -> None:
        """Bring the working copies up to date, if the dtype and the device want copies at all. Where gradients are to
        have their dtype, or to be summed in place, `stand_ins` take the weights' place in the next forward pass."""
        if not self.keeps_copies:
            return
        self.stand_ins = ()
        dtype = compute_dtype(self.gate_up)
        if self.backend == "fused" and self.gate_up.is_cuda and dtype != torch.bfloat16:
            _say("grouped", f"fused computes in bfloat16, not {dtype}")
        if dtype != self.gate_up.dtype and self.fuses(self.gate_up):
            self.gate_up_copy = refreshed(self.gate_up, self.gate_up_copy, dtype)
            self.down_copy = refreshed(self.down, self.down_copy, dtype)
            pairs = (self.gate_up, self.gate_up_copy), (self.down, self.down_copy)
            if all(weight.is_leaf and weight.grad_dtype == dtype for weight, _ in pairs):
                self.stand_ins = tuple(stand_in(weight, copy) for weight, copy in pairs)
            elif self.sums_in_place and all(weight.is_leaf for weight, _ in pairs):
                for weight, copy in pairs:
                    sum_gradients_in_place(weight, copy)
                self.stand_ins = tuple(stand_in(weight, weight, in_place=True) for weight, _ in pairs)

    def forward(self, rows_RD: Tensor, offsets_E: Tensor) -> Tensor:
        """[R, D], in the autocast dtype if autocast is on. Rows past offsets_E[-1] are undefined."""
        dtype = compute_dtype(rows_RD)
        linear = loop_linear if self.backend == "loop" else grouped_linear
        gate_up_bias = None if self.gate_up_bias is None else self._weight("gate_up_bias").to(dtype)
        down_bias = None if self.down_bias is None else self._weight("down_bias").to(dtype)
        gate_up_RF = linear(rows_RD.to(dtype), self._weight("gate_up").to(dtype), gate_up_bias, offsets_E)
        hidden_RF = self.activation(*gate_up_RF.chunk(2, -1))
        return linear(hidden_RF, self._weight("down").to(dtype), down_bias, offsets_E)

    def _weight(self, name: str) -> Tensor:
        weight: Tensor = self.held[name] if self.held else getattr(self, name)
        return weight

    def hold(self) -> None:
        """Where the parameters are DTensors: take this process's part out of each. Before every forward pass, outside
        of what is compiled, where DTensors would forbid that outputs share memory."""
        parameters: dict[str, Any] = dict(self.named_parameters())
        self.held = {name: parameter.to_local() for name, parameter in parameters.items()}


def fastest_backend(moe: MoEConfig, d_in: int) -> str:
    """What `auto` stands for here; one log line says why it is not the fastest that the device has."""
    if not grouped_widths_fit(d_in, moe.d_expert):
        _say("loop", f"their input {d_in} or d_expert {moe.d_expert} is no multiple of 8")
        return "loop"
    if not torch.cuda.is_available():
        return "grouped"
    reason = why_not_fused(moe, d_in) if HAS_TRITON else "triton is not installed"
    if reason:
        _say("grouped", reason)
    return "grouped" if reason else "fused"


@cache  # one line for all layers
def _say(backend: str, reason: str) -> None:
    log.warning("experts.backend: %s, since %s", backend, reason)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product of `x` computes in. grouped_mm does not know autocast, so it must be told."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
