"""AdamW's own pass over large tensors, against torch's AdamW; clipping inside it; moments in bfloat16."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_resume import assert_same, assert_same_state, named
from tiny_runs import Recorder
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from moelm.config import Config, OptimConfig
from moelm.train import train
from moelm.training import adamw
from moelm.training.adamw import HAS_TRITON, AdamW, adamw_reference, hash32, round_at_random
from moelm.training.checkpoint_io import load_training, step_folder
from moelm.training.gradient_clipping import clip_gradients, gradient_norm
from moelm.training.optim import build_optimizer

if HAS_TRITON:
    from moelm.training import adamw_kernel

OPTIONS: dict[str, Any] = {"lr": 0.1, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.3}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where kernels run
SHAPES = [(9, 30), (70,), (5,), (3, 40, 8), ()]  # the first, second and fourth are large here
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")


@pytest.fixture(params=["reference", pytest.param("kernel", marks=needs_triton)])
def update(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Tensors of 64 elements are large, and updated as on a GPU; the kernel by the interpreter where there is none."""
    monkeypatch.setattr(adamw, "LARGE", 64)
    monkeypatch.setattr(adamw, "has_kernel", lambda parameter: True)
    if request.param == "kernel":
        monkeypatch.setattr(adamw_kernel, "BLOCK", 128)
    else:
        monkeypatch.setattr(adamw, "adamw_kernel", adamw_reference, raising=False)
    return str(request.param)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(random(*shape, seed=i)) for i, shape in enumerate(SHAPES)]


def groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": parameters[:3]}, {"params": parameters[3:], "weight_decay": 0.0}]


def take_steps(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], first: int = 0, last: int = 4, limit: float = 3.0
) -> None:
    """Steps first to last - 1 with gradients of their own, clipped; a schedule; in step 1 one without a gradient."""
    for step in range(first, last):
        for i, parameter in enumerate(parameters):
            parameter.grad = random(*parameter.shape, seed=100 * step + i)
            if i == 3 and step == 1:
                parameter.grad = None
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (1 + step)
        clip_gradients(optimizer, parameters, limit)
        optimizer.step()


