"""A router and a balancer with one fault at a time: the contracts must refuse each of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import Tensor

from moelm.config import MoEConfig, register, registry, setting
from moelm.moe.balancing.base import Balancer, LossConfig
from moelm.moe.balancing.switch import switch_aux_loss
from moelm.moe.choice import best_ids
from moelm.moe.routing.top_k import TopKConfig, TopKRouter
from moelm.moe.types import RouteContext, RouterStats, Routing, TokenChoice

ROUTER_FAULTS = {
    "a count taken twice": "shapes_and_dtypes_are_those_of_the_seam",
    "gates in the compute dtype": "shapes_and_dtypes_are_those_of_the_seam",
    "detached gates and probabilities": "gradient_reaches_every_weight_of_the_router",
    "a scale forgotten": "route_scale_multiplies_the_gates",
    "a read of the device": "compiled_equals_eager",
    "a counter in forward": "checkpointed_equals_plain",
    "a choice made anew": "recomputation_keeps_the_choice",
    "noise of its own": "the_same_seed_gives_the_same_step",
    "noise in evaluation": "evaluation_is_free_of_noise",
    "padding that counts": "shapes_and_dtypes_are_those_of_the_seam",
    "a look at padding": "masked_tokens_change_nothing",
}


@contextmanager
def broken_things_registered() -> Iterator[None]:
    """They are known inside, and unknown again outside, where tests walk the registry."""
    saved = {kind: dict(names) for kind, names in registry._registry.items()}
    register("router", "broken", BrokenRouterConfig)(BrokenRouter)
    register("balancer", "broken", BrokenBalancerConfig)(BrokenBalancer)
    try:
        yield
    finally:
        registry._registry.clear()
        registry._registry.update(saved)


@dataclass
class BrokenRouterConfig(TopKConfig):
    fault: str = setting("", allowed=("", *ROUTER_FAULTS))


class BrokenRouter(TopKRouter):
    def __init__(self, config: BrokenRouterConfig, moe: MoEConfig, d_model: int) -> None:
        super().__init__(config, moe, d_model)
        self.fault = config.fault
        if self.fault == "a counter in forward":
            self.register_buffer("usage_bias", torch.zeros(()))

    def forward(self, x_BLD: Tensor, context: RouteContext) -> tuple[Routing, RouterStats]:
        return super().forward(x_BLD - x_BLD.mean() if self.fault == "a look at padding" else x_BLD, context)

    def route(self, x_TD: Tensor, context: RouteContext) -> tuple[TokenChoice, RouterStats]:
        if self.fault == "noise of its own":
            x_TD = x_TD + torch.randn(x_TD.shape, generator=_unseeded)
        elif self.fault == "noise in evaluation":
            x_TD = x_TD + torch.randn_like(x_TD)
        elif self.fault == "a read of the device":
            x_TD = x_TD * (2.0 if float(x_TD.sum()) > 1e30 else 1.0)
        elif self.fault == "padding that counts":
            context = context._replace(token_mask_BL=None)
        elif self.fault == "a counter in forward":
            self.usage_bias += 1
        elif self.fault == "a choice made anew":
            with mock.patch("moelm.moe.routing.top_k.choose", best_ids):
                return super().route(x_TD, context)
        routing, stats = super().route(x_TD, context)
        if self.fault == "a scale forgotten":
            routing = routing._replace(gates_TK=routing.gates_TK / self.route_scale)
        elif self.fault == "gates in the compute dtype":
            routing = routing._replace(gates_TK=routing.gates_TK.bfloat16())
        elif self.fault == "a count taken twice":
            stats = stats._replace(load_BE=2 * stats.load_BE)
        elif self.fault == "detached gates and probabilities":
            routing = routing._replace(gates_TK=routing.gates_TK.detach())
            stats = stats._replace(prob_BE=stats.prob_BE.detach(), log_z_sq=stats.log_z_sq.detach())
        return routing, stats


_unseeded = torch.Generator()
_unseeded.seed()

BALANCER_FAULTS = {
    "a sum over tokens": "a_batch_twice_as_large_gives_the_same_loss",
    "layers pooled": "shapes_and_dtypes_are_those_of_the_seam",
    "a detached loss": "gradient_reaches_the_router",
    "statistics written": "inputs_stay_as_they_are",
    "a division by the count": "a_fully_masked_batch_gives_finite_values_and_gradients",
    "the sign": "collapse_costs_more_than_balance",
}


@dataclass
class BrokenBalancerConfig(LossConfig):
    fault: str = setting("", allowed=("", *BALANCER_FAULTS))


class BrokenBalancer(Balancer):
    config: BrokenBalancerConfig

    def loss(self, stats: RouterStats, window_ME: Tensor | None) -> Tensor:
        fault = self.config.fault
        if fault == "statistics written":
            stats.load_BE.mul_(2)
        raw_M = switch_aux_loss(stats.load_BE, stats.prob_BE, stats.n_tokens_B)
        if fault == "a sum over tokens":
            return raw_M * stats.n_tokens_B.sum(-1)
        if fault == "layers pooled":
            return raw_M.mean()
        if fault == "a detached loss":
            return raw_M.detach()
        if fault == "a division by the count":
            return raw_M * stats.n_tokens_B.sum(-1) / stats.load_BE.sum((1, 2))
        return -raw_M if fault == "the sign" else raw_M


def with_fault(config: MoEConfig, fault: str) -> MoEConfig:
    return replace(config, router=BrokenRouterConfig(name="broken", fault=fault))
