"""Sizes known from the config, against formulas written out here and operations counted by PyTorch."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moelm.config import Config, build, from_dict, to_dict
from moelm.model.gpt import GPT
from moelm.model.init import initialize
from moelm.model.size import (
    ModelSize,
    _activation_bytes,
    expert_combinations,
    flops_per_token,
    model_size,
    short_name,
    training_memory,
)
from moelm.moe.dispatch.dropless import sort_by_expert
from moelm.moe.types import RouteContext

GQA = {"name": "gqa", "n_heads": 4, "n_kv_heads": 2}
MLA = {
    **{"name": "mla", "n_heads": 3, "kv_latent_dim": 12, "nope_head_dim": 5, "rope_head_dim": 6},
    "v_head_dim": 7,
}
CASES = {
    "all_moe": {},
    "untied": {"tied_embeddings": False},
    "first_layer_dense": {"n_layers": 4, "moe": {"first_moe_layer": 1}},
    "every_second": {"n_layers": 5, "moe": {"first_moe_layer": 1, "moe_every_n_layers": 2}, "attention": GQA},
    "shared": {"tied_embeddings": False, "moe": {"n_shared_experts": 2, "top_k": 3}},
    "shared_gated": {"moe": {"n_shared_experts": 1, "d_shared": 40, "shared_gate": True, "top_k": 1}},
    "biases": {"moe": {"router": {"name": "top_k", "trained_bias": True, "selection_bias": True}}},
    "expert_biases": {
        "moe": {"top_k": 3, "first_moe_layer": 1, "experts": {"bias": True, "activation": "clamped_swiglu"}}
    },
    "dense": {"moe": None, "n_layers": 3},
    "qk_norm_of_heads": {"attention": GQA | {"qk_norm": "head", "head_dim": 16}},
    "qk_norm_and_biases": {"attention": GQA | {"qk_norm": "full", "qkv_bias": True, "out_bias": True}},
    "latent": {"attention": MLA},
    "latent_of_q": {"attention": MLA | {"q_latent_dim": 9}},
    "wide_heads": {"attention": {"name": "gqa", "n_heads": 4, "n_kv_heads": 1, "head_dim": 16}},
    "prediction": {"multi_token_prediction": {}, "tied_embeddings": False, "moe": {"n_shared_experts": 1}},
    "predictions": {
        **{"multi_token_prediction": {"n_modules": 2}, "n_layers": 3, "attention": GQA | {"qk_norm": "head"}},
        "moe": {"moe_every_n_layers": 2, "first_moe_layer": 1, "experts": {"bias": True}},
    },
    "prediction_dense": {"multi_token_prediction": {}, "moe": None},
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def config(request, tiny_config):
    return tiny_config(**request.param)


def expert_parameters(config):
    d, width = config.d_model, config.moe.d_expert
    return 3 * d * width + (2 * width + d if config.moe.experts.bias else 0)


def count(config):
    """(total, active, embedding) from the config's numbers alone."""
    d, moe = config.d_model, config.moe
    embedding = config.vocab_size * d
    total = embedding * (1 if config.tied_embeddings else 2) + d
    idle = 0
    for layer in range(config.n_layers):
        total += 2 * d + sum(count_attention(config))
        first, every = (None, None) if moe is None else (moe.first_moe_layer, moe.moe_every_n_layers)
        if moe is None or layer < first or (layer - first) % every:
            total += 3 * d * config.feed_forward.d_ff
            continue
        expert = expert_parameters(config)
        total += moe.n_experts * (d + expert + (1 if moe.router.trained_bias else 0))
        total += 3 * d * (moe.d_shared or moe.n_shared_experts * moe.d_expert) + (d if moe.shared_gate else 0)
        idle += (moe.n_experts - moe.top_k) * expert
    return total, total - idle, embedding


