"""The peers' own MoE layers and models, built at the sizes of moelm's, with weights that can be set and compared.

Each is imported where it is built: one that is not installed is an ImportError, which the benchmarks report.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelm.config import ModelConfig


class Shape(NamedTuple):
    """Of one MoE layer: T tokens, width D, E experts of width F, K of them a token."""

    T: int
    D: int
    E: int
    K: int
    F: int

    @property
    def flops(self) -> int:
        """Of the experts' matrix products: three matrices of D x F a row, forward 2 a multiply-add, backward 4."""
        return 18 * self.T * self.K * self.D * self.F


Access = Callable[[Tensor], Tensor]  # a parameter -> itself or its gradient


class Layer(NamedTuple):
    """One variant of the same mixture of experts."""

    run: Callable[[Tensor], Tensor]  # x [T, D] -> y [T, D], both bfloat16
    module: nn.Module
    # views of what `Access` gives: router [E, D], gate and up [E, D, F], down [E, F, D]; None: no mixture of experts
    views: Callable[[Access], dict[str, Tensor]] | None
    weights: str  # the parameters' dtype, for the table

    @torch.no_grad()
    def load(self, values: dict[str, Tensor]) -> None:
        if self.views is not None:
            for name, view in self.views(lambda parameter: parameter).items():
                view.copy_(values[name])

    def gradients(self) -> dict[str, Tensor]:
        assert self.views is not None
        return self.views(_gradient)


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        raise RuntimeError(f"no gradient reached a parameter of shape {tuple(parameter.shape)}")
    return parameter.grad


class Bf16Router(nn.Module):
    """Softmax over all experts, the best K, renormalised; its product in bf16, as in the peers."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape.E, shape.D))
        self.top_k = shape.K

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        values_TK, ids_TK = F.linear(x_TD, self.weight).float().softmax(-1).topk(self.top_k, dim=-1)
        return (values_TK / values_TK.sum(-1, keepdim=True)).to(x_TD.dtype), ids_TK


class PlainGrouped(nn.Module):
    """Sort, gather, three grouped products, weighted `index_add`: the sequence of operations that codebases without
    kernels of their own use."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.router = Bf16Router(shape)
        self.gate = nn.Parameter(torch.empty(shape.E, shape.F, shape.D))
        self.up = nn.Parameter(torch.empty(shape.E, shape.F, shape.D))
        self.down = nn.Parameter(torch.empty(shape.E, shape.D, shape.F))

    def forward(self, x_TD: Tensor) -> Tensor:
        gates_TK, ids_TK = self.router(x_TD)
        ids_R = ids_TK.flatten()
        order_R = ids_R.argsort(stable=True)
        token_R = order_R // gates_TK.shape[1]
        counts_E = torch.zeros(self.gate.shape[0], dtype=torch.int32, device=ids_R.device)
        ends_E = counts_E.scatter_add(0, ids_R, torch.ones_like(ids_R, dtype=torch.int32)).cumsum(0, dtype=torch.int32)
        rows_RD = x_TD[token_R]
        gate_RF = F.grouped_mm(rows_RD, self.gate.transpose(1, 2), offs=ends_E)
        up_RF = F.grouped_mm(rows_RD, self.up.transpose(1, 2), offs=ends_E)
        out_RD = F.grouped_mm(F.silu(gate_RF) * up_RF, self.down.transpose(1, 2), offs=ends_E)
        weighted_RD = out_RD.float() * gates_TK.flatten()[order_R].unsqueeze(-1).float()
        return torch.zeros_like(x_TD).index_add(0, token_R, weighted_RD.to(x_TD.dtype))


def plain_grouped(shape: Shape, compiled: bool) -> Layer:
    module = PlainGrouped(shape).bfloat16()
    return Layer(
        _maybe_compiled(module, compiled),
        module,
        lambda of: {
            "router": of(module.router.weight),
            "gate": of(module.gate).transpose(1, 2),
            "up": of(module.up).transpose(1, 2),
            "down": of(module.down).transpose(1, 2),
        },
        "bf16",
    )


