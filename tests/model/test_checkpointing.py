"""Activation checkpointing: what is kept, what is made anew, and that no choice flips between the two."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition

from moelm.config import Config, from_dict, to_dict
from moelm.model.gpt import GPT
from moelm.model.init import initialize
from moelm.model.size import _activation_bytes, _kept_bytes, training_memory
from moelm.moe.routing.top_k import TopKRouter

MODES = ("none", "selective", "full")


def make_model(config, mode="none"):
    model = GPT(config)
    initialize(model, 0)
    model.activation_checkpointing = mode
    return model


def step(model, seed=0, L=16):
    """The loss and all gradients."""
    tokens_BL = torch.randint(model.config.vocab_size, (2, L + 1), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(seed)
    loss = model(tokens_BL[:, :-1], tokens_BL[:, 1:]).loss
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


OPTIONS = {
    "dropout": {"dropout": 0.1},
    "noise": {"moe": {"router": "noisy_top_k"}},
    "shared": {"moe": {"n_shared_experts": 1, "shared_gate": True, "first_moe_layer": 1}},
    "prediction": {"multi_token_prediction": {}},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_no_mode_changes_a_bit_of_the_loss_or_of_a_gradient(tiny_config, options):
    wanted, gradients = step(make_model(tiny_config(**options)))
    for mode in MODES[1:]:
        loss, found = step(make_model(tiny_config(**options), mode))
        assert torch.equal(loss, wanted), mode
        for name, gradient in gradients.items():
            assert torch.equal(found[name], gradient), (mode, name)


@pytest.mark.parametrize("mode", MODES[1:])
def test_a_tie_that_rounding_breaks_the_other_way_flips_no_choice(tiny_config, monkeypatch, mode):
    """Two experts share a router weight, so every token ties them; the second time one scores an ulp more."""
    config = tiny_config(n_layers=1, moe={"top_k": 1})
    choose, calls = TopKRouter.choose, []

    def choose_by_perturbed_scores(router, scores_TE, bias_E):
        calls.append(1)
        scores_TE = scores_TE.clone()
        scores_TE[:, len(calls) % 2] = torch.nextafter(scores_TE[:, len(calls) % 2], torch.tensor(2.0))
        return choose(router, scores_TE, bias_E)

    monkeypatch.setattr(TopKRouter, "choose", choose_by_perturbed_scores)
    results = []
    for each in ("none", mode):
        model = make_model(config, each)
        with torch.no_grad():
            model.moe_layers[0].router.weight[1] = model.moe_layers[0].router.weight[0]
        calls.clear()
        results.append(step(model))
    assert len(calls) == 2
    for name, gradient in results[0][1].items():
        assert torch.equal(results[1][1][name], gradient), name


@pytest.mark.parametrize("mode", MODES[1:])
def test_who_is_dropped_by_gate_is_a_choice_too(tiny_config, mode):
    config = tiny_config(n_layers=1, moe={"dispatch": {"name": "capacity", "drop": "probability"}, "top_k": 1})
    model, found = make_model(config, mode), []
    layer, kept = model.moe_layers[0], model.moe_layers[0].dispatcher.kept

    def kept_by_other_gates(routing, training):
        routing = routing._replace(gates_TK=routing.gates_TK.flip(0 if found else 1))  # one column: none the first time
        found.append(kept(routing, training))
        return found[-1]

    layer.dispatcher.kept = kept_by_other_gates
    step(model)
    assert (found[0] == 8).any()
    assert torch.equal(found[0], found[1])


MLA = {"name": "mla", "q_latent_dim": 8, "v_head_dim": 48}  # as wide as q and k, which flash attention wants


def compiled_parts(config, mode, L=16):
    """What the forward graph of one compiled block hands to its backward graph, bytes without parameters and rotation;
    and how often each op stands in the backward graph."""
    model, saved, ops = make_model(config, mode), [], Counter()

    def forward_compiler(graph_module, inputs):
        block = dict(model.blocks[0].named_parameters())
        shapes = Counter(tuple(p.shape) for p in block.values())
        outputs = [node.meta["val"] for node in graph_module.graph.output_node().args[0]]
        for value in outputs[1:]:  # but for the block's own output
            if not isinstance(value, torch.Tensor) or value.dtype == torch.uint8 or value.shape[-1:] == (4,):
                continue  # a random state; the rotation
            if shapes[tuple(value.shape)] > 0:
                shapes[tuple(value.shape)] -= 1
            else:
                saved.append(value.numel() * value.itemsize)
        return graph_module

    def backward_compiler(graph_module, inputs):
        ops.update(str(node.target) for node in graph_module.graph.nodes if node.op == "call_function")
        return graph_module

    torch._dynamo.reset()
    backend = aot_autograd(
        fw_compiler=forward_compiler,
        bw_compiler=backward_compiler,
        partition_fn=min_cut_rematerialization_partition,
    )
    model.blocks[0].compile(backend=backend, fullgraph=True, dynamic=False)
    step(model, L=L)
    return sum(saved), ops


def test_compiled_blocks_heed_the_policy_and_keep_what_the_estimate_says(tiny_config):
    L, kept, ops = 64, {}, {}
    config = tiny_config(n_layers=1, moe={"experts": {"backend": "grouped"}})
    for mode in MODES:
        kept[mode], ops[mode] = compiled_parts(config, mode, L)
        assert ops[mode]["moelm.best_ids.default"] == ops[mode]["moelm.choose.default"] == 0, mode
        assert ops[mode]["moelm.grouped_mm_backward.default"] == 2, mode
    assert ops["selective"]["aten.mm.default"] == ops["none"]["aten.mm.default"]
    assert ops["full"]["aten.mm.default"] == ops["none"]["aten.mm.default"] + 5  # q, k, v, out and the router
    assert [ops[mode]["moelm.grouped_mm.default"] for mode in MODES] == [0, 0, 2]
    block_input = 4 * 2 * L * config.d_model
    for mode in MODES[1:]:
        wanted = block_input + _kept_bytes(config, 0, 2 * L, False, mode)
        assert kept[mode] == pytest.approx(wanted, rel=0.02), mode
    assert kept["full"] < 0.2 * kept["selective"]
    assert kept["selective"] < 0.7 * kept["none"]


@pytest.mark.parametrize("attention", [{"name": "gqa", "n_kv_heads": 2, "qk_norm": "full"}, MLA], ids=str)
def test_a_compiled_block_keeps_what_the_estimate_says(tiny_config, attention):
    config = tiny_config(n_layers=1, moe=None, d_model=128, attention={"n_heads": 4, **attention})
    kept, _ = compiled_parts(config, "none", 64)
    heads = config.attention.n_heads * (48 if attention is MLA else 32)
    copy = 4 * 2 * 64 * heads  # of the output of attention, which the kernel on the CPU wants
    assert kept == pytest.approx(_activation_bytes(config, 0, 2 * 64, False, True) + copy, rel=0.02)


def test_selective_keeps_of_fused_experts_what_the_estimate_says(tiny_config):
    pytest.importorskip("triton")
    L, kept, ops = 16, {}, {}
    config = tiny_config(n_layers=1, moe={"n_experts": 4, "d_expert": 64, "experts": {"backend": "fused"}})
    with torch.autocast("cpu", torch.bfloat16):
        for mode in ("selective", "full"):
            kept[mode], ops[mode] = compiled_parts(config, mode, L)
    assert [ops[mode]["moelm.expert_mlp.default"] for mode in ops] == [0, 1]
    block_input = 4 * 2 * L * config.d_model
    for mode, found in kept.items():
        assert found == pytest.approx(block_input + _kept_bytes(config, 0, 2 * L, True, mode), rel=0.01), mode


@pytest.mark.parametrize("attention", [MLA, {"name": "gqa", "sinks": True}])
def test_selective_keeps_of_an_attention_what_the_estimate_says(tiny_config, attention):
    config = tiny_config(n_layers=1, moe=None, attention={"n_heads": 4, **attention})
    kept, _ = compiled_parts(config, "selective", 64)
    block_input = 4 * 2 * 64 * config.d_model
    assert kept == pytest.approx(block_input + _kept_bytes(config, 0, 2 * 64, False, "selective"), rel=0.02)


def test_the_estimate_of_a_model_falls_with_the_mode(tiny_config):
    raw = to_dict(Config()) | {"model": to_dict(tiny_config(n_layers=3, multi_token_prediction={}))}
    memory = {}
    for mode in MODES:
        raw["trainer"]["activation_checkpointing"] = mode
        memory[mode] = training_memory(from_dict(Config, raw)).activations
    config, tokens = from_dict(Config, raw).model, Config().optim.micro_batch_size * Config().data.seq_len
    whole, block_input = _activation_bytes(config, 0, tokens, False, True), 4 * tokens * config.d_model
    for mode in MODES[1:]:
        kept = block_input + _kept_bytes(config, 0, tokens, False, mode)
        assert memory["none"] - memory[mode] == 3 * (whole - kept), mode  # of four blocks one is whole
