"""The experts through a whole MoE layer: both backends against a loop over tokens in float64.

Every test runs with the rows past the last offset of a grouped product full of NaN, as uninitialised memory
may be; left alone it is often zero the first time, and a layer that reads it looks right.
"""

import logging
import math

import pytest
import torch
import torch.nn.functional as F

from moelm.config import ExpertsConfig, MoEConfig, make_named
from moelm.model.gpt import GPT
from moelm.model.init import initialize
from moelm.moe.experts import Experts, _say, clamped_swiglu, expert_of_row, sum_by_expert
from moelm.moe.types import RouteContext

E, D = 8, 32
BACKENDS = ["loop", "grouped"]
KINDS = {  # settings of the experts; the limit is low enough that many values meet it
    "swiglu": {},
    "biased": {"bias": True},
    "clamped": {"activation": "clamped_swiglu", "clamp_limit": 0.5, "clamp_alpha": 1.3},
    "clamped_biased": {"activation": "clamped_swiglu", "clamp_limit": 0.5, "bias": True},
}


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


def make_layer(tiny_config, backend="grouped", device="cpu", kind="swiglu", **moe):
    """A layer whose router reads the first E numbers of a token's vector as its logits; biases are not zero."""
    config = tiny_config(n_layers=1, moe={"experts": {"backend": backend, **KINDS[kind]}, **moe})
    model = GPT(config)
    initialize(model, 0)
    fill_biases(model)
    layer = model.blocks[0].moe
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(E, D))
    return layer.to(device)


@torch.no_grad()
def fill_biases(model):
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))


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


def activate(gate, up, activation="swiglu", clamp_limit=7.0, clamp_alpha=1.702, bias=False):
    if activation == "swiglu":
        return gate * gate.sigmoid() * up
    gate, up = gate.clamp(max=clamp_limit), up.clamp(min=-clamp_limit, max=clamp_limit)
    return (up + 1) * gate / (1 + (-clamp_alpha * gate).exp())


def reference(layer, x_BLD, ids_TK, mask_BL=None, kind="swiglu"):
    """The same, one token and one expert at a time in float64."""
    p = {n: v.detach().cpu().double().requires_grad_() for n, v in layer.named_parameters()}
    x = x_BLD.detach().cpu().double().requires_grad_()
    rows = []
    for t, x_D in enumerate(x.flatten(0, 1)):
        gate_E = (p["router.weight"] @ x_D).softmax(-1)
        y_D = torch.zeros(D, dtype=torch.float64)
        if mask_BL is None or mask_BL.flatten()[t]:
            for e in ids_TK[t].tolist():
                gate_up, down = x_D @ p["experts.gate_up"][e], p["experts.down"][e]
                if "experts.gate_up_bias" in p:
                    gate_up = gate_up + p["experts.gate_up_bias"][e]
                row_D = activate(*gate_up.chunk(2), **KINDS[kind]) @ down
                if "experts.down_bias" in p:
                    row_D = row_D + p["experts.down_bias"][e]
                y_D = y_D + gate_E[e] * row_D
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
@pytest.mark.parametrize("kind", KINDS)
def test_both_backends_equal_a_loop_over_tokens_forward_and_backward(tiny_config, device, kind, case, masked):
    ids_TK = CASES[case]
    x_BLD, mask_BL = make_input(ids_TK), mask_of(ids_TK) if masked else None
    options = {"top_k": ids_TK.shape[1], "n_shared_experts": 1}
    results = {}
    for backend in BACKENDS:
        layer = make_layer(tiny_config, backend, device, kind, **options)
        assert layer.experts.backend == backend
        results[backend] = run(layer, x_BLD, mask_BL)
        assert_near(results[backend], reference(layer, x_BLD, ids_TK, mask_BL, kind), 1e-5)
    assert_near(results["grouped"], results["loop"], 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("everything", [False, True], ids=["some_masked", "all_masked"])
@pytest.mark.parametrize("kind", KINDS)
def test_masked_tokens_get_the_shared_experts_alone_and_leave_gradients_finite(
    tiny_config, device, kind, backend, dtype, everything
):
    ids_TK = CASES["balanced"]
    x_BLD, mask_BL = make_input(ids_TK).to(dtype), mask_of(ids_TK)
    if everything:
        mask_BL = torch.zeros_like(mask_BL)
    for n_shared_experts in (0, 1):
        layer = make_layer(tiny_config, backend, device, kind, n_shared_experts=n_shared_experts).to(dtype)
        wanted = torch.zeros_like(x_BLD) if layer.shared is None else layer.shared(x_BLD.to(device)).detach().cpu()
        first, second = run(layer, x_BLD, mask_BL), run(layer, x_BLD, mask_BL)
        for name, value in first.items():
            assert value.isfinite().all(), name
            assert torch.equal(value, second[name]), name
        assert torch.equal(first["y"].cpu()[~mask_BL], wanted[~mask_BL])
        if layer.shared is None:
            assert (first["x"].cpu()[~mask_BL] == 0).all()
        if everything:
            assert all((value == 0).all() for name, value in first.items() if name.startswith("experts."))
        else:
            assert (first["y"].cpu()[mask_BL] != wanted[mask_BL]).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "kind", ["swiglu", "biased"]
)  # at the limit of a clamp rounding changes a gradient by all of it
def test_bfloat16_stays_within_a_bound_of_float64(tiny_config, device, kind, backend):
    ids_TK = CASES["balanced"]
    layer = make_layer(tiny_config, backend, device, kind, n_shared_experts=1).bfloat16()
    x_BLD = make_input(ids_TK).bfloat16()
    result = run(layer, x_BLD)
    assert {value.dtype for value in result.values()} == {torch.bfloat16}
    assert_near(result, reference(layer, x_BLD, ids_TK), 0.02)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["swiglu", "biased"])
