"""The router's kernels against plain PyTorch: on the GPU if there is one, else in triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_top_k import make_router
from torch import Tensor

pytest.importorskip("triton")

from moelm.moe import choice
from moelm.moe.kernels import counting, top_k
from moelm.moe.kernels import router_logits as kernel
from moelm.moe.routing import base, product
from moelm.moe.types import RouteContext, count_per_sequence

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS = (
    torch.bfloat16 if torch.cuda.is_available() else torch.float32
)  # the interpreter multiplies bf16 bits as integers


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def rms(x: Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt())


# ------------------------------------------------------------------------------------------ the product


@pytest.mark.parametrize(("T", "D", "E"), [(150, 256, 12), (1030, 128, 64), (70, 128, 130)])
def test_the_product_of_bf16_parts_is_as_near_to_float64_as_that_of_float32(T, D, E):
    """The three results, each against float64; the gradient of x after its rounding to bf16."""
    x_TD, weight_ED, grad_TE = normal(T, D).bfloat16(), 0.02 * normal(E, D, seed=2), normal(T, E, seed=1)
    x, w, g = x_TD.double(), weight_ED.double(), grad_TE.double()
    results = []
    for tokens_TD, forward, backward in (
        (x_TD.to(TOKENS), kernel.router_logits, kernel.router_logits_backward),
        (x_TD, kernel.router_logits_reference, kernel.router_logits_backward_reference),
    ):
        logits_TE, parts_3ED = forward(tokens_TD, weight_ED)
        grad_x_TD, grad_weight_ED = backward(grad_TE, tokens_TD, parts_3ED)
        results.append((logits_TE, grad_x_TD.bfloat16(), grad_weight_ED))
    for name, ours, plain, exact in zip(("y", "x", "weight"), *results, (x @ w.T, g @ w, g.T @ x), strict=True):
        assert ours.dtype == plain.dtype
        assert 0 < rms(ours - exact) <= 1.02 * rms(plain - exact), name


def test_three_parts_make_the_weight_without_an_error():
    weight_ED = normal(20, 128) * torch.logspace(-20, 10, 128, device=DEVICE)
    _, parts_3ED = kernel.router_logits(normal(1, 128).to(TOKENS), weight_ED)
    assert parts_3ED.shape == (3, 32, 128)
    assert torch.equal(parts_3ED.bfloat16().to(TOKENS), parts_3ED)
    assert torch.equal(parts_3ED[:, :20].double().sum(0), weight_ED.double())
    assert (parts_3ED[:, 20:] == 0).all()


@pytest.mark.parametrize("width", [128, 96])  # one that the kernels take and one that they do not
def test_the_product_is_an_operator_that_compile_and_autograd_understand(width):
    x_TD, weight_ED, grad_TE = normal(3, width).to(TOKENS), normal(5, width, seed=1), normal(3, 5, seed=2)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.moelm.router_logits.default, (x_TD, weight_ED), test_utils=checks)
    backward = torch.ops.moelm.router_logits_backward.default
    parts = torch.ops.moelm.router_logits.default(x_TD, weight_ED)[1]
    torch.library.opcheck(backward, (grad_TE, x_TD, parts), test_utils=checks)
    results = []
    for function in (product.router_logits, lambda x, w: F.linear(x.float(), w)):
        y_TE = function(x_TD.requires_grad_(), weight_ED.requires_grad_())
        results.append((y_TE, *torch.autograd.grad(y_TE, (x_TD, weight_ED), grad_TE)))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=2**-7, atol=1e-4)


def test_a_width_that_the_kernels_do_not_take_is_said_once(caplog):
    product._say_that_float32_is_used.cache_clear()
    assert [product.kernel_takes(normal(1, width)) for width in (96, 96, 128)] == [False, False, True]
    said = [record.message for record in caplog.records if record.name == product.log.name]
    assert said == ["router: products in float32, since its width 96 is no multiple of 128"]


# ------------------------------------------------------------------------------------------ the choice


@pytest.mark.parametrize(("T", "E", "k"), [(40, 64, 8), (5, 12, 3), (9, 1, 1), (4, 1000, 16)])
def test_top_k_is_a_stable_sort_even_of_ties_infinities_and_nan(T, E, k):
    scores_TE = normal(T, E)
    scores_TE[0] = 0.0
    scores_TE[0, ::3] = -0.0
    scores_TE[1, ::2] = torch.nan
    scores_TE[1, 1::4] = -torch.nan
    scores_TE[2] = -torch.inf
    scores_TE[2, -1] = torch.inf
    scores_TE[-1] = -scores_TE[-1].abs()
    scores_TE[:, E // 2] = scores_TE[:, 0]
    ids_TK = top_k.top_k(scores_TE, k)
    assert ids_TK.dtype == torch.int64
    # on the CPU: torch's sort on CUDA takes -NaN for the lowest of all
    assert torch.equal(ids_TK.cpu(), top_k.top_k_reference(scores_TE.cpu(), k))


# ------------------------------------------------------------------------------------------ the counts


@pytest.mark.parametrize(("B", "L", "E", "K"), [(2, 300, 12, 3), (3, 7, 1, 1), (1, 70, 130, 8)])
def test_sums_of_choices_are_those_of_comparing_every_choice_with_every_expert(B, L, E, K):
    ids_TK = torch.rand(B * L, E + 1, generator=torch.Generator().manual_seed(0)).topk(K).indices.to(DEVICE)
    assert (ids_TK == E).any()
    results = []
    for function in (counting.sums_of_choices, counting.sums_of_choices_reference):
        gates_TK = normal(B * L, K).requires_grad_()
        sums_3BE = function(ids_TK, gates_TK, B, E)
        (sums_3BE[2] * normal(B, E, seed=3)).sum().backward()
        results.append((sums_3BE, gates_TK.grad))
    (got, got_grad), (wanted, wanted_grad) = results
    assert torch.equal(got[:2], wanted[:2])
    torch.testing.assert_close(got[2], wanted[2])
    assert torch.equal(got_grad, wanted_grad)
    counted = counting.sums_of_choices(ids_TK, None, B, E)[0].cpu()
    assert torch.equal(counted, count_per_sequence(ids_TK.cpu(), B, E))


# ------------------------------------------------------------------------------------------ the whole router


def force_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a router on CUDA does, on the CPU."""

    def best_ids(scores: Tensor, k: int) -> Tensor:
        return top_k.top_k(scores.flatten(0, -2), k).view(*scores.shape[:-1], k)

    def sums_of_choices(*args: Tensor) -> tuple[Tensor, ...]:
        sums_3BE = counting.sums_of_choices(*args)
        return sums_3BE[0].detach(), sums_3BE[1].detach(), sums_3BE[2]

    monkeypatch.setattr(base, "float32_linear", lambda x, w: product.router_logits(x.float(), w))
    monkeypatch.setattr(base, "sums_of_choices", sums_of_choices)
    monkeypatch.setattr(choice, "_top_k", best_ids)


