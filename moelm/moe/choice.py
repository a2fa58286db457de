"""Choices: the k best of each row of scores, and the op by which activation checkpointing keeps a decision."""

from __future__ import annotations

import torch
from torch import Tensor

from moelm.moe.kernels import HAS_TRITON

if HAS_TRITON:
    from moelm.moe.kernels import top_k as kernel


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


@torch.no_grad()
def best_ids(scores: Tensor, k: int) -> Tensor:
    """int64 [..., k]: where the k largest of the last axis are, best first. No gradient.

    Of equals the lower index comes first where the kernel is used; elsewhere torch.topk decides.
    """
    if HAS_TRITON and scores.is_cuda and kernel.takes(scores.shape[-1], k):
        ids: Tensor = kernel.top_k(scores.flatten(0, -2), k).view(*scores.shape[:-1], k)
        return ids
    return scores.topk(k, dim=-1).indices
