"""Experts of which each rank keeps a share and multiplies all, as FSDP2 does with weights that stay whole until the
backward pass, without FSDP2's copies of them.

A rank's share is a part of the place where the whole lies, so nothing is unpacked; the optimizer writes it in the dtype
that is multiplied, so nothing is cast; gradients of fused experts are sent from where products write them, so nothing
is packed. FSDP2 moves 10 + 10 / W bytes of a parameter in `bf16-mixed` within each of W devices for that: 6 / W to
cast, 4 / W to pack and 4 to unpack weights, 6 to pack gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from moelm.moe.dispatch.expert_parallel import all_gather
from moelm.moe.experts import Experts
from moelm.moe.working_copies import refreshed
from moelm.training.shards import like, local

reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # renamed in torch 2.13


class GatheredExperts:
    """The experts of one layer, dealt out over `mesh` in order, whole in `dtype` on every rank. Gradients are sums over
    ranks in `reduce_dtype`, each rank's its share; those of several micro-batches are added in float32. Fused experts
    write theirs in `reduce_dtype`, others in `dtype`.

    `after` is the next layer: gathered while this one computes, and collected when this one's gradients leave, which
    have had as long as a layer takes.
    """

    def __init__(self, experts: Experts, mesh: DeviceMesh, dtype: torch.dtype, reduce_dtype: torch.dtype) -> None:
        deal_out(experts, mesh)
        experts.keeps_copies = False
        self.experts, self.group = experts, mesh.get_group()
        self.dtype, self.reduce_dtype = dtype, reduce_dtype
        self.after: GatheredExperts | None = None
        self._whole: dict[str, Tensor] = {}
        self._shares: dict[str, Tensor] = {}  # this rank's part of those
        self._receivers: dict[str, Tensor] = {}  # of fused experts' gradients, which have their shape and dtype
        self._versions: dict[str, int] = {}  # of the parameters, as they are there
        self._arriving: list[dist.Work] = []
        self._leaving: list[tuple[nn.Parameter, dist.Work, Tensor, Tensor]] = []

    @torch.inference_mode(False)  # tensors of inference mode would serve no training
    @torch.no_grad()
    def fetch(self) -> None:
        """Begin to gather what has changed. Nothing waits for what has not."""
        left_over = len(self._arriving)  # of a pass that did not come to this layer
        for name, parameter in self.experts.named_parameters():
            share = self._share_of(name, parameter)
            copied: Any = parameter  # see `working_copies.py`
            is_there = getattr(copied, "working_copy", None) is share and copied.working_version == copied._version
            if is_there and self._versions.get(name) == copied._version:
                continue
            for work in self._arriving[:left_over]:
                work.wait()
            refreshed(parameter, share, self.dtype)
            sent = share if share.is_cuda else share.clone()  # gloo would read what it writes
            work = all_gather(self._whole[name], sent, self.group, async_op=True)
            assert work is not None
            self._arriving.append(work)
            self._versions[name] = copied._version

    def _share_of(self, name: str, parameter: Tensor) -> Tensor:
        share = self._shares.get(name)
        if share is None or share.device != parameter.device:
            whole = self._whole[name] = torch.empty(parameter.shape, dtype=self.dtype, device=parameter.device)
            share = self._shares[name] = whole.chunk(self.group.size())[self.group.rank()]
            nothing = torch.empty((), dtype=self.reduce_dtype, device=parameter.device).expand(parameter.shape)
            self._receivers[name] = whole if self.dtype == self.reduce_dtype else nothing
        return share

    def hold(self) -> None:
        """Before a forward pass: let the experts multiply what is gathered, and the next layer's be fetched."""
        self.fetch()
        for work in self._arriving:
            work.wait()
        self._arriving.clear()
        if self.after is not None:
            self.after.fetch()
        experts, whole = self.experts, self._whole
        if experts.fuses(whole["gate_up"]):
            experts.gate_up_copy, experts.down_copy = whole["gate_up"], whole["down"]
            experts.stand_ins = tuple(self._stand_in(name, self._receivers[name]) for name in ("gate_up", "down"))
        else:
            experts.held = {name: self._stand_in(name, value) for name, value in whole.items()}

    def _stand_in(self, name: str, value: Tensor) -> Tensor:
        made: Tensor = _StandIn.apply(getattr(self.experts, name), value, self, name)
        torch._dynamo.mark_static_address(made)
        return made

    def send(self, name: str, gradient: Tensor) -> None:
        """Begin to sum a gradient of this layer over the ranks, once those of the layer after it are there."""
        if self.after is not None:
            self.after.collect()
        if not self._leaving:
            engine: Any = Variable._execution_engine
            engine.queue_callback(self.collect)  # at the end of the backward pass, if no layer before has
        gradient = gradient.to(self.reduce_dtype).contiguous()
        share = gradient.new_empty(gradient.shape[0] // self.group.size(), *gradient.shape[1:])
        work = reduce_scatter(share, gradient, group=self.group, async_op=True)
        assert work is not None
        # with what is read on another stream: CUDA graphs write again where nobody in Python holds a tensor
        self._leaving.append((getattr(self.experts, name), work, share, gradient))

    def collect(self) -> None:
        """Add what has been sent to the parameters' gradients."""
        for parameter, work, share, _ in self._leaving:
            work.wait()
            if parameter.grad is None:
                parameter.grad = like(share.to(parameter.dtype), parameter)
            else:
                local(parameter.grad).add_(share)
        self._leaving.clear()

    def forget(self) -> None:
        """What a backward pass that failed has sent."""
        for _, work, *_ in self._leaving:
            work.wait()
        self._leaving.clear()


class _StandIn(torch.autograd.Function):
    """`value` in the place of the parameter, whose gradient is sent."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, value: Tensor, gathered: GatheredExperts, name: str) -> Tensor:
        ctx.gathered, ctx.name = gathered, name
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None, None]:
        ctx.gathered.send(ctx.name, gradient)
        return None, None, None, None


def deal_out(experts: Experts, mesh: DeviceMesh) -> None:
    """Each rank of `mesh` gets an equal share of the experts, in order. In place, on the meta device."""
    for name, parameter in experts.named_parameters():
        share = parameter.detach().chunk(mesh.size())[0]
        whole = parameter.shape, parameter.stride()
        part = DTensor.from_local(share, mesh, [Shard(0)], run_check=False, shape=whole[0], stride=whole[1])
        setattr(experts, name, nn.Parameter(part))