def test_under_autocast_the_experts_compute_in_bfloat16(tiny_config, device, kind, backend):
    ids_TK = CASES["balanced"]
    layer, x_BLD = make_layer(tiny_config, backend, device, kind, n_shared_experts=1), make_input(ids_TK)
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
@pytest.mark.parametrize("kind", ["swiglu", "clamped_biased"])
def test_every_repetition_gives_the_same_bits(tiny_config, device, kind, backend, dtype):
    generator = torch.Generator().manual_seed(3)
    ids_TK = torch.rand(64, E, generator=generator).topk(3).indices
    layer = make_layer(tiny_config, backend, device, kind, top_k=3, n_shared_experts=1).to(dtype)
    x_BLD, mask_BL = make_input(ids_TK).to(dtype), mask_of(ids_TK)
    first = run(layer, x_BLD, mask_BL)
    for _ in range(19):
        for name, value in run(layer, x_BLD, mask_BL).items():
            assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["swiglu", "clamped_biased"])
def test_a_compiled_layer_equals_the_eager_one(tiny_config, device, kind, dtype):
    ids_TK = CASES["idle_experts"]
    layer = make_layer(tiny_config, "grouped", device, kind, n_shared_experts=1, shared_gate=True).to(dtype)
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
    torch.library.opcheck(torch.ops.moelm.grouped_mm.default, (x_RD, w_EDF, offsets_E))
    torch.library.opcheck(
        torch.ops.moelm.grouped_mm_backward.default,
        (random(12, 8), x_RD, w_EDF, offsets_E),
        test_utils=("test_schema", "test_faketensor"),
    )
    torch.library.opcheck(
        torch.ops.moelm.sum_by_expert.default,
        (random(15, 16), offsets_E),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("n_rows", [13, 16, 4096])
def test_rows_are_summed_by_expert_and_the_last_ones_left_out(device, dtype, bound, n_rows):
    ends = [0, 5, 5, n_rows - 3, n_rows - 3]
    rows_RF = torch.randn(n_rows, 16, generator=torch.Generator().manual_seed(0)) + 1.0
    rows_RF = rows_RF.to(dtype)
    rows_RF[ends[-1] :] = torch.nan
    wanted_EF = torch.stack([rows_RF[a:b].double().sum(0) for a, b in zip([0, *ends], ends, strict=False)])
    offsets_E = torch.tensor(ends, dtype=torch.int32, device=device)
    for rows in (rows_RF, rows_RF.T.contiguous().T):  # a transposed gradient too
        summed_EF = sum_by_expert(rows.to(device), offsets_E).cpu()
        assert summed_EF.dtype == dtype
        assert (summed_EF[[0, 2, 4]] == 0).all()
        # float32 sums: nothing but the last rounding to the rows' dtype is lost, however many there are
        assert (summed_EF - wanted_EF).abs().max() <= bound * wanted_EF.abs().max()
    assert expert_of_row(offsets_E, n_rows).tolist() == [1] * 5 + [3] * (n_rows - 8) + [4] * 3


def test_clamped_swiglu_has_the_values_and_slopes_of_its_formula():
    gate = torch.tensor([1.0, 9.0, -9.0, 0.0, 2.0, 2.0], requires_grad=True)
    up = torch.tensor([2.0, 0.5, 0.5, 3.0, 8.0, -8.0], requires_grad=True)
    y = clamped_swiglu(gate, up, 7.0, 1.702)

    def silu(x):  # with 1.702 in it
        return x / (1 + math.exp(-1.702 * x))

    wanted = [3 * silu(1), 1.5 * silu(7), 1.5 * silu(-9), 0, 8 * silu(2), -6 * silu(2)]
    assert y.tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-12)
    y.sum().backward()
    assert up.grad.tolist() == pytest.approx([silu(1), silu(7), silu(-9), 0, 0, 0], rel=1e-5, abs=1e-12)
    assert (gate.grad == 0).tolist() == [False, True, False, False, False, False]  # 9 is above the limit, -9 is not


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_recomputing_blocks_changes_no_bit_of_a_model_with_biased_experts(tiny_config, device, compiled):
    experts = {"backend": "grouped", **KINDS["clamped_biased"]}
    model = GPT(tiny_config(moe={"experts": experts, "first_moe_layer": 1}))
    initialize(model, 0)
    fill_biases(model)
    model.to(device)
    tokens_BL = torch.randint(64, (2, 13), generator=torch.Generator().manual_seed(0)).to(device)
    mask_BL = torch.arange(12, device=device).expand(2, 12) % 5 != 0
    if compiled:
        torch._dynamo.reset()
        for block in model.blocks:
            block.compile(backend="aot_eager", fullgraph=True)
    results = []
    for recompute in ("none", "full"):
        model.activation_checkpointing = recompute
        model.zero_grad(set_to_none=True)
        loss = model(tokens_BL[:, :-1], tokens_BL[:, 1:], token_mask_BL=mask_BL).loss
        loss.backward()
        results.append({"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()})
    assert (results[0]["blocks.1.moe.experts.down_bias"] != 0).any()
    for name, value in results[0].items():
        assert value.isfinite().all(), name
        assert torch.equal(value, results[1][name]), name


ROUTINGS = {
    "capacity": {"dispatch": {"name": "capacity", "capacity_factor": 0.5}},
    "expert_choice": {"router": {"name": "expert_choice"}, "balancers": []},
    "multi_head": {"router": {"name": "multi_head", "n_heads": 2}},
}


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("masked", [False, True], ids=["some_masked", "all_masked"])
def test_biases_reach_the_rows_of_every_kind_of_routing(tiny_config, device, routing, masked):
    """Dropped choices and slots without a token leave nothing in the gradients."""
    results = []
    for backend in BACKENDS:
        experts = {"backend": backend, **KINDS["clamped_biased"]}
        model = GPT(tiny_config(n_layers=1, moe={"experts": experts, **ROUTINGS[routing]}))
        initialize(model, 0)
        fill_biases(model)
        layer = model.blocks[0].moe.to(device)
        x_BLD = torch.randn(2, 12, D, generator=torch.Generator().manual_seed(1))
        mask_BL = torch.zeros(2, 12, dtype=torch.bool) if masked else torch.arange(24).view(2, 12) % 5 != 0
        results.append(run(layer, x_BLD, mask_BL))
        assert all(value.isfinite().all() for value in results[-1].values())
        moved = [(value != 0).any().item() for name, value in results[-1].items() if name.endswith("_bias")]
        assert moved == [not masked] * 2
    assert_near(*results, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_idle_expert_gets_a_zero_gradient_and_not_none(tiny_config, device, backend):
    layer = make_layer(tiny_config, backend, device, "biased")
    result = run(layer, make_input(CASES["idle_experts"]))
    for name in ("experts.gate_up", "experts.down", "experts.gate_up_bias", "experts.down_bias"):
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
    assert len(caplog.records) == 1  # one line for all layers
    for part in ("loop", str(d_model), str(d_expert), "multiple of 8"):
        assert part in caplog.text


@pytest.mark.parametrize(
    ("machine", "moe", "backend", "reason"),
    [
        ({}, {}, "fused", ""),
        ({"cuda": False}, {}, "grouped", ""),
        ({"triton": False}, {}, "grouped", "triton is not installed"),
        ({}, {"experts": ExpertsConfig(bias=True)}, "grouped", "biases"),
        ({}, {"experts": ExpertsConfig(activation="clamped_swiglu")}, "grouped", "clamped_swiglu"),
        ({}, {"router": make_named("router", "expert_choice")}, "grouped", "expert_choice"),
    ],
)
def test_auto_takes_the_fastest_that_can_be_and_says_why_it_is_not_fused(
    caplog, monkeypatch, machine, moe, backend, reason
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: machine.get("cuda", True))
    monkeypatch.setattr("moelm.moe.experts.HAS_TRITON", machine.get("triton", True))
    _say.cache_clear()
    with caplog.at_level(logging.INFO, logger="moelm"):
        for _ in range(2):
            experts = Experts(MoEConfig(n_experts=4, d_expert=24, **moe), d_in=40)
    assert experts.backend == backend
    assert [reason in record.getMessage() for record in caplog.records] == [True] * bool(reason)


def test_fused_experts_are_the_grouped_ones_where_no_kernel_runs(tiny_config, monkeypatch):
    """A model that was trained on a GPU, on a machine without one."""
    monkeypatch.setattr("moelm.moe.experts.INTERPRETED", False)
    x_BLD = make_input(CASES["balanced"])
    results = [run(make_layer(tiny_config, backend), x_BLD) for backend in ("fused", "grouped")]
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())
