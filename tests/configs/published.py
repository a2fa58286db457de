"""The published numbers of the thirteen models, written out once more, apart from the presets and from moelm.

`count` derives parameters from them by formulas of its own; CONFIG_JSON has what the published config.json of the
models that transformers knows says of the architecture.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Architecture(NamedTuple):
    d: int  # d_model
    layers: int
    vocab: int
    attention: int  # parameters of one layer's attention
    experts: int
    top_k: int
    expert: int  # parameters of one routed expert
    shared: int = 0  # parameters of one layer's shared experts and their gate
    dense_layers: int = 0
    dense: int = 0  # parameters of the feed-forward of a dense layer
    router_bias: bool = False
    tables: int = 2  # 1: the head is the embedding


class Count(NamedTuple):
    total: int
    active: int
    table: int  # one of input embedding and head
    tables: int

    @property
    def active_no_input_embedding(self) -> int:
        return self.active - (self.table if self.tables == 2 else 0)

    @property
    def active_no_embeddings(self) -> int:
        return self.active - self.tables * self.table


def count(a: Architecture) -> Count:
    """Every layer: attention, two norms, a dense feed-forward or experts with their router; then tables, last norm."""
    router = a.experts * a.d + (a.experts if a.router_bias else 0)
    moe_layers = a.layers - a.dense_layers
    around = a.tables * a.vocab * a.d + a.d + a.layers * (a.attention + 2 * a.d) + a.dense_layers * a.dense
    total = around + moe_layers * (router + a.shared + a.experts * a.expert)
    active = around + moe_layers * (router + a.shared + a.top_k * a.expert)
    return Count(total, active, a.vocab * a.d, a.tables)


def swiglu(d: int, width: int) -> int:
    return 3 * d * width


def grouped_query(d: int, q: int, kv: int) -> int:
    """W_q, W_k, W_v, W_o without biases; q and kv are widths over all heads."""
    return d * q + d * kv + d * kv + q * d


def latent(d: int, heads: int, q_rank: int | None, kv_rank: int = 512, rope: int = 64, nope: int = 128) -> int:
    """Multi-head latent attention; values are as wide as `nope`, and each latent has a norm."""
    q = d * heads * (nope + rope) if q_rank is None else d * q_rank + q_rank + q_rank * heads * (nope + rope)
    kv = d * (kv_rank + rope) + kv_rank + kv_rank * heads * (nope + nope)
    return q + kv + heads * nope * d


ARCHITECTURES = {
    "mixtral_8x7b": Architecture(
        d=4096, layers=32, vocab=32000, attention=grouped_query(4096, 4096, 8 * 128), experts=8, top_k=2,
        expert=swiglu(4096, 14336),
    ),
    "dbrx": Architecture(
        d=6144, layers=40, vocab=100352, attention=grouped_query(6144, 48 * 128, 8 * 128), experts=16, top_k=4,
        expert=swiglu(6144, 10752),
    ),
    "deepseek_moe_16b": Architecture(
        d=2048, layers=28, vocab=102400, attention=grouped_query(2048, 2048, 2048), experts=64, top_k=6,
        expert=swiglu(2048, 1408), shared=swiglu(2048, 2 * 1408), dense_layers=1, dense=swiglu(2048, 10944),
    ),
    "deepseek_v2": Architecture(
        d=5120, layers=60, vocab=102400, attention=latent(5120, 128, 1536), experts=160, top_k=6,
        expert=swiglu(5120, 1536), shared=swiglu(5120, 2 * 1536), dense_layers=1, dense=swiglu(5120, 12288),
    ),
    "deepseek_v2_lite": Architecture(
        d=2048, layers=27, vocab=102400, attention=latent(2048, 16, None), experts=64, top_k=6,
        expert=swiglu(2048, 1408), shared=swiglu(2048, 2 * 1408), dense_layers=1, dense=swiglu(2048, 10944),
    ),
    "deepseek_v3": Architecture(
        d=7168, layers=61, vocab=129280, attention=latent(7168, 128, 1536), experts=256, top_k=8,
        expert=swiglu(7168, 2048), shared=swiglu(7168, 2048), dense_layers=3, dense=swiglu(7168, 18432),
    ),
    "moonlight_16b_a3b": Architecture(
        d=2048, layers=27, vocab=163840, attention=latent(2048, 16, None), experts=64, top_k=6,
        expert=swiglu(2048, 1408), shared=swiglu(2048, 2 * 1408), dense_layers=1, dense=swiglu(2048, 11264),
    ),
    "qwen1_5_moe_a2_7b": Architecture(  # biases of q, k and v; the gate of the shared experts is one vector
        d=2048, layers=24, vocab=151936, attention=grouped_query(2048, 2048, 2048) + 3 * 2048, experts=60, top_k=4,
        expert=swiglu(2048, 1408), shared=swiglu(2048, 5632) + 2048,
    ),
    "qwen3_30b_a3b": Architecture(  # a norm of width 128 for the heads of q, another for those of k
        d=2048, layers=48, vocab=151936, attention=grouped_query(2048, 32 * 128, 4 * 128) + 2 * 128, experts=128,
        top_k=8, expert=swiglu(2048, 768),
    ),
    "olmoe_1b_7b": Architecture(  # a norm over the whole q, another over the whole k
        d=2048, layers=16, vocab=50304, attention=grouped_query(2048, 2048, 2048) + 2 * 2048, experts=64, top_k=8,
        expert=swiglu(2048, 1024),
    ),
    "euromoe_2_6b_a0_6b": Architecture(
        d=1024, layers=24, vocab=128000, attention=grouped_query(1024, 1024, 256), experts=64, top_k=8,
        expert=swiglu(1024, 512), tables=1,
    ),
    "llama_3_2_8x3b": Architecture(
        d=3072, layers=28, vocab=128256, attention=grouped_query(3072, 3072, 8 * 128), experts=8, top_k=2,
        expert=swiglu(3072, 8192),
    ),
    "gpt_oss_20b": Architecture(  # biases of q, k, v and out, a sink for each head; biases of gate, up and down
        d=2880, layers=24, vocab=201088,
        attention=grouped_query(2880, 64 * 64, 8 * 64) + (4096 + 2 * 512 + 2880) + 64, experts=32, top_k=4,
        expert=swiglu(2880, 2880) + 3 * 2880, router_bias=True,
    ),
}  # fmt: skip


YARN_V2 = {
    "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
    "mscale": 0.707, "mscale_all_dim": 0.707,
}  # fmt: skip
DEEPSEEK = {
    "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "rms_norm_eps": 1e-6,
    "rope_theta": 10000, "tie_word_embeddings": False,
}  # fmt: skip
V2 = {
    "model_type": "deepseek_v2", "vocab_size": 102400, "norm_topk_prob": False, "rope_scaling": YARN_V2, **DEEPSEEK,
}  # fmt: skip
V3 = {"model_type": "deepseek_v3", "norm_topk_prob": True, **DEEPSEEK}
CONFIG_JSON: dict[str, dict[str, Any]] = {
    "mixtral_8x7b": {
        "model_type": "mixtral", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2,
        "vocab_size": 32000, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "dbrx": {
        "model_type": "dbrx", "d_model": 6144, "n_heads": 48, "n_layers": 40, "vocab_size": 100352,
        "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500000},
        "ffn_config": {
            "ffn_hidden_size": 10752, "hidden_size": 6144, "moe_num_experts": 16, "moe_top_k": 4,
            "moe_normalize_expert_weights": 1.0, "moe_jitter_eps": 0, "moe_loss_weight": 0.05,
        },
        "tie_word_embeddings": False,
    },
    "deepseek_v2": V2 | {
        "hidden_size": 5120, "num_hidden_layers": 60, "num_attention_heads": 128,
        "num_key_value_heads": 128, "q_lora_rank": 1536,
        "first_k_dense_replace": 1, "intermediate_size": 12288, "moe_intermediate_size": 1536,
        "n_routed_experts": 160, "n_shared_experts": 2, "num_experts_per_tok": 6, "n_group": 8, "topk_group": 3,
        "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0,
    },
    "deepseek_v2_lite": V2 | {
        "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16,
        "num_key_value_heads": 16, "q_lora_rank": None,
        "first_k_dense_replace": 1, "intermediate_size": 10944, "moe_intermediate_size": 1408,
        "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1,
        "topk_method": "greedy", "routed_scaling_factor": 1.0,
    },
    "deepseek_v3": V3 | {
        "vocab_size": 129280, "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536, "first_k_dense_replace": 3, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
        "routed_scaling_factor": 2.5, "rope_scaling": YARN_V2 | {"mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "moonlight_16b_a3b": V3 | {
        "vocab_size": 163840, "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16,
        "num_key_value_heads": 16, "q_lora_rank": None, "first_k_dense_replace": 1, "intermediate_size": 11264,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1,
        "routed_scaling_factor": 2.446, "rms_norm_eps": 1e-5, "rope_theta": 50000, "num_nextn_predict_layers": 0,
    },
    "qwen1_5_moe_a2_7b": {
        "model_type": "qwen2_moe", "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16,
        "num_key_value_heads": 16, "intermediate_size": 5632, "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632, "num_experts": 60, "num_experts_per_tok": 4, "vocab_size": 151936,
        "norm_topk_prob": False, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "use_sliding_window": False,
        "tie_word_embeddings": False,
    },
    "qwen3_30b_a3b": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "vocab_size": 151936,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "sliding_window": None, "tie_word_embeddings": False,
    },
    "olmoe_1b_7b": {
        "model_type": "olmoe", "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16,
        "num_key_value_heads": 16, "intermediate_size": 1024, "num_experts": 64, "num_experts_per_tok": 8,
        "norm_topk_prob": False, "clip_qkv": None, "rms_norm_eps": 1e-5, "rope_theta": 10000, "vocab_size": 50304,
        "tie_word_embeddings": False,
    },
    "euromoe_2_6b_a0_6b": {  # not seen: what its parameter count and Mixtral's architecture imply
        "model_type": "mixtral", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 8,
        "num_key_value_heads": 2, "intermediate_size": 512, "num_local_experts": 64, "num_experts_per_tok": 8,
        "vocab_size": 128000, "rms_norm_eps": 1e-5, "rope_theta": 10000, "tie_word_embeddings": True,
    },
    "llama_3_2_8x3b": {  # not seen: that of Llama-3.2-3B in Mixtral's architecture
        "model_type": "mixtral", "hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24,
        "num_key_value_heads": 8, "intermediate_size": 8192, "num_local_experts": 8, "num_experts_per_tok": 2,
        "vocab_size": 128256, "rms_norm_eps": 1e-5, "rope_theta": 500000, "tie_word_embeddings": False,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "gpt_oss_20b": {
        "model_type": "gpt_oss", "hidden_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 2880, "num_local_experts": 32,
        "num_experts_per_tok": 4, "vocab_size": 201088, "sliding_window": 128, "swiglu_limit": 7.0,
        "layer_types": ["sliding_attention", "full_attention"] * 12, "attention_bias": True, "rms_norm_eps": 1e-5,
        "rope_theta": 150000, "tie_word_embeddings": False,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    },
}  # fmt: skip
