"""One function fills every parameter and buffer of a GPT, the same values on any device and any sharding."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from moelm.config import InitConfig
from moelm.model.gpt import GPT

# What writes into the residual stream: the sum of 2 n_layers such terms keeps its variance (GPT-2).
RESIDUAL = ("attention.out.weight", "down", "down.weight")


Part = tuple[Tensor, tuple[slice, ...]]  # what this process holds of a tensor, and which part of the whole that is


def whole(tensor: Tensor) -> Part:
    return tensor, tuple(slice(0, n) for n in tensor.shape)


@torch.no_grad()
def initialize(model: GPT, seed: int, held: Callable[[Tensor], Part] = whole) -> None:
    """Fill `model` in place, of each tensor what is `held`; parameters on the meta device must have been given memory
    (`to_empty`) before.

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
        part, index = held(tensor)
        if own_name in constants:
            part.fill_(constants[own_name])
        elif name.endswith("norm.weight"):
            part.fill_(1.0)
        elif name.endswith(("bias", "expert_bias")):
            part.zero_()
        elif tensor.ndim in (2, 3):
            std = std_of(name, config, model.config.n_layers)
            _fill_normal(part, index, tensor.shape, std, config.truncate_sigmas, f"{seed}/{name}")
        else:
            raise ValueError(f"no rule to initialise {name} of shape {tuple(tensor.shape)}")


def std_of(name: str, config: InitConfig, n_layers: int) -> float:
    """Standard deviation of the matrix called `name`."""
    if ".router." in name:
        return config.router_std or config.std
    if config.scale_residual and name.endswith(RESIDUAL):
        return config.std / math.sqrt(2 * n_layers)
    return config.std


def _fill_normal(
    held: Tensor, index: tuple[slice, ...], shape: torch.Size, std: float, truncate_sigmas: float | None, key: str
) -> None:
    """`held` is the part `index` of a tensor of `shape`: a matrix, or one for each expert, drawn one by one."""
    parts, numbers = (held.unbind(0), range(shape[0])[index[0]]) if len(shape) == 3 else ([held], range(1))
    for i, part in zip(numbers, parts, strict=True):
        digest = hashlib.blake2b(f"{key}/{i}".encode(), digest_size=8).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)
        values = torch.empty(shape[-2:], dtype=torch.float32, device="cpu")
        if truncate_sigmas is None:
            values.normal_(0.0, std, generator=generator)
        else:
            cut = truncate_sigmas * std
            torch.nn.init.trunc_normal_(values, 0.0, std, -cut, cut, generator=generator)
        part.copy_(values[index[-2:]])
