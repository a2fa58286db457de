"""Copies of float32 weights in the dtype that is multiplied, recast when a weight has changed and not in every pass.

A parameter names its copy (`working_copy`) and the version of itself that this holds (`working_version`), so that an
optimizer can write it in the pass in which it writes the weight. Of a DTensor it holds what this process has. What is
written through `parameter.data` counts no version and goes unnoticed.

A weight whose `grad_dtype` is that of its copy gets its gradient through the copy, in one pass and without a cast. One
whose gradients are summed in place (`GradientSum`) gets those of all micro-batches in memory that stays its own.
"""

from __future__ import annotations

from functools import cache
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

MOST_IN_BFLOAT16 = 8  # replicas whose gradients are averaged in that dtype; see `place_gradients`


def refreshed(weight: Any, copy: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A copy of the parameter `weight` as it now is: `copy`, the one that was made last, or a new one if there is none
    or it does not fit."""
    latest: Tensor | None = getattr(weight, "working_copy", None)
    if copy is not None and (copy.dtype, copy.device) != (dtype, weight.device):
        copy = None
    if copy is not None and copy is latest and weight.working_version == weight._version:
        return copy
    held = weight.to_local() if hasattr(weight, "to_local") else weight
    if copy is not None and copy.shape != held.shape:
        copy = None
    recast: Tensor = _recast(weight, held, copy, dtype)
    return recast


class GradientSum:
    """Where the gradients of a weight from the micro-batches of a step are added up, always in the same place, so that
    CUDA graphs may write there. The device knows whether there is one to add to: a graph asks no host."""

    @torch.inference_mode(False)  # a tensor of inference mode would serve no training
    def __init__(self, weight: Tensor) -> None:
        self.total = torch.empty_like(weight, requires_grad=False)  # float32, the weight's gradient once there is one
        self.has_begun = torch.zeros((), dtype=torch.bool, device=weight.device)
        self._gradient: Tensor | None = None  # of the weight, as the device knows it

    def expect(self, gradient: Tensor | None) -> None:
        """What the weight's gradient is, None or `total`, when the next is added."""
        if (gradient is None) != (self._gradient is None):
            self.has_begun.fill_(gradient is not None)
        self._gradient = gradient

    def added(self, weight: Tensor) -> None:
        """A gradient has been: the sum is that of `weight` now, and what comes next is added to it."""
        if weight.grad is not self._gradient:
            raise RuntimeError(
                "gradients of experts were removed or replaced between a forward pass and its backward pass, which "
                "adds to what there was before both; call zero_grad before the forward pass"
            )
        weight.grad = self.total
        self.expect(self.total)


class _StandIn(torch.autograd.Function):
    """The copy or the weight itself, as a function of the weight with derivative 1, made outside what is compiled. Its
    gradient, of its own dtype, goes on to the weight as it is, whose `grad_dtype` must allow that; or is in the sum
    already, and the weight gets that.

    A compiled region that takes the weight itself would cast the gradient to float32, since it knows no `grad_dtype`,
    and add it to the sum.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, value: Tensor, in_place: bool) -> Tensor:
        ctx.weight, ctx.in_place = weight, in_place
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        if not ctx.in_place:
            return gradient, None, None
        ctx.weight.gradient_sum.added(ctx.weight)
        return None, None, None


def stand_in(weight: Tensor, value: Tensor, in_place: bool = False) -> Tensor:
    """`value`, whose gradient goes to `weight` uncast. `in_place`: what computes it adds it to `gradient_sum`."""
    made: Tensor = _StandIn.apply(weight, value, in_place)
    torch._dynamo.mark_static_address(made)  # of CUDA graphs, which copy what might lie elsewhere the next time
    return made


def sum_gradients_in_place(weight: Any, copy: Any) -> None:
    """Before each forward pass, for what computes the gradient and is given nothing of the weight but its copy."""
    if not hasattr(weight, "gradient_sum"):
        weight.gradient_sum = GradientSum(weight)
    weight.gradient_sum.expect(weight.grad)
    copy.sums_for = ref(weight)


def sum_of(copy: Any) -> tuple[Tensor, Tensor]:
    """`total` and `has_begun` of the weight's `GradientSum`."""
    found: GradientSum = copy.sums_for().gradient_sum
    return found.total, found.has_begun


@torch.inference_mode(False)  # a tensor of inference mode would serve no training
@torch.no_grad()
def _recast(weight: Any, held: Tensor, copy: Tensor | None, dtype: torch.dtype) -> Tensor:
    _watch_optimizers()
    if copy is None:
        copy = torch.empty_like(held, dtype=dtype, memory_format=torch.contiguous_format)
    copy.copy_(held)
    weight.working_copy = copy
    weight.working_version = weight.seen_version = weight._version
    return copy


@cache  # once there is a copy
def _watch_optimizers() -> None:
    register_optimizer_step_post_hook(_age)


def _age(optimizer: Optimizer, *_: Any) -> None:
    """torch's fused optimizers count no version: a weight with gradient whose version stood still may have changed."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if hasattr(weight, "working_copy"):
                stood_still = weight._version == getattr(weight, "seen_version", None)
                weight.working_version = None if stood_still and weight.grad is not None else weight.working_version
                weight.seen_version = weight._version
