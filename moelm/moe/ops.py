"""Functions as ops of PyTorch: one opaque step to compile, with a name for checkpointing and for the profile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch

P = ParamSpec("P")
R = TypeVar("R")


def op(name: str, fake: Callable[..., Any], recordable: bool = True) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes the decorated function the op `name`, "moelm::..."; the first of a name stays.

    Its types are annotated, and it neither writes to an argument nor returns one. `fake` gets the same arguments and
    returns empty tensors like the results. An op has no derivative: an autograd.Function that calls it gives one.
    What is not `recordable`, since the host waits in it or shapes are those of the data, divides a CUDA graph.
    `torch.library.custom_op` does the same, through Python that costs more than a launch.
    """

    def define(function: Callable[P, R]) -> Callable[P, R]:
        namespace, plain_name = name.split("::")
        if not hasattr(getattr(torch.ops, namespace), plain_name):
            schema = torch.library.infer_schema(function, mutates_args=())
            tags = (torch.Tag.pt2_compliant_tag, *(() if recordable else (torch.Tag.cudagraph_unsafe,)))
            torch.library.define(name, schema, tags=tags)
            torch.library.register_kernel(name, None, function)
            torch.library.register_fake(name, fake)
        return cast(Callable[P, R], getattr(getattr(torch.ops, namespace), plain_name).default)

    return define