def count_prediction_modules(config):
    """Parameters of all modules: projection, five norms of their own and of the block, attention, feed-forward."""
    d, moe = config.d_model, config.moe
    module = 2 * d * d + 5 * d + sum(count_attention(config))
    if moe is None:
        module += 3 * d * config.feed_forward.d_ff
    else:
        module += moe.n_experts * (d + expert_parameters(config)) + 3 * d * moe.n_shared_experts * moe.d_expert
    return module * n_modules_of(config)


def n_modules_of(config):
    return 0 if config.multi_token_prediction is None else config.multi_token_prediction.n_modules


def count_attention(config):
    """(in matrices, in norms and biases) of one layer."""
    d, attention = config.d_model, config.attention
    heads = attention.n_heads
    if attention.name == "mla":
        qk, v, latent, rope = 11, attention.v_head_dim, attention.kv_latent_dim, attention.rope_head_dim
        q_latent = attention.q_latent_dim or 0
        q = d * q_latent + q_latent * heads * qk if q_latent else d * heads * qk
        return q + d * (latent + rope) + latent * heads * (5 + v) + heads * v * d, q_latent + latent
    head_dim = attention.head_dim or d // heads
    kv_heads = attention.n_kv_heads or heads
    q, kv = heads * head_dim, kv_heads * head_dim
    vectors = {"none": 0, "head": 2 * head_dim, "full": q + kv}[attention.qk_norm]
    vectors += (q + 2 * kv if attention.qkv_bias else 0) + (d if attention.out_bias else 0)
    return 2 * d * (q + kv), vectors


ROUTER_CASES = {  # router and its options -> (parameters of a layer beside the experts, expert input, choices a token)
    "multi_head": ({"n_heads": 2}, 8 * 16 + 2 * 32 * 32, 16, 4),
    "cosine": ({"d_projection": 3}, 8 * 3 + 3 * 32 + 1, 32, 2),
    "reinforce": ({}, 8 * 32 + 32 + 1, 32, 2),
    "noisy_top_k": ({}, 2 * 8 * 32, 32, 2),
}


@pytest.mark.parametrize("router", ROUTER_CASES)
def test_routers_with_weights_of_their_own_are_counted(tiny_config, router):
    options, beside, d_in, choices = ROUTER_CASES[router]
    config = tiny_config(n_layers=1, moe={"router": {"name": router, **options}})
    expert, size = 3 * d_in * 16, model_size(config)
    other = 64 * 32 + 3 * 32 + 4 * 32 * 32  # embedding, norms, attention
    assert size.total == other + beside + 8 * expert
    assert size.active == other + beside + choices * expert
    again = 8 * 16 if router == "multi_head" else 0  # the second chunk meets the router's weights again
    attention = 3 * 2 * 20 * 32
    assert flops_per_token(config, 20) == 6 * (size.active - 3 * 32 + again) + attention


def test_biases_of_experts_do_not_multiply_whatever_a_token_chooses(tiny_config):
    for moe in ({}, {"top_k": 8}, {"top_k": 5, "router": {"name": "multi_head", "n_heads": 2}}):
        sizes = [tiny_config(moe=moe | {"experts": {"bias": bias}}) for bias in (False, True)]
        assert flops_per_token(sizes[0], 20) == flops_per_token(sizes[1], 20)
        d_in = 32 // sizes[1].moe.router.n_chunks
        assert model_size(sizes[1]).total - model_size(sizes[0]).total == 2 * 8 * (2 * 16 + d_in)


def test_parameters_equal_a_formula_of_the_config(config):
    total, active, embedding = count(config)
    size = model_size(config)
    assert size.total == total
    assert size.active == active
    assert size.active_no_input_embedding == active - (0 if config.tied_embeddings else embedding)
    assert size.active_no_embeddings == active - embedding * (1 if config.tied_embeddings else 2)
    assert size.routed_expert == (0 if config.moe is None else expert_parameters(config))
    modules = count_prediction_modules(config) if n_modules_of(config) else 0
    assert size.multi_token_prediction == modules
    assert size.total + modules == sum(parameter.numel() for parameter in GPT(config).parameters())


