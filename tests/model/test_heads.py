"""Norm and RoPE of queries and keys by a kernel. Without a GPU it runs in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from moelm.config import build
from moelm.model.attention.gqa import GQA
from moelm.model.attention.heads import TurnedHeads, turn_heads, turn_heads_backward, turned_heads_reference
from moelm.model.rope import rotation
from moelm.moe.kernels import INTERPRETED

# (B, L, H, H_kv, Q): more than one tile, programs of several tiles, widths that are no power of two, one row
SHAPES = [(2, 45, 4, 2, 64), (1, 37, 3, 3, 24), (1, 1, 1, 1, 2)]
GQA_OPTIONS = {"name": "gqa", "n_heads": 4, "n_kv_heads": 2}


class Case:
    def __init__(self, B, L, H, H_kv, Q, device, dtype, norms):
        generator = torch.Generator().manual_seed(0)

        def random(*shape):
            return torch.randn(*shape, generator=generator).to(device)

        self.qkv_BLW = random(B, L, (H + 2 * H_kv) * Q).to(dtype).requires_grad_()
        self.weights_2Q = random(2, Q).requires_grad_() if norms else None
        self.turn = *(each.to(device) for each in rotation(torch.arange(L), Q, 100.0)), H, H_kv, 1e-5
        # as attention returns them: heads before positions
        self.grads = [random(B, heads, L, Q).to(dtype).transpose(1, 2) for heads in (H, H_kv, H_kv)]

    def results(self, function, dtype=None):
        """Outputs and gradients, computed in `dtype`."""
        qkv_BLW = self.qkv_BLW.to(dtype or self.qkv_BLW.dtype)
        weights = [] if self.weights_2Q is None else [self.weights_2Q]
        outputs = function(qkv_BLW, self.weights_2Q, *self.turn)
        grads = [grad.to(output.dtype) for grad, output in zip(self.grads, outputs, strict=True)]
        return [*outputs, *torch.autograd.grad(outputs, [self.qkv_BLW, *weights], grads)]


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_heads_are_normed_and_turned_both_ways_as_in_plain_pytorch(shape, dtype, norms, kernel_device):
    case = Case(*shape, kernel_device, dtype, norms)
    found, wanted = case.results(TurnedHeads.apply), case.results(turned_heads_reference, torch.float32)
    for a, b in zip(found, wanted, strict=True):
        # one unit in the last place of bfloat16: the interpreter cuts off where a GPU rounds
        relative = 1e-5 if a.dtype == torch.float32 else 2**-7
        torch.testing.assert_close(a.float(), b.float(), rtol=relative, atol=1e-5 * float(b.detach().abs().max()))


def test_the_ops_are_what_they_tell_compilers(kernel_device):
    case = Case(*SHAPES[0], kernel_device, torch.bfloat16, True)
    qkv_BLW, weights_2Q = case.qkv_BLW.detach(), case.weights_2Q.detach()
    cos, sin, _, _, eps = case.turn
    checks = "test_schema", "test_faketensor"
    torch.library.opcheck(turn_heads, (qkv_BLW, weights_2Q, *case.turn), test_utils=checks)
    for kept in ((qkv_BLW, weights_2Q), (None, None)):
        torch.library.opcheck(turn_heads_backward, (*case.grads, *kept, cos, sin, eps), test_utils=checks)


@pytest.mark.parametrize("options", [{}, {"qk_norm": "head", "qkv_bias": True}], ids=str)
def test_attention_with_the_kernel_is_as_right_as_without(options, tiny_config, kernel_device, monkeypatch):
    attention, x_BLD, rotation = make_attention(tiny_config, kernel_device, GQA_OPTIONS | options)
    results = [step(attention, attention, x_BLD, rotation, mixed=False)]
    for fuses in (False, True):
        monkeypatch.setattr(GQA, "fuses", lambda self, x, fuses=fuses: fuses)
        results.append(step(attention, attention, x_BLD, rotation))
    more = 0.01 if INTERPRETED else 0.002  # the interpreter cuts off
    for name, exact in results[0].items():
        plain, fused = (float((result[name] - exact).norm() / exact.norm()) for result in results[1:])
        assert plain < 0.03, name
        assert fused < 2 * plain + more, name


def test_attention_with_the_kernel_compiles_to_one_graph(tiny_config, kernel_device, monkeypatch):
    attention, x_BLD, rotation = make_attention(tiny_config, kernel_device, GQA_OPTIONS | {"qk_norm": "head"})
    monkeypatch.setattr(GQA, "fuses", lambda self, x: True)
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True, dynamic=False)
    wanted, found = (step(function, attention, x_BLD, rotation) for function in (attention, compiled))
    for name in wanted:
        assert (found[name] - wanted[name]).norm() / wanted[name].norm() < 0.005, name


def step(function, attention, x_BLD, rotation, mixed=True):
    """The output and all gradients, float32; under autocast if `mixed`."""
    leaves = {"x": x_BLD, **dict(attention.named_parameters())}
    with torch.autocast(x_BLD.device.type, torch.bfloat16, enabled=mixed):
        y_BLD = function(x_BLD, rotation)
    gradients = torch.autograd.grad(y_BLD.float().square().sum(), leaves.values())
    return {"y": y_BLD.detach().float(), **dict(zip(leaves, gradients, strict=True))}


def make_attention(tiny_config, device, options):
    config = tiny_config(n_layers=1, moe=None, attention=options)
    attention = build("attention", config.attention, config)
    generator = torch.Generator().manual_seed(0)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    x_BLD = torch.randn(2, 11, config.d_model, generator=generator).to(device).requires_grad_()
    return attention.to(device), x_BLD, attention.rotation(torch.arange(11, device=device))


MLA_OPTIONS = {"name": "mla", "n_heads": 3, "kv_latent_dim": 12, "nope_head_dim": 5, "v_head_dim": 7}


@pytest.mark.parametrize("options", [GQA_OPTIONS, GQA_OPTIONS | {"qk_norm": "head"}, MLA_OPTIONS], ids=str)
def test_the_heads_of_a_query_lie_side_by_side_so_that_the_output_needs_no_copy(options, tiny_config, monkeypatch):
    """A kernel gives its output the layout of the queries."""
    sdpa, side_by_side = F.scaled_dot_product_attention, []

    def record(q_BHLQ, *others, **more):
        side_by_side.append(q_BHLQ.transpose(1, 2).is_contiguous())
        return sdpa(q_BHLQ, *others, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    attention, x_BLD, rotation = make_attention(tiny_config, "cpu", options)
    attention(x_BLD, rotation)
    assert side_by_side == [True]
