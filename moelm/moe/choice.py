"""The op that a routing decision passes through, so that activation checkpointing keeps it."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("moelm::keep_choice", mutates_args=())
def keep_choice(ids: Tensor) -> Tensor:
    """A copy of `ids`, which `model/checkpointing.py` saves instead of making it anew.

    A recomputed score may differ in its last bit, and where two are nearly equal the backward pass would then see
    another choice than the forward pass. Every choice (by comparison or at random, int or bool, any shape) goes
    through this before anything depends on it; what follows, gates too, is then a function of the kept choice.
    """
    return ids.clone()


@keep_choice.register_fake
def _(ids: Tensor) -> Tensor:
    return torch.empty_like(ids)
