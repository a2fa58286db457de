"""How evenly experts are loaded, as numbers. All take counts [..., E] and reduce the last axis."""

from __future__ import annotations

from torch import Tensor


def relative_load(load_E: Tensor) -> Tensor:
    """Load over its mean: 1 is balanced. All zeros where nothing was counted."""
    return load_E / load_E.mean(-1, keepdim=True).clamp(min=1e-20)


def max_violation(load_E: Tensor) -> Tensor:
    """MaxVio = (max load - mean load) / mean load (arXiv 2408.15664, eq. 4): 0 is balanced, E - 1 is collapse."""
    return relative_load(load_E).amax(-1) - 1


def load_entropy(load_E: Tensor) -> Tensor:
    """Entropy of the load's distribution over experts, in nats: ln E is balanced, 0 is one expert."""
    share_E = load_E / load_E.sum(-1, keepdim=True).clamp(min=1e-20)
    return -(share_E * share_E.clamp(min=1e-20).log()).sum(-1)


def dead_experts(load_E: Tensor) -> Tensor:
    """How many experts got nothing."""
    return (load_E == 0).sum(-1)
