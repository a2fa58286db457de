"""What a remembered launch is, without a GPU: Triton and its driver are played by what records the calls."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from moelm.moe.kernels import launch
from moelm.moe.kernels.launch import Kernel

X = torch.zeros(64, dtype=torch.bfloat16)
DESCRIPTOR = SimpleNamespace(base=X, block_shape=[64, 128], layout="swizzled")


class Triton:
    """A kernel; `compiled` are the launches that Triton saw, `launched` those that it did not."""

    constexprs = (3,)

    def __init__(self):
        self.compiled, self.launched = [], []

    def __getitem__(self, grid):
        def run(*arguments, **options):
            self.compiled.append((grid, arguments, options))
            return SimpleNamespace(run=lambda *all: self.launched.append(all), function="code", packed_metadata="meta")

        return run


@pytest.fixture
def triton(monkeypatch):
    active = SimpleNamespace(get_current_device=lambda: triton.device, get_current_stream=lambda device: 7)
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(launch, "REMEMBERS", True)
    triton = Triton()
    triton.device = 0
    return triton


def test_what_triton_does_not_compile_for_is_launched_without_it(triton):
    kernel, other = Kernel(triton), torch.ones(64, dtype=torch.bfloat16)
    kernel[2, 1, 1](X, None, 3, 128, 0.5, DESCRIPTOR, num_warps=4)
    moved = SimpleNamespace(base=other, block_shape=[64, 128], layout="swizzled")
    kernel[5, 1, 1](other, None, 77, 128, 0.25, moved, num_warps=4)
    assert triton.compiled == [((2, 1, 1), (X, None, 3, 128, 0.5, DESCRIPTOR), {"num_warps": 4})]
    (arguments,) = triton.launched
    assert arguments[:9] == (5, 1, 1, 7, "code", "meta", None, None, None)
    assert arguments[9] is other
    assert arguments[10:] == (None, 77, 128, 0.25, moved)


CHANGES = {
    "option": lambda call: call | {"num_warps": 8},
    "one": lambda call: call | {"n": 1},
    "multiple": lambda call: call | {"n": 32},
    "wide": lambda call: call | {"n": 2**31 + 3},
    "constant": lambda call: call | {"block": 64},
    "dtype": lambda call: call | {"x": X.float()},
    "alignment": lambda call: call | {"x": X[1:]},
    "none": lambda call: call | {"x": None},
    "block": lambda call: call | {"blocks": SimpleNamespace(base=X, block_shape=[64, 64], layout="swizzled")},
    "layout": lambda call: call | {"blocks": SimpleNamespace(base=X, block_shape=[64, 128], layout="plain")},
    "device": lambda call: call | {"device": 1},
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_else_differs_is_a_matter_for_triton(triton, change):
    kernel = Kernel(triton)
    first = {"x": X, "n": 3, "blocks": DESCRIPTOR, "block": 16, "num_warps": 4, "device": 0}
    for call in (first, CHANGES[change](first), first):
        triton.device = call["device"]
        kernel[2, 1, 1](call["x"], call["n"], call["blocks"], call["block"], num_warps=call["num_warps"])
    assert len(triton.compiled) == 2
    assert len(triton.launched) == 1


def test_integers_of_a_kind_are_the_same_to_triton():
    jit, BaseBackend = pytest.importorskip("triton.runtime.jit"), launch.triton.backends.compiler.BaseBackend
    if not hasattr(jit, "native_specialize_impl"):
        pytest.skip("this Triton describes arguments in another way")
    powers = [sign * 2**p + d for p in (0, 3, 4, 31, 32, 62) for d in (-16, -1, 0, 1, 16) for sign in (1, -1)]
    by_kind = {}
    for n in (*powers, 2**63 - 1):
        told = [jit.native_specialize_impl(BaseBackend, n, False, *how) for how in product((True, False), repeat=2)]
        assert by_kind.setdefault(launch._kind(n), told) == told, n
    assert len(by_kind) == 5


def test_no_more_than_a_bounded_number_is_remembered(triton, monkeypatch):
    monkeypatch.setattr(launch, "MOST", 3)
    kernel = Kernel(triton)
    for n in range(10):
        kernel[1, 1, 1](X, X, X, n)
    assert len(kernel.known) <= 3


def test_a_triton_of_another_version_is_asked_each_time(triton, monkeypatch):
    monkeypatch.setattr(launch, "REMEMBERS", False)
    kernel = Kernel(triton)
    for _ in range(2):
        kernel[1, 1, 1](X)
    assert len(triton.compiled) == 2
    assert not triton.launched


@pytest.mark.parametrize(("a", "b"), [(0, 3), (1, 3), (3, 3), (4, 3), (513, 512)])
def test_sizes_are_rounded_as_triton_rounds_them(a, b):
    triton = pytest.importorskip("triton")
    assert launch.cdiv(a, b) == triton.cdiv(a, b)
    assert launch.next_power_of_2(b) == triton.next_power_of_2(b)
