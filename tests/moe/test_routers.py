"""Each router against a case worked out by hand or an independent way to compute the same."""

from __future__ import annotations

import itertools
import math
from statistics import NormalDist
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moelm.config import ConfigError, ModelConfig, MoEConfig, UserError, build, check_model, from_dict, registered
from moelm.model.gpt import GPT
from moelm.model.init import initialize
from moelm.moe.layer import MoELayer
from moelm.moe.routing.base import Router
from moelm.moe.routing.reinforce import log_prob_of_draw
from moelm.moe.types import ExpertChoice, RouteContext


def make_router(name: str, n_experts: int, top_k: int, d_model: int | None = None, **options: Any) -> Router:
    """With d_model = n_experts its weight is the identity, so that a token's vector is its logits."""
    raw = {"n_experts": n_experts, "top_k": top_k, "router": {"name": name, **options}, "balancers": []}
    moe = from_dict(MoEConfig, raw, "model.moe")
    router: Router = build("router", moe.router, moe, d_model or n_experts)
    for own_name, parameter in router.named_parameters():
        if own_name == "weight" and parameter.shape == (n_experts, n_experts):
            parameter.data = torch.eye(n_experts)
        elif own_name in router.initial:
            parameter.data.fill_(router.initial[own_name])
        else:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    return router


def context_for(x_BLD: Tensor, training: bool = True, ids_BL: Tensor | None = None) -> RouteContext:
    ids_BL = torch.zeros(x_BLD.shape[:2], dtype=torch.int64) if ids_BL is None else ids_BL
    return RouteContext(ids_BL, None, training)


def logits_for(probabilities: list[list[float]]) -> Tensor:
    """[1, L, E] whose softmax these are."""
    return torch.tensor([probabilities]).log()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_gradient_of_log_z_is_that_of_logsumexp(score):
    router = make_router("top_k", 8, 2, score=score)
    x_BLD = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3)).mul(4).requires_grad_()
    found = router(x_BLD, context_for(x_BLD))[1].log_z_sq
    wanted = x_BLD.logsumexp(-1).square().mean()
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(each, x_BLD)[0] for each in (found, wanted)))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_backward_keeps_probabilities_and_not_the_logits_too(compiled):
    """Of all that has a number for each token and expert; gates, z-loss and balance need one of them."""
    router, kept = make_router("top_k", 8, 2, 16), set()
    if compiled:
        router.compile()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.numel() == 2 * 5 * 8:
            kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x_BLD = torch.randn(2, 5, 16)
        routing, stats = router(x_BLD, context_for(x_BLD))
        loss = routing.gates_TK.square().sum() + stats.log_z_sq + stats.prob_BE.square().sum()
    assert len(kept) == 1
    loss.backward()


# ------------------------------------------------------------------------------------------ switch, gshard


def test_switch_takes_the_likeliest_expert_with_its_probability_as_gate():
    router = make_router("switch", 3, 1, jitter=0.0)
    x_BLD = logits_for([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]])
    routing, stats = router(x_BLD, context_for(x_BLD))
    assert routing.expert_ids_TK.tolist() == [[1], [0]]
    torch.testing.assert_close(routing.gates_TK, torch.tensor([[0.5], [0.6]]))
    torch.testing.assert_close(stats.prob_BE, torch.tensor([[0.4, 0.4, 0.2]]))
    assert stats.load_BE.tolist() == [[1, 1, 0]]


