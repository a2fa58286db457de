"""Small random models of transformers for the tests of the hub: every architecture, in at least three shapes each."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the published models are read from transformers: pip install moelm[hub]")

import transformers

transformers.logging.set_verbosity_error()

YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "rope_theta": 900.0}
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32, "rope_theta": 500.0},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}


def plain(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


def sizes(d: int, n_layers: int, heads: int, kv_heads: int, rope: dict[str, Any], vocab: int = 61, **more: Any) -> dict:
    return {
        **{"hidden_size": d, "num_hidden_layers": n_layers, "num_attention_heads": heads, "vocab_size": vocab},
        **{"num_key_value_heads": kv_heads, "rope_parameters": rope, "bos_token_id": None, "eos_token_id": None},
        **{"pad_token_id": None, **more},
    }


def latent(q: int | None, kv: int, nope: int, rope: int, v: int) -> dict[str, Any]:
    return {
        **{"q_lora_rank": q, "kv_lora_rank": kv, "qk_nope_head_dim": nope, "qk_rope_head_dim": rope},
        "v_head_dim": v,
    }


def dbrx(d: int, n_layers: int, heads: int, theta: float, attn: dict[str, Any], ffn: dict[str, Any]) -> dict[str, Any]:
    return {
        **{"d_model": d, "n_layers": n_layers, "n_heads": heads, "vocab_size": 61, "rope_parameters": plain(theta)},
        **{"attn_config": {"rope_theta": theta, **attn}, "ffn_config": ffn},
    }


MSCALE = {"mscale": 0.5, "mscale_all_dim": 0.9}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral odd": (
        "Mixtral",
        sizes(22, 3, 3, 1, plain(1e4), head_dim=10, intermediate_size=13, num_local_experts=5, num_experts_per_tok=3),
    ),
    "mixtral sliding and tied": (
        "Mixtral",
        sizes(32, 2, 4, 2, plain(700.0), intermediate_size=24, sliding_window=6, tie_word_embeddings=True),
    ),
    "mixtral llama3": (
        "Mixtral",
        sizes(24, 2, 2, 2, LLAMA3, head_dim=8, intermediate_size=16, num_local_experts=4, rms_norm_eps=1e-3),
    ),
    "qwen3_moe sparse steps": (
        "Qwen3Moe",
        sizes(28, 4, 6, 2, plain(700.0), head_dim=10, intermediate_size=33, moe_intermediate_size=11)
        | {"num_experts": 6, "num_experts_per_tok": 2, "decoder_sparse_step": 2, "norm_topk_prob": True},
    ),
    "qwen3_moe first layer dense, biases, window": (
        "Qwen3Moe",
        sizes(32, 3, 2, 1, YARN, head_dim=16, intermediate_size=40, moe_intermediate_size=16, attention_bias=True)
        | {"num_experts": 8, "num_experts_per_tok": 3, "mlp_only_layers": [0], "norm_topk_prob": True}
        | {"use_sliding_window": True, "sliding_window": 5},
    ),
    "qwen3_moe tied, gates not normalised": (
        "Qwen3Moe",
        sizes(30, 2, 3, 3, plain(1e4), moe_intermediate_size=7, num_experts=5, num_experts_per_tok=4)
        | {"tie_word_embeddings": True},
    ),
    "olmoe odd": (
        "Olmoe",
        sizes(42, 2, 3, 3, plain(1e4), intermediate_size=13, num_experts=7, num_experts_per_tok=3),
    ),
    "olmoe clipped, shared keys, biases": (
        "Olmoe",
        sizes(32, 3, 4, 4, plain(500.0), intermediate_size=16, num_experts=8, num_experts_per_tok=4, clip_qkv=0.9)
        | {"attention_bias": True, "norm_topk_prob": True},
    ),
    "olmoe tied, yarn": (
        "Olmoe",
        sizes(36, 2, 3, 1, YARN, intermediate_size=10, num_experts=6, num_experts_per_tok=2)
        | {"tie_word_embeddings": True},
    ),
    "qwen2_moe wide shared experts": (
        "Qwen2Moe",
        sizes(42, 2, 3, 1, plain(1e4), moe_intermediate_size=9, shared_expert_intermediate_size=40, num_experts=6),
    ),
    "qwen2_moe windows, steps": (
        "Qwen2Moe",
        sizes(32, 4, 4, 2, plain(700.0), moe_intermediate_size=16, shared_expert_intermediate_size=8, num_experts=8)
        | {"intermediate_size": 40, "decoder_sparse_step": 2, "num_experts_per_tok": 2, "norm_topk_prob": True}
        | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 4},
    ),
    "qwen2_moe tied, no biases, dense layers listed": (
        "Qwen2Moe",
        sizes(36, 5, 3, 3, LLAMA3, moe_intermediate_size=10, shared_expert_intermediate_size=10, num_experts=5)
        | {"intermediate_size": 17, "mlp_only_layers": [0, 2, 3], "num_experts_per_tok": 3, "qkv_bias": False}
        | {"tie_word_embeddings": True},
    ),
    "dbrx odd, clipped": (
        "Dbrx",
        dbrx(
            *(30, 2, 3, 300.0, {"kv_n_heads": 1, "clip_qkv": 1.1}),
            {"ffn_hidden_size": 11, "moe_num_experts": 5, "moe_top_k": 3},
        ),
    ),
    "dbrx gates not normalised": (
        "Dbrx",
        dbrx(
            *(32, 3, 4, 10_000.0, {"kv_n_heads": 2, "clip_qkv": 0.8}),
            {"ffn_hidden_size": 16, "moe_num_experts": 8, "moe_top_k": 1, "moe_normalize_expert_weights": None},
        ),
    ),
    "dbrx": (
        "Dbrx",
        dbrx(
            *(24, 1, 2, 500.0, {"kv_n_heads": 2, "clip_qkv": 8.0}),
            {"ffn_hidden_size": 20, "moe_num_experts": 4, "moe_top_k": 4},
        ),
    ),
    "deepseek_v2 groups, yarn": (
        "DeepseekV2",
        sizes(27, 3, 3, 3, YARN | MSCALE, intermediate_size=19, moe_intermediate_size=7, **latent(13, 12, 6, 10, 9))
        | {"n_routed_experts": 12, "num_experts_per_tok": 3, "n_shared_experts": 2, "first_k_dense_replace": 1}
        | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 3.0},
    ),
    "deepseek_v2 without a q latent": (
        "DeepseekV2",
        sizes(32, 2, 2, 2, plain(1e4), intermediate_size=24, moe_intermediate_size=8, **latent(None, 8, 8, 4, 8))
        | {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "tie_word_embeddings": True},
    ),
    "deepseek_v2 two dense layers": (
        "DeepseekV2",
        sizes(24, 4, 2, 2, YARN, intermediate_size=15, moe_intermediate_size=5, **latent(7, 6, 4, 6, 3))
        | {"n_routed_experts": 5, "num_experts_per_tok": 4, "n_shared_experts": 3, "first_k_dense_replace": 2},
    ),
    "deepseek_v3 groups, yarn": (
        "DeepseekV3",
        sizes(27, 3, 3, 3, YARN | MSCALE, intermediate_size=19, moe_intermediate_size=7, **latent(5, 12, 6, 10, 9))
        | {"n_routed_experts": 12, "num_experts_per_tok": 3, "n_shared_experts": 1, "first_k_dense_replace": 1}
        | {"n_group": 4, "topk_group": 2},
    ),
    "deepseek_v3 like Moonlight": (
        "DeepseekV3",
        sizes(32, 3, 2, 2, plain(5e4), intermediate_size=24, moe_intermediate_size=8, **latent(None, 8, 8, 4, 8))
        | {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 2, "first_k_dense_replace": 1}
        | {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.446, "rms_norm_eps": 1e-5},
    ),
    "deepseek_v3 in halves, tied, gates not normalised": (
        "DeepseekV3",
        sizes(24, 2, 2, 2, plain(700.0), intermediate_size=15, moe_intermediate_size=5, **latent(6, 5, 4, 6, 3))
        | {"n_routed_experts": 6, "num_experts_per_tok": 2, "n_shared_experts": 3, "first_k_dense_replace": 0}
        | {"n_group": 2, "topk_group": 1, "rope_interleave": False, "norm_topk_prob": False}
        | {"routed_scaling_factor": 1.0, "tie_word_embeddings": True},
    ),
    "gpt_oss": (
        "GptOss",
        sizes(22, 4, 6, 3, YARN | {"truncate": False, "beta_fast": 3.0}, head_dim=14, intermediate_size=13)
        | {"num_local_experts": 6, "num_experts_per_tok": 3, "sliding_window": 5, "swiglu_limit": 1.5},
    ),
    "gpt_oss odd number of layers, tied": (
        "GptOss",
        sizes(32, 3, 2, 1, plain(700.0), head_dim=8, intermediate_size=16, num_local_experts=4)
        | {"num_experts_per_tok": 2, "sliding_window": 4, "tie_word_embeddings": True, "swiglu_alpha": 1.2},
    ),
    "gpt_oss other layers, no biases in attention": (
        "GptOss",
        sizes(24, 4, 2, 2, plain(1e4), head_dim=12, intermediate_size=10, num_local_experts=5)
        | {"num_experts_per_tok": 4, "sliding_window": 6, "attention_bias": False}
        | {"layer_types": ["full_attention", "full_attention", "sliding_attention", "full_attention"]},
    ),
}


def make(name: str, **changes: Any) -> Any:
    """The model, in evaluation mode, with weights so large that everything in it matters."""
    kind, values = CASES[name]
    config = getattr(transformers, f"{kind}Config")(**values | changes)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    fill(model)
    return model.eval()


@torch.no_grad()
def fill(model: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("inv_freq"):
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if "norm" in name and "bias" not in name and tensor.ndim == 1:
            tensor.copy_(1 + 0.3 * noise)
        elif "e_score_correction_bias" in name:
            tensor.copy_(0.2 * noise)  # of the order of the differences between scores in (0, 1)
        elif tensor.ndim == 1 or name.endswith("bias"):
            tensor.copy_(0.5 * noise)
        else:
            tensor.copy_(1.5 * noise / tensor.shape[-1] ** 0.5)


def tokens(model: Any, shape: tuple[int, int] = (3, 24)) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(1))
