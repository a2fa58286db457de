"""What every router must keep. Each contract is a function of a ModelConfig that raises AssertionError."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from moelm.config import ModelConfig
from moelm.model.gpt import GPT, GPTOutput
from moelm.model.init import initialize
from moelm.moe.types import ExpertChoice, RouteContext, TokenChoice

B, L = 3, 16


def make_gpt(config: ModelConfig, training: bool = True) -> GPT:
    model = GPT(config)
    initialize(model, seed=5)
    return model.train(training)


def make_batch(config: ModelConfig, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens_BL = torch.randint(config.vocab_size, (B, L + 1), generator=generator)
    return tokens_BL[:, :-1], tokens_BL[:, 1:]


def loss_of(output: GPTOutput) -> Tensor:
    """What is differentiated in training, and a probability so that balancing losses are covered too."""
    assert output.loss is not None
    assert output.stats is not None
    total = output.loss + output.stats.prob_BE.square().sum() + output.stats.log_z_sq.sum()
    return total + sum(output.extra_losses.values(), torch.zeros(()))


def run(model: GPT, seed: int = 1) -> tuple[GPTOutput, dict[str, Tensor]]:
    """One forward and backward under a seed: the output and all gradients."""
    torch.manual_seed(seed)
    model.zero_grad()
    output = model(*make_batch(model.config))
    loss_of(output).backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(a: tuple[GPTOutput, dict[str, Tensor]], b: tuple[GPTOutput, dict[str, Tensor]], close: float) -> None:
    """Losses and gradients within `close` of their largest element (0: to the bit), counts exactly equal."""
    (x, x_gradients), (y, y_gradients) = a, b
    assert x.stats is not None
    assert y.stats is not None
    assert torch.equal(x.stats.load_BE, y.stats.load_BE)
    assert torch.equal(x.stats.kept_BE, y.stats.kept_BE)
    assert x.loss is not None
    torch.testing.assert_close(x.loss, y.loss, rtol=close, atol=0)
    torch.testing.assert_close(x.stats.prob_BE, y.stats.prob_BE, rtol=close, atol=close)
    assert x_gradients.keys() == y_gradients.keys()
    for name, gradient in x_gradients.items():
        limit = close * float(gradient.abs().max())
        torch.testing.assert_close(gradient, y_gradients[name], rtol=0, atol=limit, msg=lambda text, n=name: n + text)


def shapes_and_dtypes_are_those_of_the_seam(config: ModelConfig) -> None:
    model, (tokens_BL, _) = make_gpt(config), make_batch(config)
    layer, moe = model.moe_layers[0], config.moe
    assert moe is not None
    n, D, E, K = moe.router.n_chunks, config.d_model, moe.n_experts, moe.top_k
    T = B * L * n
    for training, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        mask_BL = torch.ones(B, L * n, dtype=torch.bool)
        mask_BL[1, -2 * n :] = False
        context = RouteContext(tokens_BL.repeat_interleave(n, 1), mask_BL, training)
        x_BLD = torch.randn(B, L * n, D // n).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            routing, stats = layer.router(x_BLD, context)
        if isinstance(routing, TokenChoice):
            ids = routing.expert_ids_TK
            assert ids.shape == routing.gates_TK.shape == (T, K)
            assert ((ids >= 0) & (ids <= E)).all()
            assert (ids[~mask_BL.flatten()] == E).all(), "masked tokens go nowhere"
            once = torch.zeros(T, E + 1).scatter_add(1, ids, torch.ones(T, K))[:, :E]
            assert once.max() <= 1, "no expert twice for one token"
            gates, n_choices = routing.gates_TK, (ids < E).sum()
            assert (gates[ids == E] == 0).all()
        else:
            assert isinstance(routing, ExpertChoice)
            ids, gates, n_choices = routing.token_ids_EC, routing.gates_EC, (routing.token_ids_EC < T).sum()
            assert ids.shape == gates.shape
            assert ids.shape[0] == E
            assert mask_BL.flatten()[ids[ids < T]].all(), "masked tokens are not chosen"
        assert ids.dtype == torch.int64
        assert gates.dtype == torch.float32
        assert torch.isfinite(gates).all()
        for name in ("load_BE", "kept_BE", "first_choice_BE", "unbiased_load_BE", "prob_BE", "gate_BE"):
            value = getattr(stats, name)
            assert value.shape == (B, E), name
            assert value.dtype == torch.float32, name
        assert stats.load_BE.sum() == n_choices
        assert stats.n_tokens_B.tolist() == [L * n, (L - 2) * n, L * n]
        torch.testing.assert_close(stats.prob_BE.sum(-1), torch.ones(B))
        torch.testing.assert_close(stats.gate_BE.sum(), gates.sum())
        assert stats.log_z_sq.shape == ()


def gradient_reaches_every_weight_of_the_router(config: ModelConfig) -> None:
    model = make_gpt(config)
    _, gradients = run(model)
    for layer in model.moe_layers:
        weights = dict(layer.router.named_parameters())
        if not weights:
            said = " ".join((inspect.getdoc(base) or "") for base in type(layer.router).__mro__[:3])
            assert "no gradient" in said, "a router without weights says so in its docstring"
    for name, parameter in model.named_parameters():
        if ".router." in name and parameter.requires_grad:
            assert name in gradients, f"{name} gets none"
            assert torch.isfinite(gradients[name]).all(), name
            assert gradients[name].abs().max() > 0, name


def route_scale_multiplies_the_gates(config: ModelConfig) -> None:
    assert config.moe is not None
    scaled = replace(config, moe=replace(config.moe, router=replace(config.moe.router, route_scale=3.0)))
    gates = []
    for each in (config, scaled):
        model, (tokens_BL, _) = make_gpt(each, training=False), make_batch(each)
        n = config.moe.router.n_chunks
        x_BLD = torch.randn(B, L * n, config.d_model // n, generator=torch.Generator().manual_seed(0))
        routing, _ = model.moe_layers[0].router(x_BLD, RouteContext(tokens_BL.repeat_interleave(n, 1), None, False))
        gates.append(routing[1])
    torch.testing.assert_close(gates[1], 3 * gates[0])


def compiled_equals_eager(config: ModelConfig) -> None:
    eager, compiled = make_gpt(config), make_gpt(config)
    torch._dynamo.reset()
    whole = compiled.moe_layers[0].router.one_graph
    for block in compiled.blocks:
        block.compile(backend="aot_eager", fullgraph=whole, dynamic=False)
    assert_same(run(eager), run(compiled), close=1e-5)


def checkpointed_equals_plain(config: ModelConfig) -> None:
    plain, checkpointed = make_gpt(config), make_gpt(config)
    checkpointed.activation_checkpointing = "full"
    state = {name: buffer.clone() for name, buffer in checkpointed.named_buffers()}
    assert_same(run(plain), run(checkpointed), close=1e-6)
    for name, buffer in checkpointed.named_buffers():
        assert torch.equal(buffer, state[name]), f"forward wrote {name}"


def recomputation_keeps_the_choice(config: ModelConfig) -> None:
    """Even if the router is given other tokens the second time, which moves more scores than rounding does."""
    assert config.moe is not None
    model = make_gpt(config)
    model.activation_checkpointing = "full"
    router, decisions = model.moe_layers[0].router, []
    router.register_forward_pre_hook(lambda _, inputs: (inputs[0].flip(1 if decisions else 0), *inputs[1:]))
    router.register_forward_hook(lambda _, inputs, outputs: decisions.append(outputs[0]))
    run(model)
    (ids, gates), (ids_again, gates_again) = decisions
    assert torch.equal(ids, ids_again)
    assert torch.equal(gates == 0, gates_again == 0), "what is left out is part of the choice"
    assert config.moe.router.equal_gates or not torch.allclose(gates, gates_again)


def the_same_seed_gives_the_same_step(config: ModelConfig) -> None:
    assert_same(run(make_gpt(config), seed=3), run(make_gpt(config), seed=3), close=0.0)


def evaluation_is_free_of_noise(config: ModelConfig) -> None:
    model = make_gpt(config, training=False)
    assert_same(run(model, seed=1), run(model, seed=2), close=0.0)


def masked_tokens_change_nothing(config: ModelConfig) -> None:
    model = make_gpt(config, training=False)
    mask_BL = torch.ones(B, L, dtype=torch.bool)
    mask_BL[1, -3:] = False
    tokens_BL, targets_BL = make_batch(config)
    changed_BL = torch.where(mask_BL, tokens_BL, (tokens_BL + 7) % config.vocab_size)
    targets_BL = torch.where(mask_BL, targets_BL, -100)
    with torch.no_grad():
        a, b = (model(each, targets_BL, token_mask_BL=mask_BL) for each in (tokens_BL, changed_BL))
    assert torch.equal(a.ce_BL, b.ce_BL)
    for name in ("load_BE", "prob_BE", "gate_BE", "n_tokens_B", "log_z_sq"):
        assert torch.equal(getattr(a.stats, name), getattr(b.stats, name)), name
    assert math.isfinite(float(a.loss))


CONTRACTS: list[Callable[[ModelConfig], None]] = [
    shapes_and_dtypes_are_those_of_the_seam,
    gradient_reaches_every_weight_of_the_router,
    route_scale_multiplies_the_gates,
    compiled_equals_eager,
    checkpointed_equals_plain,
    recomputation_keeps_the_choice,
    the_same_seed_gives_the_same_step,
    evaluation_is_free_of_noise,
    masked_tokens_change_nothing,
]
