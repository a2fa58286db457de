"""The routed experts: stacked weights, and the two ways to multiply sorted rows by them.

`loop` is the reference that nobody can doubt; `grouped` is one product for all experts. Both are tested equal.
Weights are `[E, in, out]`, gate and up side by side in one tensor, so that one product serves both.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelm.config import MoEConfig, grouped_widths_fit

log = logging.getLogger(__name__)


@torch.library.custom_op("moelm::grouped_mm", mutates_args=())
def grouped_mm(x_RD: Tensor, w_EDF: Tensor, offsets_E: Tensor) -> Tensor:
    """out[r] = x[r] @ w[e] for the rows r of expert e: offsets_E[e - 1] <= r < offsets_E[e].

    x [R, D] and w [E, D, F] of one dtype (float32 or bfloat16), offsets int32. Rows past the last offset come
    out uninitialised, in the gradient of x too. A custom op because the fp32 product cannot be traced on CPU.
    """
    return F.grouped_mm(x_RD, w_EDF, offs=offsets_E)


@grouped_mm.register_fake
def _(x_RD: Tensor, w_EDF: Tensor, offsets_E: Tensor) -> Tensor:
    return x_RD.new_empty(x_RD.shape[0], w_EDF.shape[2])


@torch.library.custom_op("moelm::grouped_mm_backward", mutates_args=())
def grouped_mm_backward(grad_RF: Tensor, x_RD: Tensor, w_EDF: Tensor, offsets_E: Tensor) -> tuple[Tensor, Tensor]:
    grad_RF = grad_RF.contiguous()  # an expanded gradient is refused by the kernel
    grad_x = F.grouped_mm(grad_RF, w_EDF.transpose(-2, -1), offs=offsets_E)
    grad_w = F.grouped_mm(x_RD.transpose(-2, -1), grad_RF, offs=offsets_E)
    return grad_x, grad_w


@grouped_mm_backward.register_fake
def _(grad_RF: Tensor, x_RD: Tensor, w_EDF: Tensor, offsets_E: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_RD), w_EDF.new_empty(w_EDF.shape)


def _save_for_backward(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: torch.autograd.function.FunctionCtx, grad_RF: Tensor) -> tuple[Tensor, Tensor, None]:
    grad_x, grad_w = grouped_mm_backward(grad_RF, *ctx.saved_tensors)  # type: ignore[attr-defined]
    return grad_x, grad_w, None


grouped_mm.register_autograd(_backward, setup_context=_save_for_backward)


def loop_mm(x_RD: Tensor, w_EDF: Tensor, offsets_E: Tensor) -> Tensor:
    """The same function, one expert after the other. Rows past the last offset come out 0."""
    ends = offsets_E.tolist()
    blocks = [x_RD[start:end] @ w for start, end, w in zip([0, *ends], ends, w_EDF, strict=False)]
    return torch.cat([*blocks, x_RD.new_zeros(x_RD.shape[0] - ends[-1], w_EDF.shape[2])])


class Experts(nn.Module):
    """y_r = W_down^e (silu(W_gate^e x_r) * W_up^e x_r) for rows sorted by expert e.

    An idle expert gets a zero gradient, not None, so the optimizer still decays its weights: the price of one
    stacked parameter, which never hangs FSDP or trips DDP.
    """

    def __init__(self, moe: MoEConfig, d_in: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(moe.n_experts, d_in, 2 * moe.d_expert))
        self.down = nn.Parameter(torch.empty(moe.n_experts, moe.d_expert, d_in))
        fits = grouped_widths_fit(d_in, moe.d_expert)
        self.backend = moe.experts.backend
        if self.backend == "auto":
            self.backend = "grouped" if fits else "loop"
            if not fits:
                _say_that_loop_is_used(d_in, moe.d_expert)

    def forward(self, rows_RD: Tensor, offsets_E: Tensor) -> Tensor:
        """[R, D], in the autocast dtype if autocast is on. Rows past offsets_E[-1] are undefined."""
        dtype = compute_dtype(rows_RD)
        matmul = grouped_mm if self.backend == "grouped" else loop_mm
        gate_RF, up_RF = matmul(rows_RD.to(dtype), self.gate_up.to(dtype), offsets_E).chunk(2, -1)
        hidden: Tensor = matmul(F.silu(gate_RF) * up_RF, self.down.to(dtype), offsets_E)
        return hidden


@cache  # one line for all layers
def _say_that_loop_is_used(d_in: int, d_expert: int) -> None:
    log.warning("experts.backend: loop, since their input %d or d_expert %d is no multiple of 8", d_in, d_expert)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product of `x` computes in. grouped_mm does not know autocast, so it must be told."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
