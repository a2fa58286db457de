"""What all routers share: float32, jitter, logits, and the statistics of a decision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moelm.config import MoEConfig, RouterConfig, UserError, setting
from moelm.moe.kernels import HAS_TRITON
from moelm.moe.routing.product import float32_linear
from moelm.moe.types import RouteContext, RouterStats, Routing, TokenChoice, count_per_sequence

if HAS_TRITON:
    from moelm.moe.kernels import counting


class Router(nn.Module):
    """Tokens -> (routing, statistics). A router implements `route`.

    Everything is float32, whatever autocast says and whatever dtype the model was cast to: under autocast even
    `F.linear(x.float(), w)` comes out in bf16, and near ties then choose other experts.
    """

    expert_bias: Tensor | None  # float32 [E], moved by a balancer between steps, never by gradient
    one_graph = True  # torch.compile takes `forward` as one graph
    float32_tokens = True  # False: `route` takes tokens as the model computes them, and makes float32 of them itself

    def __init__(self, config: RouterConfig, moe: MoEConfig, d_model: int) -> None:
        super().__init__()
        self.n_experts, self.top_k, self.route_scale = moe.n_experts, moe.top_k, config.route_scale
        self.register_buffer("expert_bias", None)
        self.initial: dict[str, float] = {}  # own parameter -> the constant that model/init.py fills it with

    def forward(self, x_BLD: Tensor, context: RouteContext) -> tuple[Routing, RouterStats]:
        with torch.autocast(device_type=x_BLD.device.type, enabled=False):
            x_TD = x_BLD.flatten(0, 1)
            if self.float32_tokens:
                x_TD = x_TD.float()
            if context.token_mask_BL is not None:  # replaced, not multiplied: padding may hold NaN
                x_TD = torch.where(context.token_mask_BL.reshape(-1, 1), x_TD, 0.0)
            routing, stats = self.route(x_TD, context)
        if isinstance(routing, TokenChoice) and routing.expert_ids_TK.shape != (len(x_TD), self.top_k):
            found = f"{type(self).__name__}: the ids of experts are of shape {list(routing.expert_ids_TK.shape)}"
            wanted = f"not [{len(x_TD)}, {self.top_k}]; a choice that is not taken has the id {self.n_experts}"
            raise UserError(f"{found}, {wanted}")
        return routing, stats

    def route(self, x_TD: Tensor, context: RouteContext) -> tuple[Routing, RouterStats]:
        """`x_TD` float32 unless `float32_tokens` is False, 0 where the mask excludes a token. Random only if
        `context.training`."""
        raise NotImplementedError

    def loss(self, stats: RouterStats, ce_BL: Tensor, predicted_BL: Tensor) -> Tensor | None:
        """A loss that trains the router beside what flows through its gates; None if it needs none.

        `stats` are stacked over the MoE layers, `ce_BL` is each token's cross-entropy, detached, `predicted_BL` is
        False where a token predicts nothing.
        """
        return None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Keep expert_bias in float32 when the model is cast: a bf16 0.5 does not move by 0.001."""
        bias = self.expert_bias
        super()._apply(fn, recurse)
        if bias is not None and self.expert_bias is not None and self.expert_bias.dtype != torch.float32:
            self.expert_bias = bias.to(device=self.expert_bias.device)
        return self


@dataclass
class LearnedRouterConfig(RouterConfig):
    jitter: float = setting(0.0, ge=0, lt=1)  # router input x uniform(1 - jitter, 1 + jitter) in training (Switch)
    logit_soft_cap: float | None = setting(None, gt=0)  # logits become cap x tanh(logits / cap)
    trained_bias: bool = False  # a bias inside the logits, trained by gradient (gpt-oss)


class LearnedRouter(Router):
    """logits = x W^T (+ b), optionally of a jittered x (Switch, arXiv 2101.03961, section 2.4) and soft-capped.

    The experts see the clean tokens: jitter multiplies the router's own copy.
    """

    float32_tokens = False

    def __init__(self, config: LearnedRouterConfig, moe: MoEConfig, d_model: int) -> None:
        super().__init__(config, moe, d_model)
        self.jitter, self.logit_soft_cap = config.jitter, config.logit_soft_cap
        self.weight = nn.Parameter(torch.empty(moe.n_experts, d_model))
        self.bias = nn.Parameter(torch.empty(moe.n_experts)) if config.trained_bias else None

    def forward(self, x_BLD: Tensor, context: RouteContext) -> tuple[Routing, RouterStats]:
        if self.jitter and context.training:
            factor_BLD = 1 + self.jitter * (2 * torch.rand_like(x_BLD, dtype=torch.float32) - 1)
            x_BLD = x_BLD.float() * factor_BLD
        return super().forward(x_BLD, context)

    def project(self, x_TD: Tensor) -> Tensor:
        """[T, E] before bias and cap."""
        return float32_linear(x_TD, self.weight)

    def logits(self, x_TD: Tensor) -> Tensor:
        """float32 [T, E]."""
        logits_TE = self.project(x_TD)
        if self.bias is not None:
            logits_TE = logits_TE + self.bias.float()
        if self.logit_soft_cap is not None:
            logits_TE = self.logit_soft_cap * torch.tanh(logits_TE / self.logit_soft_cap)
        return logits_TE