def test_gshard_takes_the_second_expert_with_twice_its_weight():
    router = make_router("gshard", 3, 2)
    x_BLD = logits_for([[0.72, 0.18, 0.10]]).expand(1, 20_000, 3)  # g2 = 0.18 / 0.9 = 0.2
    torch.manual_seed(0)
    routing, stats = router(x_BLD, context_for(x_BLD))
    taken_T = routing.expert_ids_TK[:, 1] == 1
    assert float(taken_T.float().mean()) == pytest.approx(0.4, abs=0.012)  # 3.5 deviations
    assert (routing.expert_ids_TK[:, 0] == 0).all()
    torch.testing.assert_close(routing.gates_TK[taken_T][0], torch.tensor([0.8, 0.2]))
    torch.testing.assert_close(routing.gates_TK[~taken_T][0], torch.tensor([0.8, 0.0]))
    assert (routing.expert_ids_TK[~taken_T, 1] == 3).all()
    assert stats.load_BE.tolist() == [[20_000, int(taken_T.sum()), 0]]
    assert stats.first_choice_BE.tolist() == [[20_000, 0, 0]]


@pytest.mark.parametrize(("training", "options"), [(False, {}), (True, {"second_expert": "all"})])
def test_gshard_takes_both_in_evaluation_and_on_request(training, options):
    router = make_router("gshard", 3, 2, **options)
    x_BLD = logits_for([[0.96, 0.03, 0.01]]).expand(1, 500, 3)
    routing, _ = router(x_BLD, context_for(x_BLD, training))
    assert (routing.expert_ids_TK == torch.tensor([0, 1])).all()


# ------------------------------------------------------------------------------------------ noisy_top_k


def test_noisy_top_k_without_noise_is_the_softmax_of_the_kept_logits_and_its_smooth_load_is_by_hand():
    router = make_router("noisy_top_k", 3, 2)
    x_BLD = torch.tensor([[[1.0, 3.0, 2.0]]])
    routing, stats = router(x_BLD, context_for(x_BLD, training=False))
    assert routing.expert_ids_TK.tolist() == [[1, 2]]
    e = math.exp(-1)
    torch.testing.assert_close(routing.gates_TK, torch.tensor([[1 / (1 + e), e / (1 + e)]]))
    # deviation softplus(0) + 0.01; the second largest of the others is 2 for expert 0, and 1 for the chosen ones
    phi = NormalDist().cdf
    deviation = math.log(2) + 0.01
    by_hand = [phi((1 - 2) / deviation), phi((3 - 1) / deviation), phi((2 - 1) / deviation)]
    torch.testing.assert_close(stats.extra["smooth_load_BE"], torch.tensor([by_hand]))


def test_a_router_that_has_learned_to_be_sure_keeps_a_finite_gradient_of_its_smooth_load():
    router = make_router("noisy_top_k", 3, 2)
    x_BLD = torch.tensor([[[1.0, 3.0, 2.0]]])
    router.noise.data = -200 * x_BLD[0] / x_BLD.square().sum() * torch.ones(3, 1)  # softplus(-200) is 0
    _, stats = router(x_BLD, context_for(x_BLD))
    stats.extra["smooth_load_BE"].square().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in router.parameters())


def test_the_smooth_load_of_noisy_top_k_is_the_expectation_of_its_load():
    router = make_router("noisy_top_k", 4, 2)
    x_BLD = torch.tensor([0.3, -0.4, 0.9, 0.1]).expand(1, 40_000, 4)
    torch.manual_seed(1)
    _, stats = router(x_BLD, context_for(x_BLD))
    torch.testing.assert_close(stats.extra["smooth_load_BE"], stats.load_BE, rtol=0.02, atol=0)
    assert stats.load_BE.min() > 5000  # the noise does reach all experts


# ------------------------------------------------------------------------------------------ expert_choice


