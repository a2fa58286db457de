"""The load metrics by hand."""

import math

import pytest
import torch

from moelm.moe.load_metrics import dead_experts, dropped, load_entropy, max_violation, relative_load

LOADS = {  # load: (relative load, MaxVio, entropy, dead)
    "balanced": ([5, 5, 5, 5], [1, 1, 1, 1], 0.0, math.log(4), 0),
    "collapsed": ([0, 8, 0, 0], [0, 4, 0, 0], 3.0, 0.0, 3),
    "half": ([6, 0, 6, 0], [2, 0, 2, 0], 1.0, math.log(2), 2),
    "uneven": ([1, 1, 2, 4], [0.5, 0.5, 1, 2], 1.0, 1.75 * math.log(2), 0),
}


@pytest.mark.parametrize(("load", "relative", "violation", "entropy", "dead"), LOADS.values(), ids=LOADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_metrics_of_one_layer_by_hand(load, relative, violation, entropy, dead, dtype):
    load_E = torch.tensor(load, dtype=dtype)
    assert relative_load(load_E).tolist() == relative
    assert max_violation(load_E).item() == violation
    assert load_entropy(load_E).item() == pytest.approx(entropy, abs=1e-6)
    assert dead_experts(load_E).item() == dead


def test_each_layer_is_measured_for_itself():
    load_ME = torch.tensor([load for load, *_ in LOADS.values()], dtype=torch.float64)
    assert max_violation(load_ME).tolist() == [0, 3, 1, 1]
    assert dead_experts(load_ME).tolist() == [0, 3, 2, 0]
    wanted_M = torch.tensor([entropy for *_, entropy, _ in LOADS.values()], dtype=torch.float64)
    torch.testing.assert_close(load_entropy(load_ME), wanted_M)


def test_the_scale_of_the_counts_does_not_matter():
    load_E = torch.tensor([1.0, 1.0, 2.0, 4.0])
    for metric in (relative_load, max_violation, load_entropy, dead_experts):
        torch.testing.assert_close(metric(load_E * 1e6), metric(load_E))


def test_dropped_is_the_share_of_the_choices_that_were_not_kept():
    load_ME, kept_ME = torch.tensor([[6.0, 2.0], [4.0, 4.0]]), torch.tensor([[4.0, 2.0], [4.0, 4.0]])
    assert dropped(load_ME, kept_ME).tolist() == [0.25, 0]


def test_collapse_is_the_number_of_experts_less_one():
    for n_experts in (2, 64, 256):
        load_E = torch.zeros(n_experts)
        load_E[-1] = 1000
        assert max_violation(load_E).item() == n_experts - 1


def test_nothing_counted_gives_finite_values():
    zeros_E = torch.zeros(4)
    assert relative_load(zeros_E).tolist() == [0, 0, 0, 0]
    assert max_violation(zeros_E).item() == 0
    assert dropped(zeros_E, zeros_E).item() == 0
    assert load_entropy(zeros_E).item() == 0
    assert dead_experts(zeros_E).item() == 4
