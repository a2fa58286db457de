"""How evenly experts are loaded, as numbers. All take counts [..., E] and reduce the last axis."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_load(load_E: Tensor) -> Tensor:
    """Load over its mean: 1 is balanced. All zeros where nothing was counted."""
    return load_E / load_E.mean(-1, keepdim=True).clamp(min=1e-20)


def max_violation(load_E: Tensor) -> Tensor:
    """MaxVio = (max load - mean load) / mean load (arXiv 2408.15664, eq. 4): 0 is balanced, E / k - 1 is collapse. 0
    where nothing was counted."""
    return (relative_load(load_E).amax(-1) - 1).clamp(min=0)


def dropped(load_E: Tensor, kept_E: Tensor) -> Tensor:
    """The share of the choices made, `load_E`, that are not among `kept_E`. 0 where nothing was counted."""
    return (load_E - kept_E).sum(-1) / load_E.sum(-1).clamp(min=1)


def load_entropy(load_E: Tensor) -> Tensor:
    """Entropy of the load's distribution over experts, in nats: ln E is balanced, 0 is one expert."""
    share_E = load_E / load_E.sum(-1, keepdim=True).clamp(min=1e-20)
    return -(share_E * share_E.clamp(min=1e-20).log()).sum(-1)


def effective_experts(load_E: Tensor) -> Tensor:
    """exp of the load's entropy: as many equally used experts would be as uneven. E is balanced, 1 is collapse."""
    return load_entropy(load_E).exp()


def dead_experts(load_E: Tensor) -> Tensor:
    """How many experts got nothing."""
    return (load_E == 0).sum(-1)


def mutual_information(counts_DE: Tensor) -> Tensor:
    """I(D; E) = H(D) + H(E) - H(D, E) in nats, of counts [..., D, E] of choices by domain and expert: how much the
    domain of a choice says about its expert. 0 is independent, at most ln(min(D, E)).

    The estimate is the plug-in one: of N independent choices it is too high by about (D - 1)(E - 1) / (2 N).
    """
    share_DE = counts_DE.double() / counts_DE.double().sum((-2, -1), keepdim=True).clamp(min=1e-20)
    entropy_D, entropy_E = (torch.special.entr(share_DE.sum(axis)).sum(-1) for axis in (-1, -2))
    joint = torch.special.entr(share_DE).sum((-2, -1))
    information: Tensor = entropy_D + entropy_E - joint
    return information.clamp(min=0.0)
