"""What a model costs, known from its config alone: parameters, operations a token, memory."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import torch

from moelm.config import Config, ConfigError, ModelConfig, NamedConfig, build, why_not_fused
from moelm.model.attention.base import AttentionConfig
from moelm.model.cross_entropy import MAX_FUSED_BYTES
from moelm.model.gpt import GPT
from moelm.moe.working_copies import MOST_IN_BFLOAT16


@dataclass(frozen=True)
class ModelSize:
    """Parameters. `active`: all but the routed experts that a token does not use. Buffers are not counted, and modules
    of multi-token prediction only in their own field, as in published figures."""

    total: int
    active: int  # routers, shared experts, norms, input embedding and head all counted
    active_no_input_embedding: int  # without the input embedding where it is not tied to the head
    active_no_embeddings: int  # without input embedding and head
    routed_expert: int  # one routed expert of one layer
    router: int  # of one layer
    multi_token_prediction: int = 0  # all modules; the embedding and the head that they share are not counted again


def shapes_of(config: ModelConfig) -> GPT:
    """The model on the meta device, so any size takes a moment and no memory. Raises ConfigError for sizes beyond what
    any tensor can have."""
    try:
        with torch.device("meta"):
            return GPT(config)
    except (RuntimeError, OverflowError, TypeError) as error:  # torch's, of products beyond 64 bits
        if isinstance(error, TypeError) and "Overflow" not in str(error):
            raise
        problem = f"the sizes in the config do not make a model: {str(error).splitlines()[0]}"
        raise ConfigError("model", problem, "lower the largest") from None


def model_size(config: ModelConfig) -> ModelSize:
    """Counted from shapes alone."""
    model = shapes_of(config)
    modules = sum(parameter.numel() for parameter in model.multi_token_prediction.parameters())
    total = sum(parameter.numel() for parameter in model.parameters()) - modules
    expert = router = 0
    if config.moe is not None and model.moe_layers:
        layer = model.moe_layers[0]
        expert = sum(parameter.numel() for parameter in layer.experts.parameters()) // config.moe.n_experts
        router = sum(parameter.numel() for parameter in layer.router.parameters())
    active = total - _idle_experts(config) * expert * len(config.moe_layers)
    embedding = config.vocab_size * config.d_model
    return ModelSize(
        total=total,
        active=active,
        active_no_input_embedding=active - (0 if config.tied_embeddings else embedding),
        active_no_embeddings=active - (1 if config.tied_embeddings else 2) * embedding,
        routed_expert=expert,
        router=router,
        multi_token_prediction=modules,
    )


def _idle_experts(config: ModelConfig) -> int:
    """Routed experts of one MoE layer that a token does not use."""
    return 0 if config.moe is None else max(0, config.moe.n_experts - config.moe.choices_per_token)


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Training floating-point operations a token: 6 x (active parameters that multiply) + 3 x attention.

    6 = 2 forward (a multiply-add) + 4 backward. The input embedding is a look-up; the head multiplies, tied or
    not. The biases of experts are added and do not count, nor does recomputation. Of attention only the scores that
    its mask leaves count. A module of multi-token prediction is a projection, a block and the head once more, for
    every token.
    """
    size = model_size(config)
    n_modules, n_routed = config.n_prediction_modules, len(config.routed_layers)
    head = (1 + n_modules) * config.vocab_size * config.d_model
    layers = _layers_of_blocks(config)
    vectors = [_attention_vectors(section, config) for section in config.attentions]
    n_norms = 2 * len(layers) + 1 + 3 * n_modules  # a module has one for each of its inputs, and a final one
    norms = n_norms * config.d_model + sum(vectors[layer % len(vectors)] for layer in layers)
    idle = _idle_experts(config) * size.routed_expert * (n_routed - len(config.moe_layers))
    active = size.active_no_embeddings + size.multi_token_prediction - idle
    attention = sum(attention_of(config, layer).flops_per_token(config.d_model, seq_len) for layer in layers)
    again = 0  # what chunks of one token use more than once
    biases = 0  # of the experts, which are added
    if config.moe is not None:
        if config.moe.experts.bias:
            width = 2 * config.moe.d_expert + config.d_model // config.moe.router.n_chunks
            biases = config.moe.choices_per_token * width * n_routed
        experts = max(0, config.moe.choices_per_token - config.moe.n_experts) * size.routed_expert
        again = (experts + (config.moe.router.n_chunks - 1) * size.router) * n_routed
    return 6 * (active + again + head - norms - biases) + 3 * attention


