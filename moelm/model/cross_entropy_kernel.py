"""The elementwise part of the cross-entropy and of its gradient in one pass over the logits, as a Triton kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

BLOCK, N_WARPS = 8192, 8


@triton.jit
def _cross_entropy(logits_TV, targets_T, scale, ce_T, V, IGNORE: tl.constexpr, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_T + t)
    counts = target != IGNORE
    row = logits_TV + t * V
    # read before the first reduction, at which all threads wait, so before any of them writes
    inside = (target >= 0) & (target < V)
    of_target = tl.load(row + target, inside, other=float("nan")).to(tl.float32)  # NaN: no such token
    v = tl.arange(0, BLOCK)
    highest, total = -float("inf"), 0.0
    for start in range(0, V, BLOCK):
        x = tl.load(row + start + v, v < V - start, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(x))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(x - higher))
        highest = higher
    log_z = highest + tl.log(total)
    tl.store(ce_T + t, tl.where(counts, log_z - of_target, 0.0))
    weight = tl.load(scale)
    for start in range(0, V, BLOCK):
        mask = v < V - start
        x = tl.load(row + start + v, mask, other=0.0).to(tl.float32)
        gradient = (tl.exp(x - log_z) - tl.where(start + v == target, 1.0, 0.0)) * weight
        tl.store(row + start + v, tl.where(counts, gradient, 0.0).to(logits_TV.dtype.element_ty), mask)


def cross_entropy_(logits_TV: Tensor, targets_T: Tensor, scale: Tensor, ignore: int) -> Tensor:
    """float32 [T], cross-entropy of each token, 0 where the target is `ignore`, NaN where it is no token; the logits
    (contiguous, float32 or bfloat16) are replaced by the gradient of scale * sum(ce). `scale`: float32 scalar.

    Bytes: the logits read once from memory, once more from the cache, and written once: 4 T V in bf16.
    Operations: two exponentials an element. float32 inside, rounded once.
    """
    T, V = logits_TV.shape
    ce_T = torch.empty(T, dtype=torch.float32, device=logits_TV.device)
    _cross_entropy[(T,)](logits_TV, targets_T, scale, ce_T, V, ignore, BLOCK, num_warps=N_WARPS)
    return ce_T


def cross_entropy_reference_(logits_TV: Tensor, targets_T: Tensor, scale: Tensor, ignore: int) -> Tensor:
    x_TV = logits_TV.float()
    counts_T = targets_T != ignore
    ce_T = F.cross_entropy(x_TV, targets_T, ignore_index=ignore, reduction="none")
    one_hot_TV = F.one_hot(torch.where(counts_T, targets_T, 0), x_TV.shape[1])
    gradient_TV = (x_TV.softmax(-1) - one_hot_TV) * scale
    logits_TV.copy_(torch.where(counts_T.unsqueeze(-1), gradient_TV, 0.0))
    return ce_T