def assert_close(ours: Any, theirs: Any, tolerance: float = 2e-6) -> None:
    """In relative L2: sums of float32 in another order and with other roundings."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).norm() <= tolerance * b.norm()


def test_the_steps_are_those_of_torch_with_clipping_before_them(update: str) -> None:
    ours, theirs = parameters(), parameters()
    own, torchs = AdamW(groups(ours), **OPTIONS), torch.optim.AdamW(groups(theirs), **OPTIONS, fused=True)
    for limit in (3.0, 1000.0):  # gradients have a norm of about 30
        take_steps(own, ours, limit=limit)
        take_steps(torchs, theirs, limit=limit)
        assert_close(ours, theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert own.state[a].keys() == torchs.state[b].keys()
            assert_close(own.state[a].values(), torchs.state[b].values())
    assert all((a - b).norm() > 0.05 * b.norm() for a, b in zip(ours, parameters(), strict=True))


def test_a_state_of_torch_continues_here_and_one_from_here_under_torch(update: str) -> None:
    """As a checkpoint of the CPU does on a GPU."""
    ours, theirs = parameters(), parameters()
    own, torchs = AdamW(groups(ours), **OPTIONS), torch.optim.AdamW(groups(theirs), **OPTIONS, fused=True)
    take_steps(own, ours, 0, 2)
    take_steps(torchs, theirs, 0, 2)
    state = copy.deepcopy(own.state_dict())
    assert_same(state["param_groups"], torchs.state_dict()["param_groups"])
    own.load_state_dict(torchs.state_dict())
    torchs.load_state_dict(state)
    take_steps(own, ours, 2, 5)
    take_steps(torchs, theirs, 2, 5)
    expected = parameters()
    take_steps(torch.optim.AdamW(groups(expected), **OPTIONS), expected, 0, 5)
    assert_close(ours, expected)
    assert_close(theirs, expected)


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_a_reloaded_state_continues_bitwise(update: str, moments: torch.dtype) -> None:
    straight, resumed = parameters(), parameters()
    one, two = (AdamW(groups(each), **OPTIONS, moments=moments) for each in (straight, resumed))
    take_steps(one, straight, 0, 4)
    take_steps(two, resumed, 0, 2)
    state = copy.deepcopy(two.state_dict())
    assert [state["state"][i]["exp_avg_sq"].dtype for i in range(5)] == [
        *(moments, moments, torch.float32),
        *(moments, torch.float32),
    ]
    two = AdamW(groups(resumed), **OPTIONS, moments=moments)
    two.load_state_dict(state)
    take_steps(two, resumed, 2, 4)
    assert_same(straight, resumed)
    assert_same(one.state_dict(), two.state_dict())


def test_moments_of_either_dtype_become_what_the_optimizer_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "LARGE", 64)
    ours = parameters()
    full, half = AdamW(ours, **OPTIONS), AdamW(ours, **OPTIONS, moments=torch.bfloat16)
    take_steps(full, ours, 0, 2)
    half.load_state_dict(full.state_dict())
    assert half.state[ours[0]]["exp_avg"].dtype == torch.bfloat16
    assert_close([half.state[ours[0]]["exp_avg"].float()], [full.state[ours[0]]["exp_avg"]], 2**-8)
    full.load_state_dict(half.state_dict())
    assert full.state[ours[0]]["exp_avg"].dtype == torch.float32
    assert half.state[ours[2]]["exp_avg"].dtype == torch.float32


def test_a_bf16_gradient_counts_as_what_it_is(update: str) -> None:
    """Of small parameters too."""
    ours, theirs = parameters(), parameters()
    own, torchs = AdamW(ours, **OPTIONS), torch.optim.AdamW(theirs, **OPTIONS)
    for step in range(3):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            gradient = random(*a.shape, seed=10 * step + i).bfloat16()
            a.grad_dtype = torch.bfloat16  # type: ignore[attr-defined]
            a.grad, b.grad = gradient, gradient.float()
        assert_close([clip_gradients(own, ours, 3.0)], [clip_gradients(torchs, theirs, 3.0)])
        own.step()
        torchs.step()
    assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_working_copy_is_the_new_value_rounded_and_known_to_be_fresh(update: str, dtype: torch.dtype) -> None:
    ours = parameters()
    large, small = ours[3], ours[2]
    for parameter in (large, small):
        parameter.working_copy = torch.full_like(parameter, 7, dtype=dtype)
        parameter.working_version = parameter._version
    optimizer = AdamW(ours, **OPTIONS)
    for last in (1, 2):  # the second step gives `large` no gradient: it and its copy stay
        before = [parameter._version for parameter in ours]
        take_steps(optimizer, ours, last - 1, last)
        moved = [parameter._version > version for parameter, version in zip(ours, before, strict=True)]
        assert moved == [True, True, True, last == 1, True]
        assert large.working_version == large._version
        expected = large.detach()
        if update == "kernel" and not large.is_cuda and dtype == torch.bfloat16:  # the interpreter cuts off
            expected = (expected.view(torch.int32) & ~0xFFFF).view(torch.float32)
        assert torch.equal(large.working_copy, expected.to(dtype))
    assert small.working_version < small._version, "torch writes no copies: this one must be seen to be old"


def test_autograd_sees_that_a_step_changed_what_it_saved(update: str) -> None:
    parameter = nn.Parameter(random(9, 30))
    loss = (parameter**2).sum()
    parameter.grad = torch.ones_like(parameter)
    AdamW([parameter], **OPTIONS).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class NoNumbers(TorchDispatchMode):
    """On a GPU the host would wait for each."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert op is not torch.ops.aten._local_scalar_dense.default
        return op(*args, **(kwargs or {}))


