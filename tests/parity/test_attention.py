"""Each attention equals the transformers module that it is meant to be, weight by weight and gradient by gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moelm.config import ModelConfig, build, check_model, from_dict
from moelm.model.gpt import attention_mask
from moelm.model.rope import RopeScalingConfig, frequencies

pytest.importorskip("transformers", reason="the published models are read from transformers: pip install moelm[hub]")

from transformers import PreTrainedConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.dbrx import modeling_dbrx as dbrx
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as deepseek_v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek_v3
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.mixtral import modeling_mixtral as mixtral
from transformers.models.olmoe import modeling_olmoe as olmoe
from transformers.models.qwen2_moe import modeling_qwen2_moe as qwen2_moe
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_moe

B, L, FIRST = 2, 13, 90  # sequences, longer than every window below, and their first position, so that angles are large
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "rope_theta": 900.0}
OUR_YARN = {"kind": "yarn", "factor": 8.0, "original_context": 32}
MSCALES = {"mscale": 0.5, "mscale_all_dim": 0.9}
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64, "rope_theta": 500.0},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
OUR_LLAMA3 = {"kind": "llama3", "factor": 8.0, "original_context": 64}


def plain(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


def separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of q_proj, k_proj, v_proj, o_proj -> ours."""
    return {name.replace("o_proj.", "out.").replace("_proj.", "."): tensor for name, tensor in tensors.items()}


def fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    out = tensors["out_proj.weight"]
    q_width = out.shape[1]
    kv_width = (len(tensors["Wqkv.weight"]) - q_width) // 2
    q, k, v = tensors["Wqkv.weight"].split([q_width, kv_width, kv_width])
    return {"q.weight": q, "k.weight": k, "v.weight": v, "out.weight": out}


LATENT_NAMES = {
    **{"q_proj": "q", "q_b_proj": "q", "q_a_proj": "q_compress", "q_a_layernorm": "q_latent_norm"},
    **{"kv_a_proj_with_mqa": "kv_compress", "kv_a_layernorm": "kv_latent_norm", "kv_b_proj": "kv_expand"},
    "o_proj": "out",
}


