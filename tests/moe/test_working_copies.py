"""The experts' bf16 copies of float32 weights: never old, and not made again without need."""

import copy
import io

import pytest
import torch

pytest.importorskip("triton")

from moelm.config import ExpertsConfig, MoEConfig, OptimConfig
from moelm.moe.experts import Experts
from moelm.training.optim import build_optimizer

MOE = MoEConfig(n_experts=2, d_expert=8, experts=ExpertsConfig(backend="fused"))


@pytest.fixture
def experts(kernel_device):
    experts = Experts(MOE, d_in=16).to(kernel_device)
    torch.nn.init.normal_(experts.gate_up)
    torch.nn.init.normal_(experts.down)
    refresh(experts)
    return experts


def refresh(experts):
    """What GPT does before its blocks run."""
    with torch.autocast(experts.down.device.type, torch.bfloat16):
        experts.refresh()


def copies(experts):
    return experts.gate_up_copy, experts.down_copy


def state(experts):
    return {name: 2 * value for name, value in experts.state_dict().items()}


def after_step(make_optimizer):
    def change(experts):
        for _ in range(2):  # the second finds the state of the first
            optimizer = make_optimizer(list(experts.parameters()))
            experts.zero_grad()
            sum(parameter.sum() for parameter in experts.parameters()).backward()
            optimizer.step()
            refresh(experts)
            optimizer.step()
        return experts

    return change


def built(name):
    def make(parameters):
        holder = torch.nn.ParameterDict({"gate_up": parameters[0], "down": parameters[1]})
        return build_optimizer(holder, OptimConfig(optimizer=name, lr=0.1))

    return make


def in_place(experts):
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.unbind(0)[0].mul_(2)
    return experts


def loaded(experts, assign):
    experts.load_state_dict(state(experts), assign=assign)
    return experts


def copied(experts):
    other = copy.deepcopy(experts)
    return in_place(other)


def pickled(experts):
    file = io.BytesIO()
    torch.save(experts, file)
    file.seek(0)
    return in_place(torch.load(file, weights_only=False))


def emptied_and_filled(experts):
    filling = state(experts)
    experts.to_empty(device=experts.down.device).load_state_dict(filling)
    return experts


CHANGES = {
    "load": lambda experts: loaded(experts, False),
    "assign": lambda experts: loaded(experts, True),
    "in_place": in_place,
    "deepcopy": copied,
    "pickle": pickled,
    "to_empty": emptied_and_filled,
    "there_and_back": lambda experts: in_place(experts.double().float()),
    "sgd": after_step(lambda parameters: torch.optim.SGD(parameters, lr=0.1)),
    "adamw_fused": after_step(lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True)),
    "adamw_foreach": after_step(lambda parameters: torch.optim.AdamW(parameters, lr=0.1, foreach=True)),
    "built_adamw": after_step(built("adamw")),
    "built_muon": after_step(built("muon")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_copy_follows_every_change_of_its_weight(experts, change):
    before = [each.clone() for each in copies(experts)]
    experts = CHANGES[change](experts)
    refresh(experts)
    for weight, now, was in zip((experts.gate_up, experts.down), copies(experts), before, strict=True):
        assert torch.equal(now, weight.bfloat16())
        assert not torch.equal(now, was)
        assert weight.working_copy is now


def test_nothing_is_recast_while_weights_stand_still(experts):
    first, versions = copies(experts), [each._version for each in copies(experts)]
    sum(parameter.sum() for parameter in experts.parameters()).backward()
    refresh(experts)
    with torch.inference_mode():
        refresh(experts)
    assert [each._version for each in copies(experts)] == versions
    assert all(now is was for now, was in zip(copies(experts), first, strict=True))


def test_an_optimizer_may_write_the_copies_itself(experts):
    """As moelm's AdamW does on a GPU: then nothing is cast again."""

    class Writing(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self):
            for weight in self.param_groups[0]["params"]:
                weight.sub_(weight.grad)
                weight.working_copy.copy_(weight)
                weight.working_version = weight._version

    experts = after_step(lambda parameters: Writing(parameters, {}))(experts)
    versions = [each._version for each in copies(experts)]
    refresh(experts)
    assert [each._version for each in copies(experts)] == versions
    for weight, now in zip((experts.gate_up, experts.down), copies(experts), strict=True):
        assert torch.equal(now, weight.bfloat16())


def test_a_step_leaves_the_copy_of_a_weight_without_gradient(experts):
    versions = [each._version for each in copies(experts)]
    experts.down.grad = torch.ones_like(experts.down)
    torch.optim.AdamW(experts.parameters(), lr=0.1, fused=True).step()
    refresh(experts)
    assert [each._version > was for each, was in zip(copies(experts), versions, strict=True)] == [False, True]


def test_a_copy_that_inference_mode_made_serves_training(kernel_device):
    experts = Experts(MOE, d_in=16).to(kernel_device)
    torch.nn.init.normal_(experts.down)  # memory may hold NaN, which equals nothing
    with torch.inference_mode():
        refresh(experts)
    assert not any(each.is_inference() for each in copies(experts))
    refresh(in_place(experts))
    assert torch.equal(experts.down_copy, experts.down.bfloat16())


def test_there_are_copies_only_of_float32_weights_under_autocast_and_never_in_a_checkpoint(experts, kernel_device):
    assert experts.state_dict().keys() == {"gate_up", "down"}
    other = Experts(MOE, d_in=16).to(kernel_device)
    other.refresh()
    assert copies(other) == (None, None)
    refresh(other.bfloat16())
    assert copies(other) == (None, None)
    plain = Experts(MoEConfig(n_experts=2, d_expert=8, experts=ExpertsConfig(backend="grouped")), d_in=16)
    refresh(plain.to(kernel_device))
    assert copies(plain) == (None, None)
