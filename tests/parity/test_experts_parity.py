"""One MoE layer against the published code: the blocks of transformers, with the same random weights.

Every weight is large enough that outputs are of order 1 and that choices, clamps and biases all matter; biases are
not zero. Compared are the chosen experts and their gates, the output, and the gradient of every parameter and of x.
"""

import pytest
import torch

from moelm.model.gpt import GPT
from moelm.moe.types import RouteContext

transformers = pytest.importorskip("transformers")
deepseek_v3 = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
olmoe = pytest.importorskip("transformers.models.olmoe.modeling_olmoe")
qwen2_moe = pytest.importorskip("transformers.models.qwen2_moe.modeling_qwen2_moe")

SIZES = {  # (D, E, K, F)
    "small": (32, 8, 2, 24),
    "odd": (20, 6, 3, 13),  # no multiples of 8: the loop
    "many": (48, 16, 4, 8),
}


def mixtral_pair(D, E, K, F):
    config = transformers.MixtralConfig(
        hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=K, router_jitter_noise=0.0
    )
    return mixtral.MixtralSparseMoeBlock, config, {"router": {"normalize_gates": "after_top_k"}}


def olmoe_pair(D, E, K, F, normalize=False):
    config = transformers.OlmoeConfig(
        hidden_size=D, intermediate_size=F, num_experts=E, num_experts_per_tok=K, norm_topk_prob=normalize
    )
    return olmoe.OlmoeSparseMoeBlock, config, {"router": {"normalize_gates": "after_top_k" if normalize else "none"}}


def qwen2_moe_pair(D, E, K, F):
    """Its one shared expert is wider than the routed ones, and gated."""
    d_shared = 4 * F + 4
    config = transformers.Qwen2MoeConfig(
        hidden_size=D,
        moe_intermediate_size=F,
        shared_expert_intermediate_size=d_shared,
        num_experts=E,
        num_experts_per_tok=K,
        norm_topk_prob=False,
    )
    moe = {"n_shared_experts": 1, "d_shared": d_shared, "shared_gate": True, "router": {"normalize_gates": "none"}}
    return qwen2_moe.Qwen2MoeSparseMoeBlock, config, moe


