"""torch's AdamW with a kernel of its own for each large tensor, and the clipping of gradients that goes with it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

MIN_ELEMENTS = 2**20  # a smaller tensor takes less time than a launch: torch's kernel does them all at once

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    from moelm.training.adamw_kernel import adamw_update


def clip_gradients(optimizer: Optimizer, parameters: Iterable[nn.Parameter], limit: float | None) -> Tensor:
    """The norm of all gradients together, float32 scalar; they count min(1, limit / (norm + 1e-6)) times in the step.

    `AdamW` multiplies them as it reads them; for other optimizers they are scaled in place.
    """
    if not isinstance(optimizer, AdamW):
        return nn.utils.clip_grad_norm_(parameters, float("inf") if limit is None else limit)
    norm = gradient_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if limit is not None:
        optimizer.gradient_scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    return norm


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """Euclidean norm of all together, summed in float32 whatever their dtypes."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        by_dtype.setdefault(gradient.dtype, []).append(gradient)
    norms = [norm for group in by_dtype.values() for norm in torch._foreach_norm(group, 2, dtype=torch.float32)]
    return torch.linalg.vector_norm(torch.stack(norms))


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` (arXiv 1711.05101) with fused=True: the same formula, options and state.

    What else touches a large tensor happens in the same pass. Its gradient may be bf16 and is multiplied by
    `gradient_scale`, a float32 scalar on the device that holds for one step. Where the parameter has a `working_copy`
    (bf16, the same shape) that becomes its new value, rounded, and `working_version` the version it is the copy of.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]] | Iterable[Tensor],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        self.gradient_scale: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale, self.gradient_scale = self.gradient_scale, None
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter] = _new_state(parameter)
            options = {key: group[key] for key in ("lr", "eps", "weight_decay")}
            large = [parameter for parameter in parameters if _is_large(parameter)]
            small = [parameter for parameter in parameters if not _is_large(parameter)]
            self._step_large(large, scale, betas=group["betas"], **options)
            self._step_small(small, scale, beta1=group["betas"][0], beta2=group["betas"][1], **options)
        return loss

    def _step_large(self, parameters: list[Tensor], scale: Tensor | None, **options: Any) -> None:
        if not parameters:
            return
        states = [self.state[parameter] for parameter in parameters]
        torch._foreach_add_([state["step"] for state in states], 1)
        for parameter, state in zip(parameters, states, strict=True):
            assert parameter.grad is not None
            copy = getattr(parameter, "working_copy", None)
            moments = state["exp_avg"], state["exp_avg_sq"]
            adamw_update(parameter, parameter.grad.contiguous(), *moments, copy, state["step"], scale, **options)
            # autograd does not see what a kernel writes
            torch.autograd.graph.increment_version([parameter, *moments, *([] if copy is None else [copy])])
            if copy is not None:
                parameter.working_version = parameter._version  # type: ignore[attr-defined]

    def _step_small(self, parameters: list[Tensor], scale: Tensor | None, **options: Any) -> None:
        if not parameters:
            return
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            grad_scale=None if scale is None else scale.reciprocal(),  # by which the gradients are divided
            amsgrad=False,
            maximize=False,
            **options,
        )


def _is_large(parameter: Tensor) -> bool:
    """Does it get a kernel of its own? One with a bf16 gradient must, since torch's wants a single dtype."""
    assert parameter.grad is not None
    return parameter.is_contiguous() and (parameter.numel() >= MIN_ELEMENTS or parameter.grad.dtype != torch.float32)


def _new_state(parameter: Tensor) -> dict[str, Tensor]:
    zeros = torch.zeros_like(parameter), torch.zeros_like(parameter)
    return {"step": torch.zeros((), device=parameter.device), "exp_avg": zeros[0], "exp_avg_sq": zeros[1]}
