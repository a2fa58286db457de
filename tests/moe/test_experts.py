"""The experts through a whole MoE layer: both backends against a loop over tokens in float64.

Every test runs with the rows past the last offset of a grouped product full of NaN, as uninitialised memory
may be; left alone it is often zero the first time, and a layer that reads it looks right.
"""

import logging

import pytest
import torch
import torch.nn.functional as F

from moelm.config import ExpertsConfig, MoEConfig
from moelm.model.gpt import GPT
from moelm.model.init import initialize
from moelm.moe.experts import Experts
from moelm.moe.types import RouteContext

E, D = 8, 32
BACKENDS = ["loop", "grouped"]


@pytest.fixture(autouse=True)
def poisoned_tails(monkeypatch):
    grouped_mm = F.grouped_mm

    def poisoned(a, b, *, offs, **kwargs):
        product = grouped_mm(a, b, offs=offs, **kwargs)
        if a.ndim == 2 and b.ndim == 3:  # rows are grouped; the other case sums over them
            tail_R1 = (torch.arange(len(product), device=a.device) >= offs[-1]).unsqueeze(-1)
            product.masked_fill_(tail_R1, torch.nan)
        return product

    monkeypatch.setattr(F, "grouped_mm", poisoned)


def table(T, K, pick):
    return torch.tensor([[pick(t, k) for k in range(K)] for t in range(T)])


CASES = {  # the experts that each token takes, best first
    "balanced": table(16, 2, lambda t, k: (t + k) % E),
    "idle_experts": table(12, 2, lambda t, k: (t % 3, 3 + t % 2)[k]),
    "one_token": table(1, 2, lambda t, k: (5, 2)[k]),
    "all_on_one_expert": table(12, 1, lambda t, k: 3),
    "every_expert": table(6, E, lambda t, k: (3 * k + t) % E),
}


def make_layer(tiny_config, backend="grouped", device="cpu", **moe):
    """A layer whose router reads the first E numbers of a token's vector as its logits."""
    config = tiny_config(n_layers=1, moe={"experts": {"backend": backend}, **moe})
    model = GPT(config)
    initialize(model, 0)
    layer = model.blocks[0].moe
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(E, D))
    return layer.to(device)


def make_input(ids_TK, seed=0):
    """Random vectors [B, L, D] of which token t prefers the experts ids_TK[t]."""
    T, K = ids_TK.shape
    x_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(seed))
    x_TD[:, :E] *= 0.05
    x_TD[:, :E].scatter_(1, ids_TK, 3.0 - 0.3 * torch.arange(float(K)).expand(T, K))
    return x_TD.view(1 if T % 2 else 2, -1, D)


def run(layer, x_BLD, mask_BL=None):
    """{"y": output, name: gradient of each parameter and of x}, for a fixed gradient of y."""
    device = next(layer.parameters()).device
    x_BLD = x_BLD.detach().to(device).requires_grad_()
    mask_BL = None if mask_BL is None else mask_BL.to(device)
    context = RouteContext(torch.zeros(x_BLD.shape[:2], dtype=torch.int64, device=device), mask_BL, True)
    layer.zero_grad(set_to_none=True)
    y_BLD, _ = layer(x_BLD, context)
    grad = torch.randn(y_BLD.shape, generator=torch.Generator().manual_seed(9)).to(y_BLD)
    y_BLD.backward(grad)
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"y": y_BLD.detach(), "x": x_BLD.grad, **gradients}


def reference(layer, x_BLD, ids_TK, mask_BL=None):
    """The same, one token and one expert at a time in float64."""
    p = {n: v.detach().cpu().double().requires_grad_() for n, v in layer.named_parameters()}
    x = x_BLD.detach().cpu().double().requires_grad_()
    rows = []
    for t, x_D in enumerate(x.flatten(0, 1)):
        gate_E = (p["router.weight"] @ x_D).softmax(-1)
        y_D = torch.zeros(D, dtype=torch.float64)
        if mask_BL is None or mask_BL.flatten()[t]:
            for e in ids_TK[t].tolist():
                gate, up = (x_D @ p["experts.gate_up"][e]).chunk(2)
                y_D = y_D + gate_E[e] * ((gate * gate.sigmoid() * up) @ p["experts.down"][e])
        if layer.shared is not None:
            gate, up = (p["shared.gate_up.weight"] @ x_D).chunk(2)
            shared_D = p["shared.down.weight"] @ (gate * gate.sigmoid() * up)
            if layer.shared_gate is not None:
                shared_D = (p["shared_gate.weight"] @ x_D).sigmoid() * shared_D
            y_D = y_D + shared_D
        rows.append(y_D)
    y = torch.stack(rows).view(x.shape)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(layer.experts.down.dtype).double())
    return {
        "y": y.detach(),
        "x": x.grad,
        **{n: v.grad if v.grad is not None else 0 * v for n, v in p.items()},
    }


