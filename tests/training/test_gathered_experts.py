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
from moelm.training.strategies import begin

OFFSETS_E = torch.tensor([3, 3, 5, 8], dtype=torch.int32)


@pytest.fixture
def two_layers(request: pytest.FixtureRequest) -> Iterator[list[GatheredExperts]]:
    """Of a process that has the group for itself; with a parameter their `reduce_dtype`, else float32."""
    reduce_dtype = getattr(request, "param", torch.float32)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    layers = []
    for _ in range(2):
        with torch.device("meta"):
            experts = Experts(MoEConfig(n_experts=4, top_k=2, d_expert=8, experts=ExpertsConfig(backend="loop")), 8)
        layers.append(GatheredExperts(experts, mesh, torch.bfloat16, reduce_dtype))
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


def parameters_of(layers: list[GatheredExperts]) -> list[Any]:
    return [parameter for layer in layers for parameter in layer.experts.parameters()]


def run(layers: list[GatheredExperts], x_RD: Tensor) -> Tensor:
    for layer in layers:
        layer.hold()
        with torch.autocast("cpu", torch.bfloat16):
            x_RD = layer.experts(x_RD, OFFSETS_E).float()
    return x_RD


def test_they_are_gathered_once_after_each_change(
    two_layers: list[GatheredExperts], gathered: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = parameters_of(two_layers)
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


def test_the_next_layer_is_gathered_while_one_computes_and_the_first_when_a_pass_begins(
    two_layers: list[GatheredExperts], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = two_layers
    begin(two_layers)
    assert (len(first._arriving), len(second._arriving)) == (2, 0)
    first.hold()
    assert (len(first._arriving), len(second._arriving)) == (0, 2)

    waited = []
    monkeypatch.setattr(type(second._arriving[0]), "wait", lambda work: waited.append(work))
    under_way = list(second._arriving)
    for parameter in second.experts.parameters():  # of a pass that did not come to this layer
        local(parameter).data.add_(1)
        parameter.working_version = None  # type: ignore[attr-defined]
    second.fetch()
    assert [id(work) for work in waited] == [id(work) for work in under_way] * 2


@pytest.mark.parametrize("two_layers", [torch.float32, torch.bfloat16], indirect=True)
def test_fused_experts_are_asked_for_gradients_of_the_dtype_that_is_sent(
    two_layers: list[GatheredExperts], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = two_layers[0]
    monkeypatch.setattr(layer.experts, "fuses", lambda x: True)
    layer.hold()
    assert [each.dtype for each in layer.experts.stand_ins] == [layer.reduce_dtype] * 2
    assert [each.shape for each in layer.experts.stand_ins] == [each.shape for each in layer.experts.parameters()]


def test_gradients_of_micro_batches_are_added_in_float32(
    two_layers: list[GatheredExperts], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = torch.randn(2, 8, 8)
    wanted: dict[Any, Tensor] = {}
    for x_RD in batches:
        for parameter in parameters_of(two_layers):
            parameter.grad = None
        run(two_layers, x_RD).square().sum().backward()
        for parameter in parameters_of(two_layers):
            wanted[parameter] = wanted.get(parameter, 0) + local(parameter.grad).clone()
            parameter.grad = None
    held, plain = [], gathered_experts.reduce_scatter

    def watched(share: Tensor, sent: Tensor, **options: Any) -> Any:
        held.append([[id(each[3]) for each in layer._leaving] for layer in two_layers])
        under_way.append(id(sent))
        return plain(share, sent, **options)

    monkeypatch.setattr(gathered_experts, "reduce_scatter", watched)
    for x_RD in batches:
        under_way: list[int] = []
        run(two_layers, x_RD).square().sum().backward()
        a, _, c, _ = under_way  # what is sent is held; that of the layer after has been collected meanwhile
        assert held[-4:] == [[[], []], [[], [a]], [[], []], [[c], []]]
    for parameter in parameters_of(two_layers):
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert torch.equal(local(parameter.grad), wanted[parameter])


def test_what_a_backward_pass_that_failed_has_sent_is_forgotten(two_layers: list[GatheredExperts]) -> None:
    def gradients(fails: bool = False) -> list[Tensor]:
        for parameter in parameters_of(two_layers):
            parameter.grad = None
        begin(two_layers)
        between = run(two_layers[:1], x_RD)
        if fails:
            between.register_hook(fail)
        run(two_layers[1:], between).square().sum().backward()
        return [local(parameter.grad).clone() for parameter in parameters_of(two_layers)]

    def fail(_: Tensor) -> None:
        raise RuntimeError("no memory, say")

    x_RD = torch.randn(8, 8)
    wanted = gradients()
    with pytest.raises(RuntimeError, match="no memory, say"):
        gradients(fails=True)
    assert len(two_layers[1]._leaving) == 2
    assert all(torch.equal(a, b) for a, b in zip(gradients(), wanted, strict=True))
