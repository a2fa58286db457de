"""The fused experts: kernels against plain PyTorch, that against a loop over tokens in float64, and whole layers.

On a GPU the kernels run in bfloat16 with their real tiles, else in Triton's interpreter with small ones. Memory that
nobody has written holds NaN.
"""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from test_experts import CASES as CHOICES
from test_experts import D, E, assert_near, make_input, make_layer, mask_of, reference, run
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from moelm.model.gpt import GPT
from moelm.model.init import initialize
from moelm.moe import kernels
from moelm.moe.kernels import expert_mlp, products
from moelm.moe.kernels.sorting import sort_by_expert_reference
from moelm.moe.types import TokenChoice
from moelm.moe.working_copies import sum_gradients_in_place

INTERPRETED = not torch.cuda.is_available()
DTYPES = [torch.float32, torch.bfloat16] if INTERPRETED else [torch.bfloat16]
BOUND = {  # of the largest value; the interpreter cuts off where a GPU rounds
    torch.float32: 1e-6,
    torch.bfloat16: 2**-5 if INTERPRETED else 2**-6,
}
NONE = 5  # the id n_experts below


def ids(T, K, low=0, high=NONE + 1):
    return torch.randint(low, high, (T, K), generator=torch.Generator().manual_seed(T))


CASES = {
    "some_none": ids(37, 3),
    "idle_experts": ids(9, 2, 2, 4),
    "one_expert": ids(33, 1, 2, 3),
    "one_token": ids(1, 3, 0, 5),
    "all_none": ids(4, 2, NONE),
    "no_token": ids(0, 2),
}


@pytest.fixture(autouse=True)
def poisoned_memory():
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is not initialised
    yield
    torch.use_deterministic_algorithms(False)


