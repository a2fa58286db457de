"""Mixtral (arXiv 2401.04088): grouped-query attention, every layer a mixture, gates that sum to 1."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moelm.config import ModelConfig, MoEConfig
from moelm.hub import base
from moelm.hub.reading import Reading, read_rope, write_rope
from moelm.hub.weights import Weight, experts_apart, experts_together, same


class Mixtral(base.Architecture):
    model_type = "mixtral"
    class_name = "MixtralForCausalLM"

    def read(self, hf: Reading) -> dict[str, Any]:
        attention = {"name": "gqa", **base.read_heads(hf), **base.read_head_dim(hf), **read_rope(hf)}
        return base.read_sizes(hf) | {
            "attention": attention | {"sliding_window": hf["sliding_window"]},
            "moe": {
                "n_experts": hf["num_local_experts"],
                "top_k": hf["num_experts_per_tok"],
                "d_expert": hf["intermediate_size"],
                # in training only; theirs scales what the experts see too, ours the router's copy
                "router": {"name": "top_k", "normalize_gates": "after_top_k", "jitter": hf["router_jitter_noise"]},
                "balancers": base.read_switch(hf),
            },
        }

    def write(self, config: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
        attention: Any = config.attention_of(0)
        return base.write_sizes(config) | {
            **base.write_heads(attention),
            "head_dim": attention.width(config.d_model),
            "rope_parameters": write_rope(attention),
            "sliding_window": attention.sliding_window,
            "num_local_experts": moe.n_experts,
            "num_experts_per_tok": moe.top_k,
            "intermediate_size": moe.d_expert,
            "router_jitter_noise": getattr(moe.router, "jitter", 0.0),
            "router_aux_loss_coef": base.write_coef(moe, "switch", "global_batch"),
        }

    def layer_weights(self, config: ModelConfig, layer: int, ours: str, theirs: str, fused: bool) -> Iterator[Weight]:
        assert config.moe is not None
        yield from base.norm_weights(ours, theirs)
        yield from base.gqa_weights(config.attention_of(layer), f"{ours}attention", f"{theirs}self_attn")
        block = theirs + ("mlp" if fused else "block_sparse_moe")
        yield same(f"{ours}moe.router.weight", f"{block}.gate.weight")
        if fused:
            yield from experts_together(f"{ours}moe.experts", f"{block}.experts")
        else:
            yield from experts_apart(f"{ours}moe.experts", f"{block}.experts", config.moe.n_experts, "w1", "w3", "w2")