@dataclass
class FixedRouterConfig(RouterConfig):
    learned: ClassVar[bool] = False
    balanced: ClassVar[bool] = True
    equal_gates: ClassVar[bool] = True


class FixedRouter(Router):
    """A router without weights: every gate is 1 / K, and no gradient reaches it, since there is nothing to train."""

    float32_tokens = False  # it reads none

    def choose(self, context: RouteContext) -> Tensor:
        """The expert ids [T, K], distinct for each token."""
        raise NotImplementedError

    def route(self, x_TD: Tensor, context: RouteContext) -> tuple[TokenChoice, RouterStats]:
        expert_ids_TK = self.choose(context)
        gates_TK = torch.full(expert_ids_TK.shape, 1 / self.top_k, device=x_TD.device)
        prob_TE = gates_TK.new_zeros(x_TD.shape[0], self.n_experts).scatter(1, expert_ids_TK, gates_TK)
        return token_choice_with_stats(expert_ids_TK, gates_TK * self.route_scale, prob_TE, context)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor) -> Tensor:
        prob_TE = logits_TE.softmax(-1)
        ctx.save_for_backward(prob_TE)
        return prob_TE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TE: Tensor) -> Tensor:
        prob_TE: Tensor = ctx.saved_tensors[0]
        return prob_TE * (grad_TE - (grad_TE * prob_TE).sum(-1, keepdim=True))


def probabilities(logits_TE: Tensor) -> Tensor:
    """softmax(logits). Of torch's own a compiled forward pass keeps the negative result, too."""
    prob_TE: Tensor = _Softmax.apply(logits_TE)
    return prob_TE


def token_choice_with_stats(
    expert_ids_TK: Tensor,
    gates_TK: Tensor,
    prob_TE: Tensor,
    context: RouteContext,
    *,
    logits_TE: Tensor | None = None,
    is_softmax: bool = False,
    unbiased_ids_TK: Tensor | None = None,
    extra: dict[str, Tensor] | None = None,
) -> tuple[TokenChoice, RouterStats]:
    """Masked tokens get the id "none" and a gate of 0 and are counted nowhere; the rest is counted per sequence.

    `expert_ids_TK` int64, best first, may hold "none". `prob_TE` are probabilities over experts (rows sum to 1), for
    the balancers. `logits_TE`: None for a router without; `is_softmax`: `prob_TE` is theirs, made by
    `probabilities`, and nothing else of them is kept for backward. `unbiased_ids_TK`: what would have been chosen
    without expert_bias, None if the same. `extra`: more statistics, already summed over counted tokens.
    """
    B, n_experts = context.token_ids_BL.shape[0], prob_TE.shape[1]
    if context.token_mask_BL is not None:
        mask_T1 = context.token_mask_BL.reshape(-1, 1)
        none = torch.full_like(expert_ids_TK, n_experts)
        expert_ids_TK = torch.where(mask_T1, expert_ids_TK, none)
        gates_TK = torch.where(mask_T1, gates_TK, 0.0)
        if unbiased_ids_TK is not None:
            unbiased_ids_TK = torch.where(mask_T1, unbiased_ids_TK, none)
    n_tokens_B = count_tokens(context)
    load_BE, first_choice_BE, gate_BE = sums_of_choices(expert_ids_TK, gates_TK, B, n_experts)
    log_z_sq, extra = n_tokens_B.new_zeros(()), {**(extra or {})}
    if logits_TE is not None:
        log_z_sq, observed = means_of_tokens(prob_TE, logits_TE, context, is_softmax)
        extra |= observed
    if not context.training:
        extra["expert_ids_BLK"] = expert_ids_TK.unflatten(0, context.token_ids_BL.shape)
    stats = RouterStats(
        load_BE=load_BE,
        kept_BE=load_BE,
        first_choice_BE=first_choice_BE,
        unbiased_load_BE=load_BE if unbiased_ids_TK is None else count_per_sequence(unbiased_ids_TK, B, n_experts),
        prob_BE=sum_per_sequence(prob_TE, context) / n_tokens_B.clamp(min=1).unsqueeze(-1),
        gate_BE=gate_BE,
        n_tokens_B=n_tokens_B,
        log_z_sq=log_z_sq,
        extra=extra,
    )
    return TokenChoice(expert_ids_TK, gates_TK), stats


