"""Choices: the k best of each row of scores, and the op by which activation checkpointing keeps a decision."""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

from moelm.moe.kernels import HAS_TRITON
from moelm.moe.ops import op

if HAS_TRITON:
    from moelm.moe.kernels import top_k as kernel

log = logging.getLogger(__name__)


@op("moelm::keep_choice", fake=torch.empty_like)
def keep_choice(ids: Tensor) -> Tensor:
    """A copy of `ids`, which `model/checkpointing.py` saves instead of making it anew.

    A recomputed score may differ in its last bit, and where two are nearly equal the backward pass would then see
    another choice than the forward pass. Every choice (by comparison or at random, int or bool, any shape) goes
    through this before anything depends on it; what follows, gates too, is then a function of the kept choice.
    """
    return ids.clone()


def choose(scores: Tensor, k: int) -> Tensor:
    """`best_ids`, kept as by `keep_choice`, in one op."""
    return _choose(scores.detach(), k)


def best_ids(scores: Tensor, k: int) -> Tensor:
    """int64 [..., k]: where the k largest of the last axis are, best first. No gradient.

    Of equals the lower index comes first where the kernel is used; elsewhere torch.topk decides.
    """
    return _best_ids(scores.detach(), k)


def _empty_ids(scores: Tensor, k: int) -> Tensor:
    return scores.new_empty(*scores.shape[:-1], k, dtype=torch.int64)


@op("moelm::best_ids", fake=_empty_ids)
def _best_ids(scores: Tensor, k: int) -> Tensor:
    return _top_k(scores, k)


@op("moelm::choose", fake=_empty_ids)
def _choose(scores: Tensor, k: int) -> Tensor:
    return _top_k(scores, k)


def _top_k(scores: Tensor, k: int) -> Tensor:
    if HAS_TRITON and scores.is_cuda:
        if kernel.takes(scores.shape[-1], k):
            return kernel.top_k(scores.flatten(0, -2), k).view(*scores.shape[:-1], k)
        _say_that_torch_chooses(scores.shape[-1], k)
    return scores.topk(k, dim=-1).indices


@cache
def _say_that_torch_chooses(n: int, k: int) -> None:
    log.warning("router: torch.topk, since the kernel takes no %d of %d", k, n)
