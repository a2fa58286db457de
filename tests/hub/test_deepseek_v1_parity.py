"""DeepSeekMoE 16B (arXiv 2401.06066), which transformers has no class for, against the class that differs in one thing.

Qwen2-MoE with the gate of its shared experts held open is that model: attention as in Llama, layer 0 dense, the softmax
of all experts not normalised again over the chosen ones, and shared experts beside them.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers", reason="the published models are read from transformers: pip install moelm[hub]")

from torch import Tensor, nn

from moelm.config import ModelConfig, load_config
from moelm.hub import ARCHITECTURES, HubError, to_transformers, write_config
from moelm.model.gpt import GPT

PRESET = Path(__file__).parents[2] / "configs/mini/deepseek_moe_16b.yaml"
QWEN = ARCHITECTURES["qwen2_moe"]


class HeldOpen(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.full_like(x[..., :1], 100.0)  # whose sigmoid is 1 in float32


@torch.no_grad()
def random_model(config: ModelConfig) -> GPT:
    """Matrices that keep the size of what they multiply, times 1.5; norms around 1."""
    model, generator = GPT(config), torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            parameter.copy_(1 + 0.2 * noise)
        else:
            parameter.copy_(noise if name == "embedding.weight" else 1.5 * noise / parameter.shape[1] ** 0.5)
    return model


def test_the_preset_computes_what_the_published_model_does():
    config = load_config(PRESET).model
    assert config.moe is not None
    gpt = random_model(config)
    gated = dataclasses.replace(config, moe=dataclasses.replace(config.moe, shared_gate=True))
    with pytest.raises(HubError, match="shared_gate"):
        write_config(config)
    with torch.device("meta"):
        model = GPT(gated)
    state = gpt.state_dict()
    state |= {f"blocks.{i}.moe.shared_gate.weight": torch.zeros(1, config.d_model) for i in config.moe_layers}
    model.load_state_dict(state, assign=True)
    theirs = to_transformers(model, gated)
    theirs.set_attn_implementation("eager")
    for layer in theirs.model.layers[1:]:
        layer.mlp.shared_expert_gate = HeldOpen()

    tokens_BL = torch.randint(config.vocab_size, (2, 49), generator=torch.Generator().manual_seed(1))
    inputs_BL, targets_BL = tokens_BL[:, :-1], tokens_BL[:, 1:]
    wanted_BLV, logits_BLV = theirs(inputs_BL).logits, gpt(inputs_BL).logits
    assert wanted_BLV.std() >= 1
    wanted, result = (logits.detach().double().log_softmax(-1) for logits in (wanted_BLV, logits_BLV))
    assert (wanted.exp() * (wanted - result)).sum(-1).mean().abs() < 1e-9
    assert (wanted - result).abs().max() <= 5e-4

    F.cross_entropy(wanted_BLV.flatten(0, 1), targets_BL.flatten()).backward()
    gpt(inputs_BL, targets_BL).loss.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    wanted_gradients: dict[str, Tensor] = {}
    for weight in QWEN.weights(gated, fused=True):
        if not weight.ours[0].endswith("shared_gate.weight"):
            wanted_gradients |= weight.to_ours(gradients)
    ours = {name: parameter.grad for name, parameter in gpt.named_parameters()}
    assert ours.keys() == wanted_gradients.keys()
    difference = torch.stack([(ours[name] - wanted).norm() for name, wanted in wanted_gradients.items()]).norm()
    assert difference <= 2e-4 * torch.stack([wanted.norm() for wanted in wanted_gradients.values()]).norm()