def deepseek_v3_pair(D, E, K, F, n_groups=1):
    config = transformers.DeepseekV3Config(
        hidden_size=D,
        moe_intermediate_size=F,
        n_routed_experts=E,
        num_experts_per_tok=K,
        n_shared_experts=2,
        n_group=n_groups,
        topk_group=max(1, n_groups // 2),
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )
    router = {
        "score": "sigmoid",
        "normalize_gates": "after_top_k",
        "selection_bias": True,
        "route_scale": 2.5,
        "n_groups": n_groups,
        "top_k_groups": max(1, n_groups // 2),
        "group_score": "top2_sum" if n_groups > 1 else "max",
    }
    return deepseek_v3.DeepseekV3MoE, config, {"n_shared_experts": 2, "router": router}


def gpt_oss_pair(D, E, K, F):
    """Its softmax over the chosen logits is the softmax over all, made to sum to 1 over the chosen."""
    config = transformers.GptOssConfig(
        hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=K, swiglu_limit=1.5
    )
    moe = {
        "experts": {"activation": "clamped_swiglu", "clamp_limit": 1.5, "bias": True},
        "router": {"normalize_gates": "after_top_k", "trained_bias": True},
    }
    return gpt_oss.GptOssMLP, config, moe


PAIRS = {
    "mixtral": mixtral_pair,
    "olmoe": olmoe_pair,
    "olmoe_normalized": lambda *sizes: olmoe_pair(*sizes, normalize=True),
    "qwen2_moe": qwen2_moe_pair,
    "deepseek_v3": deepseek_v3_pair,
    "deepseek_v3_groups": lambda *sizes: deepseek_v3_pair(*sizes, n_groups=2),
    "gpt_oss": gpt_oss_pair,
}


def our_names(theirs):
    """Parameters (or their gradients) of a block of transformers -> the same numbers under the names of a MoELayer.

    Theirs are [E, out, in], gate before up; those of gpt-oss, which alone have biases, [E, in, out], gate and up in
    turns.
    """
    theirs = {name.replace("router.", "gate."): tensor for name, tensor in theirs.items()}
    gate_up, down = theirs["experts.gate_up_proj"], theirs["experts.down_proj"]
    ours = {"router.weight": theirs["gate.weight"]}
    if "experts.down_proj_bias" in theirs:
        ours["experts.gate_up"], ours["experts.down"] = one_after_the_other(gate_up), down
        ours["experts.gate_up_bias"] = one_after_the_other(theirs["experts.gate_up_proj_bias"])
        ours["experts.down_bias"] = theirs["experts.down_proj_bias"]
        ours["router.bias"] = theirs["gate.bias"]
    else:
        ours["experts.gate_up"], ours["experts.down"] = gate_up.mT, down.mT
    if "gate.e_score_correction_bias" in theirs:
        ours["router.expert_bias"] = theirs["gate.e_score_correction_bias"]
    for shared in ("shared_expert", "shared_experts"):
        if f"{shared}.gate_proj.weight" in theirs:
            parts = [theirs[f"{shared}.{part}_proj.weight"] for part in ("gate", "up")]
            ours["shared.gate_up.weight"] = torch.cat(parts)
            ours["shared.down.weight"] = theirs[f"{shared}.down_proj.weight"]
    if "shared_expert_gate.weight" in theirs:
        ours["shared_gate.weight"] = theirs["shared_expert_gate.weight"]
    return ours


def one_after_the_other(gate_up):
    return torch.cat([gate_up[..., ::2], gate_up[..., 1::2]], -1)


def make_pair(tiny_config, name, size, seed):
    """The block of transformers and our layer, with the same weights."""
    D, E, K, F = SIZES[size]
    block_class, config, moe = PAIRS[name](D, E, K, F)
    config._experts_implementation = "eager"
    block = block_class(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, tensor in [*block.named_parameters(), *block.named_buffers()]:
            if "e_score_correction_bias" in path:
                std = 0.2  # of the order of the differences between scores in (0, 1)
            elif path.endswith("bias"):
                std = 0.7
            else:
                std = 1.5 / tensor.shape[-1] ** 0.5  # 1.5 / sqrt(a side of the matrix)
            tensor.copy_(std * torch.randn(tensor.shape, generator=generator))
    router = {"name": "top_k", **moe["router"]}
    n_heads = 4 if D % 16 == 0 else 2
    layer = GPT(
        tiny_config(
            n_layers=1,
            d_model=D,
            attention={"name": "gqa", "n_heads": n_heads},
            moe={"n_experts": E, "top_k": K, "d_expert": F, "balancers": [], **moe, "router": router},
        )
    ).moe_layers[0]
    layer.load_state_dict(our_names(block.state_dict()), strict=True)
    return block, layer


def forward_and_backward(module, router, x_BLD, *args):
    """(output, gradients of parameters and x, what the router returned)."""
    seen = []
    handle = router.register_forward_hook(lambda module, inputs, output: seen.append(output))
    x_BLD = x_BLD.clone().requires_grad_()
    y_BLD = module(x_BLD, *args)
    y_BLD = y_BLD[0] if isinstance(y_BLD, tuple) else y_BLD
    y_BLD.backward(torch.randn(y_BLD.shape, generator=torch.Generator().manual_seed(11)))
    handle.remove()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    return y_BLD.detach(), gradients, x_BLD.grad, seen[0]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PAIRS)
def test_a_layer_equals_the_block_of_transformers(tiny_config, name, size):
    block, layer = make_pair(tiny_config, name, size, seed=len(name))
    assert (layer.experts.backend == "loop") == (size == "odd")
    D, E, K, _ = SIZES[size]
    x_BLD = torch.randn(3, 17, D, generator=torch.Generator().manual_seed(7))
    their_router = block.router if name == "gpt_oss" else block.gate
    wanted, gradients, wanted_x, (_, their_gates_TK, their_ids_TK) = forward_and_backward(block, their_router, x_BLD)
    context = RouteContext(torch.zeros(3, 17, dtype=torch.int64), None, True)
    y_BLD, our_gradients, our_x, (choice, _) = forward_and_backward(layer, layer.router, x_BLD, context)

    assert 0.2 < wanted.std() < 20  # of order 1
    their_ids_TK, order = their_ids_TK.sort(-1)
    ids_TK, our_order = choice.expert_ids_TK.sort(-1)
    assert torch.equal(ids_TK, their_ids_TK)
    assert len(ids_TK.unique()) > 0.75 * E  # the choices are not trivial
    assert ids_TK.shape == (51, K)
    their_gates_TK = their_gates_TK.gather(-1, order)
    assert (choice.gates_TK.gather(-1, our_order) - their_gates_TK).abs().max() <= 1e-6 * their_gates_TK.max()
    assert (y_BLD - wanted).abs().max() <= 1e-5 * wanted.abs().max()

    wanted_gradients = our_names(gradients) | {"x": wanted_x}
    our_gradients["x"] = our_x
    assert our_gradients.keys() == wanted_gradients.keys()
    for path, gradient in wanted_gradients.items():
        assert gradient.norm() > 1e-3, path
        assert (our_gradients[path] - gradient).norm() <= 1e-4 * gradient.norm(), path


@pytest.mark.parametrize("size", SIZES)
def test_gpt_oss_meets_its_limits_in_the_comparison(tiny_config, size):
    """Or the clamps would be compared where they do nothing."""
    _, layer = make_pair(tiny_config, "gpt_oss", size, seed=len("gpt_oss"))
    seen = []
    activation = layer.experts.activation
    layer.experts.activation = lambda gate, up: seen.extend([gate.detach(), up.detach()]) or activation(gate, up)
    x_BLD = torch.randn(3, 17, SIZES[size][0], generator=torch.Generator().manual_seed(7))
    layer(x_BLD, RouteContext(torch.zeros(3, 17, dtype=torch.int64), None, True))
    gate, up = seen
    for share in (gate > 1.5, gate < -1.5, up > 1.5, up < -1.5):
        assert 0.05 < share.float().mean() < 0.5


def test_our_default_limit_and_alpha_are_those_of_gpt_oss(tiny_config):
    config = transformers.GptOssConfig(hidden_size=16, intermediate_size=8, num_local_experts=2)
    theirs = gpt_oss.GptOssExperts(config)
    experts = tiny_config(moe={"experts": {"activation": "clamped_swiglu"}}).moe.experts
    assert (theirs.limit, theirs.alpha) == (experts.clamp_limit, experts.clamp_alpha)
