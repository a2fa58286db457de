"""gpt-oss (arXiv 2508.10925): learned sinks, biases everywhere, layers with and without a sliding window, clamped
experts whose gate and up take turns. There is one layout only; files in MXFP4 must be made bf16 first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moelm.config import ModelConfig, MoEConfig
from moelm.hub import base
from moelm.hub.reading import Reading, read_rope, write_rope
from moelm.hub.weights import Weight, same, taking_turns


class GptOss(base.Architecture):
    model_type = "gpt_oss"
    class_name = "GptOssForCausalLM"

    def read(self, hf: Reading) -> dict[str, Any]:
        bias = hf["attention_bias"]
        for key in ("initial_context_length", "experts_per_token", "num_experts_per_token"):
            hf.get(key)  # of OpenAI's own code, copies of what other keys say
        section = {"name": "gqa", "sinks": True, "qkv_bias": bias, "out_bias": bias, **base.read_heads(hf)}
        section |= base.read_head_dim(hf) | read_rope(hf)
        return base.read_sizes(hf) | {
            "attention": base.read_layer_types(hf, section),
            "moe": {
                "n_experts": hf["num_local_experts"],
                "top_k": hf["num_experts_per_tok"],
                "d_expert": hf["intermediate_size"],
                # a softmax over the chosen logits is the one over all, made to sum to 1 over the chosen
                "router": {"name": "top_k", "normalize_gates": "after_top_k", "trained_bias": True},
                "balancers": base.read_switch(hf),
                "experts": {
                    "activation": "clamped_swiglu",
                    "clamp_limit": hf["swiglu_limit"],
                    "clamp_alpha": hf["swiglu_alpha"],
                    "bias": True,
                },
            },
        }

    def write(self, config: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
        attention: Any = config.attention_of(0)
        return base.write_sizes(config) | {
            **base.write_heads(attention),
            "head_dim": attention.width(config.d_model),
            "rope_parameters": write_rope(attention),
            "attention_bias": attention.qkv_bias,
            **base.write_layer_types(config),
            "num_local_experts": moe.n_experts,
            "num_experts_per_tok": moe.top_k,
            "intermediate_size": moe.d_expert,
            "swiglu_limit": moe.experts.clamp_limit,
            "swiglu_alpha": moe.experts.clamp_alpha,
            "router_aux_loss_coef": base.write_coef(moe, "switch", "global_batch"),
        }

    def layer_weights(self, config: ModelConfig, layer: int, ours: str, theirs: str, fused: bool) -> Iterator[Weight]:
        yield from base.norm_weights(ours, theirs)
        yield from base.gqa_weights(config.attention_of(layer), f"{ours}attention", f"{theirs}self_attn")
        for part in ("weight", "bias"):
            yield same(f"{ours}moe.router.{part}", f"{theirs}mlp.router.{part}")
        experts, theirs = f"{ours}moe.experts", f"{theirs}mlp.experts"
        yield taking_turns(f"{experts}.gate_up", f"{theirs}.gate_up_proj")
        yield taking_turns(f"{experts}.gate_up_bias", f"{theirs}.gate_up_proj_bias")
        yield same(f"{experts}.down", f"{theirs}.down_proj")
        yield same(f"{experts}.down_bias", f"{theirs}.down_proj_bias")
