"""Initial values: everything is filled, by the stated rules, the same whatever else the model holds."""

import math

import pytest
import torch
from torch import nn

from moelm.model.gpt import GPT
from moelm.model.init import initialize, std_of

RICH_MOE = {
    "n_shared_experts": 1,
    "shared_gate": True,
    "first_moe_layer": 1,
    "router": {"name": "top_k", "selection_bias": True, "trained_bias": True},
}


def make_model(config, seed=0):
    model = GPT(config)
    initialize(model, seed)
    return model


def tensors_of(model):
    return dict([*model.named_parameters(), *model.named_buffers()])


def assert_same_values(tensors, wanted):
    for name, value in wanted.items():
        assert torch.equal(tensors[name].cpu(), value), name


def test_no_tensor_of_a_model_from_the_meta_device_stays_unfilled(tiny_config, device):
    config = tiny_config(tied_embeddings=False, moe=RICH_MOE)
    with torch.device("meta"):
        model = GPT(config)
    assert {tensor.device.type for tensor in tensors_of(model).values()} == {"meta"}
    model.to_empty(device=device)
    with torch.no_grad():
        for tensor in tensors_of(model).values():
            tensor.fill_(torch.nan)
    initialize(model, 0)
    for name, tensor in tensors_of(model).items():
        assert tensor.device.type == device.type
        assert tensor.isfinite().all(), name
    assert_same_values(tensors_of(model), tensors_of(make_model(config)))


def test_norms_are_one_and_biases_zero(tiny_config):
    tensors = tensors_of(make_model(tiny_config(moe=RICH_MOE)))
    norms = [name for name in tensors if name.endswith("norm.weight")]
    biases = [name for name in tensors if name.endswith("bias")]
    assert len(norms) == 5
    assert biases == ["blocks.1.moe.router.bias", "blocks.1.moe.router.expert_bias"]
    assert all((tensors[name] == 1).all() for name in norms)
    assert all((tensors[name] == 0).all() for name in biases)
    for name in tensors.keys() - {*norms, *biases}:
        assert tensors[name].std() > 0.05, name


def test_biases_of_experts_start_at_zero_and_change_no_other_value(tiny_config):
    wanted = tensors_of(make_model(tiny_config(moe=RICH_MOE)))
    config = tiny_config(moe=RICH_MOE | {"experts": {"bias": True, "activation": "clamped_swiglu"}})
    tensors = tensors_of(make_model(config))
    assert_same_values(tensors, wanted)
    shapes = {name: (tensors[name].shape, tensors[name].abs().sum().item()) for name in tensors.keys() - wanted.keys()}
    assert shapes == {
        "blocks.1.moe.experts.gate_up_bias": ((8, 32), 0.0),
        "blocks.1.moe.experts.down_bias": ((8, 32), 0.0),
    }


