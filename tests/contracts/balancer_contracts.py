"""What every balancer must keep: functions of (balancer, its MoEConfig) that raise AssertionError."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moelm.config import MoEConfig, build
from moelm.moe.balancing.base import Balancer
from moelm.moe.types import RouteContext, RouterStats, stack_stats

M, B, L, D = 2, 4, 32, 16
Contract = Callable[[Balancer, MoEConfig], None]


def make_stats(
    moe: MoEConfig, x_BLD: Tensor, mask_BL: Tensor | None = None, training: bool = False
) -> tuple[RouterStats, list[Tensor]]:
    """Statistics of M layers of the config's router, without noise, and the routers' weights [E, D]."""
    routers = [build("router", moe.router, moe, D) for _ in range(M)]
    for i, router in enumerate(routers):
        for parameter in router.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
        if router.expert_bias is not None:
            router.expert_bias.zero_()
    context = RouteContext(torch.zeros(x_BLD.shape[:2], dtype=torch.int64), mask_BL, training)
    return stack_stats([router(x_BLD, context)[1] for router in routers]), [router.weight for router in routers]


def make_input(n_sequences: int = B, seed: int = 0) -> Tensor:
    """Tokens that lean to one side, so that the load is uneven."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_sequences, L, D, generator=generator) + torch.linspace(-1, 1, D)


def loss_of(balancer: Balancer, stats: RouterStats) -> Tensor | None:
    window_ME = stats.load_BE.sum(1) if balancer.scope == "global" else None
    return balancer.loss(stats, window_ME)


def shapes_and_dtypes_are_those_of_the_seam(balancer: Balancer, moe: MoEConfig) -> None:
    stats, _ = make_stats(moe, make_input())
    raw_M = loss_of(balancer, stats)
    assert raw_M is None or (raw_M.shape == (M,) and raw_M.dtype == torch.float32)
    bias_ME = torch.zeros(M, moe.n_experts)
    new_ME = balancer.update_bias(bias_ME, stats.load_BE.sum(1).double(), 0)
    assert new_ME is None or (new_ME.shape == bias_ME.shape and new_ME.dtype == torch.float32)


def inputs_stay_as_they_are(balancer: Balancer, moe: MoEConfig) -> None:
    stats, _ = make_stats(moe, make_input())
    before = [value.clone() for value in stats[:-1]]
    first, second = loss_of(balancer, stats), loss_of(balancer, stats)
    assert first is None or torch.equal(first, second)
    for a, b, name in zip(before, stats[:-1], stats._fields, strict=False):
        assert torch.equal(a, b), name
    bias_ME, load_ME = torch.full((M, moe.n_experts), 0.5), stats.load_BE.sum(1).double()
    kept = load_ME.clone()
    balancer.update_bias(bias_ME, load_ME, 3)
    assert torch.equal(load_ME, kept)
    assert (bias_ME == 0.5).all()


def gradient_reaches_the_router(balancer: Balancer, moe: MoEConfig) -> None:
    stats, weights = make_stats(moe, make_input())
    raw_M = loss_of(balancer, stats)
    if raw_M is None:
        return
    assert raw_M.requires_grad
    for gradient in torch.autograd.grad(raw_M.sum(), weights):
        assert torch.isfinite(gradient).all()
        assert gradient.abs().max() > 0


def a_batch_twice_as_large_gives_the_same_loss(balancer: Balancer, moe: MoEConfig) -> None:
    x_BLD = make_input()
    once, _ = make_stats(moe, x_BLD)
    twice, _ = make_stats(moe, torch.cat([x_BLD, x_BLD.flip(0)]))
    a, b = loss_of(balancer, once), loss_of(balancer, twice)
    assert (a is None) == (b is None)
    if a is not None:
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    bias_ME = torch.zeros(M, moe.n_experts)
    moved = [balancer.update_bias(bias_ME, s.load_BE.sum(1).double(), 0) for s in (once, twice)]
    assert moved[0] is None or torch.equal(moved[0], moved[1])


def masked_tokens_change_nothing(balancer: Balancer, moe: MoEConfig) -> None:
    mask_BL = torch.ones(B, L, dtype=torch.bool)
    mask_BL[1, 20:] = False
    mask_BL[3] = False
    x_BLD = make_input()
    a, b = (
        loss_of(balancer, make_stats(moe, torch.where(mask_BL.unsqueeze(-1), x_BLD, other), mask_BL)[0])
        for other in (torch.zeros(()), torch.tensor(9.0))
    )
    assert a is None or torch.equal(a, b)


def a_fully_masked_batch_gives_finite_values_and_gradients(balancer: Balancer, moe: MoEConfig) -> None:
    stats, weights = make_stats(moe, make_input(), torch.zeros(B, L, dtype=torch.bool))
    raw_M = loss_of(balancer, stats)
    if raw_M is not None:
        assert torch.isfinite(raw_M).all()
        for gradient in torch.autograd.grad(raw_M.sum(), weights):
            assert torch.isfinite(gradient).all()
    new_ME = balancer.update_bias(torch.zeros(M, moe.n_experts), stats.load_BE.sum(1).double(), 0)
    assert new_ME is None or torch.isfinite(new_ME).all()


def collapse_costs_more_than_balance(balancer: Balancer, moe: MoEConfig) -> None:
    """All tokens one way, against tokens that lie evenly: the loss is larger, or the bias pushes the crowd away."""
    even, _ = make_stats(moe, torch.randn(B, L, D, generator=torch.Generator().manual_seed(1)))
    crowd_BLD = 4 * torch.randn(D, generator=torch.Generator().manual_seed(2)).expand(B, L, D)
    crowded, _ = make_stats(moe, crowd_BLD)
    a, b = loss_of(balancer, even), loss_of(balancer, crowded)
    if a is not None:
        assert (b > a).all()
    load_ME = crowded.load_BE.sum(1).double()
    new_ME = balancer.update_bias(torch.zeros(M, moe.n_experts), load_ME, 0)
    if new_ME is not None:
        assert (new_ME[load_ME > load_ME.mean()] < 0).all()


CONTRACTS: list[Contract] = [
    shapes_and_dtypes_are_those_of_the_seam,
    inputs_stay_as_they_are,
    gradient_reaches_the_router,
    a_batch_twice_as_large_gives_the_same_loss,
    masked_tokens_change_nothing,
    a_fully_masked_batch_gives_finite_values_and_gradients,
    collapse_costs_more_than_balance,
]
