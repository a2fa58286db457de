"""When experts are gathered, and what becomes of their gradients; two processes are in test_fsdp.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from moelm.config import ExpertsConfig, MoEConfig
from moelm.moe.experts import Experts
from moelm.training import gathered_experts
from moelm.training.adamw import AdamW
from moelm.training.gathered_experts import GatheredExperts
from moelm.training.shards import local

OFFSETS_E = torch.tensor([3, 3, 5, 8], dtype=torch.int32)


@pytest.fixture
def two_layers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[GatheredExperts]]:
    """Of a process that has the group for itself."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    layers = []
    for _ in range(2):
        with torch.device("meta"):
            experts = Experts(MoEConfig(n_experts=4, top_k=2, d_expert=8, experts=ExpertsConfig(backend="loop")), 8)
        layers.append(GatheredExperts(experts, mesh, torch.bfloat16, torch.float32))
        experts.to_empty(device="cpu")
        for parameter in experts.parameters():
            local(parameter).normal_()
    layers[0].after = layers[1]
    yield layers
    dist.destroy_process_group()


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tensors gathered by each call of `hold`, the last entry those since."""
    counts, plain = [0], gathered_experts.all_gather

    def counted(*arguments: Any, **options: Any) -> Any:
        counts[-1] += 1
        return plain(*arguments, **options)

    monkeypatch.setattr(gathered_experts, "all_gather", counted)
    return counts


def run(layers: list[GatheredExperts], x_RD: Tensor) -> Tensor:
    for layer in layers:
        layer.hold()
        with torch.autocast("cpu", torch.bfloat16):
            x_RD = layer.experts(x_RD, OFFSETS_E).float()
    return x_RD


def test_they_are_gathered_once_after_each_change(
    two_layers: list[GatheredExperts], gathered: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = [parameter for each in two_layers for parameter in each.experts.parameters()]
    options: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
    optimizer = AdamW(parameters, **options)
    writes_copies = AdamW(parameters, **options, moments=torch.bfloat16)
    x_RD = torch.randn(8, 8)

    def gathers(before: Any, *, grad: bool = True) -> int:
        before()
        gathered.append(0)
        with torch.enable_grad() if grad else torch.inference_mode():
            loss = run(two_layers, x_RD).sum()
        if grad:
            loss.backward()
            for layer in two_layers:
                layer.collect()
        for layer in two_layers:
            for name, parameter in layer.experts.named_parameters():
                assert torch.equal(layer._whole[name], local(parameter).detach().bfloat16())
        return gathered[-1]

    def nothing() -> None: ...

    assert gathers(nothing, grad=False) == 4
    assert gathers(nothing) == gathers(nothing) == gathers(nothing, grad=False) == 0
    assert gathers(optimizer.step) == 4
    monkeypatch.setattr("moelm.training.adamw.LARGE", 1)
    assert gathers(writes_copies.step) == 4
    assert gathers(nothing) == 0
    changed: Any = parameters[0]
    changed.working_version = None  # as after an optimizer that counts no version
    assert gathers(nothing) == 1
    state = {name: value.clone() for name, value in two_layers[1].experts.state_dict().items()}
    assert gathers(lambda: two_layers[1].experts.load_state_dict(state)) == 2


def test_gradients_of_micro_batches_are_added_in_float32(two_layers: list[GatheredExperts]) -> None:
    batches = torch.randn(2, 8, 8)
    wanted: dict[Any, Tensor] = {}
    for x_RD in batches:
        for layer in two_layers:
            for parameter in layer.experts.parameters():
                parameter.grad = None
        run(two_layers, x_RD).square().sum().backward()
        for layer in two_layers:
            layer.collect()
            for parameter in layer.experts.parameters():
                wanted[parameter] = wanted.get(parameter, 0) + local(parameter.grad).clone()
                parameter.grad = None
    for x_RD in batches:
        run(two_layers, x_RD).square().sum().backward()
    assert [len(each._leaving) for each in two_layers] == [4, 0]  # those of the layer after it are collected meanwhile
    for layer in two_layers:
        layer.collect()
        for parameter in layer.experts.parameters():
            assert parameter.grad is not None
            assert parameter.grad.dtype == torch.float32
            assert torch.equal(local(parameter.grad), wanted[parameter])