def test_a_step_asks_the_device_for_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "LARGE", 64)
    monkeypatch.setattr(adamw, "has_kernel", lambda parameter: True)
    monkeypatch.setattr(adamw, "adamw_kernel", lambda *args, **kwargs: None, raising=False)
    ours = parameters()
    optimizer = AdamW(ours, **OPTIONS)
    for parameter in ours:
        parameter.grad = torch.randn_like(parameter)
    with NoNumbers():
        clip_gradients(optimizer, ours, 3.0)
        optimizer.step()
    assert all(optimizer.state[parameter]["step"] == 1 for parameter in ours)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_a_step_on_a_gpu_neither_waits_nor_compiles_again(
    monkeypatch: pytest.MonkeyPatch, moments: torch.dtype
) -> None:
    monkeypatch.setattr(adamw, "LARGE", 64)
    ours = parameters()
    ours[0].working_copy = torch.empty_like(ours[0], dtype=torch.bfloat16)
    optimizer = AdamW(ours, **OPTIONS, moments=moments)
    take_steps(optimizer, ours, 0, 2)
    gradients = [torch.randn_like(parameter) for parameter in ours]
    monkeypatch.setattr(adamw_kernel._adamw, "_do_compile", None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(20):
            for group in optimizer.param_groups:
                group["lr"] = 1 / (1 + step)
            for parameter, gradient in zip(ours, gradients, strict=True):
                parameter.grad = gradient
            clip_gradients(optimizer, ours, 3.0)
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def step_arguments(moments: torch.dtype, t: int, n: int) -> list[Any]:
    """Those of `adamw_reference`, in the middle of a run."""
    m, v = (random(n, seed=i) for i in (1, 2))
    step, scale = (torch.tensor(value, device=DEVICE) for value in (float(t), 0.3))
    p, g = random(n), random(n, seed=3)
    return [p, g, m.to(moments), (v * v).to(moments), None, step, scale]


@needs_triton
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("beta2", "t"), [(0.95, 7), (0.999, 1), (0.9999, 200_000), (0.0, 1)])
def test_the_kernel_is_its_reference(
    beta2: float, t: int, moments: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adamw_kernel, "BLOCK", 256)
    options = {**OPTIONS, "betas": (0.9, beta2), "index": 300}
    kernel, reference = (step_arguments(moments, t, 2100) for _ in range(2))
    adamw_kernel.adamw_kernel(*kernel, **options)
    adamw_reference(*reference, **options)
    start = step_arguments(moments, t, 2100)[0]
    assert ((kernel[0] - reference[0]).abs() <= 2e-6 * (start.abs() + reference[0].abs())).all()
    if moments == torch.float32:
        assert_close(kernel[2:4], reference[2:4])
    else:  # another last bit in float32 may tip a rounding
        for a, b in zip(kernel[2:4], reference[2:4], strict=True):
            assert (a.view(torch.int16) - b.view(torch.int16)).abs().max() <= 1
            assert (a != b).sum() <= 2


def test_moments_in_bf16_are_rounded_up_or_down_and_right_in_the_mean() -> None:
    x = torch.tensor([1.0, 1 + 2**-9, -(1 + 2**-9), 3e-41, 0.0, 65537.0, float("inf")]).repeat_interleave(4000)
    rounded = round_at_random(x, hash32(torch.arange(len(x))) & 0xFFFF).float()
    low, high = x.abs().view(torch.int32) & ~0xFFFF, (x.abs().view(torch.int32) + 0xFFFF) & ~0xFFFF
    bits = rounded.abs().view(torch.int32)
    assert ((bits == low) | (bits == high)).all()
    assert torch.equal(rounded.signbit(), x.signbit())
    means = rounded.view(7, -1).mean(1)
    assert means[0] == 1
    assert means[1:3].tolist() == pytest.approx([1 + 2**-9, -(1 + 2**-9)], abs=3e-4)
    assert means[3].item() == pytest.approx(3e-41, rel=0.15)
    assert means[4] == 0
    assert means[5].item() == pytest.approx(65537, abs=10)
    assert means[6] == float("inf")


