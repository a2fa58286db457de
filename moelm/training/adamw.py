"""torch's AdamW with one pass over memory for each large tensor, and with bfloat16 moments."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.adamw import adamw

from moelm.moe.kernels import HAS_TRITON
from moelm.training.shards import local

if HAS_TRITON:
    from moelm.training.adamw_kernel import adamw_kernel

LARGE = 2**20  # elements; a smaller tensor takes less time than a launch, and torch's kernel updates many in one
LOW_32_BITS = 2**32 - 1


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` (arXiv 1711.05101) with fused=True: the same formula, options and state.

    On a GPU a large parameter is updated by itself, in one pass that also multiplies the gradient (float32 or bfloat16)
    by `gradient_scale` and writes the new value, rounded, into the parameter's `working_copy` where it has one
    (bfloat16 or float32, same shape; its `working_version` is the version this is a copy of). `gradient_scale` is a
    float32 scalar on the device that holds for one step; a NaN is for a step that changes nothing, no moment or count
    either. All others are updated together by torch, their gradients scaled in place.

    `moments` is the dtype of exp_avg and exp_avg_sq of large parameters. In bfloat16 they are rounded up or down at
    random, right in the mean: to the nearest, exp_avg_sq could not decay with beta2 > 0.998, where a step takes less
    than half of its last digit. The random bits are a function of parameter, element and step, so a resume is exact;
    of a sharded parameter (a DTensor) each rank updates its part, and an element is counted within that.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]] | Iterable[Tensor],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        moments: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        self.moments = moments
        self.gradient_scale: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        n_before = 0  # parameters of the groups before
        for group in self.param_groups:
            alone: dict[int, Tensor] = {}
            together: list[Tensor] = []
            for index, parameter in enumerate(group["params"], start=n_before):
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    self.state[parameter] = self._new_state(parameter)
                if self._is_alone(parameter):
                    alone[index] = parameter
                else:
                    together.append(parameter)
            n_before += len(group["params"])
            options = {key: group[key] for key in ("lr", "eps", "weight_decay")}
            self._update_alone(alone, betas=group["betas"], **options)
            self._update_together(together, beta1=group["betas"][0], beta2=group["betas"][1], **options)
        self.gradient_scale = None
        return loss

    def _is_alone(self, parameter: Tensor) -> bool:
        assert parameter.grad is not None
        if parameter.grad.dtype != parameter.dtype:  # torch updates no such parameter
            return True
        return is_large(parameter) and (has_kernel(parameter) or self.moments != torch.float32)

    def reads_bfloat16(self, parameter: Tensor) -> bool:
        """Does a step take less time if the gradient of this parameter is bfloat16?"""
        return is_large(parameter) and has_kernel(parameter)

    def _update_alone(self, parameters: dict[int, Tensor], **options: Any) -> None:
        if not parameters:
            return
        steps = [self.state[parameter]["step"] for parameter in parameters.values()]
        if self.gradient_scale is None:
            torch._foreach_add_(steps, 1.0)
        else:  # a list, since of one tensor torch asks the device for the number
            torch._foreach_add_(steps, [(~self.gradient_scale.isnan()).float()] * len(steps))
        for index, parameter in parameters.items():
            assert parameter.grad is not None
            state, copy = self.state[parameter], getattr(parameter, "working_copy", None)
            update = adamw_kernel if has_kernel(parameter) else adamw_reference
            update(
                local(parameter),
                local(parameter.grad).contiguous(),
                local(state["exp_avg"]),
                local(state["exp_avg_sq"]),
                copy,
                state["step"],
                self.gradient_scale,
                index=index,
                **options,
            )
            # a kernel does not tell autograd what it wrote
            increment_version(parameter if copy is None else (parameter, copy))
            if copy is not None:
                parameter.working_version = parameter._version  # type: ignore[attr-defined]

    def _update_together(self, parameters: list[Tensor], **options: Any) -> None:
        if not parameters:
            return
        gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        states = [self.state[parameter] for parameter in parameters]
        if self.gradient_scale is not None:
            torch._foreach_mul_(gradients, self.gradient_scale)
        adamw(
            [local(parameter) for parameter in parameters],
            gradients,
            [local(state["exp_avg"]) for state in states],
            [local(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            maximize=False,
            found_inf=None if self.gradient_scale is None else self.gradient_scale.isnan().float(),
            **options,
        )
        increment_version(parameters)  # nor does torch's kernel: without this a working copy would seem fresh

    def _new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        moments = {key: torch.zeros_like(parameter, dtype=self._dtype(parameter)) for key in ("exp_avg", "exp_avg_sq")}
        return {"step": torch.zeros((), device=parameter.device), **moments}

    def _dtype(self, parameter: Tensor) -> torch.dtype:
        return self.moments if is_large(parameter) else parameter.dtype

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Moments of either dtype: they become what this optimizer keeps."""
        super().load_state_dict(state_dict)  # makes all of them float32
        for parameter, state in self.state.items():
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = state[key].to(self._dtype(parameter))