def assert_near(result, wanted, bound):
    """Each tensor within `bound` of the largest value of the wanted one."""
    assert result.keys() == wanted.keys()
    for name, value in wanted.items():
        error = (result[name].cpu().double() - value.cpu().double()).abs().max()
        assert error <= bound * value.abs().max().double().cpu(), f"{name}: {error:.3g}"


def mask_of(ids_TK):
    """Every third token is masked, the last ones too."""
    mask_T = torch.arange(len(ids_TK)) % 3 != 1
    mask_T[-3:] = False
    return mask_T.view(1 if len(ids_TK) % 2 else 2, -1)


@pytest.mark.parametrize("masked", [False, True], ids=["all_tokens", "some_masked"])
@pytest.mark.parametrize("case", CASES)
def test_both_backends_equal_a_loop_over_tokens_forward_and_backward(tiny_config, device, case, masked):
    ids_TK = CASES[case]
    x_BLD, mask_BL = make_input(ids_TK), mask_of(ids_TK) if masked else None
    options = {"top_k": ids_TK.shape[1], "n_shared_experts": 1}
    results = {}
    for backend in BACKENDS:
        layer = make_layer(tiny_config, backend, device, **options)
        assert layer.experts.backend == backend
        results[backend] = run(layer, x_BLD, mask_BL)
        assert_near(results[backend], reference(layer, x_BLD, ids_TK, mask_BL), 1e-5)
    assert_near(results["grouped"], results["loop"], 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("everything", [False, True], ids=["some_masked", "all_masked"])
def test_masked_tokens_get_the_shared_experts_alone_and_leave_gradients_finite(
    tiny_config, device, backend, dtype, everything
):
    ids_TK = CASES["balanced"]
    x_BLD, mask_BL = make_input(ids_TK).to(dtype), mask_of(ids_TK)
    if everything:
        mask_BL = torch.zeros_like(mask_BL)
    for n_shared_experts in (0, 1):
        layer = make_layer(tiny_config, backend, device, n_shared_experts=n_shared_experts).to(dtype)
        wanted = torch.zeros_like(x_BLD) if layer.shared is None else layer.shared(x_BLD.to(device)).detach().cpu()
        first, second = run(layer, x_BLD, mask_BL), run(layer, x_BLD, mask_BL)
        for name, value in first.items():
            assert value.isfinite().all(), name
            assert torch.equal(value, second[name]), name
        assert torch.equal(first["y"].cpu()[~mask_BL], wanted[~mask_BL])
        if layer.shared is None:
            assert (first["x"].cpu()[~mask_BL] == 0).all()
        if everything:
            assert (first["experts.gate_up"] == 0).all()
            assert (first["experts.down"] == 0).all()
        else:
            assert (first["y"].cpu()[mask_BL] != wanted[mask_BL]).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_stays_within_a_bound_of_float64(tiny_config, device, backend):
    ids_TK = CASES["balanced"]
    layer = make_layer(tiny_config, backend, device, n_shared_experts=1).bfloat16()
    x_BLD = make_input(ids_TK).bfloat16()
    result = run(layer, x_BLD)
    assert {value.dtype for value in result.values()} == {torch.bfloat16}
    assert_near(result, reference(layer, x_BLD, ids_TK), 0.02)


@pytest.mark.parametrize("backend", BACKENDS)
def test_under_autocast_the_experts_compute_in_bfloat16(tiny_config, device, backend):
    ids_TK = CASES["balanced"]
    layer, x_BLD = make_layer(tiny_config, backend, device, n_shared_experts=1), make_input(ids_TK)
    float32 = run(layer, x_BLD)
    seen = []
    layer.experts.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast(device.type, torch.bfloat16):
        mixed = run(layer, x_BLD)
    assert seen == [torch.bfloat16]
    assert mixed["y"].dtype == torch.bfloat16
    assert {value.dtype for name, value in mixed.items() if name != "y"} == {torch.float32}
    assert_near(mixed, reference(layer, x_BLD, ids_TK), 0.02)
    assert not torch.equal(mixed["experts.down"], float32["experts.down"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_repetition_gives_the_same_bits(tiny_config, device, backend, dtype):
    generator = torch.Generator().manual_seed(3)
    ids_TK = torch.rand(64, E, generator=generator).topk(3).indices
    layer = make_layer(tiny_config, backend, device, top_k=3, n_shared_experts=1).to(dtype)
    x_BLD, mask_BL = make_input(ids_TK).to(dtype), mask_of(ids_TK)
    first = run(layer, x_BLD, mask_BL)
    for _ in range(19):
        for name, value in run(layer, x_BLD, mask_BL).items():
            assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_layer_equals_the_eager_one(tiny_config, device, dtype):
    ids_TK = CASES["idle_experts"]
    layer = make_layer(tiny_config, "grouped", device, n_shared_experts=1, shared_gate=True).to(dtype)
    x_BLD, mask_BL = make_input(ids_TK).to(dtype), mask_of(ids_TK)
    eager = run(layer, x_BLD, mask_BL)
    torch._dynamo.reset()
    layer.compile(backend="aot_eager", fullgraph=True)
    compiled = run(layer, x_BLD, mask_BL)
    assert_near(compiled, eager, 1e-6 if dtype == torch.float32 else 1e-2)
    assert torch.equal(compiled["y"], eager["y"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_custom_ops_keep_the_rules_of_custom_ops(device, dtype):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    offsets_E = torch.tensor([3, 3, 12], dtype=torch.int32, device=device)
    x_RD, w_EDF = random(12, 16), random(3, 16, 8)
    torch.library.opcheck(
        torch.ops.moelm.grouped_mm.default, (x_RD.requires_grad_(), w_EDF.requires_grad_(), offsets_E)
    )
    torch.library.opcheck(
        torch.ops.moelm.grouped_mm_backward.default,
        (random(12, 8), x_RD.detach(), w_EDF.detach(), offsets_E),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_idle_expert_gets_a_zero_gradient_and_not_none(tiny_config, device, backend):
    layer = make_layer(tiny_config, backend, device)
    result = run(layer, make_input(CASES["idle_experts"]))
    for name in ("experts.gate_up", "experts.down"):
        used_E = result[name].flatten(1).abs().sum(-1) > 0
        assert used_E.tolist() == [True] * 5 + [False] * 3


@pytest.mark.parametrize("shared_gate", [False, True])
@pytest.mark.parametrize(("n_shared_experts", "d_shared", "width"), [(2, None, 32), (2, 24, 24), (1, 40, 40)])
def test_shared_experts_are_one_feed_forward_of_their_width(
    tiny_config, device, n_shared_experts, d_shared, width, shared_gate
):
    options = {"n_shared_experts": n_shared_experts, "d_shared": d_shared, "shared_gate": shared_gate}
    layer = make_layer(tiny_config, "grouped", device, **options)
    assert layer.shared.gate_up.weight.shape == (2 * width, D)
    assert (layer.shared_gate is not None) == shared_gate
    x_BLD = make_input(CASES["balanced"])
    assert_near(run(layer, x_BLD), reference(layer, x_BLD, CASES["balanced"]), 1e-5)


@pytest.mark.parametrize(("d_model", "d_expert"), [(36, 16), (32, 20)])
def test_auto_falls_back_to_the_loop_for_odd_widths_and_says_so_once(tiny_config, caplog, d_model, d_expert):
    with caplog.at_level(logging.INFO, logger="moelm"):
        model = GPT(
            tiny_config(
                n_layers=3,
                d_model=d_model,
                attention={"name": "gqa", "n_heads": 2},
                moe={"d_expert": d_expert, "experts": {"backend": "auto"}},
            )
        )
    assert [layer.experts.backend for layer in model.moe_layers] == ["loop"] * 3
    assert len(caplog.records) == 1
    for part in ("loop", str(d_model), str(d_expert), "multiple of 8"):
        assert part in caplog.text


def test_auto_takes_the_grouped_product_where_widths_allow_and_says_nothing(caplog):
    with caplog.at_level(logging.INFO, logger="moelm"):
        experts = Experts(MoEConfig(n_experts=4, d_expert=24, experts=ExpertsConfig(backend="auto")), d_in=40)
    assert experts.backend == "grouped"
    assert not caplog.records