def test_the_second_moment_decays_in_bf16_as_slowly_as_beta2_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.999 takes a quarter to half of the last digit in a step: to the nearest, nothing would ever change."""
    monkeypatch.setattr(adamw, "LARGE", 64)
    parameter = nn.Parameter(torch.zeros(4096))
    optimizer = AdamW([parameter], lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, moments=torch.bfloat16)
    parameter.grad = torch.full_like(parameter, 2)
    optimizer.step()
    state = optimizer.state[parameter]
    state["exp_avg_sq"].fill_(4)
    parameter.grad = torch.zeros_like(parameter)
    for _ in range(50):
        optimizer.step()
    assert state["exp_avg_sq"].float().mean().item() == pytest.approx(4 * 0.999**50, rel=1e-3)
    assert state["exp_avg"].float().mean().item() == pytest.approx(0.2 * 0.9**50, rel=1e-3)


def test_every_element_parameter_and_step_is_rounded_by_its_own_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.tensor(1 + 2**-8)  # half way

    def pattern(t: int, index: int) -> Tensor:
        parameter, moments = torch.zeros(64, 64), [torch.zeros(64, 64, dtype=torch.bfloat16) for _ in range(2)]
        options = {**OPTIONS, "betas": (0.0, 0.0), "index": index}
        adamw_reference(parameter, x.expand(64, 64), *moments, None, torch.tensor(float(t)), None, **options)
        return moments[0] > 1

    first = pattern(1, 0)
    assert torch.equal(first, pattern(1, 0))
    for bits in (first, *(first ^ pattern(t, index) for t, index in [(1, 1), (2, 0), (2, 1), (100_000, 0)])):
        for share in (bits.float().mean(), bits.float().mean(0).mean(), (bits[:, 1:] ^ bits[:, :-1]).float().mean()):
            assert 0.45 < share < 0.55
        assert (bits[1:] ^ bits[:-1]).any(1).all(), "rows are the same"
    twins = [nn.Parameter(torch.ones_like(random(100))) for _ in range(3)]
    for twin in twins:
        twin.grad = random(100)
    monkeypatch.setattr(adamw, "LARGE", 64)
    optimizer = AdamW([{"params": twins[:2]}, {"params": twins[2:]}], **OPTIONS, moments=torch.bfloat16)
    optimizer.step()
    a, b, c = (optimizer.state[twin]["exp_avg"] for twin in twins)
    assert all((one != other).any() for one, other in [(a, b), (b, c), (a, c)])


def test_the_gradient_norm_is_that_of_all_dtypes_in_float32() -> None:
    gradients = [random(1000, seed=i) for i in range(4)]
    gradients = [gradients[0], gradients[1].bfloat16(), 1e-3 * gradients[2], gradients[3].bfloat16()]
    expected = torch.cat([gradient.double() for gradient in gradients]).norm()
    assert gradient_norm(gradients).item() == pytest.approx(expected.item(), rel=1e-6)


def test_clipping_holds_for_one_step(update: str) -> None:
    parameter = nn.Parameter(random(100))
    parameter.grad = gradient = random(100, seed=1)
    optimizer = AdamW([parameter], **OPTIONS)
    norm = clip_gradients(optimizer, [parameter], 0.5)
    assert norm.item() == pytest.approx(gradient.norm().item())
    for factor in (0.5 / norm, 1.0, 1.0):
        optimizer.step()
        assert_close([optimizer.state[parameter]["exp_avg"]], [0.2 * factor * gradient])
        optimizer.state.clear()
        clip_gradients(optimizer, [parameter], None)
    assert torch.equal(gradient, random(100, seed=1))


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [0, 2])
def test_a_gradient_or_loss_that_is_no_number_changes_nothing(update: str, first: int, moments: torch.dtype) -> None:
    ours = parameters()
    ours[3].working_copy = ours[3].detach().bfloat16()  # type: ignore[attr-defined]
    optimizer = AdamW(groups(ours), **OPTIONS, moments=moments)
    take_steps(optimizer, ours, 0, first)
    for bad, loss, limit in [(math.nan, None, 1.0), (math.inf, None, None), (1.0, math.nan, 1.0)]:
        before = copy.deepcopy([[parameter.detach() for parameter in ours], ours[3].working_copy])
        state = copy.deepcopy(optimizer.state_dict()["state"])
        for i, parameter in enumerate(ours):
            parameter.grad = torch.full_like(parameter, bad if i == 2 else 1.0)
        clip_gradients(optimizer, ours, limit, None if loss is None else torch.tensor(loss, device=DEVICE))
        optimizer.step()
        assert_same([[parameter.detach() for parameter in ours], ours[3].working_copy], before)
        now = optimizer.state_dict()["state"]
        assert_same({i: now[i] for i in state}, state)
        assert all(not value.any() for i in now.keys() - state.keys() for value in now[i].values())
    before = copy.deepcopy(ours)
    take_steps(optimizer, ours, 2, 3)
    assert all(not torch.equal(a, b) for a, b in zip(ours, before, strict=True))


def test_gradients_of_other_optimizers_are_clipped_in_place() -> None:
    parameter = nn.Parameter(random(10, 10))
    parameter.grad = random(10, 10, seed=1)
    norm = clip_gradients(torch.optim.AdamW([parameter], **OPTIONS, fused=True), [parameter], 0.5)
    assert norm.item() == pytest.approx(random(10, 10, seed=1).norm().item())
    assert_close([parameter.grad], [random(10, 10, seed=1) * (0.5 / (norm + 1e-6))])


def test_what_is_not_large_is_updated_by_torch_to_the_last_bit() -> None:
    ours, theirs = parameters(), parameters()
    own, torchs = AdamW(groups(ours), **OPTIONS), torch.optim.AdamW(groups(theirs), **OPTIONS, fused=True)
    take_steps(own, ours)
    take_steps(torchs, theirs)
    assert_same(ours, theirs)
    assert_same(own.state_dict(), torchs.state_dict())
    assert clip_gradients(own, ours, 3.0) == clip_gradients(torchs, theirs, 3.0)


def test_the_options_reach_the_optimizer() -> None:
    model = nn.Linear(3, 3)
    config = OptimConfig(moments="bfloat16", lr=0.5, betas=[0.1, 0.2], eps=1e-3, weight_decay=0.4)
    optimizer = build_optimizer(model, config)
    assert isinstance(optimizer, AdamW)
    assert optimizer.moments == torch.bfloat16
    for group in optimizer.param_groups:
        assert (group["lr"], group["eps"], group["betas"]) == (0.5, 1e-3, (0.1, 0.2))
    assert optimizer.param_groups[0]["weight_decay"] == 0.4
    assert build_optimizer(model, OptimConfig()).moments == torch.float32


def test_a_run_with_bf16_moments_learns_as_one_with_float32_and_resumes_bitwise(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adamw, "LARGE", 256)
    options = {"trainer.max_steps": 16, "checkpoint.every_n_steps": 8, "optim.betas": [0.9, 0.999]}
    options["data.val_every_n_steps"] = 100
    train(named(tiny(options), "plain"))
    plain = Recorder.made[-1]
    config = tiny({**options, "optim.moments": "bfloat16"})
    straight, broken = named(config, "straight"), named(config, "broken")
    train(straight)
    whole = Recorder.made[-1]
    assert whole.losses[0] - whole.losses[-1] > 0.3
    assert whole.losses != plain.losses
    assert whole.losses[-5:] == pytest.approx(plain.losses[-5:], abs=0.01)
    Recorder.raise_after = 11
    with pytest.raises(RuntimeError, match="the machine is gone"):
        train(broken)
    Recorder.raise_after = None
    train(broken, resume="auto")
    assert whole.losses[8:] == Recorder.made[-1].losses
    last = step_folder(broken.run_folder, 16)
    assert_same_state(step_folder(straight.run_folder, 16), last)
    states = load_training(last)["optimizer_states"][0]["state"].values()
    assert {state["exp_avg"].dtype for state in states} == {torch.float32, torch.bfloat16}