def test_idle_experts_are_all_that_separates_total_from_active(tiny_config):
    assert model_size(tiny_config(moe={"top_k": 8})).active == model_size(tiny_config()).total
    dense = model_size(tiny_config(moe=None))
    assert dense.active == dense.total


@pytest.mark.parametrize("case", CASES)
def test_flops_are_those_that_pytorch_counts(tiny_config, case):
    """The counter sees every product of a training step; dropless, so top_k experts a token at any balance.

    In SDPA's plain implementation it sees the whole square of scores, of which causal attention needs half:
    two products of L Q multiply-adds a token and head are 4 L H Q forward and 12 L H Q in all, so
    `flops_per_token` leaves out 6 L H Q a layer. It counts the router's trained bias as if it multiplied, and the
    experts of prediction module k for all L tokens, where they see L - k.
    """
    changes = dict(CASES[case])
    if changes.get("moe", {}) is not None:
        moe = changes.get("moe", {})  # grouped_mm is opaque to the counter
        changes["moe"] = moe | {"experts": moe.get("experts", {}) | {"backend": "loop"}}
    config = tiny_config(**changes)
    model = GPT(config)
    initialize(model, 0)
    B, L = 2, 24
    tokens_BL = torch.randint(config.vocab_size, (B, L + 1), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        output = model(tokens_BL[:, :-1], tokens_BL[:, 1:])
        (output.loss + sum(output.extra_losses.values())).backward()
    attention = config.attention
    if attention.name == "mla":
        head_dim = (attention.nope_head_dim + attention.rope_head_dim + attention.v_head_dim) / 2  # of k and of v
    else:
        head_dim = attention.head_dim or config.d_model // attention.n_heads
    unneeded_half = 6 * L * attention.n_heads * head_dim * (config.n_layers + n_modules_of(config))
    not_routed = 0
    for k in range(1, n_modules_of(config) + 1) if config.moe is not None else ():
        not_routed += 6 * 3 * config.d_model * config.moe.d_expert * config.moe.top_k * k / L
    counted = counter.get_total_flops() / (B * L)
    wanted = flops_per_token(config, L) + unneeded_half - not_routed
    assert counted == pytest.approx(wanted, rel=0.01)
    if case != "biases":
        assert counted == pytest.approx(wanted, rel=1e-12)
    # each part alone is more than the tolerance
    assert unneeded_half > 0.02 * wanted


def test_flops_of_attention_grow_with_the_sequence(tiny_config):
    config = tiny_config(n_layers=3)
    # 3 x (2 products) x (2 per multiply-add) x (half of the extra 100 keys) x width 32 x 3 layers
    assert flops_per_token(config, 150) - flops_per_token(config, 50) == 3 * 2 * 2 * 50 * 32 * 3


@pytest.mark.parametrize(
    ("total", "active", "name"),
    [
        (6_919_161_856, 1_281_892_352, "6.9B-A1.3B"),
        (671_026_000_000, 37_550_000_000, "671B-A37.5B"),
        (1_040_000_000_000, 32_600_000_000, "1.0T-A32.6B"),
        (60_000_000, 60_000_000, "60.0M"),
        (123_456_789, 9_500_000, "123M-A9.5M"),
        (41_500, 20_400, "42K-A20K"),
    ],
)
def test_the_short_name_says_total_and_active(total, active, name):
    assert short_name(ModelSize(total, active, active, active, 1, 1)) == name


@pytest.mark.parametrize(
    ("n_experts", "top_k", "combinations"), [(16, 2, 120), (64, 8, 4_426_165_368), (8, 8, 1), (8, 1, 8)]
)
def test_expert_combinations_are_binomial_coefficients(tiny_config, n_experts, top_k, combinations):
    assert expert_combinations(tiny_config(moe={"n_experts": n_experts, "top_k": top_k})) == combinations


def test_a_dense_model_has_one_combination(tiny_config):
    assert expert_combinations(tiny_config(moe=None)) == 1


@pytest.mark.parametrize("experts", [{}, {"bias": True}, {"activation": "clamped_swiglu", "bias": True}], ids=str)
def test_the_memory_of_eager_experts_is_what_autograd_keeps(tiny_config, experts):
    """Only what grows with d_expert is compared: the rows that come in and go out are kept by others too."""
    kept, counted = [], []
    for d_expert in (16, 32):
        config = tiny_config(n_layers=1, moe={"d_expert": d_expert, "experts": {"backend": "grouped", **experts}})
        model = GPT(config)
        initialize(model, 0)
        module, n_tokens = model.moe_layers[0].experts, 100
        weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
        saved = {}

        def keep(tensor, saved=saved):
            saved[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        rows_RD = torch.randn(2 * n_tokens, 32, requires_grad=True)  # two experts a token
        offsets_E = torch.arange(1, 9, dtype=torch.int32) * 25
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            module(rows_RD, offsets_E)
        kept.append(sum(t.untyped_storage().nbytes() for pointer, t in saved.items() if pointer not in weights))
        counted.append(_activation_bytes(config, 0, n_tokens, False, False))
    assert kept[1] - kept[0] == counted[1] - counted[0]


def test_the_memory_of_fused_experts_is_what_their_op_keeps(tiny_config):
    """All but the tokens, which the norm before the layer counts."""
    pytest.importorskip("triton")
    n_tokens, device = 24, "cuda" if torch.cuda.is_available() else "cpu"
    config = tiny_config(n_layers=1, moe={"experts": {"backend": "fused"}})
    model = GPT(config)
    initialize(model, 0)
    experts = model.to(device).moe_layers[0].experts
    x_TD = torch.randn(n_tokens, 32, device=device, dtype=torch.bfloat16)
    ids_TK = torch.randint(8, (n_tokens, 2), device=device)
    gates_TK = torch.rand(n_tokens, 2, device=device, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        experts.refresh()
        kept = saved_bytes(lambda: experts.mix(x_TD, gates_TK, sort_by_expert(ids_TK, 8)), model)
    copies = 2 * sum(parameter.numel() for parameter in experts.parameters())
    rows = _activation_bytes(config, 0, n_tokens, True, True) - _activation_bytes(
        tiny_config(n_layers=1, moe={"experts": {"backend": "fused"}, "d_expert": 8, "top_k": 1}),
        0,
        n_tokens,
        True,
        True,
    )
    wanted = n_tokens * (2 * 32 + 2 * (4 * 16 + 12)) + 8 * 4  # and the offsets of the experts
    assert kept - copies == wanted
    assert rows == n_tokens * (2 * (4 * 16 + 12) - (4 * 8 + 12))


def test_gradients_of_fused_experts_are_bfloat16_where_they_are_no_sums(tiny_config):
    raw = to_dict(Config()) | {"model": to_dict(tiny_config(moe={"first_moe_layer": 1}, multi_token_prediction={}))}
    raw["trainer"]["precision"] = "bf16-mixed"
    raw["optim"] |= {"micro_batch_size": 2, "batch_tokens": 2 * raw["data"]["seq_len"]}
    config = from_dict(Config, raw)
    size = model_size(config.model)
    weights, experts = size.total + size.multi_token_prediction, 2 * 8 * 3 * 32 * 16
    assert training_memory(config).gradients == 4 * weights - 2 * experts
    assert training_memory(config, n_shards=2).gradients == 4 * weights // 2
    assert training_memory(config, n_replicas=8).gradients == 4 * weights - 2 * experts
    assert training_memory(config, n_replicas=9).gradients == 4 * weights
    for section, key, value in [
        ("optim", "micro_batch_size", 1),
        ("optim", "optimizer", "muon"),
        ("trainer", "precision", "32-true"),
    ]:
        other = from_dict(Config, raw | {section: raw[section] | {key: value}})
        assert training_memory(other).gradients == 4 * weights


def saved_bytes(run, model):
    """What autograd keeps of `run()`, without parameters."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(t.untyped_storage().nbytes() for pointer, t in saved.items() if pointer not in weights)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_memory_of_a_router_is_what_autograd_keeps(tiny_config, score):
    """Only what grows with the number of experts is compared: its input is kept by the norm too."""
    kept, counted = [], []
    for n_experts in (64, 128):
        config = tiny_config(n_layers=1, moe={"n_experts": n_experts, "router": {"name": "top_k", "score": score}})
        model = GPT(config)
        initialize(model, 0)
        x_BLD, ids_BL = torch.randn(2, 50, 32, requires_grad=True), torch.zeros(2, 50, dtype=torch.long)
        router = model.moe_layers[0].router
        kept.append(saved_bytes(lambda run=router, x=x_BLD, ids=ids_BL: run(x, RouteContext(ids, None, True)), router))
        counted.append(_activation_bytes(config, 0, 100, False, False))
    assert kept[1] - kept[0] == counted[1] - counted[0]


@pytest.mark.parametrize("options", [{"sliding_window": 100}, {"sinks": True}, {"sinks": True, "sliding_window": 100}])
def test_a_mask_and_sinks_make_grouped_attention_keep_more(tiny_config, options):
    """Compared is what they add: of plain attention the kernel on the CPU keeps a copy that is none on a GPU."""
    n_tokens, kept, counted = 256, [], []
    for more in ({}, options):
        section = {"name": "gqa", "n_heads": 16, "n_kv_heads": 2, "head_dim": 64, **more}
        config = tiny_config(n_layers=1, attention=section)
        attention = build("attention", config.attention, config)
        for parameter in attention.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        x_BLD = torch.randn(1, n_tokens, 32, requires_grad=True)
        rotation = attention.rotation(torch.arange(n_tokens))
        kept.append(saved_bytes(lambda run=attention, x=x_BLD, r=rotation: run(x, r), attention))
        counted.append(4 * n_tokens * config.attention.saved_per_token(32, False))
    mask = 4 * n_tokens**2  # what the kernel adds to the scores; not a matter of a token
    assert kept[1] - kept[0] - mask == pytest.approx(counted[1] - counted[0], rel=0.01)


def test_the_memory_of_a_prediction_module_is_what_autograd_keeps_beside_its_block(tiny_config):
    """LayerNorm, since RMSNorm in pieces, as on the CPU, keeps its normalised input as well."""
    raw = to_dict(Config()) | {"model": to_dict(tiny_config(n_layers=1, moe=None, vocab_size=4096, norm="layernorm"))}
    raw["data"]["seq_len"], raw["trainer"]["compile"] = 64, False
    memories = []
    for section in (None, {"n_modules": 1}):
        raw["model"]["multi_token_prediction"] = section
        config = from_dict(Config, raw)
        memories.append(training_memory(config))
    plain, predicting = memories
    model, n_tokens = GPT(config.model), config.optim.micro_batch_size * 64
    initialize(model, 0)
    added = model_size(config.model).multi_token_prediction
    assert predicting.weights - plain.weights == predicting.gradients - plain.gradients == 4 * added
    assert predicting.optimizer - plain.optimizer == 8 * added

    module, context = model.multi_token_prediction[0], RouteContext(torch.zeros(8, 64, dtype=torch.int64), None, True)
    rotation = model.attentions[0].rotation(torch.arange(64))
    x_BLD, hidden_BLD, embedded_BLD = (torch.randn(8, 64, 32, requires_grad=True) for _ in range(3))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        block = saved_bytes(lambda: module.block(x_BLD, rotation, None, context), model)
        whole = saved_bytes(lambda: module(hidden_BLD, embedded_BLD * 1, rotation, None, context), model)
    assert n_tokens == 8 * 64
    estimate = predicting.activations - plain.activations - _activation_bytes(config.model, 0, n_tokens, False, False)
    assert whole - block == pytest.approx(estimate, rel=0.05)