@pytest.mark.parametrize("masked", [False, True])
def test_expert_choice_equals_a_loop_over_experts_that_sort_tokens(masked):
    moe = from_dict(
        MoEConfig,
        {"n_experts": 4, "top_k": 2, "d_expert": 8, "router": "expert_choice", "balancers": []},
        "model.moe",
    )
    layer = MoELayer(moe, 8, None)
    torch.manual_seed(3)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape)
    B, L = 2, 6
    x_BLD = torch.randn(B, L, 8, requires_grad=True)
    mask_BL = torch.ones(B, L, dtype=torch.bool)
    if masked:
        mask_BL[1, 5:] = False  # five tokens are left, for two places of each expert instead of three
    y_BLD, stats = layer(x_BLD, RouteContext(torch.zeros(B, L, dtype=torch.int64), mask_BL, True))
    expected = torch.zeros(B, L, 8)
    load_BE = torch.zeros(B, 4)
    unchosen = 0
    for b in range(B):
        prob_LE = (x_BLD[b] @ layer.router.weight.T).softmax(-1)
        wish_LE = prob_LE.detach()
        allowed = [t for t in range(L) if mask_BL[b, t]]
        C, taken = len(allowed) * 2 // 4, set()
        for e in range(4):
            for t in sorted(allowed, key=lambda t, e=e, wish=wish_LE: -float(wish[t, e]))[:C]:
                gate, up = (x_BLD[b, t] @ layer.experts.gate_up[e]).chunk(2)
                expected[b, t] = expected[b, t] + prob_LE[t, e] * ((F.silu(gate) * up) @ layer.experts.down[e])
                load_BE[b, e] += 1
                taken.add(t)
        unchosen += len(allowed) - len(taken)
    torch.testing.assert_close(y_BLD, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(stats.load_BE, load_BE)
    assert float(stats.extra["unchosen"]) == pytest.approx(unchosen / int(mask_BL.sum()))
    loss = (y_BLD * torch.arange(8.0)).sum()
    got = torch.autograd.grad(loss, [x_BLD, *layer.parameters()], retain_graph=True)
    want = torch.autograd.grad((expected * torch.arange(8.0)).sum(), [x_BLD, *layer.parameters()])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_expert_choice_gives_each_expert_the_same_number_and_a_token_any_number():
    router = make_router("expert_choice", 4, 2, d_model=8)
    x_BLD = torch.randn(3, 10, 8, generator=torch.Generator().manual_seed(0))
    routing, stats = router(x_BLD, context_for(x_BLD))
    assert isinstance(routing, ExpertChoice)
    assert (stats.load_BE == 10 * 2 // 4).all()
    per_token_T = torch.bincount(routing.token_ids_EC.flatten(), minlength=30)
    assert per_token_T.unique().numel() > 2


# ------------------------------------------------------------------------------------------ without weights


def test_hash_gives_every_expert_the_same_number_of_ids_and_a_token_distinct_experts():
    router = make_router("hash", 8, 2, d_model=4)
    ids_BL = torch.arange(8 * 40).view(1, -1)
    x_BLD = torch.randn(1, 8 * 40, 4)
    routing, stats = router(x_BLD, context_for(x_BLD, ids_BL=ids_BL))
    first, second = routing.expert_ids_TK.T
    assert torch.bincount(first, minlength=8).tolist() == [40] * 8
    assert torch.bincount(second, minlength=8).tolist() == [40] * 8
    assert (first != second).all()
    assert (routing.gates_TK == 0.5).all()
    assert stats.load_BE.tolist() == [[80.0] * 8]
    again, _ = router(x_BLD.flip(1), context_for(x_BLD, training=False, ids_BL=ids_BL.flip(1)))
    assert torch.equal(again.expert_ids_TK.flip(0), routing.expert_ids_TK), "the id alone decides"


def test_hash_of_some_ids_by_hand():
    def mix(x: int) -> int:
        for multiplier in (0x21F0AAAD, 0x735A2D97):
            x = ((x ^ (x >> 15)) * multiplier) % 2**31
        return x ^ (x >> 15)

    router = make_router("hash", 6, 3, d_model=4)
    ids = [0, 1, 5, 6, 1000, 128_255]
    x_BLD = torch.randn(1, len(ids), 4)
    routing, _ = router(x_BLD, context_for(x_BLD, ids_BL=torch.tensor([ids])))
    expected = [[(i + mix(i // 6) + 2 * k) % 6 for k in range(3)] for i in ids]
    assert routing.expert_ids_TK.tolist() == expected
    assert len({(i + mix(i // 6)) % 6 - i % 6 for i in range(600)}) > 1, "blocks are rotated"


def test_random_is_uniform_distinct_and_fixed_in_evaluation():
    router = make_router("random", 8, 3, d_model=4)
    x_BLD = torch.randn(4, 5000, 4)
    torch.manual_seed(0)
    first, stats = router(x_BLD, context_for(x_BLD))
    second, _ = router(x_BLD, context_for(x_BLD))
    assert not torch.equal(first.expert_ids_TK, second.expert_ids_TK)
    assert (first.expert_ids_TK.sort(-1).values.diff(dim=-1) > 0).all()
    torch.testing.assert_close(stats.load_BE.sum(0), torch.full((8,), 20_000 * 3 / 8), rtol=0.03, atol=0)
    fixed, evaluated = router(x_BLD, context_for(x_BLD, training=False))
    assert torch.equal(fixed.expert_ids_TK[:5000], fixed.expert_ids_TK[5000:10_000])
    torch.testing.assert_close(evaluated.load_BE.sum(0), torch.full((8,), 20_000 * 3 / 8), rtol=0.06, atol=0)


def test_round_robin_deals_the_tokens_out():
    router = make_router("round_robin", 5, 2, d_model=4)
    x_BLD = torch.randn(1, 6, 4)
    routing, _ = router(x_BLD, context_for(x_BLD))
    assert routing.expert_ids_TK.tolist() == [[0, 1], [2, 3], [4, 0], [1, 2], [3, 4], [0, 1]]


# ------------------------------------------------------------------------------------------ base


@pytest.mark.parametrize("seed", range(5))
def test_base_finds_the_best_of_all_balanced_assignments(seed):
    router = make_router("base", 3, 1, n_iterations=200)
    x_BLD = torch.randn(1, 6, 3, generator=torch.Generator().manual_seed(seed)) + torch.tensor([2.0, 0.0, 0.0])
    routing, stats = router(x_BLD, context_for(x_BLD))
    balanced = set(itertools.permutations([0, 0, 1, 1, 2, 2]))
    best = max(balanced, key=lambda ids: sum(float(x_BLD[0, t, e]) for t, e in enumerate(ids)))
    assert stats.load_BE.tolist() == [[2, 2, 2]]
    assert tuple(routing.expert_ids_TK[:, 0].tolist()) == best
    torch.testing.assert_close(routing.gates_TK[:, 0], x_BLD[0, torch.arange(6), list(best)].sigmoid())


def test_base_with_few_tokens_an_expert_is_balanced_but_for_a_few_of_them():
    generator = torch.Generator().manual_seed(1)
    x_BLD = torch.randn(1, 512, 64, generator=generator) + torch.randn(64, generator=generator)
    _, stats = make_router("base", 64, 1)(x_BLD, context_for(x_BLD))
    assert (stats.load_BE - 8).abs().max() <= 2


@pytest.mark.parametrize("top_k", [1, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_base_is_balanced_in_training_and_greedy_in_evaluation(top_k, masked):
    E, T = 16, 2048
    router = make_router("base", E, top_k)
    generator = torch.Generator().manual_seed(1)
    x_BLD = torch.randn(1, T, 4, generator=generator) @ torch.randn(4, E, generator=generator)
    x_BLD = x_BLD + 3 * torch.randn(E, generator=generator)
    mask_BL = torch.ones(1, T, dtype=torch.bool)
    if masked:
        mask_BL[0, ::2] = False
    context = context_for(x_BLD)._replace(token_mask_BL=mask_BL)
    _, stats = router(x_BLD, context)
    load_E = stats.load_BE[0]
    assert load_E.sum() == mask_BL.sum() * top_k
    assert float(load_E.max() / load_E.mean()) <= 1.03
    assert float(load_E.min() / load_E.mean()) >= 0.97
    routing, stats = router(x_BLD, context_for(x_BLD, training=False))
    assert torch.equal(routing.expert_ids_TK, x_BLD[0].topk(top_k).indices)
    assert stats.load_BE.max() > 2 * stats.load_BE.mean()


@pytest.mark.parametrize("common", [10.0, 100.0])
@pytest.mark.parametrize("masked", [False, True])
def test_base_is_balanced_whatever_all_tokens_offer_an_expert_alike(common, masked):
    E, T = 16, 4096
    generator = torch.Generator().manual_seed(2)
    x_BLD = torch.randn(1, T, E, generator=generator) + common * torch.randn(E, generator=generator)
    mask_BL = torch.ones(1, T, dtype=torch.bool)
    mask_BL[0, : T // 2] = not masked
    _, stats = make_router("base", E, 1)(x_BLD, context_for(x_BLD)._replace(token_mask_BL=mask_BL))
    assert float(stats.load_BE.max() / stats.load_BE.mean()) <= 1.03


# ------------------------------------------------------------------------------------------ cosine, multi_head


def test_cosine_logits_are_angles_over_a_temperature():
    router = make_router("cosine", 2, 1, d_model=3, d_projection=2, initial_temperature=0.5, normalize_gates="none")
    router.projection.data = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    router.weight.data = torch.tensor([[5.0, 0.0], [0.0, 0.1]])
    x_TD = torch.tensor([[3.0, 4.0, 100.0]])  # on the sphere (0.6, 0.8): lengths and the third axis do not count
    torch.testing.assert_close(router.logits(x_TD), torch.tensor([[1.2, 1.6]]))
    router.log_scale.data.fill_(20.0)
    torch.testing.assert_close(router.logits(x_TD), torch.tensor([[60.0, 80.0]]))  # the temperature stops at 0.01


@pytest.mark.parametrize("projections", [True, False])
def test_multi_head_equals_a_loop_over_the_chunks_of_each_token(projections):
    raw = {
        "n_experts": 4,
        "top_k": 2,
        "d_expert": 8,
        "router": {"name": "multi_head", "n_heads": 3, "projections": projections},
    }
    moe = from_dict(MoEConfig, raw, "model.moe")
    layer = MoELayer(moe, 24, None)
    torch.manual_seed(4)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape) / 2
    x_BLD = torch.randn(2, 5, 24)
    mask_BL = torch.ones(2, 5, dtype=torch.bool)
    mask_BL[0, 4] = False
    y_BLD, stats = layer(x_BLD, RouteContext(torch.zeros(2, 5, dtype=torch.int64), mask_BL, True))
    expected = torch.zeros(2, 5, 24)
    for b, t in itertools.product(range(2), range(5)):
        x_D = layer.split.weight @ x_BLD[b, t] if projections else x_BLD[b, t]
        pieces = []
        for chunk in x_D.split(8):
            prob_E = (layer.router.weight @ chunk).softmax(-1)
            y = torch.zeros(8)
            for e in prob_E.topk(2).indices.tolist() if mask_BL[b, t] else []:
                gate, up = (chunk @ layer.experts.gate_up[e]).chunk(2)
                y = y + prob_E[e] * ((F.silu(gate) * up) @ layer.experts.down[e])
            pieces.append(y)
        y_D = torch.cat(pieces)
        expected[b, t] = layer.merge.weight @ y_D if projections else y_D
    torch.testing.assert_close(y_BLD, expected, rtol=1e-4, atol=1e-4)
    assert stats.n_tokens_B.tolist() == [12, 15]
    assert stats.load_BE.sum(-1).tolist() == [24, 30]


# ------------------------------------------------------------------------------------------ reinforce


def test_the_log_probability_of_a_draw_without_replacement_by_hand():
    logits_TE = torch.tensor([[0.5, 0.3, 0.2]]).log() + 1.7
    log_prob_T = log_prob_of_draw(logits_TE, torch.tensor([[1, 0]]))
    assert float(log_prob_T.exp()) == pytest.approx(0.3 * 0.5 / 0.7)
    three = log_prob_of_draw(logits_TE.requires_grad_(), torch.tensor([[2, 0, 1]]))
    assert float(three.exp().detach()) == pytest.approx(0.2 * 0.5 / 0.8)
    three.sum().backward()
    assert torch.isfinite(logits_TE.grad).all()


def test_reinforce_draws_in_proportion_to_its_policy():
    router = make_router("reinforce", 3, 2)
    x_BLD = logits_for([[0.5, 0.3, 0.2]]).expand(1, 40_000, 3)
    torch.manual_seed(0)
    routing, stats = router(x_BLD, context_for(x_BLD))
    pairs = (routing.expert_ids_TK[:, 0] * 3 + routing.expert_ids_TK[:, 1]).bincount(minlength=9) / 40_000
    p = [0.5, 0.3, 0.2]
    expected = torch.tensor([[0 if i == j else p[i] * p[j] / (1 - p[i]) for j in range(3)] for i in range(3)])
    torch.testing.assert_close(pairs.view(3, 3), expected, rtol=0, atol=0.01)
    assert (routing.gates_TK == 0.5).all()
    drawn_T = torch.tensor([expected[i, j] for i, j in routing.expert_ids_TK[:50].tolist()])
    torch.testing.assert_close(stats.extra["log_prob_BL"][0, :50].exp(), drawn_T)


def test_the_policy_gradient_of_reinforce_by_hand():
    router = make_router("reinforce", 2, 1, policy_coef=0.5, baseline_coef=0.25)
    router.baseline.weight.data.zero_()
    router.baseline.bias.data.fill_(1.0)
    x_BLD = torch.zeros(1, 2, 2)  # both experts have probability 1/2
    routing, stats = router(x_BLD, context_for(x_BLD, training=False))
    extra = {k: v.unsqueeze(0) for k, v in stats.extra.items()}
    stacked = stats._replace(extra=extra)
    loss = router.loss(stacked, torch.tensor([[4.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool))
    # b - CE = (-3, 1), deviation sqrt(5), log p = ln 1/2 for both; squared errors 9 and 1
    assert loss.item() == pytest.approx(0.5 * (3 - 1) / math.sqrt(5) * math.log(0.5) / 2 + 0.25 * 5, rel=1e-5)
    loss.backward()
    assert float(router.baseline.bias.grad) == pytest.approx(0.25 * 2 * (-3 + 1) / 2)
    assert routing.expert_ids_TK.shape == (2, 1)
    alone = router.loss(stacked, torch.tensor([[4.0, 0.0]]), torch.tensor([[True, False]]))
    by_hand = 0.5 * math.log(0.5) + 0.25 * 9  # a token without a target is no reward
    assert alone.item() == pytest.approx(by_hand, rel=1e-5)


def test_the_rewards_of_reinforce_are_scaled_by_the_deviation_of_their_own_layer():
    router = make_router("reinforce", 2, 1, policy_coef=1.0, baseline_coef=0.0)
    stats = router(torch.zeros(1, 2, 2), context_for(torch.zeros(1, 2, 2)))[1]
    baseline_MBL = torch.tensor([[[1.0, -1.0]], [[100.0, -100.0]]])
    extra = {"baseline_BL": baseline_MBL, "log_prob_BL": torch.tensor([[[-1.0, -2.0]], [[-1.0, -4.0]]])}
    loss = router.loss(stats._replace(extra=extra), torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool))
    # rewards (1, -1) of both layers: -(-1 + 2) / 2 and -(-1 + 4) / 2
    assert loss.item() == pytest.approx((-0.5 - 1.5) / 2)


def test_reinforce_learns_which_expert_is_good():
    router = make_router("reinforce", 4, 1, d_model=8, policy_coef=1.0)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    torch.manual_seed(0)
    for _ in range(150):
        x_BLD = torch.randn(2, 64, 8)
        routing, stats = router(x_BLD, context_for(x_BLD))
        good_T = (x_BLD[..., 0] > 0).long().flatten() * 2  # expert 0 or 2, by the first coordinate
        ce_BL = 2.0 + (routing.expert_ids_TK[:, 0] != good_T).float().view(2, 64)
        extra = {k: v.unsqueeze(0) for k, v in stats.extra.items()}
        loss = router.loss(stats._replace(extra=extra), ce_BL, torch.ones_like(ce_BL, dtype=torch.bool))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x_BLD = torch.randn(4, 256, 8)
    routing, _ = router(x_BLD, context_for(x_BLD, training=False))
    good_T = (x_BLD[..., 0] > 0).long().flatten() * 2
    assert float((routing.expert_ids_TK[:, 0] == good_T).float().mean()) > 0.9  # chance is 0.25


# ------------------------------------------------------------------------------------------ common options


@pytest.mark.parametrize("name", [name for name, config in registered("router").items() if config.learned])
def test_jitter_shakes_the_router_and_not_the_experts(name):
    options = {"n_heads": 2} if name == "multi_head" else {}
    config = from_dict(
        ModelConfig,
        {
            "n_layers": 1,
            "d_model": 16,
            "vocab_size": 32,
            "attention": {"name": "gqa", "n_heads": 2},
            "moe": {
                "n_experts": 8,
                "top_k": 1 if name == "switch" else 2,
                "d_expert": 8,
                "router": {"name": name, "jitter": 0.5, **options},
                "balancers": [],
            },
        },
        "model",
    )
    check_model(config)
    model = GPT(config)
    initialize(model, 0)
    layer, seen = model.moe_layers[0], []
    real = layer.dispatcher.spread
    layer.dispatcher.spread = lambda x_TD, *rest: seen.append(x_TD.clone()) or real(x_TD, *rest)
    ids_BL = torch.zeros(2, 8, dtype=torch.int64)
    x_BLD, probabilities = torch.randn(2, 8, 16), []
    for seed, training in ((0, True), (1, True), (0, False), (1, False)):
        torch.manual_seed(seed)
        _, stats = layer(x_BLD, RouteContext(ids_BL, None, training))
        probabilities.append(stats.prob_BE)
    assert all(torch.equal(x_TD, seen[0]) for x_TD in seen), "the experts see clean tokens"
    assert not torch.equal(probabilities[0], probabilities[1])
    assert not torch.equal(probabilities[0], probabilities[2])
    assert torch.equal(probabilities[2], probabilities[3]), "evaluation is not shaken"


def test_jitter_is_uniform_around_one():
    router = make_router("top_k", 2, 1, jitter=0.25)
    captured: list[Tensor] = []
    router.project = lambda x_TD: captured.append(x_TD) or x_TD  # type: ignore[method-assign]
    x_BLD = torch.full((1, 50_000, 2), 2.0)
    torch.manual_seed(0)
    router(x_BLD, context_for(x_BLD))
    factor = captured[0] / 2
    assert float(factor.min()) == pytest.approx(0.75, abs=1e-3)
    assert float(factor.max()) == pytest.approx(1.25, abs=1e-3)
    assert float(factor.mean()) == pytest.approx(1.0, abs=2e-3)
    assert float(factor.var()) == pytest.approx(0.5**2 / 12, rel=0.02)


def test_soft_cap_and_scale_and_trained_bias():
    plain = make_router("top_k", 3, 1)
    capped = make_router("top_k", 3, 1, logit_soft_cap=2.0, trained_bias=True, route_scale=3.0)
    capped.bias.data = torch.tensor([0.5, 0.0, 0.0])
    x_BLD = torch.tensor([[[4.0, -1.0, 0.0]]])
    logits_TE = capped.logits(x_BLD[0])
    torch.testing.assert_close(logits_TE, 2 * torch.tanh(torch.tensor([[4.5, -1.0, 0.0]]) / 2))
    routing, _ = capped(x_BLD, context_for(x_BLD))
    torch.testing.assert_close(routing.gates_TK, 3 * logits_TE.softmax(-1)[:, :1])
    torch.testing.assert_close(plain.logits(x_BLD[0]), x_BLD[0])


def test_what_the_callbacks_are_shown_by_hand():
    router = make_router("top_k", 3, 1)
    x_BLD = logits_for([[0.5, 0.3, 0.2], [0.25, 0.25, 0.5]])
    mask_BL = torch.tensor([[True, True]])
    _, stats = router(x_BLD, context_for(x_BLD)._replace(token_mask_BL=mask_BL))
    entropy = -sum(p * math.log(p) for p in (0.5, 0.3, 0.2, 0.25, 0.25, 0.5)) / 2
    assert float(stats.extra["prob_entropy"]) == pytest.approx(entropy)
    assert float(stats.extra["top1_margin"]) == pytest.approx((0.2 + 0.25) / 2)
    assert float(stats.extra["logit_sq"]) == pytest.approx(float(x_BLD.square().mean()))
    assert "expert_ids_BLK" not in stats.extra
    _, evaluated = router(x_BLD, context_for(x_BLD, training=False))
    assert evaluated.extra["expert_ids_BLK"].tolist() == [[[0], [2]]]


def test_tokens_sent_to_a_group_are_counted_once():
    router = make_router("top_k", 4, 2, n_groups=2, top_k_groups=2)
    x_BLD = torch.tensor([[[9.0, 8, 0, 0], [9, 0, 8, 0], [0, 0, 8, 9]], [[9.0, 8, 0, 0], [9, 8, 0, 0], [9, 8, 0, 0]]])
    _, stats = router(x_BLD, context_for(x_BLD))
    assert stats.extra["sent_BG"].tolist() == [[2, 2], [3, 0]]


@pytest.mark.parametrize(
    ("moe", "key"),
    [
        ({"router": "switch", "top_k": 2}, "model.moe.top_k"),
        ({"router": "gshard", "top_k": 3}, "model.moe.top_k"),
        ({"router": "noisy_top_k", "top_k": 1}, "model.moe.top_k"),
        ({"router": "noisy_top_k", "top_k": 8}, "model.moe.top_k"),
        ({"router": {"name": "hash", "jitter": 0.1}, "balancers": []}, "model.moe.router.jitter"),
        ({"router": {"name": "multi_head", "n_heads": 5}}, "model.moe.router"),
        ({"router": "expert_choice", "dispatch": "capacity", "balancers": []}, "model.moe.dispatch"),
        ({"router": {"name": "cosine", "initial_temperature": 0.001}}, "model.moe.router.initial_temperature"),
        ({"router": "base"}, "model.moe.balancers.0"),  # the default, switch, has nothing to balance
        (
            {"router": "hash", "dispatch": {"name": "capacity", "drop": "probability"}, "balancers": []},
            "model.moe.dispatch.drop",
        ),
    ],
)
def test_what_a_router_cannot_do_is_refused(tiny_config, moe, key):
    with pytest.raises(ConfigError) as error:
        tiny_config(moe=moe)
    assert error.value.key == key
    assert "remedy" in str(error.value) or "allowed" in str(error.value)


def test_a_router_that_chooses_another_number_of_experts_than_it_is_told_is_refused(monkeypatch: pytest.MonkeyPatch):
    router = make_router("top_k", 4, 2)

    def one_less(x_TD: Tensor, context: RouteContext) -> Any:
        routing, stats = type(router).route(router, x_TD, context)
        return routing._replace(expert_ids_TK=routing.expert_ids_TK[:, :1]), stats

    monkeypatch.setattr(router, "route", one_less)
    x_BLD = torch.randn(2, 3, router.weight.shape[1])
    with pytest.raises(UserError, match=r"TopKRouter: the ids of experts are of shape \[6, 1\], not \[6, 2\]"):
        router(x_BLD, context_for(x_BLD))
