"""`loss_free`, against arithmetic by hand and a numpy re-implementation."""

import numpy as np
import pytest
import torch
from test_balancing import LOGITS_BLE, identity_router, make_balancer, route


def test_loss_free_on_four_tokens_and_three_experts_by_hand():
    # load (3, 0, 1), mean 4/3: signs (-1, 1, 1), their mean 1/3
    load_ME = route(identity_router(), LOGITS_BLE).load_BE.sum(0, keepdim=True)
    bias_ME = torch.tensor([[0.1, 0.2, 0.3]])
    plain = make_balancer("loss_free", rate=0.03, centred=False).update_bias(bias_ME, load_ME, 0)
    torch.testing.assert_close(plain, torch.tensor([[0.07, 0.23, 0.33]]))
    centred = make_balancer("loss_free", rate=0.03).update_bias(bias_ME, load_ME, 0)
    torch.testing.assert_close(centred, torch.tensor([[0.06, 0.22, 0.32]]))
    assert bias_ME.tolist() == torch.tensor([[0.1, 0.2, 0.3]]).tolist()  # pure


def test_the_proportional_rule_on_four_tokens_and_three_experts_by_hand():
    # load (3, 0, 1), mean 4/3: 1 - load / mean = (-5/4, 1, 1/4), whose mean is 0
    load_ME = torch.tensor([[3.0, 0.0, 1.0]], dtype=torch.float64)
    bias_ME = torch.tensor([[0.1, 0.2, 0.3]])
    for centred in (False, True):
        balancer = make_balancer("loss_free", rate=0.04, rule="proportional", centred=centred)
        for batches in (1, 1000):  # the size of the batch does not matter
            new_ME = balancer.update_bias(bias_ME, load_ME * batches, 0)
            torch.testing.assert_close(new_ME, torch.tensor([[0.05, 0.24, 0.31]]))
            assert new_ME.dtype == torch.float32


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("rule", ["sign", "proportional"])
def test_the_bias_stands_still_at_balance_and_without_tokens(rule, centred):
    balancer = make_balancer("loss_free", rate=0.5, rule=rule, centred=centred)
    bias_ME = torch.tensor([[0.1, 0.2, 0.3]])
    for load in (0.0, 1.0, 7.0):
        assert torch.equal(balancer.update_bias(bias_ME, torch.full((1, 3), load, dtype=torch.float64), 0), bias_ME)


def test_collapse_costs_one_expert_its_bias():
    # load (12, 0, 0, 0), mean 3: signs (-1, 1, 1, 1), whose mean is 1/2; 1 - load / mean = (-3, 1, 1, 1)
    load_ME = torch.tensor([[12.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    wanted = {"sign": [-1.5, 0.5, 0.5, 0.5], "proportional": [-3.0, 1.0, 1.0, 1.0]}
    for rule, step in wanted.items():
        balancer = make_balancer("loss_free", rate=1.0, rule=rule)
        assert balancer.update_bias(torch.zeros(1, 4), load_ME, 0).tolist() == [step]


def test_from_the_stop_step_on_the_bias_is_kept():
    balancer = make_balancer("loss_free", stop_step=5)
    bias_ME, load_ME = torch.zeros(1, 3), torch.tensor([[3.0, 0.0, 1.0]], dtype=torch.float64)
    kept = [balancer.update_bias(bias_ME, load_ME, step) is None for step in range(8)]
    assert kept == [False] * 5 + [True] * 3


@pytest.mark.parametrize("centred", [False, True])
def test_fifty_steps_of_loss_free_equal_a_numpy_re_implementation(centred):
    balancer = make_balancer("loss_free", rate=0.001, centred=centred)
    random = np.random.default_rng(0)
    bias_ME, expected = torch.zeros(3, 8), np.zeros((3, 8), dtype=np.float32)
    for _ in range(50):
        load = random.poisson(4.0, size=(3, 8)).astype(np.float64)
        bias_ME = balancer.update_bias(bias_ME, torch.from_numpy(load), 0)
        step = np.where(load < load.mean(1, keepdims=True), 1.0, np.where(load > load.mean(1, keepdims=True), -1, 0))
        if centred:
            step = step - step.mean(1, keepdims=True)
        expected = expected + np.float32(0.001) * step.astype(np.float32)
    assert bias_ME.dtype == torch.float32
    np.testing.assert_array_equal(bias_ME.numpy(), expected)
    assert np.abs(expected).max() > 0.005
    drift_M = bias_ME.mean(-1).abs()
    assert (drift_M < 1e-6).all() if centred else (drift_M > 1e-4).any()


@pytest.mark.parametrize("n_experts", [3, 7, 12, 49, 60, 64, 160])
def test_an_expert_with_exactly_the_mean_load_keeps_its_bias(device, n_experts):
    balancer = make_balancer("loss_free", rate=0.5, centred=False)
    for mean in (1, 7, 1000, 12_345, 699_051, 3_333_333):
        load_ME = torch.full((1, n_experts), float(mean), dtype=torch.float64, device=device)
        load_ME[0, 0] += 1
        load_ME[0, 1] -= 1
        bias_ME = balancer.update_bias(torch.zeros(1, n_experts, device=device), load_ME, 0)
        assert bias_ME.tolist() == [[-0.5, 0.5, *[0.0] * (n_experts - 2)]], mean