def forbid_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (base, choice, product):
        monkeypatch.setattr(module, "HAS_TRITON", False)


GROUPED = {"score": "sigmoid", "selection_bias": True, "n_groups": 4, "top_k_groups": 2, "group_score": "top2_sum"}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", [{"normalize_gates": "after_top_k"}, GROUPED], ids=["softmax", "grouped"])
def test_a_router_with_kernels_decides_and_learns_as_without(monkeypatch, options, masked):
    results = []
    for with_kernels in (True, False):
        router = make_router(d_model=128, **options).to(DEVICE)
        x_BLD = normal(2, 20, 128).bfloat16()
        mask_BL = normal(2, 20, seed=5) > 0 if masked else None
        if masked:
            x_BLD[~mask_BL] = torch.nan
        x_BLD.requires_grad_()
        ids_BL = torch.zeros(2, 20, dtype=torch.int64, device=DEVICE)
        with monkeypatch.context() as patch:
            if not with_kernels:
                forbid_kernels(patch)
            elif DEVICE == "cpu":
                force_kernels(patch)
            routing, stats = router(x_BLD, RouteContext(ids_BL, mask_BL, True))
            loss = (routing.gates_TK**2).sum() + (stats.prob_BE**2).sum() + (stats.gate_BE**2).sum() + stats.log_z_sq
            loss.backward()
        assert not any(value.requires_grad for value in stats.extra.values())
        values = {**routing._asdict(), **stats._asdict(), **stats.extra, "x": x_BLD.grad, "weight": router.weight.grad}
        values.pop("extra")
        results.append(values)
    for name, value in results[0].items():
        tolerance = {"rtol": 2**-7, "atol": 3e-5} if name == "x" else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(value, results[1][name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")
        assert value.requires_grad == results[1][name].requires_grad, name