def _layers_of_blocks(config: ModelConfig) -> list[int]:
    """What layer each block is: those of the main model, then those of multi-token prediction."""
    return [*range(config.n_layers), *[config.prediction_layer] * config.n_prediction_modules]


def _attention_vectors(section: NamedConfig, config: ModelConfig) -> int:
    """Parameters of one layer's attention that are in no matrix: norms, biases, sinks."""
    with torch.device("meta"):
        attention = build("attention", section, config)
    return sum(parameter.numel() for parameter in attention.parameters() if parameter.ndim < 2)


def attention_of(config: ModelConfig, layer: int) -> AttentionConfig:
    section = config.attention_of(layer)
    assert isinstance(section, AttentionConfig)
    return section


def short_name(size: ModelSize) -> str:
    """6.9B-A1.3B: total and active parameters."""
    return f"{_short(size.total)}-A{_short(size.active)}" if size.active != size.total else _short(size.total)


def _short(count: int) -> str:
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if count >= 0.9995 * scale:
            value = count / scale
            return f"{value:.0f}{unit}" if value >= 100 else f"{value:.1f}{unit}"
    return f"{count / 1e3:.0f}K"


def expert_combinations(config: ModelConfig) -> int:
    """C(n_experts, top_k): the sets of experts a token can choose in one layer; 1 for a dense model."""
    return 1 if config.moe is None else comb(config.moe.n_experts, config.moe.top_k)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of a training step."""

    weights: int  # float32 master weights
    gradients: int  # float32; bfloat16 of fused experts where a step has one micro-batch and each device all weights
    optimizer: int  # two moments, in optim.moments; under Muon one, and two of the embeddings
    activations: int  # saved for backward, for one micro-batch
    working: int  # bf16 copies of the weights under bf16-mixed, and what the loss holds
    accumulates: bool  # gradients of earlier micro-batches lie beside the activations; else they come as those go

    @property
    def total(self) -> int:
        both = self.gradients + self.activations if self.accumulates else max(self.gradients, self.activations)
        return self.weights + self.optimizer + both + self.working


def training_memory(config: Config, n_shards: int = 1, n_replicas: int = 1) -> Memory:
    """An estimate for a device of `n_shards` that share weights, gradients and moments, in each of `n_replicas` groups.

    For a GPU, where blocks are compiled unless trainer.compile is false. Activations count what autograd keeps,
    tensor by tensor, from the shapes (see `_activation_bytes`); the allocator's fragmentation is not included.
    """
    model, micro = config.model, config.optim.micro_batch_size * config.data.seq_len
    mixed = config.trainer.precision == "bf16-mixed"
    size = model_size(model)
    n_parameters = size.total + size.multi_token_prediction
    state = 4 * n_parameters // n_shards
    compiled = config.trainer.compile is not False
    layers, mode = _layers_of_blocks(model), config.trainer.activation_checkpointing
    per_block = [_activation_bytes(model, i, micro, mixed, compiled) for i in layers]
    residual = 4 * micro * model.d_model
    head_bytes = 2 if mixed else 4
    read_by_head = head_bytes * micro * model.d_model
    activations = sum(per_block)
    if mode != "none":  # and one block at a time is whole again
        kept = [residual + _kept_bytes(model, i, micro, mixed, mode) for i in layers]
        activations = sum(kept) + max(whole - part for whole, part in zip(per_block, kept, strict=True))
    activations += 2 * residual + read_by_head
    # a prediction module: its embeddings, and what projection, final norm and head read
    activations += model.n_prediction_modules * (2 * residual + 3 * read_by_head)
    # logits, in whose place their gradient comes, and the gradients that the loss makes of the head and of its input
    working = min(head_bytes * micro * model.vocab_size, MAX_FUSED_BYTES)
    # the head's gradient in float32, one for each prediction and one more in flight
    working += (2 + model.n_prediction_modules) * 4 * model.vocab_size * model.d_model + read_by_head
    if mixed:
        working += 2 * n_parameters  # autocast keeps bf16 copies for the backward pass, the experts for longer
    second = size.active - size.active_no_embeddings if config.optim.optimizer == "muon" else n_parameters
    moments = n_parameters // n_shards + second // n_shards
    width = 2 if config.optim.moments == "bfloat16" else 4  # the small ones, always float32, are not told apart
    accumulates = config.optim.batch_tokens > micro * n_shards * n_replicas
    gradients = state
    are_whole = n_shards == 1 and n_replicas <= MOST_IN_BFLOAT16
    if not accumulates and are_whole and config.optim.optimizer == "adamw" and _is_fused(model, mixed):
        assert model.moe is not None
        gradients -= 2 * size.routed_expert * model.moe.n_experts * len(model.routed_layers)
    return Memory(state, gradients, width * moments, activations, working, accumulates)


def _activation_bytes(model: ModelConfig, layer: int, tokens: int, mixed: bool, compiled: bool) -> int:
    """Saved for backward by one block: c bytes an element in the compute dtype, 4 in float32. Compiled blocks
    recompute what is elementwise (sums, float32 copies, silu) unless a product of matrices reads it."""
    c, d = (2 if mixed else 4), model.d_model
    # of the norms their float32 inputs, the second one's as what attention adds to the first one's where that is added
    # again, and their outputs, which projections and FFN read
    norms = 4 * d + (c if compiled else 4) * d + 2 * c * d
    attended = c * attention_of(model, layer).saved_per_token(d, compiled)
    hidden = 3 if compiled else 4  # gate and up and their product; and silu(gate)
    moe = model.moe
    if moe is None or not model.is_moe_layer(layer):
        return tokens * (norms + attended + c * hidden * model.feed_forward.d_ff)
    rows = moe.choices_per_token * row_bytes(model, mixed, compiled)
    n_kept = 1 if getattr(moe.router, "score", "softmax") == "softmax" else 2  # probabilities; or scores and logits
    router = 4 * n_kept * moe.n_experts * moe.router.n_chunks + (0 if compiled else 4 * d)
    if moe.router.mixes_chunks:
        router += c * 2 * d  # what split and merge read
    return tokens * (norms + attended + rows + router + c * hidden * moe.shared_width)


def row_bytes(model: ModelConfig, mixed: bool, compiled: bool) -> int:
    """Saved for backward by the experts for one choice."""
    moe = model.moe
    assert moe is not None
    c, hidden = (2 if mixed else 4), (3 if compiled else 4)
    if _is_fused(model, mixed):
        return c * 2 * moe.d_expert + 3 * 4  # gate and up; its gate and both ways of the permutation
    if moe.experts.activation == "clamped_swiglu" and not compiled:
        hidden = 7  # gate and up; clamped gate, its sigmoid, their product, up + 1; and the product of all
    return c * (2 * model.d_model // moe.router.n_chunks + hidden * moe.d_expert)  # input and output rows, hidden


def _is_fused(model: ModelConfig, mixed: bool) -> bool:
    """Are the experts one op on a GPU? It keeps neither rows that come in nor rows that go out."""
    moe = model.moe
    if moe is None or not mixed or moe.experts.backend not in ("auto", "fused"):
        return False
    return not why_not_fused(moe, model.d_model // moe.router.n_chunks)


def _kept_bytes(model: ModelConfig, layer: int, tokens: int, mixed: bool, mode: str) -> int:
    """Kept of one block under activation checkpointing, beside its input: the choices, and under `selective` their
    order and what products put out, but for the last one, which is only added."""
    c, d, moe = (2 if mixed else 4), model.d_model, model.moe
    routed = moe if model.is_moe_layer(layer) else None
    choices = 0 if routed is None else 8 * routed.choices_per_token
    if mode == "full":
        return tokens * choices
    attended = c * (attention_of(model, layer).products_per_token(d) + d)
    if routed is None:
        return tokens * (attended + c * 2 * model.feed_forward.d_ff)
    n_chunks = routed.router.n_chunks
    out = 0 if _is_fused(model, mixed) else d // n_chunks  # of an expert; the op of fused ones adds them up itself
    rows = routed.choices_per_token * c * (2 * routed.d_expert + out)
    split = c * d if routed.router.mixes_chunks else 0
    logits = 4 * routed.n_experts * n_chunks
    return tokens * (2 * choices + attended + rows + split + logits + c * 2 * routed.shared_width)
