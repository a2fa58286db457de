"""The capacity dispatcher: who is dropped, what a dropped token is, and what that does to evaluation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moelm.config import ConfigError, MoEConfig, build, from_dict
from moelm.model.gpt import GPT
from moelm.model.init import initialize
from moelm.moe.dispatch.capacity import drop_over_capacity
from moelm.moe.dispatch.capacity import expert_capacity as capacity_of
from moelm.moe.layer import MoELayer
from moelm.moe.types import RouteContext, TokenChoice

NONE = 3


def expert_capacity(factor: float, n_tokens: int, top_k: int, n_experts: int) -> int:
    return int(capacity_of(factor, torch.tensor(n_tokens), top_k, n_experts))


def dropped_by_loop(ids_TK: Tensor, priority_T: Tensor | None, capacity: int, n_experts: int) -> Tensor:
    """The rule of the papers, one choice after the other."""
    order = list(range(ids_TK.shape[0]))
    if priority_T is not None:
        order.sort(key=lambda t: -float(priority_T[t]))  # a stable sort
    kept, room = torch.full_like(ids_TK, n_experts), [capacity] * n_experts
    for k in range(ids_TK.shape[1]):
        for t in order:
            expert = int(ids_TK[t, k])
            if expert < n_experts and room[expert] > 0:
                room[expert] -= 1
                kept[t, k] = expert
    return kept


def test_position_keeps_the_first_and_probability_the_surest():
    ids_TK = torch.tensor([[0, 1], [0, 2], [0, 1], [1, 0]])
    by_position = drop_over_capacity(ids_TK, None, 2, 3)
    assert by_position.tolist() == [[0, 1], [0, 2], [NONE, NONE], [1, NONE]]
    by_gate = drop_over_capacity(ids_TK, torch.tensor([0.4, 0.9, 0.8, 0.5]), 2, 3)
    assert by_gate.tolist() == [[NONE, NONE], [0, 2], [0, 1], [1, NONE]]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("with_priority", [False, True])
def test_drops_equal_a_loop_over_choices(device, seed, with_priority):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(200, 8, generator=generator) + torch.linspace(0, 0.6, 8)
    ids_TK = scores.topk(3, dim=-1).indices
    ids_TK[torch.rand(200, generator=generator) < 0.1] = 8  # masked tokens take no place
    priority_T = torch.randint(20, (200,), generator=generator).float() if with_priority else None  # with ties
    for capacity in (1, 40, 75, 200):
        on_device = None if priority_T is None else priority_T.to(device)
        kept_TK = drop_over_capacity(ids_TK.to(device), on_device, capacity, 8).cpu()
        assert torch.equal(kept_TK, dropped_by_loop(ids_TK, priority_T, capacity, 8))


def test_capacity_is_rounded_up_and_never_zero():
    assert expert_capacity(1.25, 100, 2, 8) == 32  # 31.25
    assert expert_capacity(1.0, 100, 2, 8) == 25
    assert expert_capacity(0.01, 10, 1, 64) == 1


def make_layer(top_k: int = 2, **dispatch: Any) -> MoELayer:
    raw = {"n_experts": 4, "top_k": top_k, "d_expert": 8, "dispatch": {"name": "capacity", **dispatch}}
    moe = from_dict(MoEConfig, raw, "model.moe")
    moe.dispatch.check("model.moe.dispatch", moe)
    layer = MoELayer(moe, 8, None)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return layer


def make_input(seed: int = 1) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(seed)), torch.zeros(2, 20, dtype=torch.int64)


@pytest.mark.parametrize("drop", ["position", "probability"])
def test_a_dropped_choice_adds_nothing_and_the_others_are_those_of_dropless(drop):
    layer, (x_BLD, ids_BL) = make_layer(capacity_factor=0.7, drop=drop), make_input()
    x_BLD.requires_grad_()
    y_BLD, stats = layer(x_BLD, RouteContext(ids_BL, None, True))
    routing, _ = layer.router(x_BLD, RouteContext(ids_BL, None, True))
    kept_TK = layer.dispatcher.kept(routing, True)
    capacity = expert_capacity(0.7, 40, 2, 4)
    assert torch.bincount(kept_TK.flatten(), minlength=5)[:4].max() <= capacity
    assert 0 < (kept_TK == 4).sum() < kept_TK.numel()
    expected_TD = torch.zeros(40, 8)
    for t in range(40):
        for k in range(2):
            if kept_TK[t, k] < 4:
                x_D, e = x_BLD.flatten(0, 1)[t], int(kept_TK[t, k])
                gate, up = (x_D @ layer.experts.gate_up[e]).chunk(2)
                hidden = (torch.nn.functional.silu(gate) * up) @ layer.experts.down[e]
                expected_TD[t] = expected_TD[t] + routing.gates_TK[t, k] * hidden
    torch.testing.assert_close(y_BLD.flatten(0, 1), expected_TD, rtol=1e-4, atol=1e-4)
    lost_T = (kept_TK == 4).all(-1)
    assert lost_T.any()
    assert (y_BLD.flatten(0, 1)[lost_T] == 0).all(), "a token without a place passes by the residual alone"
    counts = torch.stack([torch.bincount(part.flatten(), minlength=5)[:4] for part in kept_TK.chunk(2)])
    assert torch.equal(stats.kept_BE, counts.float())
    assert stats.load_BE.sum() == 80, "the load counts choices as made"
    weights = [x_BLD, *layer.parameters()]
    got = torch.autograd.grad(y_BLD.square().sum(), weights, retain_graph=True)
    want = torch.autograd.grad(expected_TD.square().sum(), weights)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


def test_enough_capacity_is_dropless_to_the_bit(tiny_config):
    config = tiny_config()
    outputs = []
    for dispatch in ("dropless", {"name": "capacity", "capacity_factor": 100.0}):
        config = tiny_config(moe={"dispatch": dispatch})
        model = GPT(config)
        initialize(model, 0)
        outputs.append(model.train()(torch.arange(48).view(2, 24), torch.arange(48).view(2, 24)))
    assert torch.equal(outputs[0].ce_BL, outputs[1].ce_BL)
    assert torch.equal(outputs[0].stats.kept_BE, outputs[1].stats.kept_BE)


@pytest.mark.parametrize("eval_dispatch", ["capacity", "dropless"])
def test_with_capacity_a_neighbour_in_the_batch_changes_a_tokens_output_and_without_it_none_does(
    tiny_config, eval_dispatch
):
    dispatch = {"name": "capacity", "eval_dispatch": eval_dispatch}
    if eval_dispatch == "capacity":
        dispatch["eval_capacity_factor"] = 1.0
    model = GPT(tiny_config(moe={"dispatch": dispatch}))
    initialize(model, 0)
    model.eval()
    generator = torch.Generator().manual_seed(0)
    tokens_BL = torch.randint(64, (4, 32), generator=generator)
    neighbours_BL = tokens_BL.clone()
    neighbours_BL[:3] = torch.randint(64, (3, 32), generator=generator)
    with torch.no_grad():
        alone, a, b = (model(each).logits[-1] for each in (tokens_BL[-1:], tokens_BL, neighbours_BL))
    same = [torch.allclose(a, b, atol=1e-5), torch.allclose(a, alone, atol=1e-5)]
    assert same == ([True, True] if eval_dispatch == "dropless" else [False, False])


def test_training_and_evaluation_have_factors_of_their_own():
    layer, (x_BLD, ids_BL) = make_layer(capacity_factor=0.5, eval_capacity_factor=100.0), make_input()
    kept = [layer(x_BLD, RouteContext(ids_BL, None, training))[1].kept_BE.sum() for training in (True, False)]
    assert kept[0] == 4 * expert_capacity(0.5, 40, 2, 4)
    assert kept[1] == 80


@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_padding_gives_no_expert_more_places(factor):
    layer, (x_BLD, ids_BL) = make_layer(capacity_factor=factor), make_input()
    mask_BL = torch.ones_like(ids_BL, dtype=torch.bool)
    short, short_stats = layer(x_BLD, RouteContext(ids_BL, mask_BL, True))
    padded = [torch.cat([each, each], 1) for each in (x_BLD, ids_BL, mask_BL)]
    padded[2][:, ids_BL.shape[1] :] = False
    long, long_stats = layer(padded[0], RouteContext(padded[1], padded[2], True))
    torch.testing.assert_close(long[:, : ids_BL.shape[1]], short)
    assert torch.equal(long_stats.kept_BE, short_stats.kept_BE)
    assert 0 < short_stats.kept_BE.sum() < short_stats.load_BE.sum()


def test_a_choice_that_is_none_takes_no_place():
    routing = TokenChoice(torch.tensor([[4, 4], [0, 4], [0, 4]]), torch.ones(3, 2))
    raw = {"n_experts": 4, "top_k": 2, "dispatch": {"name": "capacity", "capacity_factor": 1.3}}
    moe = from_dict(MoEConfig, raw, "model.moe")
    dispatcher = build("dispatch", moe.dispatch, moe)
    assert expert_capacity(1.3, 3, 2, 4) == 2
    assert dispatcher.kept(routing, True).tolist() == [[4, 4], [0, 4], [0, 4]]


def test_the_experts_of_a_group_may_share_its_places_unevenly():
    ids_TK = torch.tensor([[0, 2], [0, 3], [0, 1], [4, 0], [1, 3]])
    raw = {
        **{"n_experts": 4, "top_k": 2, "router": {"name": "top_k", "n_groups": 2, "top_k_groups": 2}},
        "dispatch": {"name": "capacity", "of": "group", "capacity_factor": 0.8},
    }
    moe = from_dict(MoEConfig, raw, "model.moe")
    moe.dispatch.check("model.moe.dispatch", moe)
    kept_TK = build("dispatch", moe.dispatch, moe).kept(TokenChoice(ids_TK, torch.ones(5, 2)), True)
    assert kept_TK.tolist() == [[0, 2], [0, 3], [0, 4], [4, 4], [1, 3]]  # 4 places a group
    with pytest.raises(ConfigError, match=r"of: group: the router top_k has no groups of experts here"):
        make_layer(of="group")


def make_dispatcher(**dispatch: Any) -> Any:
    """Of 8 experts in 2 groups, with a capacity factor of 1."""
    raw = {
        **{"n_experts": 8, "top_k": 2, "router": {"name": "top_k", "n_groups": 2, "top_k_groups": 2}},
        "dispatch": {"name": "capacity", "capacity_factor": 1.0, **dispatch},
    }
    moe = from_dict(MoEConfig, raw, "model.moe")
    return build("dispatch", moe.dispatch, moe)


def test_the_places_go_to_the_tokens_with_the_largest_gate():
    gates_TK = torch.tensor([[0.5, 0.45], [0.9, 0.05], [0.6, 0.3]])
    routing = TokenChoice(torch.tensor([[0, 1], [0, 2], [0, 3]]), gates_TK)
    kept_TK = make_dispatcher(drop="probability").kept(routing, True)  # one place an expert
    assert kept_TK.tolist() == [[8, 1], [0, 2], [8, 3]]
    turned = TokenChoice(routing.expert_ids_TK.flip(1), gates_TK.flip(1))  # the largest need not come first
    kept_TK = make_dispatcher(drop="probability").kept(turned, True)
    assert kept_TK.tolist() == [[1, 8], [2, 0], [3, 8]]


def test_a_group_has_as_many_experts_as_there_are_for_each_group():
    routing = TokenChoice(torch.tensor([[0, 3], [1, 2], [2, 5]]), torch.ones(3, 2))
    kept_TK = make_dispatcher(of="group").kept(routing, True)  # 3 places for experts 0 to 3, 3 for 4 to 7
    assert kept_TK.tolist() == [[0, 8], [1, 8], [2, 5]]


def test_shapes_are_static_and_the_layer_is_one_graph(tiny_config):
    model = GPT(tiny_config(moe={"dispatch": {"name": "capacity", "capacity_factor": 0.8, "drop": "probability"}}))
    initialize(model, 0)
    model.train()
    tokens_BL = torch.arange(64).view(4, 16)
    eager = model(tokens_BL, tokens_BL)
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    compiled = model(tokens_BL, tokens_BL)
    torch.testing.assert_close(eager.loss, compiled.loss)
    assert torch.equal(eager.stats.kept_BE, compiled.stats.kept_BE)
    assert eager.stats.kept_BE.sum() < eager.stats.load_BE.sum()


def test_a_factor_without_effect_is_refused():
    with pytest.raises(ConfigError, match="eval_capacity_factor: has no effect"):
        make_layer(eval_dispatch="dropless", eval_capacity_factor=1.5)
