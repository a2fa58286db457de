"""Launching a kernel with less Python than Triton takes, which describes every argument anew for each launch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from moelm.moe.kernels import INTERPRETED

MOST = 1024  # launches that a kernel remembers
KNOWN_VERSION = triton.__version__.startswith(("3.6.", "3.7.", "3.8.", "3.9."))  # of what `_launch` asks of Triton
REMEMBERS = KNOWN_VERSION and torch.version.hip is None and not INTERPRETED


class Kernel:
    """A `triton.jit` function that is launched as such, `kernel[grid](*arguments, **options)`, with a grid of three
    and no argument by name.

    Where nothing that Triton compiles for differs from an earlier launch, the binary of that one is launched, without a
    word to Triton's compiler or to its launch hooks. So what other ranks send, as many tokens as they like, costs the
    host no more than a batch of one size. Other Tritons than those tested are asked each time.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self.constants = frozenset(function.constexprs if REMEMBERS else ())  # places of arguments
        self.known: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, int, int], *arguments: Any, **options: Any) -> None:
        if not REMEMBERS:
            self.function[grid](*arguments, **options)
            return
        constants = self.constants
        kinds = [each if i in constants else _kind(each) for i, each in enumerate(arguments)]
        device = driver.active.get_current_device()
        key = device, *options.items(), *kinds
        known = self.known.get(key)
        if known is not None:
            run, function, metadata = known
            run(*grid, driver.active.get_current_stream(device), function, metadata, None, None, None, *arguments)
            return
        compiled = self.function[grid](*arguments, **options)
        if len(self.known) >= MOST:
            self.known.clear()
        self.known[key] = compiled.run, compiled.function, compiled.packed_metadata


def _kind(argument: Any) -> Any:
    """All of an argument that Triton compiles for, or more: it takes 1 for a constant, and asks of other integers what
    they are a multiple of and how many bits they need."""
    if argument.__class__ is int:
        return "one" if argument == 1 else (argument % 16 == 0, -(2**31) <= argument < 2**31, argument < 2**63)
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, float):
        return float
    block = getattr(argument, "block_shape", None)  # of a tensor descriptor
    return argument if block is None else (argument.base.dtype, *block, argument.layout)


def cdiv(a: int, b: int) -> int:
    """`triton.cdiv`, which takes a microsecond."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