def test_values_do_not_depend_on_the_state_of_the_global_generator(tiny_config):
    config = tiny_config(moe=RICH_MOE)
    torch.manual_seed(1)
    wanted = tensors_of(make_model(config))
    model = GPT(config)
    torch.rand(7)
    before = torch.get_rng_state()
    initialize(model, 0)
    assert_same_values(tensors_of(model), wanted)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("default", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_values_do_not_depend_on_the_default_device(tiny_config, default):
    config = tiny_config(moe=RICH_MOE)
    model = GPT(config)
    with torch.device(default):
        initialize(model, 0)
    assert_same_values(tensors_of(model), tensors_of(make_model(config)))


def test_values_do_not_depend_on_the_other_parameters(tiny_config):
    init = {"std": 0.2, "scale_residual": False}  # the residual scale is meant to depend on the depth
    wanted = tensors_of(make_model(tiny_config(moe=RICH_MOE, init=init)))
    deeper = tensors_of(make_model(tiny_config(n_layers=5, tied_embeddings=False, moe=RICH_MOE, init=init)))
    assert_same_values(deeper, wanted)
    dense = tensors_of(make_model(tiny_config(moe=None, init=init)))
    assert_same_values(wanted, {name: dense[name] for name in dense if not name.startswith("blocks.1.feed")})


@pytest.mark.parametrize("truncate_sigmas", [None, 2.0])
def test_values_of_an_expert_do_not_depend_on_how_many_there_are(tiny_config, truncate_sigmas):
    def experts(n_experts):
        config = tiny_config(
            d_model=6,  # widths that are no multiple of the generator's blocks of 16
            attention={"name": "gqa", "n_heads": 3},
            moe={"n_experts": n_experts, "d_expert": 3},
            init={"truncate_sigmas": truncate_sigmas},
        )
        return make_model(config).moe_layers[0].experts

    few, many = experts(3), experts(5)
    assert torch.equal(many.gate_up[:3], few.gate_up)
    assert torch.equal(many.down[:3], few.down)


def test_seeds_tensors_and_experts_all_differ(tiny_config):
    config = tiny_config(init={"std": 0.2, "scale_residual": False})
    model, other = tensors_of(make_model(config)), tensors_of(make_model(config, seed=1))
    seen = {}
    for seed, tensors in enumerate((model, other)):
        for name, tensor in tensors.items():
            if "norm" in name:
                continue
            for e, part in enumerate(tensor.unbind(0) if tensor.ndim == 3 else [tensor]):
                start = tuple(part.flatten()[:8].tolist())
                assert start not in seen, f"{(seed, name, e)} equals {seen[start]}"
                seen[start] = (seed, name, e)
    assert len(seen) == 2 * (1 + 2 * (4 + 1 + 2 * 8))  # embedding; projections, router, experts of two layers


@pytest.mark.parametrize("truncate_sigmas", [None, 2.0])
def test_a_bfloat16_model_gets_the_rounded_values(tiny_config, truncate_sigmas):
    config = tiny_config(moe=RICH_MOE, init={"std": 0.2, "truncate_sigmas": truncate_sigmas})
    model = GPT(config).bfloat16()
    initialize(model, 0)
    wanted = tensors_of(make_model(config))
    for name, tensor in tensors_of(model).items():
        assert torch.equal(tensor, wanted[name].to(tensor.dtype)), name


def wide_config(tiny_config, **init):
    """Matrices of over 20,000 numbers: a sample's standard deviation is within 2 % (4 sigma) of the truth."""
    moe = RICH_MOE | {"d_expert": 40, "n_shared_experts": 2, "d_shared": 104}
    return tiny_config(
        n_layers=3,
        d_model=200,
        vocab_size=400,
        tied_embeddings=False,
        attention={"name": "gqa", "n_heads": 4},
        feed_forward={"d_ff": 120},
        moe=moe | {"n_experts": 112},
        init=init,
    )


def expected_std(name, std, n_layers, router_std=None):
    """By the parameter's role, spelled out."""
    if "router" in name:
        return router_std or std
    writes_into_residual = any(
        part in name for part in ("attention.out.", "experts.down", "feed_forward.down.", "shared.down.")
    )
    return std / math.sqrt(2 * n_layers) if writes_into_residual else std


@pytest.mark.parametrize("init", [{"std": 0.03}, {"std": 0.006, "router_std": 0.1, "scale_residual": False}], ids=str)
def test_matrices_are_normal_with_their_standard_deviation(tiny_config, init):
    model = make_model(wide_config(tiny_config, **init))
    scaled = 0
    for name, weight in model.named_parameters():
        if weight.ndim < 2 or "shared_gate" in name:
            continue
        std = expected_std(name, init["std"], 3, init.get("router_std"))
        if init.get("scale_residual") is False and "router" not in name:
            std = init["std"]
        scaled += std != init["std"]
        sample = weight.detach().double().flatten()
        assert len(sample) > 20_000, name
        assert sample.std().item() == pytest.approx(std, rel=0.02), name
        assert abs(sample.mean().item()) < 4 * std / math.sqrt(len(sample)), name
        inside = (sample.abs() < std).double().mean().item()
        assert inside == pytest.approx(math.erf(1 / math.sqrt(2)), abs=0.015), name
        assert sample.abs().max() > 3.5 * std, name  # not truncated
    assert scaled == (3 + 1 + 2 + 2 if init.get("scale_residual") is not False else 2)


def test_truncation_cuts_at_so_many_sigmas_of_each_tensor(tiny_config):
    model = make_model(wide_config(tiny_config, std=0.05, truncate_sigmas=2.0))
    # of a normal distribution cut at 2 sigma: variance 1 - 2 c phi(c) / (2 Phi(c) - 1)
    c = 2.0
    density = math.exp(-(c**2) / 2) / math.sqrt(2 * math.pi)
    shrink = math.sqrt(1 - 2 * c * density / math.erf(c / math.sqrt(2)))
    for name, weight in model.named_parameters():
        if weight.ndim < 2 or "shared_gate" in name:
            continue
        std = expected_std(name, 0.05, 3)
        assert weight.abs().max() <= 2 * std * (1 + 1e-6), name
        assert weight.abs().max() > 1.95 * std, name
        assert weight.double().std().item() == pytest.approx(shrink * std, rel=0.02), name


def test_std_of_scales_what_writes_into_the_residual_stream(tiny_config):
    init = tiny_config(init={"std": 0.02, "router_std": 0.5}).init
    small = 0.02 / math.sqrt(16)
    wanted = {
        "embedding.weight": 0.02,
        "head.weight": 0.02,
        "blocks.0.attention.q.weight": 0.02,
        "blocks.0.attention.out.weight": small,
        "blocks.0.feed_forward.gate_up.weight": 0.02,
        "blocks.0.feed_forward.down.weight": small,
        "blocks.1.moe.router.weight": 0.5,
        "blocks.1.moe.experts.gate_up": 0.02,
        "blocks.1.moe.experts.down": small,
        "blocks.1.moe.merge.weight": 0.02,  # the experts before it are small already
        "blocks.1.moe.shared.down.weight": small,
        "blocks.1.moe.shared_gate.weight": 0.02,
    }
    assert {name: std_of(name, init, 8) for name in wanted} == pytest.approx(wanted)


@pytest.mark.parametrize("shape", [(3,), (2, 2, 2, 2)], ids=str)
def test_a_tensor_that_no_rule_covers_is_refused_by_name(tiny_config, shape):
    model = GPT(tiny_config())
    model.mystery = nn.Parameter(torch.zeros(shape))
    with pytest.raises(ValueError, match="mystery"):
        initialize(model, 0)
    model = GPT(tiny_config())
    model.register_buffer("table", torch.zeros(shape))
    with pytest.raises(ValueError, match="table"):
        initialize(model, 0)
