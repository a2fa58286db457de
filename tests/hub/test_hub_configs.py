"""Configs in both directions: what is read, what is refused and why, what can be written."""

from __future__ import annotations

import copy
import importlib
import sys
from typing import Any

import pytest
import torch
from hub.hub_models import CASES, make

from moelm.config import ModelConfig, check_model, from_dict, to_dict
from moelm.hub import (
    ARCHITECTURES,
    HubError,
    architecture_of,
    from_transformers,
    load_weights,
    to_transformers,
    write_config,
)

COMMON = {  # of files from before transformers 5
    **{"architectures": ["X"], "auto_map": {"AutoConfig": "x"}, "attention_dropout": 0.0, "bos_token_id": 1},
    **{"eos_token_id": 2, "hidden_act": "silu", "initializer_range": 0.02, "torch_dtype": "bfloat16"},
    **{"tie_word_embeddings": False, "transformers_version": "4.40.0", "use_cache": True},
}
MIXTRAL = COMMON | {
    **{"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768},
    **{"num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8},
    **{"num_local_experts": 8, "output_router_logits": False, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
    **{"router_aux_loss_coef": 0.02, "sliding_window": None, "vocab_size": 32000},
}
DBRX = {
    **{"architectures": ["DbrxForCausalLM"], "d_model": 6144, "emb_pdrop": 0.0, "initializer_range": 0.02},
    **{"attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "model_type": "", "rope_theta": 500000}},
    "ffn_config": {
        **{"ffn_hidden_size": 10752, "model_type": "", "moe_jitter_eps": 0, "moe_loss_weight": 0.05},
        **{"moe_num_experts": 16, "moe_top_k": 4},
    },
    **{"max_seq_len": 32768, "model_type": "dbrx", "n_heads": 48, "n_layers": 40, "output_router_logits": False},
    **{"resid_pdrop": 0.0, "router_aux_loss_coef": 0.05, "tie_word_embeddings": False, "torch_dtype": "bfloat16"},
    **{"transformers_version": "4.38.2", "use_cache": True, "vocab_size": 100352},
}
DEEPSEEK_V2 = COMMON | {
    **{"model_type": "deepseek_v2", "attention_bias": False, "aux_loss_alpha": 0.001, "ep_size": 1},
    **{"first_k_dense_replace": 1, "hidden_size": 5120, "intermediate_size": 12288, "kv_lora_rank": 512},
    **{"max_position_embeddings": 163840, "moe_intermediate_size": 1536, "moe_layer_freq": 1, "n_group": 8},
    **{"n_routed_experts": 160, "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 128},
    **{"num_experts_per_tok": 6, "num_hidden_layers": 60, "num_key_value_heads": 128, "pretraining_tp": 1},
    **{"q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6},
    "rope_scaling": {
        **{"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707},
        **{"original_max_position_embeddings": 4096, "type": "yarn"},
    },
    **{"rope_theta": 10000, "routed_scaling_factor": 16.0, "scoring_func": "softmax", "seq_aux": True},
    **{"topk_group": 3, "topk_method": "group_limited_greedy", "v_head_dim": 128, "vocab_size": 102400},
}
MOONLIGHT = COMMON | {
    **{"model_type": "deepseek_v3", "attention_bias": False, "aux_loss_alpha": 0.001, "ep_size": 1},
    **{"first_k_dense_replace": 1, "hidden_size": 2048, "intermediate_size": 11264, "kv_lora_rank": 512},
    **{"max_position_embeddings": 8192, "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1},
    **{"n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": True, "num_attention_heads": 16},
    **{"num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16, "num_nextn_predict_layers": 0},
    **{"q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-5},
    **{"rope_theta": 50000.0, "routed_scaling_factor": 2.446, "scoring_func": "sigmoid", "seq_aux": True},
    **{"topk_group": 1, "topk_method": "noaux_tc", "v_head_dim": 128, "vocab_size": 163840, "rope_scaling": None},
}
OLMOE = COMMON | {
    **{"model_type": "olmoe", "attention_bias": False, "clip_qkv": None, "hidden_size": 2048},
    **{"intermediate_size": 1024, "max_position_embeddings": 4096, "norm_topk_prob": False, "pad_token_id": 1},
    **{"num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16},
    **{"num_key_value_heads": 16, "output_router_logits": False, "rms_norm_eps": 1e-5, "rope_scaling": None},
    **{"rope_theta": 10000.0, "router_aux_loss_coef": 0.01, "vocab_size": 50304},
}
QWEN2 = COMMON | {
    **{"model_type": "qwen2_moe", "decoder_sparse_step": 1, "hidden_size": 2048, "intermediate_size": 5632},
    **{"max_position_embeddings": 8192, "max_window_layers": 21, "moe_intermediate_size": 1408},
    **{"norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 60, "num_experts_per_tok": 4},
    **{"num_hidden_layers": 24, "num_key_value_heads": 16, "output_router_logits": False, "rms_norm_eps": 1e-6},
    **{"rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 5632},
    **{"sliding_window": 32768, "use_sliding_window": False, "vocab_size": 151936},
}
QWEN3 = COMMON | {
    **{"model_type": "qwen3_moe", "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128},
    **{"hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48},
    **{"mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32},
    **{"num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4},
    **{"output_router_logits": False, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 1000000.0},
    **{"router_aux_loss_coef": 0.001, "sliding_window": None, "use_sliding_window": False, "vocab_size": 151936},
}
GPT_OSS = COMMON | {
    **{"model_type": "gpt_oss", "attention_bias": True, "experts_per_token": 4, "head_dim": 64},
    **{"hidden_size": 2880, "initial_context_length": 4096, "intermediate_size": 2880, "num_attention_heads": 64},
    **{"layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072},
    **{"num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32},
    "rope_scaling": {
        **{"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096},
        **{"rope_type": "yarn", "truncate": False},
    },
    **{"rms_norm_eps": 1e-5, "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128},
    **{"swiglu_limit": 7.0, "vocab_size": 201088, "output_router_logits": False, "pad_token_id": 199999},
}
NO_ROPE = {"rope_theta": 10000.0, "rope_scaling": {"kind": "none"}}
PUBLISHED: list[tuple[dict[str, Any], dict[str, Any]]] = [  # as the vendors' files have them, and what they mean
    (
        MIXTRAL,
        {
            "attention": {"name": "gqa", "n_heads": 32, "n_kv_heads": 8, "head_dim": 128, "rope_theta": 1e6},
            "moe": {
                **{"n_experts": 8, "top_k": 2, "d_expert": 14336, "balancers": [{"name": "switch", "coef": 0.02}]},
                "router": {"name": "top_k", "normalize_gates": "after_top_k"},
            },
            **{"n_layers": 32, "d_model": 4096, "vocab_size": 32000, "norm_eps": 1e-5},
        },
    ),
    (
        DBRX,
        {
            "attention": {"name": "gqa", "n_heads": 48, "n_kv_heads": 8, "clip_qkv": 8, "rope_theta": 500000},
            "moe": {
                **{"n_experts": 16, "top_k": 4, "d_expert": 10752, "balancers": [{"name": "switch", "coef": 0.05}]},
                "router": {"name": "top_k", "normalize_gates": "after_top_k"},
            },
            **{"n_layers": 40, "d_model": 6144, "vocab_size": 100352, "norm": "layernorm", "norm_eps": 1e-5},
        },
    ),
    (
        DEEPSEEK_V2,
        {
            "attention": {
                **{"name": "mla", "n_heads": 128, "q_latent_dim": 1536, "kv_latent_dim": 512, "nope_head_dim": 128},
                **{"rope_head_dim": 64, "v_head_dim": 128},
                "rope_scaling": {
                    **{"kind": "yarn", "factor": 40, "original_context": 4096},
                    **{"mscale": 0.707, "mscale_all_dim": 0.707},
                },
            },
            "feed_forward": {"d_ff": 12288},
            "moe": {
                **{"n_experts": 160, "top_k": 6, "d_expert": 1536, "n_shared_experts": 2, "first_moe_layer": 1},
                "balancers": [{"name": "sequence", "coef": 0.001, "over_layers": "sum"}],
                "router": {"name": "top_k", "route_scale": 16.0, "n_groups": 8, "top_k_groups": 3},
            },
            **{"n_layers": 60, "d_model": 5120, "vocab_size": 102400, "norm_eps": 1e-6},
        },
    ),
    (
        MOONLIGHT,
        {
            "attention": {
                **{"name": "mla", "n_heads": 16, "q_latent_dim": None, "kv_latent_dim": 512, "nope_head_dim": 128},
                **{"rope_head_dim": 64, "v_head_dim": 128, "rope_theta": 50000},
            },
            "feed_forward": {"d_ff": 11264},
            "moe": {
                **{"n_experts": 64, "top_k": 6, "d_expert": 1408, "n_shared_experts": 2, "first_moe_layer": 1},
                "balancers": ["loss_free", {"name": "sequence", "coef": 0.001, "over_layers": "sum"}],
                "router": {
                    **{"name": "top_k", "score": "sigmoid", "normalize_gates": "after_top_k", "route_scale": 2.446},
                    "selection_bias": True,
                },
            },
            **{"n_layers": 27, "d_model": 2048, "vocab_size": 163840, "norm_eps": 1e-5},
        },
    ),
    (
        OLMOE,
        {
            "attention": {"name": "gqa", "n_heads": 16, "n_kv_heads": 16, "qk_norm": "full"},
            "moe": {
                **{"n_experts": 64, "top_k": 8, "d_expert": 1024, "balancers": [{"name": "switch", "coef": 0.01}]},
            },
            **{"n_layers": 16, "d_model": 2048, "vocab_size": 50304, "norm_eps": 1e-5},
        },
    ),
    (
        QWEN2,
        {
            "attention": {
                **{"name": "gqa", "n_heads": 16, "n_kv_heads": 16, "head_dim": 128, "rope_theta": 1e6},
                "qkv_bias": True,
            },
            "feed_forward": {"d_ff": 5632},
            "moe": {
                **{"n_experts": 60, "top_k": 4, "d_expert": 1408, "n_shared_experts": 1, "d_shared": 5632},
                **{"shared_gate": True, "balancers": [{"name": "switch", "coef": 0.001}]},
            },
            **{"n_layers": 24, "d_model": 2048, "vocab_size": 151936, "norm_eps": 1e-6},
        },
    ),
    (
        QWEN3,
        {
            "attention": {
                **{"name": "gqa", "n_heads": 32, "n_kv_heads": 4, "head_dim": 128, "rope_theta": 1e6},
                "qk_norm": "head",
            },
            "feed_forward": {"d_ff": 6144},
            "moe": {
                **{"n_experts": 128, "top_k": 8, "d_expert": 768, "balancers": [{"name": "switch", "coef": 0.001}]},
                "router": {"name": "top_k", "normalize_gates": "after_top_k"},
            },
            **{"n_layers": 48, "d_model": 2048, "vocab_size": 151936, "norm_eps": 1e-6},
        },
    ),
    (
        GPT_OSS,
        {
            "attention": [
                {
                    **{"name": "gqa", "n_heads": 64, "n_kv_heads": 8, "head_dim": 64, "rope_theta": 150000},
                    **{"sinks": True, "qkv_bias": True, "out_bias": True, "sliding_window": window},
                    "rope_scaling": {"kind": "yarn", "factor": 32, "original_context": 4096, "truncate": False},
                }
                for window in (128, None)
            ],
            "moe": {
                **{"n_experts": 32, "top_k": 4, "d_expert": 2880, "balancers": [{"name": "switch", "coef": 0.9}]},
                "router": {"name": "top_k", "normalize_gates": "after_top_k", "trained_bias": True},
                "experts": {"activation": "clamped_swiglu", "bias": True},
            },
            **{"n_layers": 24, "d_model": 2880, "vocab_size": 201088, "norm_eps": 1e-5},
        },
    ),
]
every_published = pytest.mark.parametrize(("hf", "wanted"), PUBLISHED, ids=[hf["model_type"] for hf, _ in PUBLISHED])


def ours(**raw: Any) -> ModelConfig:
    config = from_dict(ModelConfig, raw, "model")
    check_model(config)
    return config


def read(hf: dict[str, Any]) -> ModelConfig:
    return architecture_of(hf).read_config(hf)


@every_published
def test_a_published_config_means_what_its_paper_says(hf: dict, wanted: dict):
    before = copy.deepcopy(hf)
    init = {"std": 0.02, "scale_residual": False}
    assert read(hf) == ours(**wanted, tied_embeddings=False, init=init)
    assert hf == before


def test_a_loss_that_is_a_mean_over_layers_is_written_as_part_of_a_sum():
    model = read(DEEPSEEK_V2)
    balancer: Any = model.moe.balancers[0]
    balancer.over_layers, balancer.coef = "mean", 0.59
    assert write_config(model)[1]["aux_loss_alpha"] == pytest.approx(0.59 / 59)


@every_published
def test_a_published_model_can_be_written_again(hf: dict, wanted: dict):
    architecture, written = write_config(read(hf))
    assert architecture.model_type == hf["model_type"]
    assert read(written) == read(hf)


@every_published
def test_what_is_written_is_a_config_that_transformers_takes_and_gives_back(hf: dict, wanted: dict):
    architecture, written = write_config(read(hf))
    theirs = architecture.config_class(**copy.deepcopy(written))
    assert read(theirs.to_dict()) == read(hf)
    assert read(theirs.to_diff_dict()) == read(hf)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_missing_key_has_the_default_of_transformers(model_type: str):
    architecture = ARCHITECTURES[model_type]
    # keys whose own default transformers cannot run with, or we cannot express
    needed = {
        "dbrx": {"attn_config": {"clip_qkv": 8.0}, "ffn_config": {"moe_top_k": 2}},
        "deepseek_v2": {"num_experts_per_tok": 6},
    }.get(model_type, {})
    defaults = architecture.config_class(**needed)
    config = architecture.read_config({"model_type": model_type, **needed})
    assert config.n_layers == defaults.num_hidden_layers
    assert config.d_model == defaults.hidden_size
    assert config.vocab_size == defaults.vocab_size
    assert config == architecture.read_config(defaults.to_dict())


def test_old_and_new_spellings_of_rope_mean_the_same():
    scaling = {"factor": 8.0, "original_max_position_embeddings": 64, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    old = MIXTRAL | {"rope_theta": 500.0, "rope_scaling": {"type": "llama3", **scaling}}
    new = {key: value for key, value in MIXTRAL.items() if key != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "llama3", "rope_theta": 500.0, **scaling}
    assert read(old) == read(new)
    attention: Any = read(new).attention
    assert attention.rope_theta == 500
    assert attention.rope_scaling.kind == "llama3"
    assert attention.rope_scaling.original_context == 64


# --------------------------------------------------------------------------------------------------- refusals


@every_published
def test_every_reason_is_listed_at_once(hf: dict, wanted: dict):
    act = {"ffn_config": hf["ffn_config"] | {"ffn_act_fn": {"name": "gelu"}}} if "d_model" in hf else {}
    changed = hf | (act or {"hidden_act": "gelu"}) | {"quantization_config": {"quant_method": "fp8"}, "z": 1, "y": 2}
    with pytest.raises(HubError) as caught:
        read(changed)
    reasons = caught.value.reasons
    assert len(reasons) == 4
    assert any("ffn_config.ffn_act_fn" in each if act else "hidden_act is 'gelu'" in each for each in reasons)
    assert (
        "quantization_config is {'quant_method': 'fp8'}, allowed: null (convert the weights to bf16 first)" in reasons
    )
    assert reasons[-2:] == ["y is a key that is not understood", "z is a key that is not understood"]
    assert all(reason in str(caught.value) for reason in reasons)


def nested(hf: dict, key: str, value: Any) -> dict:
    section, _, name = key.rpartition(".")
    return hf | ({section: hf.get(section, {}) | {name: value}} if section else {key: value})


@pytest.mark.parametrize(
    ("hf", "key"), [(MIXTRAL, "router_jitter_noise"), (DBRX, "ffn_config.moe_jitter_eps")], ids=["mixtral", "dbrx"]
)
def test_the_noise_of_training_is_kept_both_ways(hf: dict, key: str):
    architecture = ARCHITECTURES[hf["model_type"]]
    config = architecture.read_config(nested(hf, key, 0.01))
    assert config.moe.router.jitter == 0.01
    assert architecture.read_config(architecture.write_config(config)) == config


def test_whole_numbers_stand_for_floats_where_transformers_insists_on_them():
    ones = nested(nested(DBRX, "ffn_config.moe_normalize_expert_weights", 1), "initializer_range", 1)
    config = ARCHITECTURES["dbrx"].read_config(ones)
    assert (config.moe.router.normalize_gates, config.init.std) == ("after_top_k", 1.0)
    assert ARCHITECTURES["mixtral"].read_config(MIXTRAL | {"router_aux_loss_coef": 0}).moe.balancers == []


REFUSED: list[tuple[dict, str, Any, str]] = [
    (MIXTRAL, "attention_dropout", 0.1, "allowed: 0.0"),
    (
        MIXTRAL,
        "rope_scaling",
        {"type": "dynamic", "factor": 2.0},
        "allowed: 'default' or 'yarn' or 'llama3'",
    ),
    (MIXTRAL, "partial_rotary_factor", 0.5, "0.5, allowed: 1.0"),
    (MIXTRAL, "num_experts_per_tok", 1, "normalize_gates"),
    (MIXTRAL, "num_experts_per_tok", 9, "9 is more than n_experts = 8"),
    (MIXTRAL, "num_attention_heads", 31, "n_kv_heads"),
    (MIXTRAL, "num_attention_heads", 0, "its values do not make a model"),
    (MIXTRAL, "vocab_size", "many", "vocab_size"),
    (MIXTRAL, "mlp_bias", True, "not understood"),
    (OLMOE, "head_dim", 64, "64, allowed: null or 128"),
    (DBRX, "resid_pdrop", 0.1, "allowed: 0.0"),
    (DBRX, "emb_pdrop", 0.1, "allowed: 0.0"),
    (DBRX, "attn_config.attn_pdrop", 0.1, "allowed: 0.0"),
    (DBRX, "attn_config.clip_qkv", None, "null, allowed: a number"),
    (DBRX, "attn_config.window", 5, "not understood"),
    (DBRX, "ffn_config.moe_normalize_expert_weights", 2.0, "2.0, allowed: null or 1.0"),
    (DBRX, "ffn_config.activation", "relu", "not understood"),
    (DBRX, "rope_theta", 10000.0, "10000.0, allowed: 500000, as attn_config.rope_theta says"),
    (DEEPSEEK_V2, "moe_layer_freq", 2, "2, allowed: 1"),
    (DEEPSEEK_V2, "scoring_func", "sigmoid", "allowed: 'softmax'"),
    (DEEPSEEK_V2, "topk_method", "noaux_tc", "allowed: 'greedy' or 'group_limited_greedy'"),
    (DEEPSEEK_V2, "norm_topk_prob", True, "true, allowed: false"),
    (DEEPSEEK_V2, "attention_bias", True, "true, allowed: false"),
    (DEEPSEEK_V2, "mlp_bias", True, "true, allowed: false"),
    (DEEPSEEK_V2, "num_key_value_heads", 8, "8, allowed: 128"),
    (DEEPSEEK_V2, "n_shared_experts", 0, "0, allowed: at least 1"),
    (DEEPSEEK_V2, "kv_lora_rank", 511, "511, allowed: an even number"),
    (DEEPSEEK_V2, "rope_scaling.attention_factor", 1.3, "rope_parameters.attention_factor is a key that is not"),
    (MIXTRAL, "rope_scaling", {"type": "default", "spice": 3}, "rope_parameters.spice is a key that is not understood"),
    (MIXTRAL, "rope_scaling", {"factor": 8.0}, "rope_parameters.factor is a key that is not understood"),
    (DEEPSEEK_V2, "rope_scaling.mscale", None, "mscale"),
    (MOONLIGHT, "scoring_func", "softmax", "allowed: 'sigmoid'"),
    (MOONLIGHT, "topk_method", "greedy", "allowed: 'noaux_tc'"),
    (MOONLIGHT, "num_nextn_predict_layers", "one", "'one', allowed: a whole number"),
    (MOONLIGHT, "num_nextn_predict_layers", None, "null, allowed: a whole number"),
    (MOONLIGHT, "topk_group", 2, "2 is more than n_groups = 1"),
    (MOONLIGHT, "n_group", None, "its values do not make a model"),
    (QWEN3, "decoder_sparse_step", 0, "its values do not make a model"),
    (MOONLIGHT, "moe_layer_freq", 2, "2, allowed: 1"),
    (QWEN3, "mlp_only_layers", [1], "mlp_only_layers"),
    (QWEN3, "mlp_only_layers", list(range(48)), "allowed: dense layers that leave every n-th layer"),
    (QWEN2, "layer_types", ["full_attention"] * 23 + ["chunked_attention"], "layer_types"),
    (GPT_OSS, "layer_types", ["full_attention"] * 23, "layer_types"),
]


@pytest.mark.parametrize(
    ("hf", "key", "value", "reason"), REFUSED, ids=[f"{r[0]['model_type']} {r[1]}" for r in REFUSED]
)
def test_a_value_that_cannot_be_expressed_is_refused(hf: dict, key: str, value: Any, reason: str):
    with pytest.raises(HubError) as caught:
        read(nested(hf, key, value))
    assert len(caught.value.reasons) >= 1
    assert any(reason in each for each in caught.value.reasons), caught.value
    read(hf)  # and it was that key


def test_a_model_type_that_is_not_known_is_refused():
    for hf in ({"model_type": "llama"}, {}, {"model_type": ["mixtral"]}):
        with pytest.raises(HubError, match="known: mixtral"):
            architecture_of(hf)


@pytest.mark.parametrize("call", [lambda: read(MIXTRAL), lambda: write_config(ours(**TINY | {"moe": MOE}))])
def test_without_transformers_the_error_says_what_to_install(call: Any, monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(HubError) as caught:
        call()
    assert str(caught.value) == "transformers is not installed\n  - pip install moelm[hub]"


def test_a_transformers_older_than_the_tested_one_is_refused(monkeypatch: pytest.MonkeyPatch):
    for version in ("5.17.0", "4.57.1"):
        monkeypatch.setattr("transformers.__version__", version)
        with pytest.raises(HubError, match=f"transformers {version} is too old"):
            ARCHITECTURES["mixtral"].read_config(MIXTRAL)
    for version in ("5.23.0", "5.100.0.dev0", "6.0"):
        monkeypatch.setattr("transformers.__version__", version)
        ARCHITECTURES["mixtral"].read_config(MIXTRAL)


# ------------------------------------------------------------------------------------------------ what is written

TINY = {
    **{"n_layers": 3, "d_model": 32, "vocab_size": 64, "feed_forward": {"d_ff": 48}},
    "attention": {"name": "gqa", "n_heads": 4},
}
MOE = {"n_experts": 8, "top_k": 2, "d_expert": 16, "router": {"name": "top_k", "normalize_gates": "after_top_k"}}
INEXPRESSIBLE: dict[str, tuple[dict[str, Any], list[str]]] = {
    "dense": ({"moe": None}, ["model.moe is null"]),
    "expert choice": (
        {"moe": MOE | {"router": "expert_choice", "balancers": []}},
        ["model.moe.router.name is 'expert_choice', mixtral has 'top_k'"],
    ),
    "sinks with q/k-norm": (
        {"moe": MOE, "attention": {"name": "gqa", "n_heads": 4, "sinks": True, "qk_norm": "head"}},
        ["model.attention.sinks is true, qwen3_moe has false"],
    ),
    "capacity in evaluation": (
        {"moe": MOE | {"dispatch": "capacity"}},
        ["model.moe.dispatch.name is 'capacity', mixtral has 'dropless'"],
    ),
    "latent attention with sigmoid and no selection bias": (
        {"moe": MOE | {"n_shared_experts": 1, "router": {"name": "top_k", "score": "sigmoid"}}, "attention": "mla"},
        ["model.moe.router.selection_bias is false, deepseek_v3 has true"],
    ),
    "layernorm": ({"moe": MOE, "norm": "layernorm"}, ["model.norm is 'layernorm', mixtral has 'rmsnorm'"]),
    "latent attention in every other layer": (
        {"moe": MOE, "attention": ["mla", {"name": "gqa", "n_heads": 4}]},
        ["model.attention.1.name is 'gqa', deepseek_v2 has 'mla'"],
    ),
    "a window in some layers": (
        {"moe": MOE, "attention": [{"name": "gqa", "n_heads": 4, "sliding_window": window} for window in (None, 4)]},
        ["model.attention.1.sliding_window is 4, mixtral has null"],
    ),
    "soft cap": (
        {"moe": MOE | {"router": {"name": "top_k", "normalize_gates": "after_top_k", "logit_soft_cap": 30.0}}},
        ["model.moe.router.logit_soft_cap is 30.0, mixtral has null"],
    ),
    "every other layer a mixture, without q/k-norm": (
        {"moe": MOE | {"moe_every_n_layers": 2}},
        ["qwen3_moe: model.attention.qk_norm is 'none', qwen3_moe has 'head'"],
    ),
}


@pytest.mark.parametrize("name", INEXPRESSIBLE)
def test_what_no_architecture_expresses_is_refused_with_the_reasons_of_the_closest(name: str):
    changes, wanted = INEXPRESSIBLE[name]
    with pytest.raises(HubError) as caught:
        write_config(ours(**TINY | changes))
    for reason in wanted:
        assert any(reason in each for each in caught.value.reasons), caught.value


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_an_architecture_lists_all_reasons(model_type: str):
    moe = MOE | {"router": "switch", "top_k": 1, "dispatch": "capacity", "shared_gate": True, "n_shared_experts": 1}
    moe |= {"experts": {"activation": "clamped_swiglu", "clamp_limit": 3.0}}
    with pytest.raises(HubError) as caught:
        ARCHITECTURES[model_type].write_config(ours(**TINY | {"moe": moe, "norm_eps": 3e-4}))
    text = str(caught.value)
    assert "model.moe.router.name is 'switch'" in text
    assert "model.moe.dispatch.name is 'capacity'" in text
    assert ("model.moe.experts.activation" in text) == (model_type != "gpt_oss")
    assert ("model.moe.shared_gate is true" in text) == (model_type != "qwen2_moe")
    assert ("model.norm_eps is 0.0003" in text) == (model_type == "dbrx")
    assert ("model.attention.name is 'gqa', deepseek" in text) == model_type.startswith("deepseek")


@pytest.mark.parametrize(("kind", "more"), [("yarn", {}), ("llama3", {"high_frequency_factor": 4.0})])
def test_transformers_finds_no_fault_with_the_rope_that_is_written(
    kind: str, more: dict, monkeypatch: pytest.MonkeyPatch
):
    said: list[str] = []
    logger = importlib.import_module("transformers.modeling_rope_utils").logger
    for name in ("warning", "warning_once"):
        monkeypatch.setattr(logger, name, said.append)
    scaling = {"kind": kind, "factor": 2.5, "original_context": 262_144, **more}
    attention = {"name": "gqa", "n_heads": 4, "rope_scaling": scaling}
    assert write_config(ours(**TINY | {"moe": MOE, "attention": attention}))[1]["max_position_embeddings"] == 655_360
    assert said == []


def test_equal_spellings_are_expressed_alike():
    first = ours(**TINY | {"moe": MOE})
    attention = {"name": "gqa", "n_heads": 4, "n_kv_heads": 4, "head_dim": 8}
    router = MOE["router"] | {"n_groups": 2, "top_k_groups": 2}
    moe = MOE | {"router": router, "dispatch": {"name": "capacity", "eval_dispatch": "dropless"}, "balancers": []}
    second = ours(**TINY | {"moe": moe, "attention": [attention, attention], "dropout": 0.1})
    one, other = write_config(first)[1], write_config(second)[1]
    assert one | {"router_aux_loss_coef": 0.0} == other
    assert one["model_type"] == "mixtral"


def test_shared_experts_are_as_wide_as_they_are_whatever_their_number():
    router = {"name": "top_k", "score": "sigmoid", "selection_bias": True}
    moe = MOE | {"router": router, "n_shared_experts": 1, "d_shared": 48, "balancers": ["loss_free"]}
    base = TINY | {"attention": {"name": "mla", "n_heads": 2}}
    assert write_config(ours(**base, moe=moe))[1]["n_shared_experts"] == 3
    with pytest.raises(HubError, match=r"model\.moe\.d_shared is 40, deepseek_v3 has 32"):
        write_config(ours(**base, moe=moe | {"d_shared": 40}))


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else []
    found = [leaf for key, branch in items for leaf in leaves(branch, (*path, key))]
    return found if isinstance(tree, dict | list) else [path]


def other(value: Any, key: str) -> Any:
    """A different value that is likely to be valid."""
    words = {"none": "head", "head": "full", "full": "none", "rmsnorm": "layernorm", "layernorm": "rmsnorm"}
    words |= {"softmax": "sigmoid", "sigmoid": "softmax", "after_top_k": "none", "swiglu": "clamped_swiglu"}
    if key == "normalize_gates":
        words = {"none": "after_top_k", "after_top_k": "none"}
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return 2 * value
    if isinstance(value, float):
        return value * 1.5 + 0.5
    return words.get(value, 6 if value is None else value)


def written_and_read(hf: dict, config: ModelConfig) -> tuple[Any, list[str]]:
    """What comes back of the config through the architecture of `hf`; or None and the reasons against it."""
    architecture = architecture_of(hf)
    try:
        return to_dict(architecture.read_config(architecture.write_config(config))), []
    except HubError as error:
        return None, error.reasons


NO_EFFECT = {"init", "dropout", "balancers", "backend", "jitter"}  # on what a trained model computes


@every_published
def test_every_setting_is_either_written_or_refused(hf: dict, wanted: dict):
    """Nothing of a config is lost silently: another value of any setting comes back, or is named as a reason."""
    raw, n_tried = to_dict(read(hf)), 0
    for path in leaves(raw):
        changed = copy.deepcopy(raw)
        section: Any = changed
        for key in path[:-1]:
            section = section[key]
        section[path[-1]] = value = other(section[path[-1]], path[-1])
        if NO_EFFECT & {str(key) for key in path} or path[-1] == "name":
            continue
        if path[-1] == "d_ff" and raw["moe"]["first_moe_layer"] == 0:  # there is no dense layer
            continue
        try:
            config = ours(**changed)
        except Exception:  # not a valid model
            continue
        n_tried += 1
        section_name = ".".join(map(str, ("model", *path[:-1])))
        back, reasons = written_and_read(hf, config)
        if back is None:
            assert any(each.startswith(section_name) or str(path[-1]) in each for each in reasons), (path, reasons)
            continue
        for key in path:
            back = back[key]
        if path[-1] != "n_shared_experts" or raw["moe"]["d_shared"] is None:  # else the width is given
            assert back == value, path
    assert n_tried > 15


# -------------------------------------------------------------------------------------------------------- tensors


def test_tensors_beside_the_model_are_ignored():
    v3, mixtral = ARCHITECTURES["deepseek_v3"], ARCHITECTURES["mixtral"]
    moonlight = read(MOONLIGHT)
    for n in (0, 1, 2):
        names = [f"model.layers.{layer}.mlp.gate.weight" for layer in (26, 27, 28, 29)]
        assert [v3.ignored(name, moonlight, n) for name in names] == [False, n > 0, n > 1, False]
    assert not v3.ignored("lm_head.weight", moonlight, 1)
    assert mixtral.ignored("lm_head.weight", read(MIXTRAL | {"tie_word_embeddings": True}))
    assert mixtral.ignored("model.layers.3.self_attn.rotary_emb.inv_freq", read(MIXTRAL))
    assert not mixtral.ignored("model.layers.3.self_attn.q_proj.weight", read(MIXTRAL))


def test_only_deepseek_v3_has_layers_of_prediction_and_as_many_as_its_config_says():
    for hf, _ in PUBLISHED:
        for key in ("num_nextn_predict_layers", "num_mtp_layers"):
            n = architecture_of(hf).n_prediction_layers({**without_predictions(hf), key: 2})
            assert n == (2 if hf["model_type"] == "deepseek_v3" else 0)
    assert ARCHITECTURES["deepseek_v3"].n_prediction_layers(MOONLIGHT) == 0


def without_predictions(hf: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in hf.items() if key != "num_nextn_predict_layers"}


def test_missing_and_unexpected_tensors_are_named():
    model = make("deepseek_v3 like Moonlight")
    config, gpt = from_transformers(model)
    tensors = model.state_dict() | {"model.layers.3.mtp": torch.zeros(1)}
    state = load_weights(ARCHITECTURES["deepseek_v3"], config, tensors, n_prediction_layers=1)
    assert state.keys() == gpt.state_dict().keys()
    tensors |= {"model.layers.2.mtp": torch.zeros(1), "model.layers.4.mtp": torch.zeros(1)}
    del tensors["model.norm.weight"]
    with pytest.raises(HubError) as caught:
        load_weights(ARCHITECTURES["deepseek_v3"], config, tensors, n_prediction_layers=1)
    unexpected = [f"model.layers.{layer}.mtp is not expected" for layer in (2, 4)]
    assert caught.value.reasons == ["model.norm.weight is missing", *unexpected]
    with pytest.raises(HubError, match=r"model\.layers\.3\.mtp is not expected"):
        load_weights(ARCHITECTURES["deepseek_v3"], config, tensors)


def test_a_second_copy_of_a_tied_table_must_be_a_copy():
    model = make("mixtral sliding and tied")
    config, gpt = from_transformers(model)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert load_weights(ARCHITECTURES["mixtral"], config, tensors).keys() == gpt.state_dict().keys()
    tensors["lm_head.weight"][3, 5].neg_()
    with pytest.raises(HubError, match=r"lm_head\.weight is not model\.embed_tokens\.weight\n.*tie_word_embeddings"):
        load_weights(ARCHITECTURES["mixtral"], config, tensors)
    del tensors["lm_head.weight"]
    assert load_weights(ARCHITECTURES["mixtral"], config, tensors).keys() == gpt.state_dict().keys()


def test_a_model_that_is_not_of_the_config_is_not_exported():
    config, gpt = from_transformers(make("mixtral odd"))
    gpt.embedding_scale = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(HubError, match="the GPT is not one of this config\n  - embedding_scale is not expected"):
        to_transformers(gpt, config)


def test_a_message_of_thousands_of_reasons_is_cut():
    error = HubError("problem", [f"reason {i}" for i in range(1000)])
    assert len(error.reasons) == 1000
    assert str(error).splitlines()[-1] == "  and 960 more"


def test_every_case_of_the_parity_tests_is_written_as_what_it_is():
    for name, (kind, _) in CASES.items():
        model = make(name)
        config = architecture_of(model.config.to_dict()).read_config(model.config.to_dict())
        assert write_config(config)[0].class_name == f"{kind}ForCausalLM", name
