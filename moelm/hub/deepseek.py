"""DeepSeek-V2 (arXiv 2405.04434) and DeepSeek-V3 (2412.19437; also Moonlight, 2502.16982): latent attention, the first
layers dense, shared experts, experts chosen within groups."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moelm.config import ModelConfig, MoEConfig
from moelm.hub import base
from moelm.hub.reading import Reading, make_config, read_rope, write_rope
from moelm.hub.weights import Weight, same, same_in_float32

LATENT_NORM_EPS = 1e-6  # transformers' modules and DeepSeek's own have this default and are given no other


class DeepSeek(base.Architecture):
    """What the two share."""

    attention = "mla"

    def read_router(self, hf: Reading) -> dict[str, Any]:
        raise NotImplementedError

    def read(self, hf: Reading) -> dict[str, Any]:
        for key in ("head_dim", "qk_head_dim"):
            hf.get(key)  # the class computes them
        hf.only("attention_bias", False)
        hf.only("attention_dropout", 0.0, None)
        hf.only("num_key_value_heads", hf["num_attention_heads"])
        hf.only("moe_layer_freq", 1, remedy="transformers makes every layer from first_k_dense_replace on a mixture")
        if hf["n_shared_experts"] < 1:
            hf.refuse("n_shared_experts", hf["n_shared_experts"], "at least 1")
        attention = {
            "name": "mla",
            "n_heads": hf["num_attention_heads"],
            "q_latent_dim": hf["q_lora_rank"],
            "kv_latent_dim": hf["kv_lora_rank"],
            "nope_head_dim": hf["qk_nope_head_dim"],
            "rope_head_dim": hf["qk_rope_head_dim"],
            "v_head_dim": hf["v_head_dim"],
            "latent_norm_eps": LATENT_NORM_EPS,
            **read_rope(hf),
        }
        return base.read_sizes(hf) | {
            "attention": attention,
            "feed_forward": {"d_ff": hf["intermediate_size"]},
            "moe": {
                "n_experts": hf["n_routed_experts"],
                "top_k": hf["num_experts_per_tok"],
                "d_expert": hf["moe_intermediate_size"],
                "n_shared_experts": hf["n_shared_experts"],
                "first_moe_layer": hf["first_k_dense_replace"],
                "router": self.read_router(hf),
                "balancers": _read_sequence(hf),
            },
        }

    def write(self, config: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
        attention: Any = config.attention_of(0)
        return base.write_sizes(config) | {
            "num_attention_heads": attention.n_heads,
            "num_key_value_heads": attention.n_heads,
            "q_lora_rank": attention.q_latent_dim,
            "kv_lora_rank": attention.kv_latent_dim,
            "qk_nope_head_dim": attention.nope_head_dim,
            "qk_rope_head_dim": attention.rope_head_dim,
            "v_head_dim": attention.v_head_dim,
            "rope_parameters": write_rope(attention),
            "intermediate_size": config.feed_forward.d_ff,
            "n_routed_experts": moe.n_experts,
            "num_experts_per_tok": moe.top_k,
            "moe_intermediate_size": moe.d_expert,
            "n_shared_experts": moe.shared_width // moe.d_expert,
            "first_k_dense_replace": moe.first_moe_layer,
            "aux_loss_alpha": base.write_summed_coef(config, "sequence", "switch"),
            "seq_aux": "switch" not in [each.name for each in moe.balancers],
        }

    def layer_weights(self, config: ModelConfig, layer: int, ours: str, theirs: str, fused: bool) -> Iterator[Weight]:
        assert config.moe is not None
        yield from base.norm_weights(ours, theirs)
        yield from mla_weights(config.attention_of(layer), f"{ours}attention", f"{theirs}self_attn")
        if not config.is_moe_layer(layer):
            yield from base.swiglu_weights(f"{ours}feed_forward", f"{theirs}mlp")
            return
        yield same(f"{ours}moe.router.weight", f"{theirs}mlp.gate.weight")
        if getattr(config.moe.router, "selection_bias", False):
            yield same_in_float32(f"{ours}moe.router.expert_bias", f"{theirs}mlp.gate.e_score_correction_bias")
        yield from base.experts_weights(f"{ours}moe.experts", f"{theirs}mlp.experts", config.moe.n_experts, fused)
        yield from base.swiglu_weights(f"{ours}moe.shared", f"{theirs}mlp.shared_experts")


class DeepSeekV2(DeepSeek):
    model_type = "deepseek_v2"
    class_name = "DeepseekV2ForCausalLM"

    def read(self, hf: Reading) -> dict[str, Any]:
        for key in ("kv_lora_rank", "qk_nope_head_dim"):
            if hf[key] % 2:
                hf.refuse(key, hf[key], "an even number", "transformers' code cannot take pairs for complex numbers")
        return super().read(hf)

    def read_router(self, hf: Reading) -> dict[str, Any]:
        hf.only("mlp_bias", False)
        hf.only("scoring_func", "softmax")
        hf.only("norm_topk_prob", False, None, remedy="transformers' code never normalises")
        router = {"name": "top_k", "route_scale": hf["routed_scaling_factor"]}
        hf.only("topk_method", "greedy", "group_limited_greedy")
        groups = {"n_groups": hf["n_group"], "top_k_groups": hf["topk_group"]}
        return router | groups if hf["topk_method"] == "group_limited_greedy" else router

    def write(self, config: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
        router: Any = moe.router
        return super().write(config, moe) | {
            "topk_method": "greedy" if router.n_groups == 1 else "group_limited_greedy",
            "n_group": router.n_groups,
            "topk_group": router.top_k_groups,
            "routed_scaling_factor": router.route_scale,
            "norm_topk_prob": False,
        }


class DeepSeekV3(DeepSeek):
    model_type = "deepseek_v3"
    class_name = "DeepseekV3ForCausalLM"

    def read(self, hf: Reading) -> dict[str, Any]:
        n_predictions = hf["num_nextn_predict_layers"]  # see n_prediction_layers
        if not isinstance(n_predictions, int):
            hf.refuse("num_nextn_predict_layers", n_predictions, "a whole number")
        raw = super().read(hf)
        raw["attention"]["rope_interleaved"] = hf["rope_interleave"]
        raw["moe"]["balancers"].insert(0, {"name": "loss_free"})
        return raw

    def n_prediction_layers(self, hf: dict[str, Any]) -> int:
        return int(make_config(self.config_class, hf).num_nextn_predict_layers)

    def read_router(self, hf: Reading) -> dict[str, Any]:
        hf.only("scoring_func", "sigmoid")
        hf.only("topk_method", "noaux_tc")
        return {
            "name": "top_k",
            "score": "sigmoid",
            "selection_bias": True,
            "normalize_gates": "after_top_k" if hf["norm_topk_prob"] else "none",
            "route_scale": hf["routed_scaling_factor"],
            "n_groups": hf["n_group"],
            "top_k_groups": hf["topk_group"],
            "group_score": "top2_sum" if hf["n_group"] > 1 else "max",
        }

    def write(self, config: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
        router: Any = moe.router
        attention: Any = config.attention_of(0)
        return super().write(config, moe) | {
            "rope_interleave": attention.rope_interleaved,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "n_group": router.n_groups,
            "topk_group": router.top_k_groups,
            "routed_scaling_factor": router.route_scale,
            "norm_topk_prob": router.normalize_gates == "after_top_k",
            "num_nextn_predict_layers": 0,
        }


def _read_sequence(hf: Reading) -> list[dict[str, Any]]:
    """transformers has no such loss; the published files say what the training had, and their code that the losses of
    the layers are added up."""
    coef, by_sequence = hf.get("aux_loss_alpha", 0.0), hf.get("seq_aux", True)
    name = "sequence" if by_sequence else "switch"
    return [{"name": name, "coef": coef, "over_layers": "sum"}] if coef else []


def mla_weights(attention: Any, ours: str, theirs: str) -> Iterator[Weight]:
    if attention.q_latent_dim is None:
        yield same(f"{ours}.q.weight", f"{theirs}.q_proj.weight")
    else:
        yield same(f"{ours}.q_compress.weight", f"{theirs}.q_a_proj.weight")
        yield same(f"{ours}.q_latent_norm.weight", f"{theirs}.q_a_layernorm.weight")
        yield same(f"{ours}.q.weight", f"{theirs}.q_b_proj.weight")
    yield same(f"{ours}.kv_compress.weight", f"{theirs}.kv_a_proj_with_mqa.weight")
    yield same(f"{ours}.kv_latent_norm.weight", f"{theirs}.kv_a_layernorm.weight")
    yield same(f"{ours}.kv_expand.weight", f"{theirs}.kv_b_proj.weight")
    yield same(f"{ours}.out.weight", f"{theirs}.o_proj.weight")
