"""The k best of each row of scores."""

from __future__ import annotations

import torch
from torch import Tensor

from moelm.moe.kernels import HAS_TRITON

if HAS_TRITON:
    from moelm.moe.kernels import top_k as kernel


@torch.no_grad()
def best_ids(scores: Tensor, k: int) -> Tensor:
    """int64 [..., k]: where the k largest of the last axis are, best first. No gradient.

    Of equals the lower index comes first on CUDA; elsewhere torch.topk decides.
    """
    if HAS_TRITON and scores.is_cuda and kernel.takes(scores.shape[-1], k):
        ids: Tensor = kernel.top_k(scores.flatten(0, -2), k).view(*scores.shape[:-1], k)
        return ids
    return scores.topk(k, dim=-1).indices