def make_case(expert_ids_TK, device, dtype, D=40, F=24):
    """(gradient of y, arguments of `forward`); widths are multiples of 8 and of no tile."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator)).to(device, dtype)

    T, K = expert_ids_TK.shape
    permutation = [each.to(device) for each in sort_by_expert_reference(expert_ids_TK, NONE)]
    gates_TK = torch.rand(T, K, generator=generator).to(device) + 0.1
    weights = random(NONE, D, 2 * F, scale=2 * D**-0.5), random(NONE, F, D, scale=F**-0.5)
    return random(T, D), (random(T, D), gates_TK, *permutation, *weights)


def poison(rows_RF, offsets_E):
    rows_RF[offsets_E[-1] :] = torch.nan
    return rows_RF


class Tiled:
    """What `hopper.py` computes, for the rows of the tiles that it is given and when it is given them."""

    SIZE = 4

    def sorted(self, tokens_TD, token_of_row_R, spread_RD):
        assert (spread_RD is not None) == (products.SPREAD_FROM == 0)
        return tokens_TD[token_of_row_R] if spread_RD is None else spread_RD[: len(token_of_row_R)]

    def rows_of(self, tiles):
        for e, row, stop in tiles.tiles_N3.tolist():
            if e >= 0:
                yield e, slice(row, min(row + self.SIZE, stop))

    def product(self, rows_RK, w, tiles, *, transposed=False, out_RN=None):
        out_RN = torch.full((len(rows_RK), w.shape[1 if transposed else 2]), torch.nan) if out_RN is None else out_RN
        for e, rows in self.rows_of(tiles):
            out_RN[rows] = rows_RK[rows] @ (w[e].T if transposed else w[e])
        return out_RN

    def up_product(self, x_TD, choice_of_row_R, top_k, w, tiles, spread_RD=None):
        gate_up_R2F = torch.full((len(choice_of_row_R), w.shape[2]), torch.nan)
        for part in tiles:
            self.product(self.sorted(x_TD, choice_of_row_R // top_k, spread_RD), w, part, out_RN=gate_up_R2F)
        return gate_up_R2F, expert_mlp.swiglu_reference(gate_up_R2F, None)

    def down_backward(self, grad_y_TD, gates_TK, choice_of_row_R, offsets_E, w, gate_up_R2F, tiles, spread_RD=None):
        grad_h_RF = torch.full((len(choice_of_row_R), w.shape[1]), torch.nan)
        for part in tiles:
            grad_rows_RD = self.sorted(grad_y_TD, choice_of_row_R // gates_TK.shape[1], spread_RD)
            self.product(grad_rows_RD, w, part, transposed=True, out_RN=grad_h_RF)
        return expert_mlp.swiglu_backward_reference(grad_h_RF, gate_up_R2F, gates_TK, choice_of_row_R, offsets_E)

    def weight_gradient(
        self,
        tokens_TM,
        rows_RN,
        choice_of_row_R,
        top_k,
        offsets_E,
        tiles,
        dtype,
        to=None,
        spread_RM=None,
        *,
        rows_first=False,
    ):
        pair = self.sorted(tokens_TM, choice_of_row_R // top_k, spread_RM), rows_RN
        return expert_mlp._sum_of_products(*(reversed(pair) if rows_first else pair), offsets_E).to(dtype)


def meanwhile(grad_y_TD, arguments, n_here):
    """All that `forward` and `backward` return, of tokens of which those behind `n_here` arrive meanwhile."""
    x_TD, gates_TK, row_of_choice_TK, choice_of_row_R, offsets_E, *weights = arguments
    n_rows_here, left = int((row_of_choice_TK[:n_here] < offsets_E[-1]).sum()), []

    def others(arriving_TD):
        travelling_TD = torch.full_like(x_TD, torch.nan)
        travelling_TD[:n_here] = arriving_TD[:n_here]
        arrive = partial(travelling_TD[n_here:].copy_, arriving_TD[n_here:])
        return travelling_TD, expert_mlp.Others(n_here, n_rows_here, arrive, lambda home: left.append(home.clone()))

    batch = gates_TK, row_of_choice_TK, choice_of_row_R, offsets_E
    there_TD, about = others(x_TD)
    gate_up_R2F, h_RF = expert_mlp.up(there_TD, *batch, weights[0], about)
    here_XD, grad_x_XD = torch.full((2, n_here, x_TD.shape[1]), torch.nan, dtype=x_TD.dtype, device=x_TD.device)
    expert_mlp.down(h_RF, *batch, weights[1], about, here_XD)
    grad_there_TD, about = others(grad_y_TD)
    inputs = there_TD, *batch, *weights, gate_up_R2F, torch.float32, about, grad_x_XD
    grads = expert_mlp.backward_around(grad_there_TD, *inputs)
    used_R2F = gate_up_R2F[: int(offsets_E[-1])]
    return [torch.cat([here_XD, left[0]]), used_R2F, torch.cat([grad_x_XD, left[1]]), *grads]


@pytest.mark.skipif(not INTERPRETED, reason="in Triton's interpreter, on CPU tensors")
@pytest.mark.parametrize("tiled", [True, False])
@pytest.mark.parametrize("n_here", [0, 11, 37])
def test_tokens_that_arrive_meanwhile_are_not_touched_before_and_leave_first(monkeypatch, n_here, tiled):
    grad_y_TD, arguments = make_case(CASES["some_none"], "cpu", torch.float32)
    y_TD, gate_up_R2F = expert_mlp.forward_reference(*arguments)
    wanted = y_TD, gate_up_R2F, *expert_mlp.backward_reference(grad_y_TD, *arguments, gate_up_R2F)
    if tiled:

        def tiles(x_TD, n_rows, top_k, d_expert, offsets_E, dtype, here):
            return products.row_tiles(n_rows, offsets_E, Tiled.SIZE, here)

        monkeypatch.setattr(expert_mlp, "hopper", Tiled)
        monkeypatch.setattr(expert_mlp, "hopper_tiles", tiles)
    found = meanwhile(grad_y_TD, arguments, n_here)
    for one, other in zip(found, wanted, strict=True):
        assert_near({"": one}, {"": other[: len(one)]}, 1e-6)


@pytest.mark.skipif(not INTERPRETED, reason="in Triton's interpreter, on CPU tensors")
@pytest.mark.parametrize("spread_from", [0, 4096])
@pytest.mark.parametrize("case", ["some_none", "one_expert"])
def test_tokens_of_wide_experts_are_spread_first(monkeypatch, case, spread_from):
    grad_y_TD, arguments = make_case(CASES[case], "cpu", torch.float32)
    y_TD, gate_up_R2F = expert_mlp.forward_reference(*arguments)
    wanted = y_TD, *expert_mlp.backward_reference(grad_y_TD, *arguments, gate_up_R2F)
    monkeypatch.setattr(products, "SPREAD_FROM", spread_from)
    monkeypatch.setattr(expert_mlp, "hopper", Tiled)
    monkeypatch.setattr(
        expert_mlp, "hopper_tiles", lambda _, n_rows, *more: products.row_tiles(n_rows, more[2], Tiled.SIZE)
    )
    found = expert_mlp.forward(*arguments)[0], *expert_mlp.backward(grad_y_TD, *arguments, gate_up_R2F)
    for one, other in zip(found, wanted, strict=True):
        assert_near({"": one}, {"": other}, 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("n_here", [0, 1, 1234, 3000])
def test_tokens_that_arrive_meanwhile_change_no_bit(n_here):
    grad_y_TD, arguments = make_case(ids(3000, 3), "cuda", torch.bfloat16, D=264, F=136)
    y_TD, gate_up_R2F = expert_mlp.forward(*arguments)
    wanted = y_TD, gate_up_R2F, *expert_mlp.backward(grad_y_TD, *arguments, gate_up_R2F)
    found = meanwhile(grad_y_TD, arguments, n_here)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other[: len(one)])


def test_choices_without_a_row_change_no_bit():
    device, dtype = ("cpu", torch.float32) if INTERPRETED else ("cuda", torch.bfloat16)
    expert_ids_TK = CASES["some_none"] if INTERPRETED else ids(3000, 3)
    grad_y_TD, (*tokens, row_of_choice_TK, choice_of_row_R, offsets_E, w1, w2) = make_case(
        expert_ids_TK, device, dtype, D=264, F=520
    )
    found = []
    for R in (len(choice_of_row_R), int(offsets_E[-1]) + 2):
        arguments = *tokens, row_of_choice_TK, choice_of_row_R[:R], offsets_E, w1, w2
        y_TD, gate_up_R2F = expert_mlp.forward(*arguments)
        grad_x_TD, grad_gates_TK, *grads = expert_mlp.backward(grad_y_TD, *arguments, gate_up_R2F)
        assert len(gate_up_R2F) == R
        found.append([y_TD, grad_x_TD, torch.where(row_of_choice_TK < R, grad_gates_TK, 0.0), *grads])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("case", CASES)
def test_the_reference_is_a_loop_over_tokens_and_its_gradient(case):
    grad_y_TD, arguments = make_case(CASES[case], "cpu", torch.float32)
    x_TD, gates_TK, _, _, offsets_E, gate_up_EDF, down_EFD = arguments
    leaves = [each.double().requires_grad_() for each in (x_TD, gates_TK, gate_up_EDF, down_EFD)]
    x, gates, w1, w2 = leaves
    rows = list((0 * x).unbind())
    for t, chosen in enumerate(CASES[case].tolist()):
        for k, e in enumerate(chosen):
            if e != NONE:
                gate, up = (x[t] @ w1[e]).chunk(2)
                rows[t] = rows[t] + gates[t, k] * (gate * gate.sigmoid() * up) @ w2[e]
    y = torch.stack(rows) if rows else 0 * x
    (y * grad_y_TD).sum().backward()
    found_y, gate_up_R2F = expert_mlp.forward_reference(*arguments)
    found = expert_mlp.backward_reference(grad_y_TD, *arguments, poison(gate_up_R2F, offsets_E))
    names = "y", "x", "gates", "gate_up", "down"
    wanted = [y.detach(), *(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)]
    for name, value, true in zip(names, (found_y, *found), wanted, strict=True):
        scale = true.abs().max() if true.numel() else 0
        assert value.shape == true.shape, name
        assert value.isfinite().all(), name
        assert ((value - true).abs() <= 1e-6 * scale).all(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_the_reference(kernel_device, case, dtype):
    grad_y_TD, arguments = make_case(CASES[case], kernel_device, dtype)
    offsets_E, n_used = arguments[4], int(arguments[4][-1])
    wanted_y, wanted_gate_up = expert_mlp.forward_reference(*arguments)
    y_TD, gate_up_R2F = expert_mlp.forward(*arguments)
    assert y_TD.dtype == gate_up_R2F.dtype == dtype
    kept_R2F = poison(wanted_gate_up.clone(), offsets_E)
    strided_TD = grad_y_TD.T.contiguous().T  # as a gradient may be
    found = expert_mlp.backward(strided_TD, *arguments, kept_R2F)
    wanted = expert_mlp.backward_reference(grad_y_TD, *arguments, kept_R2F)
    assert [each.dtype for each in found] == [dtype, torch.float32, torch.float32, torch.float32]
    pairs = zip((y_TD, gate_up_R2F[:n_used], *found), (wanted_y, wanted_gate_up[:n_used], *wanted), strict=True)
    for value, true in pairs:
        bound = BOUND[dtype] * true.float().abs().max() if true.numel() else 0
        assert value.shape == true.shape
        assert ((value - true).float().abs() <= bound).all()
    idle_E = torch.tensor([not (CASES[case] == e).any() for e in range(NONE)])
    for gradient in found[2:]:
        assert ((gradient == 0).flatten(1).all(1).cpu() == idle_E).all()
    assert ((found[1] == 0).cpu() == (CASES[case] == NONE)).all()
    assert (found[0].cpu()[(CASES[case] == NONE).all(1)] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", ["gathered", "spread", "for torch"])
def test_many_tiles_and_steps_are_the_reference_too(rows, monkeypatch):
    """More tiles than processors, more steps than stages, and no width or load that a tile divides."""
    if rows == "for torch":
        monkeypatch.setattr(products, "_hopper_works", lambda *_: False)
    elif rows == "spread":
        monkeypatch.setattr(products, "SPREAD_FROM", 0)
    grad_y_TD, arguments = make_case(ids(4100, 3), "cuda", torch.bfloat16, D=584, F=328)
    n_used = int(arguments[4][-1])
    y_TD, gate_up_R2F = expert_mlp.forward(*arguments)
    wanted_y, wanted_gate_up = expert_mlp.forward_reference(*arguments)
    found = expert_mlp.backward(grad_y_TD, *arguments, wanted_gate_up)
    wanted = expert_mlp.backward_reference(grad_y_TD, *arguments, wanted_gate_up)
    pairs = zip((y_TD, gate_up_R2F[:n_used], *found), (wanted_y, wanted_gate_up[:n_used], *wanted), strict=True)
    for value, true in pairs:
        assert (value - true).float().norm() <= 2**-6 * true.float().norm()
        assert (value - true).float().abs().max() <= 2**-6 * true.float().abs().max()


@pytest.mark.gpu
def test_neither_rounds_of_blocks_nor_spread_rows_nor_a_sum_that_begins_change_a_bit(monkeypatch):
    grad_y_TD, arguments = make_case(ids(4100, 3), "cuda", torch.bfloat16, D=584, F=328)
    n_used = int(arguments[4][-1])

    def results(*sums):
        y_TD, gate_up_R2F = expert_mlp.forward(*arguments)
        grads = expert_mlp.backward(grad_y_TD, *arguments, gate_up_R2F, torch.float32, *sums)
        return [y_TD, gate_up_R2F[:n_used], *(grad.clone() for grad in grads)]

    wanted = results()
    monkeypatch.setattr(kernels, "rounds", 3)
    for spread_from in (10**9, 0):
        monkeypatch.setattr(products, "SPREAD_FROM", spread_from)
        begun = torch.zeros((), dtype=torch.bool, device="cuda")
        sums = [(torch.full(weight.shape, torch.nan, device="cuda"), begun) for weight in arguments[5:]]
        for one, other in zip(results(*sums), wanted, strict=True):
            assert torch.equal(one, other)
        begun.fill_(True)
        for one, other in zip(results(*sums)[-2:], wanted[-2:], strict=True):
            assert torch.equal(one, 2 * other)


def test_gradients_of_weights_are_written_in_the_type_of_the_parameter(kernel_device):
    grad_y_TD, arguments = make_case(CASES["one_token"], kernel_device, torch.bfloat16)
    gate_up_R2F = expert_mlp.forward_reference(*arguments)[1]
    wide = expert_mlp.backward(grad_y_TD, *arguments, gate_up_R2F)[2:]
    found = expert_mlp.backward(grad_y_TD, *arguments, gate_up_R2F, torch.bfloat16)[2:]
    for value, float32 in zip(found, wide, strict=True):
        assert value.dtype == torch.bfloat16
        assert (value - float32).abs().max() <= 2**-7 * float32.abs().max()


def test_rows_that_are_sorted_already_are_the_case_of_one_choice_a_token(kernel_device):
    """What comes from other devices: the same experts on the same vectors, in the order of the rows."""
    _, arguments = make_case(CASES["some_none"], kernel_device, DTYPES[0])
    x_TD, gates_TK, _, choice_of_row_R, offsets_E, *weights = arguments
    rows_R = torch.arange(len(choice_of_row_R), dtype=torch.int32, device=kernel_device)
    sorted_RD, ones_R1 = x_TD[choice_of_row_R // 3], torch.ones(len(rows_R), 1, device=kernel_device)
    y_RD, _ = expert_mlp.forward(sorted_RD, ones_R1, rows_R.unsqueeze(1), rows_R, offsets_E, *weights)
    y_TKD = torch.empty_like(y_RD).index_copy(0, choice_of_row_R.long(), y_RD).view(*gates_TK.shape, -1)
    wanted_TD = expert_mlp.forward_reference(*arguments)[0]
    bound = BOUND[DTYPES[0]] * wanted_TD.float().abs().max()
    assert ((gates_TK.unsqueeze(-1) * y_TKD).sum(1) - wanted_TD).abs().max() <= bound


def test_the_ops_keep_the_rules_of_custom_ops(kernel_device):
    dtype = DTYPES[0]
    grad_y_TD, (x, gates, *permutation, w1, w2) = make_case(CASES["one_token"], kernel_device, dtype, 16, 8)
    inputs = (x, gates, *permutation, w1, w2)
    _, gate_up_R2F = torch.ops.moelm.expert_mlp.default(*inputs)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.moelm.expert_mlp.default, inputs, test_utils=tests)
    backward = torch.ops.moelm.expert_mlp_backward.default
    arguments = grad_y_TD, *inputs, gate_up_R2F, torch.float32
    torch.library.opcheck(backward, (*arguments, False), test_utils=tests)
    weights = [torch.nn.Parameter(copied.float()) for copied in (w1, w2)]
    for weight, copied in zip(weights, (w1, w2), strict=True):  # opcheck makes copies, which know of no sums
        sum_gradients_in_place(weight, copied)
    found = backward(*arguments, True)
    with FakeTensorMode() as mode:
        fakes = backward(*(mode.from_tensor(each) if torch.is_tensor(each) else each for each in arguments), True)
    for each, fake in zip(found, fakes, strict=True):
        assert (each.shape, each.dtype, each.stride()) == (fake.shape, fake.dtype, fake.stride())


# ------------------------------------------------------------------------------------------------ layers


def on_device(layer, x_BLD, mask_BL=None):
    """`run`, in bfloat16 where the kernels need it."""
    if INTERPRETED:
        return run(layer, x_BLD, mask_BL)
    with torch.autocast("cuda", torch.bfloat16):
        return run(layer, x_BLD, mask_BL)


LAYER_BOUND = 1e-5 if INTERPRETED else 0.02


@pytest.mark.parametrize("masked", [False, True], ids=["all_tokens", "some_masked"])
@pytest.mark.parametrize("case", ["idle_experts", "all_on_one_expert"])
def test_a_layer_equals_a_loop_over_tokens_forward_and_backward(tiny_config, kernel_device, case, masked):
    ids_TK = CHOICES[case]
    x_BLD, mask_BL = make_input(ids_TK), mask_of(ids_TK) if masked else None
    options = {"top_k": ids_TK.shape[1], "n_shared_experts": 1}
    layer = make_layer(tiny_config, "fused", kernel_device, **options)
    found, wanted = on_device(layer, x_BLD, mask_BL), reference(layer, x_BLD, ids_TK, mask_BL)
    if INTERPRETED:
        assert_near(found, wanted, 1e-5)
        return
    layer.experts.backend = "grouped"  # in bfloat16, which loses much where few experts share all: no more than plainly
    plain = on_device(layer, x_BLD, mask_BL)
    for name, value in wanted.items():
        errors = [(each[name].cpu().double() - value.cpu().double()).norm() / value.norm() for each in (found, plain)]
        assert errors[0] <= 1.5 * errors[1] + 0.02, name


ROUTINGS = {
    "capacity": {"dispatch": {"name": "capacity", "capacity_factor": 0.5}},
    "multi_head": {"router": {"name": "multi_head", "n_heads": 2}},
}


@pytest.mark.parametrize("routing", ROUTINGS)
def test_dropped_choices_and_chunks_go_through_the_kernels_as_through_the_loop(tiny_config, kernel_device, routing):
    x_BLD, mask_BL = torch.randn(2, 12, D, generator=torch.Generator().manual_seed(1)), torch.arange(24) % 5 != 0
    results = []
    for backend in ("fused", "loop"):
        model = GPT(tiny_config(n_layers=1, moe={"experts": {"backend": backend}, **ROUTINGS[routing]}))
        initialize(model, 0)
        results.append(on_device(model.blocks[0].moe.to(kernel_device), x_BLD, mask_BL.view(2, 12)))
    assert_near(*results, LAYER_BOUND)


def test_under_autocast_a_layer_computes_in_bfloat16_and_its_parameters_get_float32(tiny_config, kernel_device):
    ids_TK = CHOICES["balanced"]
    layer, x_BLD = make_layer(tiny_config, "fused", kernel_device), make_input(ids_TK)
    with torch.autocast(kernel_device.type, torch.bfloat16):
        result = run(layer, x_BLD)
    assert result["y"].dtype == torch.bfloat16
    assert {value.dtype for name, value in result.items() if name != "y"} == {torch.float32}
    assert_near(result, reference(layer, x_BLD, ids_TK), 0.02)
    plain = make_layer(tiny_config, "grouped", kernel_device)
    with torch.autocast(kernel_device.type, torch.bfloat16):
        wanted = run(plain, x_BLD)
    assert not torch.equal(result["experts.down"], wanted["experts.down"])


def test_bfloat16_parameters_are_their_own_copies(tiny_config, kernel_device):
    ids_TK = CHOICES["idle_experts"]
    layer, x_BLD = make_layer(tiny_config, "fused", kernel_device).bfloat16(), make_input(ids_TK).bfloat16()
    result = run(layer, x_BLD)
    assert {value.dtype for value in result.values()} == {torch.bfloat16}
    assert layer.experts.gate_up_copy is None
    assert_near(result, reference(layer, x_BLD, ids_TK), 0.02)


def test_every_repetition_gives_the_same_bits(tiny_config, kernel_device):
    generator = torch.Generator().manual_seed(3)
    ids_TK = torch.rand(12 if INTERPRETED else 4096, E, generator=generator).topk(3).indices
    layer = make_layer(tiny_config, "fused", kernel_device, top_k=3)
    x_BLD, mask_BL = make_input(ids_TK), mask_of(ids_TK)
    first = on_device(layer, x_BLD, mask_BL)
    for _ in range(1 if INTERPRETED else 19):
        for name, value in on_device(layer, x_BLD, mask_BL).items():
            assert torch.equal(value, first[name]), name


def test_backward_keeps_the_tokens_and_one_product_and_no_gradient_keeps_nothing(tiny_config, kernel_device):
    ids_TK = CHOICES["balanced"]
    layer = make_layer(tiny_config, "fused", kernel_device)
    experts = layer.experts
    known = {tensor.data_ptr() for tensor in experts.parameters()}
    x_TD = make_input(ids_TK).flatten(0, 1).to(kernel_device)
    gates_TK = torch.rand(ids_TK.shape, device=kernel_device, requires_grad=True)
    plan = layer.dispatcher.plan(TokenChoice(ids_TK.to(kernel_device), gates_TK), len(x_TD))
    saved = []
    with torch.autocast(kernel_device.type, torch.bfloat16):
        with torch.autograd.graph.saved_tensors_hooks(lambda each: saved.append(each) or each, lambda each: each):
            experts.mix(x_TD.requires_grad_(), gates_TK, plan)
        with torch.no_grad():
            y_TD = experts.mix(x_TD, gates_TK, plan)
    assert y_TD.grad_fn is None
    known |= {experts.gate_up_copy.data_ptr(), experts.down_copy.data_ptr()}
    shapes = sorted((str(each.dtype), tuple(each.shape)) for each in saved if each.data_ptr() not in known)
    T, K = ids_TK.shape
    assert shapes == sorted(
        [
            ("torch.bfloat16", (T, D)),
            ("torch.bfloat16", (T * K, 2 * 16)),
            ("torch.float32", (T, K)),
            ("torch.int32", (T, K)),
            ("torch.int32", (T * K,)),
            ("torch.int32", (E,)),
        ]
    )


# ------------------------------------------------------------------------------------------------ models


def make_model(tiny_config, device, backend):
    model = GPT(tiny_config(moe={"n_experts": 4, "experts": {"backend": backend}, "first_moe_layer": 1}))
    initialize(model, 0)
    return model.to(device)


def compile_blocks(model):
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend="aot_eager" if INTERPRETED else "inductor", fullgraph=True, dynamic=False)


def loss_of(model):
    tokens_BL = torch.randint(64, (2, 7), generator=torch.Generator().manual_seed(0)).to(model.embedding.weight.device)
    with torch.autocast(tokens_BL.device.type, torch.bfloat16):
        return model(tokens_BL[:, :-1], tokens_BL[:, 1:]).loss


def test_a_block_compiles_where_no_gradient_is_wanted(tiny_config, kernel_device):
    model = make_model(tiny_config, kernel_device, "fused")
    with torch.no_grad():
        wanted = loss_of(model).item()
        compile_blocks(model)
        assert loss_of(model).item() == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_recomputing_blocks_changes_nothing(tiny_config, kernel_device, compiled):
    model = make_model(tiny_config, kernel_device, "fused")
    if compiled:
        compile_blocks(model)
    results = []
    for mode in ("none", "selective", "full"):
        model.activation_checkpointing = mode
        model.zero_grad(set_to_none=True)
        loss_of(model).backward()
        results.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert (results[0]["blocks.1.moe.experts.down"] != 0).any()
    for name, value in results[0].items():
        for again in (results[1][name], results[2][name]):
            if compiled:  # a fused kernel may leave out a rounding that a kept result has had
                assert (value - again).norm() <= 0.01 * value.norm(), name
            else:
                assert torch.equal(value, again), name
        assert value.isfinite().all(), name


@pytest.mark.parametrize(("compiled", "mode"), [(False, "full"), (True, "none")])
def test_gradients_of_experts_are_what_the_op_wrote_in_float32_or_in_bfloat16_if_parameters_say_so(
    tiny_config, kernel_device, monkeypatch, compiled, mode
):
    model = make_model(tiny_config, kernel_device, "fused")
    weights = [parameter for layer in model.moe_layers for parameter in layer.experts.parameters()]
    backward, written, hooked = expert_mlp.backward, [], []

    def watched(*arguments):
        gradients = backward(*arguments)
        written.extend(each.data_ptr() for each in gradients[2:])
        return gradients

    def step():
        written.clear()
        hooked.clear()
        loss_of(model).backward()
        gradients = [weight.grad for weight in weights]
        assert [each.data_ptr() for each in gradients] == written, "copied or cast"
        return gradients

    monkeypatch.setattr(expert_mlp, "backward", watched)
    full = step()
    assert {each.dtype for each in full} == {torch.float32}
    model.activation_checkpointing = mode
    if compiled:
        compile_blocks(model)
    model.zero_grad()
    for weight in weights:
        weight.grad_dtype = torch.bfloat16
        weight.register_hook(lambda gradient: hooked.append(gradient.dtype))
    for again in (False, True):
        with torch._dynamo.config.patch(error_on_recompile=again):
            short = step()
        for gradient, wanted in zip(short, full, strict=True):
            if compiled:  # what is not this op has other roundings
                assert (gradient - wanted).norm() <= 0.03 * wanted.norm()
            else:
                assert ((gradient - wanted).abs() <= 2**-8 * wanted.abs()).all()
        assert [each.dtype for each in short] == hooked == [torch.bfloat16] * 2
        copy.deepcopy(model)  # in which nothing may be left of the step
        with torch.no_grad():
            loss_of(model)  # compiles beside gradients of another dtype than their parameters
        model.zero_grad()


@pytest.mark.parametrize(("compiled", "mode"), [(False, "full"), pytest.param(True, "none", marks=pytest.mark.slow)])
def test_gradients_of_experts_are_summed_where_they_always_lie(tiny_config, kernel_device, monkeypatch, compiled, mode):
    """Three micro-batches a step, three steps, in the last of which nothing that a step before left may show: the
    gradients that autograd would add up, in one place."""
    backward, written, steps = expert_mlp.backward, [], []

    def watched(*arguments):
        gradients = backward(*arguments)
        written.extend(each.data_ptr() for each in gradients[2:])
        return gradients

    monkeypatch.setattr(expert_mlp, "backward", watched)
    for in_place in (False, True):
        model = make_model(tiny_config, kernel_device, "fused")
        weights = [parameter for layer in model.moe_layers for parameter in layer.experts.parameters()]
        model.activation_checkpointing = mode
        for layer in model.moe_layers:
            layer.experts.sums_in_place = in_place
        if compiled:
            compile_blocks(model)
        steps.append([])
        places = set()
        for step in range(3):
            model.zero_grad()
            for micro_batch in range(3):
                written.clear()
                with torch._dynamo.config.patch(error_on_recompile=step + micro_batch > 0):
                    ((micro_batch + 1) * loss_of(model)).backward()
                if in_place:
                    assert written == [weight.grad.data_ptr() for weight in weights]
                    places.add(tuple(written))
                copy.deepcopy(model)
            if step == 1:
                for weight in weights:
                    weight.grad.fill_(torch.nan)  # as a step that was left out
            gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
            steps[-1].append({} if step == 1 else gradients)
        assert len(places) == in_place
    for wanted, found in zip(*steps, strict=True):
        for name, value in wanted.items():
            assert (value - found[name]).norm() <= 1e-6 * value.norm(), name


def test_sums_hold_whatever_the_order_of_passes_or_say_that_they_do_not(tiny_config, kernel_device):
    """The first forward pass is one of a validation."""
    found = []
    for in_place in (False, True):
        model = make_model(tiny_config, kernel_device, "fused")
        for layer in model.moe_layers:
            layer.experts.sums_in_place = in_place
        with torch.inference_mode():
            loss_of(model)
        first, second = loss_of(model), loss_of(model)
        first.backward()
        (2 * second).backward()
        (loss_of(model) + 3 * loss_of(model)).backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, value in found[0].items():
        assert (value - found[1][name]).norm() <= 1e-6 * value.norm(), name
    loss = loss_of(model)
    model.zero_grad()
    with pytest.raises(RuntimeError, match="call zero_grad before the forward pass"):
        loss.backward()


def test_weights_may_themselves_be_computed(tiny_config, kernel_device):
    model = make_model(tiny_config, kernel_device, "fused")
    computed = {name: 1 * parameter for name, parameter in model.named_parameters()}
    tokens_BL = torch.arange(6, device=kernel_device).view(2, 3)
    with torch.autocast(kernel_device.type, torch.bfloat16):
        torch.func.functional_call(model, computed, (tokens_BL, tokens_BL)).loss.backward()
    assert (model.moe_layers[0].experts.down.grad != 0).any()


def test_training_compiled_follows_the_grouped_experts_and_compiles_once(tiny_config, kernel_device):
    """Two micro-batches a step, a fused optimizer: weights that the kernels read late would show in the loss."""
    curves = []
    for backend in ("grouped", "fused"):
        model = make_model(tiny_config, kernel_device, backend)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.03, fused=True)
        if backend == "fused":
            compile_blocks(model)
        losses = []
        for micro_batch in range(6):
            with torch._dynamo.config.patch(error_on_recompile=micro_batch > 0):
                loss = loss_of(model)
            loss.backward()
            losses.append(loss.item())
            if micro_batch % 2:
                optimizer.step()
                optimizer.zero_grad()
        curves.append(losses)
        assert (model.moe_layers[0].experts.down_copy is not None) == (backend == "fused")  # made outside the blocks
    assert curves[0][0] == curves[0][1] > curves[0][2] + 0.3 > curves[0][4] + 0.6
    assert curves[1] == pytest.approx(curves[0], abs=0.05)


class GradGatesOfAllRows(Tiled):
    """Two blocks of columns whose gradients of gates lie R apart, where there are more choices than rows."""

    def down_backward(self, grad_y_TD, gates_TK, choice_of_row_R, offsets_E, *others):
        *grads, grad_gates_TK = super().down_backward(grad_y_TD, gates_TK, choice_of_row_R, offsets_E, *others)
        choices, halves = choice_of_row_R[: offsets_E[-1]].long(), torch.zeros(2 * gates_TK.numel())
        for column in range(2):
            halves[column * len(choice_of_row_R) + choices] = grad_gates_TK.flatten()[choices] / 2
        return *grads, halves.view(2, *gates_TK.shape).sum(0)


@pytest.mark.skipif(not INTERPRETED, reason="there the kernels themselves are compared")
@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("kernels_of", [Tiled, GradGatesOfAllRows])
def test_what_tries_the_kernels_has_choices_without_a_row(kernels_of, dtype, monkeypatch):
    monkeypatch.setattr(kernels_of, "SIZE", products.ROWS)
    monkeypatch.setattr(products, "hopper", kernels_of)
    monkeypatch.setattr(products, "row_tiles", lambda *shape: [products.row_tiles_reference(*shape)])
    monkeypatch.setattr(products, "sort_by_expert", sort_by_expert_reference)
    for name in ("spread", "swiglu", "swiglu_backward"):
        monkeypatch.setattr(products, name, getattr(kernels.rows, f"{name}_reference"))
    wrong = kernels_of is GradGatesOfAllRows and dtype is not None
    with pytest.raises(ValueError, match="an error of") if wrong else nullcontext():
        products._compare_with_torch(torch.device("cpu"), 16, 24, 8, dtype)
