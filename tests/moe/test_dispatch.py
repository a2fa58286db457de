"""The dropless dispatcher: rows sorted by expert, and back."""

import pytest
import torch

from moelm.config import MoEConfig, build, make_named
from moelm.moe.dispatch.dropless import counting_sort, sort_by_expert, stable_argsort
from moelm.moe.types import TokenChoice

NONE = 4  # the id n_experts of the cases below


def plan_of(ids):
    return sort_by_expert(torch.tensor(ids), NONE)


def random_routing(T=20, K=3, n_experts=6, masked=(), seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    ids_TK = torch.rand(T, n_experts, generator=generator).topk(K).indices
    gates_TK = torch.rand(T, K, generator=generator)
    for t in masked:
        ids_TK[t], gates_TK[t] = n_experts, 0.0
    return TokenChoice(ids_TK, gates_TK.to(dtype))


def make_dispatcher(n_experts=6):
    moe = MoEConfig(n_experts=n_experts)
    return build("dispatch", make_named("dispatch", "dropless"), moe)


def spread(dispatcher, x_TD, routing):
    plan = dispatcher.plan(routing, len(x_TD))
    return dispatcher.spread(x_TD, plan), plan


def test_rows_lie_in_the_order_of_experts_and_then_of_choices():
    plan = plan_of([[2, 0], [0, 3], [2, 3]])
    # choices 0..5 go to the experts 2 0 0 3 2 3
    assert plan.choice_of_row_R.tolist() == [1, 2, 0, 4, 3, 5]
    assert plan.row_of_choice_TK.tolist() == [[2, 0], [1, 4], [3, 5]]
    assert plan.offsets_E.tolist() == [2, 2, 4, 6]
    assert plan.offsets_E.dtype == torch.int32
    assert plan.valid_TK.all()


def test_none_ids_come_last_and_past_the_last_offset():
    plan = plan_of([[NONE, NONE], [3, 1], [NONE, 0]])
    assert plan.choice_of_row_R.tolist() == [5, 3, 2, 0, 1, 4]
    assert plan.offsets_E.tolist() == [1, 2, 2, 3]
    assert plan.valid_TK.tolist() == [[False, False], [True, True], [False, True]]


@pytest.mark.parametrize(
    ("ids", "offsets"),
    [
        ([[1]], [0, 1, 1, 1]),
        ([[0], [0], [0]], [3, 3, 3, 3]),
        ([[NONE]], [0, 0, 0, 0]),
        ([[3, 2, 1, 0]], [1, 2, 3, 4]),
    ],
    ids=["one_token", "all_on_one_expert", "no_token", "every_expert"],
)
def test_offsets_are_the_ends_of_the_experts_rows(ids, offsets):
    assert plan_of(ids).offsets_E.tolist() == offsets


def test_the_two_permutations_are_inverse():
    routing = random_routing(masked=(3, 19))
    plan = sort_by_expert(routing.expert_ids_TK, 6)
    assert torch.equal(plan.row_of_choice_TK.flatten()[plan.choice_of_row_R], torch.arange(60))
    sorted_ids = routing.expert_ids_TK.flatten()[plan.choice_of_row_R]
    assert torch.equal(sorted_ids, sorted_ids.sort().values)
    for expert, (start, end) in enumerate(zip([0, *plan.offsets_E.tolist()], plan.offsets_E.tolist(), strict=False)):
        assert (sorted_ids[start:end] == expert).all()
    assert (sorted_ids[plan.offsets_E[-1] :] == 6).all()


def test_the_sort_of_the_gpu_is_the_stable_one(kernel_device):
    pytest.importorskip("triton")
    ids_TK = random_routing(masked=(3, 19)).expert_ids_TK.to(kernel_device)
    for found, wanted in zip(counting_sort(ids_TK, 6), stable_argsort(ids_TK, 6), strict=True):
        assert found.dtype == wanted.dtype == torch.int32
        assert torch.equal(found, wanted)
    torch.library.opcheck(counting_sort, (ids_TK, 6), test_utils=("test_schema", "test_faketensor"))


def test_dispatch_gives_each_row_the_vector_of_its_token():
    dispatcher, routing = make_dispatcher(), random_routing()
    x_TD = torch.arange(20.0).unsqueeze(1) * torch.ones(4)
    rows_RD, plan = spread(dispatcher, x_TD, routing)
    assert torch.equal(rows_RD, x_TD[plan.choice_of_row_R // 3])


@pytest.mark.parametrize("masked", [(), (0, 7, 8)], ids=["all", "some_masked"])
def test_with_identity_experts_the_result_is_the_sum_of_the_gates_times_the_token(masked):
    dispatcher, routing = make_dispatcher(), random_routing(masked=masked)
    x_TD = torch.randn(20, 5, generator=torch.Generator().manual_seed(1), requires_grad=True)
    gates_TK = routing.gates_TK.requires_grad_()
    rows_RD, plan = spread(dispatcher, x_TD, routing)
    y_TD = dispatcher.combine(rows_RD, routing, plan)
    torch.testing.assert_close(y_TD, gates_TK.sum(-1, keepdim=True) * x_TD)
    grad_TD = torch.randn(20, 5, generator=torch.Generator().manual_seed(2))
    y_TD.backward(grad_TD)
    torch.testing.assert_close(x_TD.grad, gates_TK.sum(-1, keepdim=True) * grad_TD)
    wanted_T1 = (x_TD * grad_TD).sum(-1, keepdim=True).detach()
    wanted_T1[list(masked)] = 0.0
    torch.testing.assert_close(gates_TK.grad, wanted_T1.expand(20, 3))


def test_each_choice_has_its_own_gate():
    """Experts that multiply by their own number: sum_k gate_k (1 + id_k) x."""
    dispatcher, routing = make_dispatcher(), random_routing()
    x_TD = torch.randn(20, 5, generator=torch.Generator().manual_seed(1))
    rows_RD, plan = spread(dispatcher, x_TD, routing)
    number_R1 = routing.expert_ids_TK.flatten()[plan.choice_of_row_R].unsqueeze(-1) + 1.0
    y_TD = dispatcher.combine(rows_RD * number_R1, routing, plan)
    factor_T1 = (routing.gates_TK * (routing.expert_ids_TK + 1)).sum(-1, keepdim=True)
    torch.testing.assert_close(y_TD, factor_T1 * x_TD)


def test_the_hand_written_gradients_are_those_of_finite_differences():
    dispatcher = make_dispatcher()
    routing = random_routing(T=5, masked=(2,), dtype=torch.float64)
    x_TD = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    factor_RD = torch.randn(15, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def layer(x_TD, gates_TK):
        rows_RD, plan = spread(dispatcher, x_TD, routing)
        return dispatcher.combine(rows_RD.square() * factor_RD, TokenChoice(routing.expert_ids_TK, gates_TK), plan)

    inputs = (x_TD.requires_grad_(), routing.gates_TK.requires_grad_())
    # the float64 gradient of the gates is summed in float32, whence the tolerance
    torch.autograd.gradcheck(layer, inputs, atol=1e-5, rtol=1e-4)


def test_rows_of_none_are_never_read():
    dispatcher, routing = make_dispatcher(), random_routing(masked=(0, 19))
    x_TD = torch.randn(20, 5, generator=torch.Generator().manual_seed(1), requires_grad=True)
    gates_TK = routing.gates_TK.requires_grad_()
    rows_RD, plan = spread(dispatcher, x_TD, routing)
    tail_R1 = (torch.arange(60) >= plan.offsets_E[-1]).unsqueeze(-1)
    poisoned_RD = torch.where(tail_R1, torch.nan, rows_RD)
    poisoned_RD.register_hook(lambda grad: torch.where(tail_R1, torch.nan, grad))
    y_TD = dispatcher.combine(poisoned_RD, routing, plan)
    assert (y_TD[[0, 19]] == 0).all()
    y_TD.sum().backward()
    assert y_TD.isfinite().all()
    assert x_TD.grad.isfinite().all()
    assert (x_TD.grad[[0, 19]] == 0).all()
    assert gates_TK.grad.isfinite().all()


def test_a_gradient_through_bfloat16_rows_is_summed_in_float32():
    """1001 products of 1/256 are 3.91015625, which bf16 cannot hold."""
    dispatcher = make_dispatcher(1)
    gates_TK = torch.ones(1, 1, requires_grad=True)
    routing = TokenChoice(torch.zeros(1, 1, dtype=torch.int64), gates_TK)
    rows_RD, plan = spread(dispatcher, torch.full((1, 1001), 1 / 256, dtype=torch.bfloat16), routing)
    y_TD = dispatcher.combine(rows_RD, routing, plan)
    assert y_TD.dtype == torch.bfloat16
    y_TD.backward(torch.ones_like(y_TD))
    assert gates_TK.grad.dtype == torch.float32
    assert gates_TK.grad.item() == 1001 / 256