def transformers_layer(shape: Shape, compiled: bool) -> Layer:
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

    config = OlmoeConfig(
        hidden_size=shape.D,
        intermediate_size=shape.F,
        num_experts=shape.E,
        num_experts_per_tok=shape.K,
        norm_topk_prob=True,
    )
    config._experts_implementation = "grouped_mm"
    module = OlmoeSparseMoeBlock(config).bfloat16()
    block = _maybe_compiled(module, compiled)

    def run(x_TD: Tensor) -> Tensor:
        y = block(x_TD.unsqueeze(0))
        return (y[0] if isinstance(y, tuple) else y).squeeze(0)

    return Layer(
        run,
        module,
        lambda of: {
            "router": of(module.gate.weight),
            "gate": of(module.experts.gate_up_proj).transpose(1, 2)[..., : shape.F],
            "up": of(module.experts.gate_up_proj).transpose(1, 2)[..., shape.F :],
            "down": of(module.experts.down_proj).transpose(1, 2),
        },
        "bf16",
    )


def torchtitan_layer(shape: Shape, compiled: bool) -> Layer:
    from torchtitan.models.moe import MoE, MoEArgs

    arguments = MoEArgs(
        num_experts=shape.E,
        num_shared_experts=0,
        score_func="softmax",
        route_norm=True,
        score_before_experts=False,
        top_k=shape.K,
        load_balance_coeff=None,
    )
    module = MoE(arguments, dim=shape.D, hidden_dim=shape.F)
    with torch.no_grad():  # fills its buffers too
        module.init_weights(0.02, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    module = module.bfloat16()
    block = _maybe_compiled(module, compiled)
    return Layer(
        lambda x_TD: block(x_TD.unsqueeze(0)).squeeze(0),
        module,
        lambda of: {
            "router": of(module.router.gate.weight),
            "gate": of(module.experts.w1).transpose(1, 2),
            "up": of(module.experts.w3).transpose(1, 2),
            "down": of(module.experts.w2).transpose(1, 2),
        },
        "bf16",
    )


class _ScatterMoE(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        from scattermoe.mlp import GLUMLP

        self.router = Bf16Router(shape)
        self.experts = GLUMLP(shape.D, shape.F, shape.E, shape.K)

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD: Tensor = self.experts(x_TD, *self.router(x_TD))
        return y_TD


def scattermoe_layer(shape: Shape, compiled: bool) -> Layer:
    module = _ScatterMoE(shape).bfloat16()
    up_gate, down = module.experts.experts.weight, module.experts.output_experts.weight
    return Layer(
        _maybe_compiled(module, compiled),
        module,
        lambda of: {
            "router": of(module.router.weight),
            "gate": of(up_gate).transpose(1, 2)[..., shape.F :],  # its gate stands second
            "up": of(up_gate).transpose(1, 2)[..., : shape.F],
            "down": of(down).transpose(1, 2),
        },
        "bf16",
    )


def sonicmoe_layer(shape: Shape, tuned: bool) -> Layer:
    """With the default tiles of its products, or with those that it finds best for each shape in many minutes."""
    import quack.gemm_interface
    import sonicmoe.functional
    from sonicmoe import KernelBackendMoE, MoE
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import backward, forward

    for module in (sonicmoe.functional, forward, backward):
        for name in ("gemm", "gemm_gated", "gemm_dgated"):
            if hasattr(module, name):
                setattr(module, name, partial(getattr(quack.gemm_interface, name), tuned=tuned))
    module = MoE(
        num_experts=shape.E,
        num_experts_per_tok=shape.K,
        hidden_size=shape.D,
        intermediate_size=shape.F,
        activation_function=ActivationType.SWIGLU,
        add_bias=False,
        std=0.02,
    ).bfloat16()
    return Layer(
        lambda x_TD: module(x_TD, kernel_backend_moe=KernelBackendMoE.sonicmoe)[0],
        module,
        lambda of: {
            "router": of(module.router.weight),
            "gate": of(module.c_fc.weight).transpose(1, 2)[..., 0::2],  # gate and up interleaved
            "up": of(module.c_fc.weight).transpose(1, 2)[..., 1::2],
            "down": of(module.c_proj.weight).transpose(1, 2),
        },
        "bf16",
    )


def _maybe_compiled(module: nn.Module, compiled: bool) -> Any:
    return torch.compile(module, dynamic=False) if compiled else module


# ---------------------------------------------------------------------------------------------- models


class Model(NamedTuple):
    """A whole language model, built on the default device."""

    module: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]  # inputs and targets [B, L] -> mean cross-entropy
    undo: Callable[[], None] = lambda: None  # takes back what building it changed for the whole process


def transformers_model(config: ModelConfig, seq_len: int) -> Model:
    """Its weights, gradients and moments all in bf16, compiled per layer: its fastest way, with less than the float32
    masters that the others keep."""
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

    attention: Any = config.attention
    shared = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.width(config.d_model),
        "max_position_embeddings": seq_len,
        "use_cache": False,
        "attn_implementation": "sdpa",
    }
    if config.moe is None:
        its_config: Any = Qwen3Config(intermediate_size=config.feed_forward.d_ff, **shared)
    else:
        its_config = Qwen3MoeConfig(
            moe_intermediate_size=config.moe.d_expert,
            num_experts=config.moe.n_experts,
            num_experts_per_tok=config.moe.top_k,
            norm_topk_prob=True,
            experts_implementation="grouped_mm",
            **shared,
        )
    module = AutoModelForCausalLM.from_config(its_config, dtype=torch.bfloat16)
    for layer in module.model.layers:
        layer.compile(dynamic=False)
    return Model(module, lambda inputs, targets: cross_entropy(module(input_ids=inputs).logits, targets))