def is_large(parameter: Tensor) -> bool:
    return parameter.numel() >= LARGE and parameter.is_contiguous()


def has_kernel(parameter: Tensor) -> bool:
    return HAS_TRITON and parameter.is_cuda


def adamw_reference(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    working_copy: Tensor | None,
    step: Tensor,
    gradient_scale: Tensor | None,
    *,
    index: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One step for one parameter p of any shape, in place.

        g = gradient_scale * gradient;  m <- m + (1 - beta1) (g - m);  v <- beta2 v + (1 - beta2) g^2
        p <- (1 - lr * weight_decay) p - lr * m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)

    p float32, gradient float32 or bfloat16, m and v both float32 or both bfloat16; all arithmetic is float32. `step` is
    t, float32 scalar, 1 in the first step. `index` is the place of p in the optimizer. With a `gradient_scale` of NaN
    all stay as they are.
    """
    beta1, beta2 = betas
    g = gradient.float() if gradient_scale is None else gradient.float() * gradient_scale
    m = exp_avg + (1 - beta1) * (g - exp_avg)
    v = beta2 * exp_avg_sq.float() + (1 - beta2) * (g * g)
    correction1, correction2 = (1 - beta ** step.double() for beta in betas)
    p = parameter - lr * weight_decay * parameter
    p = p - (lr / correction1).float() * m / (v.sqrt() / correction2.sqrt().float() + eps)
    if exp_avg.dtype == torch.bfloat16:
        elements = torch.arange(parameter.numel(), device=parameter.device).view_as(parameter)
        random = hash32(elements & LOW_32_BITS ^ hash32(hash32(step.long()) ^ index))
        m, v = round_at_random(m, random & 0xFFFF), round_at_random(v, random >> 16)
    for held, new in ((parameter, p), (exp_avg, m), (exp_avg_sq, v)):
        held.copy_(new if gradient_scale is None else torch.where(gradient_scale.isnan(), held, new.to(held.dtype)))
    if working_copy is not None:
        working_copy.copy_(parameter)


def hash32(x: Tensor) -> Tensor:
    """int64 in [0, 2^32), to the same: each bit depends on all (lowbias32 of C. Wellons' hash-prospector)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & LOW_32_BITS
    x = (x ^ (x >> 15)) * 0x846CA68B & LOW_32_BITS
    return x ^ (x >> 16)


def round_at_random(x: Tensor, random: Tensor) -> Tensor:
    """float32 to bfloat16, away from zero in as many of the 2^16 values of `random` as x lies on the way there.

    A NaN may become another number: in AdamW the parameter is a NaN then.
    """
    bits = (x.view(torch.int32).long() & LOW_32_BITS) + random & LOW_32_BITS
    return (bits >> 16).to(torch.uint16).view(torch.bfloat16)
