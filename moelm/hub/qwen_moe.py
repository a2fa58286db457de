"""Qwen1.5 / Qwen2-MoE (gated shared experts, q/k/v biases) and Qwen3-MoE (arXiv 2505.09388: q and k normed a head).

Both say by two keys which layers are dense, and both may have a sliding window.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moelm.config import ModelConfig, MoEConfig
from moelm.hub import base
from moelm.hub.reading import Reading, read_rope, write_rope
from moelm.hub.weights import Weight, same


class QwenMoE(base.Architecture):
    """What the two share."""

    def read_attention(self, hf: Reading) -> Any:
        raise NotImplementedError

    def write_attention(self, config: ModelConfig) -> dict[str, Any]:
        raise NotImplementedError

    def read(self, hf: Reading) -> dict[str, Any]:
        return base.read_sizes(hf) | {
            "attention": self.read_attention(hf),
            "feed_forward": {"d_ff": hf["intermediate_size"]},
            "moe": {
                "n_experts": hf["num_experts"],
                "top_k": hf["num_experts_per_tok"],
                "d_expert": hf["moe_intermediate_size"],
                **_read_moe_layers(hf),
                "router": base.read_softmax_router(hf),
                "balancers": base.read_switch(hf),
            },
        }

    def write(self, config: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
        attention: Any = config.attention_of(0)
        return base.write_sizes(config) | {
            **base.write_heads(attention),
            "head_dim": attention.width(config.d_model),
            "rope_parameters": write_rope(attention),
            **self.write_attention(config),
            "intermediate_size": config.feed_forward.d_ff,
            "num_experts": moe.n_experts,
            "num_experts_per_tok": moe.top_k,
            "moe_intermediate_size": moe.d_expert,
            **_write_moe_layers(config, moe),
            **base.write_softmax_router(moe),
        }

    def layer_weights(self, config: ModelConfig, layer: int, ours: str, theirs: str, fused: bool) -> Iterator[Weight]:
        assert config.moe is not None
        yield from base.norm_weights(ours, theirs)
        yield from base.gqa_weights(config.attention_of(layer), f"{ours}attention", f"{theirs}self_attn")
        if not config.is_moe_layer(layer):
            yield from base.swiglu_weights(f"{ours}feed_forward", f"{theirs}mlp")
            return
        yield same(f"{ours}moe.router.weight", f"{theirs}mlp.gate.weight")
        yield from base.experts_weights(f"{ours}moe.experts", f"{theirs}mlp.experts", config.moe.n_experts, fused)
        if config.moe.shared_width:
            yield from base.swiglu_weights(f"{ours}moe.shared", f"{theirs}mlp.shared_expert")
            yield same(f"{ours}moe.shared_gate.weight", f"{theirs}mlp.shared_expert_gate.weight")


class Qwen2MoE(QwenMoE):
    model_type = "qwen2_moe"
    class_name = "Qwen2MoeForCausalLM"

    def read_attention(self, hf: Reading) -> Any:
        section = {"name": "gqa", "qkv_bias": hf["qkv_bias"], **base.read_heads(hf), **base.read_head_dim(hf)}
        hf.get("use_sliding_window")  # the class has made layer_types of these two
        hf.get("max_window_layers")
        return base.read_layer_types(hf, section | read_rope(hf))

    def write_attention(self, config: ModelConfig) -> dict[str, Any]:
        attention: Any = config.attention_of(0)
        types = base.write_layer_types(config)
        return {"qkv_bias": attention.qkv_bias, "use_sliding_window": bool(types["sliding_window"]), **types}

    def read(self, hf: Reading) -> dict[str, Any]:
        raw = super().read(hf)
        width = hf["shared_expert_intermediate_size"]
        raw["moe"] |= {"n_shared_experts": 1, "d_shared": width, "shared_gate": True}
        return raw

    def write(self, config: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
        return super().write(config, moe) | {"shared_expert_intermediate_size": moe.shared_width or moe.d_expert}


class Qwen3MoE(QwenMoE):
    model_type = "qwen3_moe"
    class_name = "Qwen3MoeForCausalLM"

    def read_attention(self, hf: Reading) -> Any:
        bias = hf["attention_bias"]
        for key in ("use_sliding_window", "max_window_layers"):  # the class has removed a window that is not used
            hf.get(key)
        attention = {"qk_norm": "head", "qkv_bias": bias, "out_bias": bias, "sliding_window": hf["sliding_window"]}
        return {"name": "gqa", **attention, **base.read_heads(hf), **base.read_head_dim(hf), **read_rope(hf)}

    def write_attention(self, config: ModelConfig) -> dict[str, Any]:
        attention: Any = config.attention_of(0)
        window = attention.sliding_window
        return {
            "attention_bias": attention.qkv_bias,
            "use_sliding_window": window is not None,
            "sliding_window": window,
        }


def _read_moe_layers(hf: Reading) -> dict[str, Any]:
    """The layers that are a mixture: each `decoder_sparse_step`-th, counted from 1, that `mlp_only_layers` lacks."""
    n_layers, step, dense = hf["num_hidden_layers"], hf["decoder_sparse_step"], hf["mlp_only_layers"]
    layers = [i for i in range(n_layers) if i not in dense and (i + 1) % step == 0]
    first = layers[0] if layers else 0
    every = layers[1] - first if len(layers) > 1 else n_layers
    if layers != list(range(first, n_layers, every)):
        problem = f"{dense} with decoder_sparse_step = {step}"
        hf.refuse("mlp_only_layers", problem, "dense layers that leave every n-th layer, from some layer on, a mixture")
        return {}
    return {"first_moe_layer": first, "moe_every_n_layers": every if len(layers) > 1 else 1}


def _write_moe_layers(config: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    every, first = moe.moe_every_n_layers, moe.first_moe_layer
    step = every if (first + 1) % every == 0 else 1
    dense = [i for i in range(config.n_layers) if (i + 1) % step == 0 and not config.is_moe_layer(i)]
    return {"decoder_sparse_step": step, "mlp_only_layers": dense}
