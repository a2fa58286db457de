"""Steps that change nothing because they must not: without numbers, or with a loss that jumps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moelm.config import UserError
from moelm.training.statistics import gather

WINDOW = 32  # optimizer steps whose losses say what is usual


class BadStepError(UserError):
    """Raised by all ranks after the same step. Nothing of that step is in a checkpoint."""


class NonFiniteError(BadStepError):
    """Training went where there are no numbers."""


class LossSpikeError(BadStepError):
    pass


class RecentLosses:
    """The cross-entropy of the last WINDOW optimizer steps over all ranks, from a ring on the device.

    Those of spikes count too, so a loss that stays high is usual after half a window.
    """

    def __init__(self) -> None:
        self.ring: Tensor | None = None  # float64 [WINDOW]; NaN where there was no step yet

    @torch.no_grad()
    def limit(self, ce: Tensor, factor: float, step: int) -> Tensor:
        """factor x the median of the steps before, on the device; while these fill the ring, x a larger one of them,
        and NaN, which no number exceeds, until half of it is full. Then `ce` of this step, counted from 0, is one of
        them; float64 scalar."""
        if self.ring is None:
            self.ring = torch.full((WINDOW,), torch.nan, dtype=torch.float64, device=ce.device)
        self.ring = self.ring.to(ce.device)  # if it comes from a checkpoint
        limit = factor * self.ring.sort().values[(WINDOW - 1) // 2]
        slot = self.ring[step % WINDOW]
        slot.copy_(torch.where(ce.isfinite(), ce, slot))
        return limit


class Evidence(NamedTuple):
    """What says where a step went wrong, left on the device until it is known that it did. Of this rank alone."""

    loss: Tensor
    logit_max_M: Tensor | None  # largest absolute router logit
    parameters: Sequence[nn.Parameter]
    norms: Sequence[Tensor]  # of their gradients, or of the parts that this rank has

    def describe(self, model: nn.Module, layers: Sequence[str]) -> str:
        """`layers`: the names of what stands on the M axis. Asks all ranks."""
        logits_M = [] if self.logit_max_M is None else self.logit_max_M.tolist()
        bad = [i for i, norm in enumerate(self.norms) if not math.isfinite(float(norm))]
        found = gather((math.isfinite(float(self.loss)), logits_M, bad))
        texts = []
        ranks = [str(rank) for rank, (fine, _, _) in enumerate(found) if not fine]
        if 0 < len(ranks) < len(found):
            texts.append(f"on rank {', '.join(ranks)}")
        if logits_M:
            largest_M = [max(values, key=_nan_last) for values in zip(*(logits for _, logits, _ in found), strict=True)]
            by_layer = zip(layers, largest_M, strict=True)
            texts.append("largest router logit by layer: " + ", ".join(f"{name}: {x:.3g}" for name, x in by_layer))
            without = [name for name, x in zip(layers, largest_M, strict=True) if not math.isfinite(x)]
            if without:
                texts.append(f"the first without numbers is layer {without[0]}")
        bad = sorted({i for _, _, theirs in found for i in theirs})
        if bad and len(bad) < len(self.norms):  # all of them follow from a loss that is none
            names = {parameter: name for name, parameter in model.named_parameters()}
            nearest = names[self.parameters[bad[-1]]]
            texts.append(f"{len(bad)} of {len(self.norms)} gradients have none, nearest to the loss {nearest}")
        return "; ".join(texts)


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value
