"""Muon for the matrices of a model and AdamW for the rest, as one optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from moelm.training.shards import local, with_whole_matrices

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of Keller Jordan's Muon: steepest at 0, ends near 1 and not at it
NEWTON_SCHULZ_STEPS = 5


class MuonAdamW(Optimizer):
    """Muon as Moonlight scales it (arXiv 2502.16982, section 2.2), and AdamW with the same learning rate.

    A group follows the `rule` "muon" or "adamw" (the default). With gradient G, momentum M and weights W of shape
    [A, B] Muon does

        M <- mu M + (1 - mu) G
        W <- (1 - lr * decay) W - lr * 0.2 sqrt(max(A, B)) * orthogonalize(mu M + (1 - mu) G)

    for each matrix by itself: a parameter [N, A, B] is a stack of N, and `halves` of its group is the axis along which
    two matrices stand side by side, None for one. `gradient_scale` is as in `AdamW`; gradients are scaled in place.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        own = {"rule": "adamw", "halves": None, "momentum": momentum}
        # `fused` also tells load_state_dict to keep `step` on the parameter's device
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": True}
        super().__init__(groups, {**own, **defaults})
        self.gradient_scale: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters and self.gradient_scale is not None:
                torch._foreach_mul_([local(parameter.grad) for parameter in parameters], self.gradient_scale)
            (self._muon if group["rule"] == "muon" else self._adamw)(group, parameters)
        self.gradient_scale = None
        return loss

    def _muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        lr, mu, axis = group["lr"], group["momentum"], group["halves"]
        skips = None if self.gradient_scale is None else self.gradient_scale.isnan()
        for parameter in parameters:
            assert parameter.grad is not None
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            gradient, momentum, weight = (local(each) for each in (parameter.grad, state["momentum"], parameter))
            if skips is not None:
                gradient = torch.where(skips, momentum, gradient)  # which leaves it where it is
            momentum.lerp_(gradient, 1 - mu)
            update, held = with_whole_matrices(gradient.lerp(momentum, mu), parameter)  # Nesterov's
            matrices = [update] if axis is None else update.chunk(2, axis)
            directions = [orthogonalize(matrix) for matrix in matrices]
            scale = 0.2 * math.sqrt(max(matrices[0].shape[-2:]))  # the root mean square of AdamW's updates
            direction = directions[0][held] if axis is None else torch.cat(directions, axis)[held]
            new = (weight * (1 - lr * group["weight_decay"])).add_(direction, alpha=-lr * scale)
            weight.copy_(new if skips is None else torch.where(skips, weight, new))

    def _adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        if parameters:
            states = [self.state[parameter] for parameter in parameters]
            adamw(
                [local(parameter) for parameter in parameters],
                [local(parameter.grad) for parameter in parameters if parameter.grad is not None],
                [local(state["exp_avg"]) for state in states],
                [local(state["exp_avg_sq"]) for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
                found_inf=None if self.gradient_scale is None else self.gradient_scale.isnan().float(),
            )


def orthogonalize(matrices: Tensor) -> Tensor:
    """Same shape [A, B] or [N, A, B]: roughly U V^T of each matrix's singular value decomposition U S V^T.

    Newton-Schulz: from X = G / |G|, five times X <- a X + (b X X^T + c (X X^T)^2) X, whose singular values end within
    0.6 and 1.3 unless they began near 0; a matrix of zeros stays one.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.to(newton_schulz_dtype(matrices.device))
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT  # the smaller Gram matrix
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    add_product = torch.addmm if x.ndim == 2 else torch.baddbmm
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = add_product(x, add_product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def newton_schulz_dtype(device: torch.device) -> torch.dtype:
    """bf16, which the iteration bears; float32 on a CPU without AVX-512, where bf16 products take 30 times as long."""
    slow = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() != "AVX512"
    return torch.float32 if slow else torch.bfloat16
