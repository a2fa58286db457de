"""One function fills every parameter and buffer of a GPT, the same values on any device and any sharding."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from moelm.config import InitConfig
from moelm.model.gpt import GPT

# What writes into the residual stream: the sum of 2 n_layers such terms keeps its variance (GPT-2).
RESIDUAL = ("attention.out.weight", "down", "down.weight")


@torch.no_grad()
def initialize(model: GPT, seed: int) -> None:
    """Fill `model` in place; parameters on the meta device must have been given memory (`to_empty`) before.

    matrices: normal(0, std), cut at truncate_sigmas; residual writers std / sqrt(2 n_layers); routers router_std.
    norms: 1; biases and expert_bias: 0; what a module lists in its `initial`: that constant. Each tensor, and each
    expert of a stacked one, draws from its own generator, keyed by (seed, name, expert), so values depend on nothing
    else.
    Raises ValueError for a tensor that no rule covers.
    """
    config = model.config.init
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        owner, _, own_name = name.rpartition(".")
        constants = getattr(model.get_submodule(owner), "initial", {})
        if own_name in constants:
            tensor.fill_(constants[own_name])
        elif name.endswith("norm.weight"):
            tensor.fill_(1.0)
        elif name.endswith(("bias", "expert_bias")):
            tensor.zero_()
        elif tensor.ndim in (2, 3):
            _fill_normal(tensor, std_of(name, config, model.config.n_layers), config.truncate_sigmas, seed, name)
        else:
            raise ValueError(f"no rule to initialise {name} of shape {tuple(tensor.shape)}")


def std_of(name: str, config: InitConfig, n_layers: int) -> float:
    """Standard deviation of the matrix called `name`."""
    if ".router." in name:
        return config.router_std or config.std
    if config.scale_residual and name.endswith(RESIDUAL):
        return config.std / math.sqrt(2 * n_layers)
    return config.std


def _fill_normal(tensor: Tensor, std: float, truncate_sigmas: float | None, seed: int, name: str) -> None:
    parts = tensor.unbind(0) if tensor.ndim == 3 else [tensor]  # one draw an expert
    for i, part in enumerate(parts):
        key = hashlib.blake2b(f"{seed}/{name}/{i}".encode(), digest_size=8).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(key, "little") >> 1)
        values = torch.empty(part.shape, dtype=torch.float32, device="cpu")
        if truncate_sigmas is None:
            values.normal_(0.0, std, generator=generator)
        else:
            cut = truncate_sigmas * std
            torch.nn.init.trunc_normal_(values, 0.0, std, -cut, cut, generator=generator)
        part.copy_(values)