def latent(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{LATENT_NAMES[name.removesuffix('.weight')]}.weight": tensor for name, tensor in tensors.items()}


@dataclass
class Case:
    ours: Any  # the attention section, or a list of them
    module: type[nn.Module]
    rotary: type[nn.Module]
    theirs: Any  # their config
    rename: Callable[[dict[str, Tensor]], dict[str, Tensor]] = separate
    layer: int = 0
    eps: float = 1e-6
    documents: Tensor = field(default_factory=lambda: torch.tensor([[0] * 4 + [1] * 9, [0] * 11 + [1] * 2]))

    def make(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """(theirs, ours, their rotary embedding), with the same random weights that give outputs of order one."""
        generator = torch.Generator().manual_seed(0)
        self.theirs._attn_implementation = "eager"
        theirs = self.module(self.theirs, layer_idx=self.layer)
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.ndim == 2:
                    parameter.copy_(2 * noise / parameter.shape[1] ** 0.5)
                else:
                    parameter.copy_(noise if "norm" not in name else 1 + 0.4 * noise)
        raw = {"d_model": self.theirs.hidden_size, "n_layers": 2, "norm_eps": self.eps, "attention": self.ours}
        config = from_dict(ModelConfig, raw, "model")
        check_model(config)
        ours = build("attention", config.attention_of(self.layer), config)
        ours.load_state_dict(self.rename(theirs.state_dict()))  # strict: no parameter of either is left over
        return theirs, ours, self.rotary(self.theirs)

    def mask(self, x_BLD: Tensor, documents: bool) -> Tensor:
        """Theirs, added to the scores. Within documents: written out here."""
        sections = self.ours if isinstance(self.ours, list) else [self.ours]
        window = sections[self.layer % len(sections)].get("sliding_window")
        sliding = window is not None
        if not documents:
            create = create_sliding_window_causal_mask if sliding else create_causal_mask
            mask: Tensor = create(self.theirs, x_BLD, None, None)
            return mask
        seen = [
            [[j <= i and (not sliding or i - j < window) and ids[i] == ids[j] for j in range(L)] for i in range(L)]
            for ids in self.documents.tolist()
        ]
        return torch.where(torch.tensor(seen), 0.0, torch.finfo(torch.float32).min).unsqueeze(1)


def gqa(**options: Any) -> dict[str, Any]:
    return {"name": "gqa", **options}


QWEN3 = {"hidden_size": 28, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10}
OLMOE = {"hidden_size": 42, "num_attention_heads": 3, "num_key_value_heads": 3}
GPT_OSS = {
    **{"hidden_size": 22, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 14, "sliding_window": 5},
    **{"num_hidden_layers": 2, "rope_parameters": YARN | {"truncate": False, "beta_fast": 3.0}},
}
OUR_GPT_OSS = gqa(
    **{"n_heads": 6, "n_kv_heads": 3, "head_dim": 14, "rope_theta": 900.0, "sinks": True, "qkv_bias": True},
    **{"out_bias": True, "rope_scaling": OUR_YARN | {"truncate": False, "beta_fast": 3.0}},
)
OUR_GPT_OSS = [OUR_GPT_OSS | {"sliding_window": 5}, OUR_GPT_OSS]
DEEPSEEK = {
    **{"hidden_size": 27, "num_attention_heads": 3, "num_key_value_heads": 3, "kv_lora_rank": 12},
    **{"qk_nope_head_dim": 6, "qk_rope_head_dim": 10, "v_head_dim": 9},
}
OURS = {
    **{"name": "mla", "n_heads": 3, "kv_latent_dim": 12, "nope_head_dim": 6, "rope_head_dim": 10, "v_head_dim": 9},
    "rope_theta": 900.0,
}


def deepseek(version: Any, ours: dict[str, Any], **theirs: Any) -> Case:
    name = "DeepseekV2" if version is deepseek_v2 else "DeepseekV3"
    config = getattr(version, f"{name}Config")(**DEEPSEEK, **theirs)
    parts = (getattr(version, f"{name}{part}") for part in ("Attention", "RotaryEmbedding"))
    return Case(OURS | ours, *parts, config, latent, eps=1e-5)  # the latent norms keep an epsilon of their own


CASES = {
    "qwen3_moe": Case(
        gqa(n_heads=6, n_kv_heads=2, head_dim=10, qk_norm="head", rope_theta=700.0),
        *(qwen3_moe.Qwen3MoeAttention, qwen3_moe.Qwen3MoeRotaryEmbedding),
        qwen3_moe.Qwen3MoeConfig(**QWEN3, rope_parameters=plain(700.0), rms_norm_eps=1e-2),
        eps=1e-2,
    ),
    "qwen3_moe with biases": Case(
        gqa(n_heads=6, n_kv_heads=2, head_dim=10, qk_norm="head", rope_theta=700.0, qkv_bias=True, out_bias=True),
        *(qwen3_moe.Qwen3MoeAttention, qwen3_moe.Qwen3MoeRotaryEmbedding),
        qwen3_moe.Qwen3MoeConfig(**QWEN3, rope_parameters=plain(700.0), attention_bias=True),
    ),
    "qwen2_moe": Case(
        gqa(n_heads=3, n_kv_heads=1, qkv_bias=True),
        *(qwen2_moe.Qwen2MoeAttention, qwen2_moe.Qwen2MoeRotaryEmbedding),
        qwen2_moe.Qwen2MoeConfig(
            hidden_size=42, num_attention_heads=3, num_key_value_heads=1, rope_parameters=plain(10_000.0)
        ),
    ),
    "olmoe": Case(
        gqa(n_heads=3, qk_norm="full"),
        *(olmoe.OlmoeAttention, olmoe.OlmoeRotaryEmbedding),
        olmoe.OlmoeConfig(**OLMOE, rope_parameters=plain(10_000.0), rms_norm_eps=1e-2),
        eps=1e-2,
    ),
    "olmoe with clip_qkv and shared keys": Case(
        gqa(n_heads=3, n_kv_heads=1, qk_norm="full", clip_qkv=0.7),
        *(olmoe.OlmoeAttention, olmoe.OlmoeRotaryEmbedding),
        olmoe.OlmoeConfig(**OLMOE | {"num_key_value_heads": 1}, rope_parameters=plain(10_000.0), clip_qkv=0.7),
    ),
    "dbrx": Case(
        gqa(n_heads=3, n_kv_heads=1, clip_qkv=1.1, rope_theta=300.0),
        *(dbrx.DbrxAttention, dbrx.DbrxRotaryEmbedding),
        dbrx.DbrxConfig(
            **{"d_model": 30, "n_heads": 3, "rope_parameters": plain(300.0)},
            attn_config={"kv_n_heads": 1, "clip_qkv": 1.1, "rope_theta": 300.0},
        ),
        fused,
    ),
    "mixtral with llama3 scaling": Case(
        gqa(n_heads=5, n_kv_heads=1, head_dim=8, rope_theta=500.0, rope_scaling=OUR_LLAMA3),
        *(mixtral.MixtralAttention, mixtral.MixtralRotaryEmbedding),
        mixtral.MixtralConfig(
            **{"hidden_size": 26, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 8},
            **{"rope_parameters": LLAMA3, "sliding_window": None},
        ),
    ),
    "gpt_oss, sliding layer": Case(
        *(OUR_GPT_OSS, gpt_oss.GptOssAttention, gpt_oss.GptOssRotaryEmbedding, gpt_oss.GptOssConfig(**GPT_OSS)),
        layer=0,
    ),
    "gpt_oss, full layer": Case(
        *(OUR_GPT_OSS, gpt_oss.GptOssAttention, gpt_oss.GptOssRotaryEmbedding, gpt_oss.GptOssConfig(**GPT_OSS)),
        layer=1,
    ),
    "deepseek_v2": deepseek(
        deepseek_v2,
        {"q_latent_dim": 13, "rope_scaling": OUR_YARN | MSCALES},
        q_lora_rank=13,
        rope_parameters=YARN | MSCALES,
    ),
    "deepseek_v2 without a q latent": deepseek(deepseek_v2, {}, q_lora_rank=None, rope_parameters=plain(900.0)),
    "deepseek_v3": deepseek(
        deepseek_v3,
        {"q_latent_dim": 5, "rope_scaling": OUR_YARN | MSCALES},
        q_lora_rank=5,
        rope_parameters=YARN | MSCALES,
    ),
    "deepseek_v3 without a q latent": deepseek(
        deepseek_v3, {"rope_scaling": OUR_YARN}, q_lora_rank=None, rope_parameters=YARN
    ),
    "deepseek_v3 in halves": deepseek(
        deepseek_v3,
        {"q_latent_dim": 5, "rope_interleaved": False},
        q_lora_rank=5,
        rope_interleave=False,
        rope_parameters=plain(900.0),
    ),
}


@pytest.mark.parametrize("documents", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_outputs_and_gradients_equal_the_published_module(case: Case, documents: bool):
    theirs, ours, rotary = case.make()
    generator = torch.Generator().manual_seed(1)
    x_BLD, direction_BLD = torch.randn(2, B, L, case.theirs.hidden_size, generator=generator)
    positions_L = torch.arange(FIRST, FIRST + L)
    inputs = [x_BLD.clone().requires_grad_() for _ in range(2)]
    wanted, _ = theirs(
        hidden_states=inputs[0],
        position_embeddings=rotary(x_BLD, positions_L.unsqueeze(0)),
        attention_mask=case.mask(x_BLD, documents),
    )
    mask_BLL = attention_mask(torch.arange(L), case.documents, 0) if documents else None
    result = ours(inputs[1], ours.rotation(positions_L), mask_BLL)
    assert 0.3 < wanted.std() < 10
    assert (result - wanted).abs().max() <= 1e-5 * wanted.std()

    (wanted * direction_BLD).sum().backward()
    (result * direction_BLD).sum().backward()
    wanted_gradients = case.rename({name: parameter.grad for name, parameter in theirs.named_parameters()})
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in [*gradients.items(), ("input", inputs[1].grad)]:
        wanted_gradient = inputs[0].grad if name == "input" else wanted_gradients[name]
        assert wanted_gradient.norm() > 0.1, name
        assert (gradient - wanted_gradient).norm() <= 1e-4 * wanted_gradient.norm(), name


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_number_of_parameters_is_that_of_the_published_module(case: Case):
    theirs, ours, _ = case.make()
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


SCALINGS = [
    ({"kind": "none"}, plain(1e4)),
    (OUR_LLAMA3, LLAMA3),
    (
        OUR_LLAMA3 | {"low_frequency_factor": 2.0, "high_frequency_factor": 9.5, "original_context": 8192},
        LLAMA3 | {"low_freq_factor": 2.0, "high_freq_factor": 9.5, "original_max_position_embeddings": 8192},
    ),
    (OUR_YARN, YARN),
    (OUR_YARN | {"truncate": False}, YARN | {"truncate": False}),
    (OUR_YARN | {"beta_fast": 3.5, "beta_slow": 0.4}, YARN | {"beta_fast": 3.5, "beta_slow": 0.4}),
    (OUR_YARN | MSCALES | {"factor": 40.0}, YARN | MSCALES | {"factor": 40.0}),
    (OUR_YARN | {"original_context": 4096}, YARN | {"original_max_position_embeddings": 4096}),
]


@pytest.mark.parametrize("theta", [300.0, 10_000.0, 1_000_000.0])
@pytest.mark.parametrize(("scaling", "parameters"), SCALINGS, ids=lambda each: str(each.get("kind", "")))
def test_frequencies_are_those_of_the_published_scalings(scaling: dict, parameters: dict, theta: float):
    config = PreTrainedConfig()
    config.hidden_size, config.num_attention_heads, config.max_position_embeddings = 48, 2, 100
    config.rope_parameters = parameters | {"rope_theta": theta}
    if scaling["kind"] == "none":
        wanted, wanted_magnitude = 1 / theta ** (torch.arange(0, 24, 2) / 24), 1.0
    else:
        wanted, wanted_magnitude = ROPE_INIT_FUNCTIONS[scaling["kind"]](config)
    result, magnitude = frequencies(24, theta, from_dict(RopeScalingConfig, scaling, "rope_scaling"))
    torch.testing.assert_close(result, wanted, rtol=1e-6, atol=0)
    assert magnitude == pytest.approx(wanted_magnitude, rel=1e-12)
    if scaling["kind"] != "none":  # the case is one where it changes something
        assert not torch.allclose(result, frequencies(24, theta)[0], rtol=0.01)