def sums_of_choices(
    expert_ids_TK: Tensor, gates_TK: Tensor, n_sequences: int, n_experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """float32 [B, E] each: how often an expert was chosen, how often first, the sum of its gates, with gradient. No
    atomics in the sum: the same one every time."""
    if HAS_TRITON and gates_TK.is_cuda:
        sums_3BE: Tensor = counting.sums_of_choices(expert_ids_TK, gates_TK, n_sequences, n_experts)
        return sums_3BE[0].detach(), sums_3BE[1].detach(), sums_3BE[2]
    dense_TE = gates_TK.new_zeros(gates_TK.shape[0], n_experts + 1).scatter(1, expert_ids_TK, gates_TK)
    return (
        count_per_sequence(expert_ids_TK, n_sequences, n_experts),
        count_per_sequence(expert_ids_TK[:, :1], n_sequences, n_experts),
        dense_TE[:, :n_experts].unflatten(0, (n_sequences, -1)).sum(1),
    )


def means_of_tokens(
    prob_TE: Tensor, logits_TE: Tensor, context: RouteContext, is_softmax: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Means over the counted tokens: logsumexp(logits)^2, with gradient, and the OBSERVED scalars of a router with
    logits, all in one reduction; in training `logit_max` too."""
    prob, logits = prob_TE.detach(), logits_TE.detach()
    if is_softmax:  # is the gradient, too: so the backward pass, which needs it anyway, keeps nothing else of [T, E]
        linear_T = (prob * logits_TE).sum(-1)
        log_z_T = logits.logsumexp(-1) + (linear_T - linear_T.detach())
    else:
        log_z_T = logits_TE.logsumexp(-1)
    experts_E = torch.arange(prob.shape[1], device=prob.device)
    second_T = torch.where(experts_E == prob.argmax(-1, keepdim=True), 0.0, prob).amax(-1)
    observed = {
        "prob_entropy": torch.special.entr(prob).sum(-1),
        "top1_margin": prob.amax(-1) - second_T,
        "logit_sq": logits.square().mean(-1),
    }
    means = mean_over_tokens(torch.stack([log_z_T.square(), *observed.values()]), context)
    extra = dict(zip(observed, means[1:].detach(), strict=True))
    if context.training:
        largest_T = logits.abs().amax(-1)
        if context.token_mask_BL is not None:
            largest_T = torch.where(context.token_mask_BL.flatten(), largest_T, 0.0)
        extra["logit_max"] = largest_T.amax()
    return means[0], extra


def count_tokens(context: RouteContext) -> Tensor:
    """float32 [B]: counted tokens of each sequence."""
    B, L = context.token_ids_BL.shape
    if context.token_mask_BL is None:
        return torch.full((B,), float(L), device=context.token_ids_BL.device)
    return context.token_mask_BL.sum(1, dtype=torch.float32)


def sum_per_sequence(values_TE: Tensor, context: RouteContext) -> Tensor:
    """[B, E]: the sum over each sequence's counted tokens."""
    if context.token_mask_BL is not None:
        values_TE = torch.where(context.token_mask_BL.reshape(-1, 1), values_TE, 0.0)
    summed_BE: Tensor = values_TE.unflatten(0, context.token_ids_BL.shape).sum(1)
    return summed_BE


def mean_over_tokens(values_xT: Tensor, context: RouteContext) -> Tensor:
    """[x]: the mean over the counted tokens of the batch; 0 if there is none."""
    if context.token_mask_BL is None:
        return values_xT.mean(-1)
    mask_T = context.token_mask_BL.flatten()
    return torch.where(mask_T, values_xT, 0.0).sum(-1) / mask_T.sum().clamp(min=1)


def mix(x: Tensor) -> Tensor:
    """A fixed scrambling of non-negative integers below 2^31 to ones below 2^31: the finaliser of lowbias32."""
    for multiplier in (0x21F0AAAD, 0x735A2D97):
        x = ((x ^ (x >> 15)) * multiplier) & 0x7FFFFFFF
    return x ^ (x >> 15)
