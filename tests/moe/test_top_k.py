"""The top_k router against a plain implementation of the papers' equations, one number at a time."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from moelm.config import MoEConfig, from_dict
from moelm.model.gpt import GPT
from moelm.moe.routing.top_k import TopKRouter
from moelm.moe.types import RouteContext

SCORES = [
    ("softmax", "none"),
    ("softmax", "after_top_k"),
    ("sigmoid", "none"),
    ("sigmoid", "before_top_k"),
    ("sigmoid", "after_top_k"),
]
GROUPS = [
    {},
    {"n_groups": 4, "top_k_groups": 2, "group_score": "max"},
    {"n_groups": 4, "top_k_groups": 2, "group_score": "top2_sum"},
    {"n_groups": 3, "top_k_groups": 1, "group_score": "top2_sum"},
]


def make_router(d_model=6, n_experts=12, top_k=3, seed=0, **options):
    raw = {"n_experts": n_experts, "top_k": top_k, "router": {"name": "top_k", **options}}
    moe = from_dict(MoEConfig, raw, "moe")
    moe.router.check("moe.router", moe)
    router = TopKRouter(moe.router, moe, d_model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*router.parameters(), *router.buffers()]:
            tensor.normal_(0.0, 0.5, generator=generator)
    return router


def make_input(B=2, L=5, d_model=6, seed=1):
    return torch.randn(B, L, d_model, generator=torch.Generator().manual_seed(seed))


def context_of(x_BLD, mask_BL=None, training=True):
    return RouteContext(torch.zeros(x_BLD.shape[:2], dtype=torch.int64), mask_BL, training)


def stats_of(router, x_BLD, mask_BL=None):
    return router(x_BLD, context_of(x_BLD, mask_BL))[1]


def logits_of(router, x_D):
    """x W^T + b in float64, as Python floats."""
    weight = router.weight.double().tolist()
    bias = [0.0] * len(weight) if router.bias is None else router.bias.double().tolist()
    x = x_D.double().tolist()
    return [sum(a * w for a, w in zip(x, row, strict=True)) + b for row, b in zip(weight, bias, strict=True)]


def reference_scores(router, x_D):
    logits = logits_of(router, x_D)
    if router.config.score == "sigmoid":
        return [1 / (1 + math.exp(-z)) for z in logits]
    exponentials = [math.exp(z - max(logits)) for z in logits]
    return [e / sum(exponentials) for e in exponentials]


def reference_route(router, x_D, expert_bias=None):
    """(ids, gates) of one token: DeepSeek-V3 eq. 12-16; groups: V2 section 2.2.2, V3 section 2.1.2."""
    config, E, K = router.config, router.n_experts, router.top_k
    scores = reference_scores(router, x_D)
    bias = [0.0] * E if expert_bias is None else expert_bias.double().tolist()
    choice = [s + b for s, b in zip(scores, bias, strict=True)]
    size = E // config.n_groups
    groups = [range(g * size, (g + 1) * size) for g in range(config.n_groups)]
    taken = 1 if config.group_score == "max" else 2

    def group_score(group):
        return sum(sorted((choice[e] for e in group), reverse=True)[:taken])

    best = sorted(groups, key=group_score, reverse=True)[: config.top_k_groups]
    allowed = [e for group in best for e in group]
    ids = sorted(allowed, key=lambda e: choice[e], reverse=True)[:K]
    gates = [scores[e] for e in ids]
    if config.normalize_gates == "before_top_k":
        gates = [g / sum(scores) for g in gates]
    if config.normalize_gates == "after_top_k":
        gates = [g / sum(gates) for g in gates]
    return ids, [g * config.route_scale for g in gates]


@pytest.mark.parametrize(("score", "normalize"), SCORES)
@pytest.mark.parametrize("groups", GROUPS, ids=lambda g: "-".join(map(str, g.values())) or "no_groups")
def test_ids_and_gates_are_those_of_the_papers_equations(score, normalize, groups):
    flags = itertools.product((False, True), (False, True), (1.0, 2.5))
    for seed, (selection_bias, trained_bias, route_scale) in enumerate(flags):
        router = make_router(
            seed=seed,
            score=score,
            normalize_gates=normalize,
            route_scale=route_scale,
            selection_bias=selection_bias,
            trained_bias=trained_bias,
            **groups,
        )
        x_BLD = make_input(seed=100 + seed)
        routing, _ = router(x_BLD, context_of(x_BLD))
        expected = [reference_route(router, x, router.expert_bias) for x in x_BLD.flatten(0, 1)]
        assert routing.expert_ids_TK.tolist() == [ids for ids, _ in expected]
        assert routing.gates_TK.dtype == torch.float32
        wanted = torch.tensor([gates for _, gates in expected])
        torch.testing.assert_close(routing.gates_TK, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("score", "normalize"), SCORES)
def test_selection_bias_changes_the_choice_and_never_the_gates(score, normalize):
    router = make_router(n_experts=6, score=score, normalize_gates=normalize, selection_bias=True)
    x_BLD = make_input()
    router.expert_bias.zero_()
    plain, _ = router(x_BLD, context_of(x_BLD))
    router.expert_bias[4] = 100.0
    biased, _ = router(x_BLD, context_of(x_BLD))
    assert not (plain.expert_ids_TK[:, 0] == 4).all()
    assert (biased.expert_ids_TK[:, 0] == 4).all()
    for x_D, ids, gates in zip(x_BLD.flatten(0, 1), biased.expert_ids_TK, biased.gates_TK, strict=True):
        scores = torch.tensor(reference_scores(router, x_D))
        wanted = scores[ids]
        if normalize != "none":
            wanted = wanted / (scores if normalize == "before_top_k" else wanted).sum()
        torch.testing.assert_close(gates, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("group_score", ["max", "top2_sum"])
def test_excluded_groups_never_win_even_with_very_negative_biases(group_score):
    router = make_router(score="sigmoid", n_groups=4, top_k_groups=1, group_score=group_score, selection_bias=True)
    router.expert_bias.fill_(-1000.0)
    x_BLD = make_input(L=50)
    routing, _ = router(x_BLD, context_of(x_BLD))
    groups_TK = routing.expert_ids_TK // 3
    assert (groups_TK == groups_TK[:, :1]).all()
    assert len(groups_TK.unique()) == 4  # every group is the best one of some token


@pytest.mark.parametrize(
    ("group_score", "wanted"),
    # groups {0, 1}, {2, 3}, {4, 5}: the best expert of all sits in the first, the best pair in the second
    [("max", [0, 1]), ("top2_sum", [2, 3])],
)
def test_v2_takes_the_group_of_the_best_expert_and_v3_the_group_of_the_best_pair(group_score, wanted):
    router = make_router(d_model=6, n_experts=6, top_k=2, score="sigmoid", n_groups=3, group_score=group_score)
    scores = torch.tensor([0.9, 0.1, 0.7, 0.6, 0.5, 0.65])
    with torch.no_grad():
        router.weight.copy_(torch.eye(6))
    routing, _ = router(scores.logit().view(1, 1, 6), context_of(scores.view(1, 1, 6)))
    assert routing.expert_ids_TK.tolist() == [wanted]
    torch.testing.assert_close(routing.gates_TK, scores[wanted].unsqueeze(0))


def test_the_groups_are_chosen_by_the_biased_scores():
    router = make_router(n_experts=4, top_k=1, d_model=4, n_groups=2, selection_bias=True)
    with torch.no_grad():
        router.weight.copy_(torch.eye(4))
        router.expert_bias.copy_(torch.tensor([0.0, 0.0, 0.0, 1.0]))
    x_BLD = torch.tensor([3.0, 0.0, 1.0, 0.0]).view(1, 1, 4)
    routing, stats = router(x_BLD, context_of(x_BLD))
    assert routing.expert_ids_TK.tolist() == [[3]]
    assert stats.unbiased_load_BE.tolist() == [[1, 0, 0, 0]]


def values_of(output):
    routing, stats = output
    return {**routing._asdict(), **{k: v for k, v in stats._asdict().items() if k != "extra"}}


def assert_same_bits(output, other):
    for (name, value), (_, wanted) in zip(values_of(output).items(), values_of(other).items(), strict=True):
        assert value.dtype == wanted.dtype, name
        assert torch.equal(value, wanted), name


OPTIONS = {"score": "sigmoid", "normalize_gates": "after_top_k", "selection_bias": True, "trained_bias": True}


def test_under_bf16_autocast_every_bit_is_the_one_of_float32(device):
    router = make_router(d_model=32, **OPTIONS).to(device)
    x_BLD = make_input(L=64, d_model=32).to(device)
    context = context_of(x_BLD)._replace(token_ids_BL=torch.zeros(2, 64, dtype=torch.int64, device=device))
    plain = router(x_BLD, context)
    with torch.autocast(device.type, torch.bfloat16):
        assert F.linear(x_BLD.float(), router.weight.float()).dtype == torch.bfloat16  # autocast is on indeed
        assert_same_bits(router(x_BLD, context), plain)
        half = router(x_BLD.bfloat16(), context)
    assert_same_bits(half, router(x_BLD.bfloat16().float(), context))
    assert all(v.dtype in (torch.float32, torch.int64) for v in values_of(half).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_cast_to_16_bits_still_routes_in_float32(dtype):
    router, float32 = make_router(d_model=32, **OPTIONS), make_router(d_model=32, **OPTIONS)
    with torch.no_grad():
        for parameter in float32.parameters():  # the same rounded weights, float32 arithmetic
            parameter.copy_(parameter.to(dtype))
    x_BLD = make_input(L=64, d_model=32).to(dtype)
    router.to(dtype)
    assert router.weight.dtype == dtype
    assert_same_bits(router(x_BLD, context_of(x_BLD)), float32(x_BLD.float(), context_of(x_BLD)))


def test_logits_are_the_float32_product_under_autocast():
    """One token whose gates are its softmax over all experts: gates and log_z_sq give the logits away."""
    router = make_router(d_model=48, n_experts=4, top_k=4)
    x_BLD = make_input(B=1, L=1, d_model=48)
    with torch.autocast("cpu", torch.bfloat16):
        routing, stats = router(x_BLD, context_of(x_BLD))
    logits_E = F.linear(x_BLD[0, 0], router.weight)
    assert torch.equal(stats.log_z_sq, logits_E.logsumexp(-1).square())
    assert torch.equal(routing.gates_TK[0], logits_E.softmax(-1)[routing.expert_ids_TK[0]])


CASTS = {
    "bfloat16": lambda m, d: m.bfloat16(),
    "half": lambda m, d: m.half(),
    "to_dtype": lambda m, d: m.to(torch.bfloat16),
    "to_device": lambda m, d: m.to(d),
    "to_both": lambda m, d: m.to(d, torch.bfloat16),
    "bfloat16_and_back": lambda m, d: m.bfloat16().float(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_expert_bias_stays_float32_and_is_not_rounded_by_a_cast(cast, device, tiny_config):
    model = GPT(tiny_config(moe={"router": {"name": "top_k", "selection_bias": True}}))
    bias_E = torch.linspace(-0.5, 0.5, 8) + 0.001
    for layer in model.moe_layers:
        layer.router.expert_bias.copy_(bias_E)
    model = cast(model, device)
    for layer in model.moe_layers:
        bias = layer.router.expert_bias
        assert bias.dtype == torch.float32
        assert bias.device.type == layer.router.weight.device.type
        assert torch.equal(bias.cpu(), bias_E)
        assert bias is dict(layer.router.named_buffers())["expert_bias"]
        assert "expert_bias" in layer.router.state_dict()
    assert not torch.equal(bias_E.bfloat16().float(), bias_E)


def test_a_bias_on_meta_gets_memory_and_stays_float32(tiny_config):
    with torch.device("meta"):
        model = GPT(tiny_config(moe={"router": {"name": "top_k", "selection_bias": True}}))
    model.bfloat16().to_empty(device="cpu")
    assert {layer.router.expert_bias.dtype for layer in model.moe_layers} == {torch.float32}
    assert {layer.router.expert_bias.device.type for layer in model.moe_layers} == {"cpu"}
    model.to("meta", torch.float16)
    assert {layer.router.expert_bias.device.type for layer in model.moe_layers} == {"meta"}
    assert {layer.router.expert_bias.dtype for layer in model.moe_layers} == {torch.float32}


MASK_BL = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [0, 1, 1, 0, 0]], dtype=torch.bool)


@pytest.mark.parametrize(("score", "normalize"), SCORES)
def test_masked_tokens_get_no_expert_and_are_counted_nowhere(score, normalize):
    router = make_router(score=score, normalize_gates=normalize, selection_bias=True)
    x_BLD = make_input(B=3)
    x_BLD[~MASK_BL] *= 1e3  # what leaks shows
    routing, stats = router(x_BLD, context_of(x_BLD, MASK_BL))
    masked_T = ~MASK_BL.flatten()
    assert (routing.expert_ids_TK[masked_T] == 12).all()
    assert (routing.gates_TK[masked_T] == 0).all()

    kept = x_BLD[MASK_BL].unsqueeze(0)
    alone, alone_stats = router(kept, context_of(kept))
    assert torch.equal(routing.expert_ids_TK[~masked_T], alone.expert_ids_TK)
    torch.testing.assert_close(routing.gates_TK[~masked_T], alone.gates_TK)
    torch.testing.assert_close(stats.log_z_sq, alone_stats.log_z_sq)
    assert stats.n_tokens_B.tolist() == [3, 0, 2]
    for b in (0, 2):
        own = x_BLD[b, MASK_BL[b]].unsqueeze(0)
        wanted = stats_of(router, own)
        for name in ("load_BE", "kept_BE", "first_choice_BE", "unbiased_load_BE"):
            assert torch.equal(getattr(stats, name)[b], getattr(wanted, name)[0]), name
        for name in ("prob_BE", "gate_BE"):
            torch.testing.assert_close(getattr(stats, name)[b], getattr(wanted, name)[0], msg=name)
    for name in ("load_BE", "kept_BE", "first_choice_BE", "unbiased_load_BE", "prob_BE", "gate_BE"):
        assert (getattr(stats, name)[1] == 0).all(), name


def test_masked_tokens_add_nothing_to_the_gradient():
    gradients = []
    x_BLD = make_input(B=3)
    x_BLD[~MASK_BL] *= 1e3
    for x, mask in ((x_BLD, MASK_BL), (x_BLD[MASK_BL].unsqueeze(0), None)):
        router = make_router()
        routing, stats = router(x, context_of(x, mask))
        n_tokens = stats.n_tokens_B.unsqueeze(-1)
        expert_E = torch.arange(12.0)
        prob_E = (stats.prob_BE * n_tokens).sum(0)
        loss = (routing.gates_TK**2).sum() + prob_E @ expert_E + stats.gate_BE.sum(0) @ expert_E + stats.log_z_sq
        loss.backward()
        gradients.append(router.weight.grad)
    torch.testing.assert_close(*gradients)


def test_a_batch_without_any_token_gives_finite_zeros():
    router = make_router(selection_bias=True)
    x_BLD = make_input().requires_grad_()
    routing, stats = router(x_BLD, context_of(x_BLD, torch.zeros(2, 5, dtype=torch.bool)))
    assert (routing.expert_ids_TK == 12).all()
    values = values_of((routing, stats))
    values.pop("expert_ids_TK")
    assert all((value == 0).all() for value in values.values())
    (routing.gates_TK.sum() + stats.prob_BE.sum() + stats.gate_BE.sum() + stats.log_z_sq).backward()
    assert (router.weight.grad == 0).all()
    assert (x_BLD.grad == 0).all()


def test_statistics_are_counts_and_means_of_each_sequence():
    router = make_router(score="sigmoid", normalize_gates="after_top_k", selection_bias=True)
    router.expert_bias.mul_(0.5)
    x_BLD = make_input()
    stats = stats_of(router, x_BLD)
    load, first, unbiased, gate, prob = (torch.zeros(2, 12) for _ in range(5))
    squares = []
    for b in range(2):
        for x_D in x_BLD[b]:
            ids, gates = reference_route(router, x_D, router.expert_bias)
            first[b, ids[0]] += 1
            for e, g in zip(ids, gates, strict=True):
                load[b, e] += 1
                gate[b, e] += g
            for e in reference_route(router, x_D)[0]:
                unbiased[b, e] += 1
            scores = torch.tensor(reference_scores(router, x_D))
            prob[b] += scores / scores.sum() / 5
            squares.append(math.log(sum(map(math.exp, logits_of(router, x_D)))) ** 2)
    assert torch.equal(stats.load_BE, load)
    assert torch.equal(stats.kept_BE, load)
    assert torch.equal(stats.first_choice_BE, first)
    assert torch.equal(stats.unbiased_load_BE, unbiased)
    assert not torch.equal(unbiased, load)
    assert stats.n_tokens_B.tolist() == [5, 5]
    torch.testing.assert_close(stats.gate_BE, gate)
    torch.testing.assert_close(stats.prob_BE, prob)
    torch.testing.assert_close(stats.log_z_sq, torch.tensor(sum(squares) / len(squares)))
    assert not stats.load_BE.requires_grad
    assert stats.prob_BE.requires_grad
    assert stats.gate_BE.requires_grad
    assert stats.log_z_sq.requires_grad


@pytest.mark.parametrize(
    ("score", "normalize", "top_k"),
    [("softmax", "none", 1), ("softmax", "after_top_k", 3), ("sigmoid", "none", 2)],
)
def test_the_gradient_of_the_gates_reaches_the_router(score, normalize, top_k):
    """Compared with central differences of the plain implementation."""
    router = make_router(n_experts=6, top_k=top_k, score=score, normalize_gates=normalize, trained_bias=True)
    x_BLD = make_input(L=3)
    factor_TK = torch.arange(1.0, 6 * top_k + 1).view(6, top_k)
    routing, _ = router(x_BLD, context_of(x_BLD))
    (routing.gates_TK * factor_TK).sum().backward()

    def loss():
        rows = [reference_route(router, x)[1] for x in x_BLD.flatten(0, 1)]
        return (torch.tensor(rows, dtype=torch.float64) * factor_TK).sum().item()

    step = 1e-3
    for parameter in (router.weight, router.bias):
        flat, wanted = parameter.data.view(-1), []
        for i in range(0, flat.numel(), 5):
            before = flat[i].item()
            flat[i] = before + step
            upper, above = loss(), flat[i].item()
            flat[i] = before - step
            lower, below = loss(), flat[i].item()
            flat[i] = before
            wanted.append((upper - lower) / (above - below))
        assert max(map(abs, wanted)) > 0.01
        torch.testing.assert_close(parameter.grad.view(-1)[::5], torch.tensor(wanted), rtol=1e-3, atol=1e-4)


def test_forward_changes_no_state():
    router = make_router(selection_bias=True)
    before = {name: tensor.clone() for name, tensor in router.state_dict().items()}
    x_BLD = make_input()
    for training in (True, False):
        router.train(training)(x_BLD, context_of(x_BLD, training=training))
    assert before.keys() == router.state_dict().keys() == {"weight", "expert_bias"}
    assert all(torch.equal(router.state_dict()[name], tensor) for name, tensor in before.items())
