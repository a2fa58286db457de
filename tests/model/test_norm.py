"""The norms against their formulas in float64, and where the config puts them."""

import pytest
import torch

from moelm.model.gpt import GPT
from moelm.model.init import initialize
from moelm.model.norm import NORMS, LayerNorm, RMSNorm

EPS = 0.05  # large enough that leaving it out shows


def rms_norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def layer_norm(x, weight):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


FORMULAS = {"rmsnorm": rms_norm, "layernorm": layer_norm}


def make_norm_and_input(name, dtype, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    norm = NORMS[name](24, EPS)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(24, generator=generator))
    x = 0.3 * torch.randn(2, 5, 24, generator=generator) + 0.5
    return norm.to(device, dtype), x.to(device, dtype).requires_grad_()


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_a_norm_is_its_formula_computed_in_float32(device, name, dtype, bound):
    norm, x = make_norm_and_input(name, dtype, device)
    x64, weight64 = (tensor.detach().cpu().double().requires_grad_() for tensor in (x, norm.weight))
    y, wanted = norm(x), FORMULAS[name](x64, weight64)
    assert y.dtype == dtype
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    y.backward(gradient.to(device))
    wanted.backward(gradient.double())
    for got, value in ((y.detach(), wanted.detach()), (x.grad, x64.grad), (norm.weight.grad, weight64.grad)):
        assert got.dtype == dtype
        # float32 inside: nothing but the last rounding to x's dtype is lost
        assert (got.cpu().double() - value).abs().max() <= bound * value.abs().max()


@pytest.mark.parametrize("name", FORMULAS)
def test_under_autocast_a_norm_still_computes_in_float32_and_rounds_once(name):
    norm, x = make_norm_and_input(name, torch.float32)
    outside = norm(x)
    with torch.autocast("cpu", torch.bfloat16):
        inside = norm(x)
    assert outside.dtype == torch.float32
    assert inside.dtype == torch.bfloat16
    assert torch.equal(inside, outside.bfloat16())


def test_under_autocast_what_routers_and_experts_read_is_bfloat16_and_the_residual_stream_float32(tiny_config):
    model = GPT(tiny_config(multi_token_prediction={}))
    initialize(model, 0)
    seen = {}
    for layer in model.moe_layers:
        layer.router.register_forward_pre_hook(lambda module, inputs: seen.update({module: inputs[0].dtype}))
    for block in model.all_blocks:
        block.register_forward_hook(lambda module, inputs, outputs: seen.update({module: outputs[0].dtype}))
    tokens_BL = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens_BL[:, :-1], tokens_BL[:, 1:]).loss.backward()
    assert [seen[layer.router] for layer in model.moe_layers] == [torch.bfloat16] * 3
    # of a prediction module the stream begins with a product
    assert [seen[block] for block in model.all_blocks] == [torch.float32, torch.float32, torch.bfloat16]


@pytest.mark.parametrize(("name", "kind"), [("rmsnorm", RMSNorm), ("layernorm", LayerNorm)])
def test_the_config_chooses_every_norm_and_the_names_stay(tiny_config, name, kind):
    model = GPT(tiny_config(norm=name, norm_eps=EPS))
    norms = {path: module for path, module in model.named_modules() if path.endswith("norm")}
    in_blocks = [f"blocks.{i}.{part}_norm" for i in (0, 1) for part in ("attention", "feed_forward")]
    assert list(norms) == [*in_blocks, "norm"]
    assert {type(norm) for norm in norms.values()} == {kind}
    assert {norm.eps for norm in norms.values()} == {EPS}
    assert model.state_dict().keys() == GPT(tiny_config()).state_dict().keys()
    initialize(model, 0)
    assert all((norm.weight == 1).all() for norm in norms.values())
    # a constant added to the whole residual stream is seen by RMSNorm alone
    x_BLD = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    same = torch.allclose(model.norm(x_BLD), model.norm(x_BLD + 5.0), atol=1e-4)
    assert same == (kind is LayerNorm)