def torchtitan_model(config: ModelConfig, seq_len: int) -> Model:
    """Float32 masters under autocast, compiled by its own `apply_compile`."""
    import torchtitan.models.llama4.infra.parallelize as parallelize
    import torchtitan.models.moe.moe as moe_module
    from torchtitan.config import JobConfig
    from torchtitan.models.moe import MoEArgs
    from torchtitan.models.qwen3.model.args import Qwen3ModelArgs
    from torchtitan.models.qwen3.model.model import Qwen3Model

    attention: Any = config.attention
    arguments = Qwen3ModelArgs(
        dim=config.d_model,
        n_layers=config.n_layers,
        n_heads=attention.n_heads,
        n_kv_heads=attention.kv_heads,
        head_dim=attention.width(config.d_model),
        vocab_size=config.vocab_size,
        hidden_dim=config.feed_forward.d_ff,
        max_seq_len=seq_len,
        moe_enabled=config.moe is not None,
    )
    if config.moe is not None:
        arguments.moe_inter_dim = config.moe.d_expert
        arguments.moe_args = MoEArgs(
            num_experts=config.moe.n_experts,
            num_shared_experts=0,
            top_k=config.moe.top_k,
            score_func="softmax",
            route_norm=True,
            score_before_experts=False,
            load_balance_coeff=None,
        )
    device = torch.get_default_device()
    with torch.device("meta"):
        module = Qwen3Model(arguments)
    module.to_empty(device=device)
    with torch.no_grad():
        module.init_weights(device)
    compile_config = JobConfig().compile
    compile_config.enable = True
    product, scalars = moe_module._run_experts_grouped_mm, torch._dynamo.config.capture_scalar_outputs

    def undo() -> None:
        moe_module._run_experts_grouped_mm = product
        torch._dynamo.config.capture_scalar_outputs = scalars

    parallelize.apply_compile(module, compile_config, False)

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            logits = module(inputs)
        return cross_entropy(logits, targets)

    return Model(module, loss, undo)


def cross_entropy(logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
    return F.cross_entropy(logits_BLV.flatten(0, 1).float(), targets_BL.flatten())
