"""OLMoE (arXiv 2409.02060): q and k normed whole before they are split into heads, every layer a mixture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moelm.config import ModelConfig, MoEConfig
from moelm.hub import base
from moelm.hub.reading import Reading, read_rope, write_rope
from moelm.hub.weights import Weight, same


class Olmoe(base.Architecture):
    model_type = "olmoe"
    class_name = "OlmoeForCausalLM"

    def read(self, hf: Reading) -> dict[str, Any]:
        hf.only("head_dim", None, hf["hidden_size"] // hf["num_attention_heads"])
        bias = hf["attention_bias"]
        attention = {"qk_norm": "full", "clip_qkv": hf["clip_qkv"], "qkv_bias": bias, "out_bias": bias}
        return base.read_sizes(hf) | {
            "attention": {"name": "gqa", **attention, **base.read_heads(hf), **read_rope(hf)},
            "moe": {
                "n_experts": hf["num_experts"],
                "top_k": hf["num_experts_per_tok"],
                "d_expert": hf["intermediate_size"],
                "router": base.read_softmax_router(hf),
                "balancers": base.read_switch(hf),
            },
        }

    def write(self, config: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
        attention: Any = config.attention_of(0)
        return base.write_sizes(config) | {
            **base.write_heads(attention),
            "rope_parameters": write_rope(attention),
            "attention_bias": attention.qkv_bias,
            "clip_qkv": attention.clip_qkv,
            "num_experts": moe.n_experts,
            "num_experts_per_tok": moe.top_k,
            "intermediate_size": moe.d_expert,
            **base.write_softmax_router(moe),
        }

    def layer_weights(self, config: ModelConfig, layer: int, ours: str, theirs: str, fused: bool) -> Iterator[Weight]:
        assert config.moe is not None
        yield from base.norm_weights(ours, theirs)
        yield from base.gqa_weights(config.attention_of(layer), f"{ours}attention", f"{theirs}self_attn")
        yield same(f"{ours}moe.router.weight", f"{theirs}mlp.gate.weight")
        yield from base.experts_weights(f"{ours}moe.experts", f"{theirs}mlp.experts", config.moe.n_experts, fused)
