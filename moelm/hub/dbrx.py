"""DBRX (databricks/dbrx): LayerNorm without bias, q, k and v in one matrix and cut to a range, experts in one tensor
each of gate, up and down. There is one layout only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moelm.config import ModelConfig, MoEConfig
from moelm.hub import base
from moelm.hub.reading import Reading, read_rope, write_rope
from moelm.hub.weights import Weight, cut, same

EPS = 1e-5  # of torch's LayerNorm, which is given no other
NORMALIZE = {None: "none", 1.0: "after_top_k"}  # moe_normalize_expert_weights, the p of a norm -> normalize_gates


class Dbrx(base.Architecture):
    model_type = "dbrx"
    class_name = "DbrxForCausalLM"
    embedding = "transformer.wte.weight"
    final_norm = "transformer.norm_f.weight"
    layer_prefix = "transformer.blocks."

    def read(self, hf: Reading) -> dict[str, Any]:
        hf.only("resid_pdrop", 0.0, None)
        hf.only("emb_pdrop", 0.0, None)
        hf.only("tie_word_embeddings", False)
        for key in ("num_key_value_heads", "router_aux_loss_coef"):
            hf.get(key)  # copies of what the two sections below say
        attn, ffn = hf.section("attn_config"), hf.section("ffn_config")
        attn.only("attn_pdrop", 0.0, None)
        ffn.only("ffn_act_fn", {"name": "silu"})
        ffn.get("hidden_size")  # a copy of d_model
        if attn["clip_qkv"] is None:
            attn.refuse("clip_qkv", None, "a number", "transformers' code stops without one")
        power, jitter = ffn["moe_normalize_expert_weights"], ffn["moe_jitter_eps"] or 0.0  # jitter: in training only
        ffn.only("moe_normalize_expert_weights", *NORMALIZE)
        attention = {"n_heads": hf["n_heads"], "n_kv_heads": attn["kv_n_heads"], "clip_qkv": attn["clip_qkv"]}
        return {
            "n_layers": hf["n_layers"],
            "d_model": hf["d_model"],
            "vocab_size": hf["vocab_size"],
            "norm": "layernorm",
            "norm_eps": EPS,
            "tied_embeddings": False,
            "init": {"std": hf["initializer_range"], "scale_residual": False},
            "attention": {"name": "gqa", **attention, **_read_rope(hf, attn)},
            "moe": {
                "n_experts": ffn["moe_num_experts"],
                "top_k": ffn["moe_top_k"],
                "d_expert": ffn["ffn_hidden_size"],
                "router": {"name": "top_k", "normalize_gates": NORMALIZE.get(power, "none"), "jitter": jitter},
                "balancers": base.read_switch(ffn, "moe_loss_weight"),
            },
        }

    def write(self, config: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
        attention: Any = config.attention_of(0)
        router: Any = moe.router
        powers = {name: power for power, name in NORMALIZE.items()}
        return {
            "n_layers": config.n_layers,
            "d_model": config.d_model,
            "n_heads": attention.n_heads,
            "vocab_size": config.vocab_size,
            "initializer_range": config.init.std,
            "rope_parameters": write_rope(attention),
            "attn_config": {
                "clip_qkv": attention.clip_qkv,
                "kv_n_heads": attention.kv_heads,
                "rope_theta": attention.rope_theta,
            },
            "ffn_config": {
                "ffn_hidden_size": moe.d_expert,
                "moe_num_experts": moe.n_experts,
                "moe_top_k": moe.top_k,
                "moe_normalize_expert_weights": powers.get(router.normalize_gates),
                "moe_loss_weight": base.write_coef(moe, "switch", "global_batch"),
                "moe_jitter_eps": router.jitter or None,
            },
            "tie_word_embeddings": False,
            **base.no_special_tokens(),
        }

    def layer_weights(self, config: ModelConfig, layer: int, ours: str, theirs: str, fused: bool) -> Iterator[Weight]:
        assert config.moe is not None
        attention: Any = config.attention_of(layer)
        q, kv = (n * attention.width(config.d_model) for n in (attention.n_heads, attention.kv_heads))
        block, names = f"{theirs}norm_attn_norm", tuple(f"{ours}attention.{part}.weight" for part in "qkv")
        yield same(f"{ours}attention_norm.weight", f"{block}.norm_1.weight")
        yield cut(names, f"{block}.attn.Wqkv.weight", [q, kv, kv])
        yield same(f"{ours}attention.out.weight", f"{block}.attn.out_proj.weight")
        yield same(f"{ours}feed_forward_norm.weight", f"{block}.norm_2.weight")
        yield same(f"{ours}moe.router.weight", f"{theirs}ffn.router.layer.weight")
        yield from _experts(f"{ours}moe.experts", f"{theirs}ffn.experts.mlp", config.moe.n_experts)


def _read_rope(hf: Reading, attn: Reading) -> dict[str, Any]:
    """transformers computes with the theta of `rope_parameters` and gives it a default where the file has none;
    published files have it in `attn_config` alone."""
    rope, theta = read_rope(hf), attn.get("rope_theta")
    if theta is None:
        return rope
    if not {"rope_parameters", "rope_theta", "rope_scaling"} & hf.given:
        return {"rope_theta": theta}
    if theta != rope["rope_theta"]:
        hf.refuse("rope_parameters.rope_theta", rope["rope_theta"], f"{theta}, as attn_config.rope_theta says")
    return rope


def _experts(ours: str, theirs: str, n_experts: int) -> Iterator[Weight]:
    """w1 (gate), v1 (up) and w2 (down), all [E * F, D]."""

    def join(parts: list[Tensor]) -> list[Tensor]:
        return [torch.cat([part.unflatten(0, (n_experts, -1)) for part in parts], 1).mT.contiguous()]

    def split(each: list[Tensor]) -> list[Tensor]:
        return [part.mT.flatten(0, 1).contiguous() for part in each[0].chunk(2, -1)]

    yield Weight((f"{ours}.gate_up",), (f"{theirs}.w1", f"{theirs}.v1"), join, split)
    yield Weight(
        (f"{ours}.down",),
        (f"{theirs}.w2",),
        lambda each: [each[0].unflatten(0, (n_experts, -1))],
        lambda each: [each[0].flatten(0, 1)],
    )
