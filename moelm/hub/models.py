"""Whole models: from transformers to ours and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moelm.config import ModelConfig, grouped_widths_fit
from moelm.hub.base import Architecture
from moelm.hub.dbrx import Dbrx
from moelm.hub.deepseek import DeepSeekV2, DeepSeekV3
from moelm.hub.gpt_oss import GptOss
from moelm.hub.mixtral import Mixtral
from moelm.hub.olmoe import Olmoe
from moelm.hub.qwen_moe import Qwen2MoE, Qwen3MoE
from moelm.hub.reading import HubError, transformers
from moelm.hub.weights import Weight
from moelm.model.gpt import GPT

# In the order in which `write_config` tries them.
ARCHITECTURES: dict[str, Architecture] = {
    each.model_type: each
    for each in (Mixtral(), Qwen3MoE(), Olmoe(), Qwen2MoE(), Dbrx(), DeepSeekV3(), DeepSeekV2(), GptOss())
}


def architecture_of(hf: Mapping[str, Any]) -> Architecture:
    """The one that a config.json names. Raises HubError for one that moelm does not know."""
    name = hf.get("model_type")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise HubError(f"model_type is {name!r}, which moelm does not know", [f"known: {', '.join(ARCHITECTURES)}"])
    return ARCHITECTURES[name]


def write_config(config: ModelConfig) -> tuple[Architecture, dict[str, Any]]:
    """The first architecture that expresses the model, and its config.json.

    Raises HubError with the reasons of those that come closest.
    """
    transformers()  # or each architecture would fail for the want of it
    failures: dict[str, list[str]] = {}
    for name, architecture in ARCHITECTURES.items():
        try:
            return architecture, architecture.write_config(config)
        except HubError as error:
            failures[name] = error.reasons
    fewest = min(map(len, failures.values()))
    reasons = [f"{name}: {reason}" for name, each in failures.items() if len(each) == fewest for reason in each]
    raise HubError("no architecture of transformers that moelm knows expresses this model; the closest", reasons)


def from_transformers(model: Any) -> tuple[ModelConfig, GPT]:
    """A PreTrainedModel for causal language modelling -> its config and a GPT with copies of its weights, in their
    dtype. Raises HubError for one that moelm cannot express."""
    hf = model.config.to_dict()
    architecture = architecture_of(hf)
    config = architecture.read_config(hf)
    state = load_weights(architecture, config, model.state_dict(), architecture.n_prediction_layers(hf))
    with torch.device("meta"):
        gpt = GPT(config)
    gpt.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    return config, gpt.train(model.training)


def load_weights(
    architecture: Architecture, config: ModelConfig, tensors: Mapping[str, Tensor], n_prediction_layers: int = 0
) -> dict[str, Tensor]:
    """Our state dict from all tensors of theirs, in either layout. Raises HubError as `find_weights` does."""
    weights = find_weights(architecture, config, tensors, n_prediction_layers)
    return {name: tensor for weight in weights for name, tensor in weight.to_ours(tensors).items()}


def find_weights(
    architecture: Architecture, config: ModelConfig, tensors: Mapping[str, Tensor], n_prediction_layers: int
) -> list[Weight]:
    """The map for the layout that all tensors of theirs have. Of their values it looks at the two copies of a tied
    table alone.

    Raises HubError that lists the tensors that are missing or belong nowhere, or for two copies that differ.
    """
    names = {name for name in tensors if not architecture.ignored(name, config, n_prediction_layers)}
    weights = list(architecture.weights(config, architecture.is_fused(names, config)))
    wanted = {name for weight in weights for name in weight.theirs}
    _check_names(wanted, names, f"these are not the tensors of a {architecture.model_type} of this config")
    head, embedding = architecture.head, architecture.embedding
    if config.tied_embeddings and head in tensors and not _same_bits(tensors[head], tensors[embedding]):
        remedy = f"transformers computes with {head} then: set tie_word_embeddings to false in config.json"
        raise HubError(f"tie_word_embeddings is true, but {head} is not {embedding}", [remedy])
    return weights


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(*(each.flatten().view(torch.uint8) for each in (a, b)))
    )


def _check_names(wanted: set[str], given: set[str], problem: str) -> None:
    if wanted != given:
        missing = [f"{name} is missing" for name in sorted(wanted - given)]
        raise HubError(problem, missing + [f"{name} is not expected" for name in sorted(given - wanted)])


def to_transformers(gpt: GPT, config: ModelConfig) -> Any:
    """A PreTrainedModel, in evaluation mode, that computes the same, with copies of the weights in their dtype.

    Raises HubError with all reasons if no architecture expresses the model.
    """
    architecture, hf = write_config(config)
    ours = {name: tensor for name, tensor in gpt.state_dict().items() if not architecture.left_out(name)}
    weights = list(architecture.weights(config, fused=True))
    _check_names({name for weight in weights for name in weight.ours}, set(ours), "the GPT is not one of this config")
    state = {name: tensor.clone() for weight in weights for name, tensor in weight.to_theirs(ours).items()}
    auto = transformers("models.auto.modeling_auto").AutoModelForCausalLM
    assert config.moe is not None
    fits = grouped_widths_fit(config.d_model, config.moe.d_expert)
    experts = {} if fits else {"experts_implementation": "eager"}  # theirs otherwise stop with an error
    model = auto.from_config(architecture.config_class(**hf), dtype=gpt.embedding.weight.dtype, **experts)
    if config.tied_embeddings:
        state[architecture.head] = state[architecture.embedding]
    model.load_state_dict(state, assign=True)  # assigned, not copied: the selection bias stays float32 in a bf16 model
    model.tie_weights()
    return model.eval()
