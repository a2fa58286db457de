"""What one optimizer step did, summed over its micro-batches and over all ranks in one all-reduce."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moelm.moe.balancing.base import AuxLoss
from moelm.moe.types import OBSERVED, RouterStats

WINDOW = 50  # optimizer steps without a token after which an expert is called dead


@dataclass
class StepStatistics:
    """Means over the micro-batches of one optimizer step on all ranks; tensors on the device, no gradient."""

    ce: Tensor  # scalar, nats a token
    loss: Tensor  # scalar, what was differentiated
    extra: dict[str, Tensor]  # scalars, weighted losses beside cross-entropy and balancers
    aux: dict[str, Tensor]  # scalars, weighted
    aux_raw_M: dict[str, Tensor]
    observed_M: dict[str, Tensor]  # the OBSERVED statistics of routers that have them
    n_asked: Tensor  # float64 scalar, ranks that were told to end
    own_loss: Tensor  # scalar, the sum of this rank's losses
    logit_max_M: Tensor | None  # the largest absolute router logits on this rank; None for routers without
    load_ME: Tensor | None  # float64 counts summed, not averaged; None for a dense model
    kept_ME: Tensor | None  # the same after capacity
    gate_ME: Tensor | None  # float64 combine weights summed


class StepAccumulator:
    """Sums the returned statistics of micro-batches; `finish` reduces them over ranks and starts anew.

    Plain tensors, not buffers: DDP would overwrite buffers with rank 0's, and precision plugins cast them.
    float64, so that counts stay exact to 2^53.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._logit_max_M: Tensor | None = None
        self._n_micro_batches = 0
        self._window_ME: Tensor | None = None

    @torch.no_grad()
    def window(self, load_ME: Tensor) -> Tensor:
        """The load of this optimizer step so far, over all ranks, this micro-batch's `load_ME` included; one
        all-reduce. float32, exact to 2^24 choices of an expert."""
        (reduced,) = all_reduce_sums({"load": load_ME.detach().clone()}).values()
        self._window_ME = reduced if self._window_ME is None else self._window_ME + reduced
        return self._window_ME

    @torch.no_grad()
    def add(
        self,
        ce: Tensor,
        loss: Tensor,
        extra: dict[str, Tensor],
        aux: dict[str, AuxLoss],
        stats: RouterStats | None,
    ) -> None:
        parts = {"ce": ce, "loss": loss}
        parts |= {f"extra/{name}": value for name, value in extra.items()}
        parts |= {f"aux/{name}": value.weighted for name, value in aux.items()}
        parts |= {f"raw/{name}": value.raw_M for name, value in aux.items()}
        if stats is not None:
            parts |= {"load": stats.load_BE.sum(1), "kept": stats.kept_BE.sum(1), "gate": stats.gate_BE.sum(1)}
            parts |= {f"observed/{name}": stats.extra[name] for name in OBSERVED if name in stats.extra}
        for name, value in parts.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        if stats is not None and "logit_max" in stats.extra:
            new_M, old_M = stats.extra["logit_max"], self._logit_max_M
            self._logit_max_M = new_M if old_M is None else torch.maximum(old_M, new_M)
        self._n_micro_batches += 1

    @torch.no_grad()
    def finish(self, asked: bool = False) -> StepStatistics:
        """`asked`: was this rank told to end?"""
        self._sums["asked"] = torch.full_like(self._sums["loss"], float(asked))
        own_loss, logit_max_M, self._logit_max_M = self._sums["loss"], self._logit_max_M, None
        sums, n = all_reduce_sums(self._sums), self._n_micro_batches * world_size()
        self._sums, self._n_micro_batches, self._window_ME = {}, 0, None
        load_ME, kept_ME, gate_ME = (sums.pop(name, None) for name in ("load", "kept", "gate"))
        n_asked = sums.pop("asked")
        means = {name: value / n for name, value in sums.items()}
        return StepStatistics(
            ce=means["ce"],
            loss=means["loss"],
            extra=_with_prefix(means, "extra/"),
            aux=_with_prefix(means, "aux/"),
            aux_raw_M=_with_prefix(means, "raw/"),
            observed_M=_with_prefix(means, "observed/"),
            n_asked=n_asked,
            own_loss=own_loss,
            logit_max_M=logit_max_M,
            load_ME=load_ME,
            kept_ME=kept_ME,
            gate_ME=gate_ME,
        )


def _with_prefix(values: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def world_size() -> int:
    """Processes that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather(value: Any) -> list[Any]:
    """One value from every rank, by rank."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def all_reduce_sums(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """All tensors summed over ranks in ONE all-reduce; the same names and shapes on every rank."""
    if world_size() == 1:
        return sums
    flat = torch.cat([value.flatten() for value in sums.values()])
    dist.all_reduce(flat)
    parts = flat.split([value.numel() for value in sums.values()])
    return {name: part.view_as(value) for (name, value), part in zip(sums.items(), parts, strict=True)}


class StepReports:
    """Brings a few numbers of each optimizer step to the host one step late, so that the host need not wait for what it
    has just queued: at most for the step before, while the device has a whole one to do. What is the same on all ranks
    is so known to all after the same step."""

    def __init__(self) -> None:
        self._sent: tuple[int, Tensor, torch.cuda.Event | None, Any] | None = None

    def send(self, step: int, values: list[Tensor], kept: Any = None) -> None:
        """Scalars or vectors, all on one device. What is `kept` stays there."""
        host = torch.cat([value.double().reshape(-1) for value in values]).to("cpu", non_blocking=True)
        arrived = None
        if values[0].is_cuda:
            arrived = torch.cuda.Event()
            arrived.record()
        self._sent = step, host, arrived, kept

    def read(self) -> tuple[int, list[float], Any] | None:
        """What was sent last and what was kept with it, if it was not read before."""
        if self._sent is None:
            return None
        (step, host, arrived, kept), self._sent = self._sent, None
        if arrived is not None:
            arrived.synchronize()
        return step, host.tolist(), kept


class RecentLoad:
    """The load of the last WINDOW optimizer steps, float32 [M, E] summed, from a ring on the device."""

    def __init__(self) -> None:
        self.ring: Tensor | None = None  # [WINDOW, M, E]

    def add(self, load_ME: Tensor, step: int) -> None:
        """`step` counts optimizer steps from 0."""
        if self.ring is None:
            self.ring = torch.zeros(WINDOW, *load_ME.shape, device=load_ME.device)
        elif self.ring.device != load_ME.device:  # restored from a checkpoint
            self.ring = self.ring.to(load_ME.device)
        self.ring[step % WINDOW] = load_ME.float()

    def total(self) -> Tensor:
        assert self.ring is not None, "no step was added"
        return self.ring.sum(0)
