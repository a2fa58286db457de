"""How a run is spread over devices: DDP, or FSDP2 under Lightning's ModelParallelStrategy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch._dynamo.config
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.strategies.parallel import ParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from moelm.config import Config, TrainerConfig
from moelm.model.block import Block
from moelm.model.devices import SMALL_UNIT, gathers_experts
from moelm.model.gpt import GPT
from moelm.moe import kernels
from moelm.moe.dispatch.expert_parallel import ExpertParallel
from moelm.moe.experts import Experts
from moelm.moe.layer import MoELayer
from moelm.training.checkpoint_io import Held, load_training, verify_together
from moelm.training.gathered_experts import GatheredExperts, deal_out
from moelm.training.launch import end_with_launcher
from moelm.training.shards import held_part, like
from moelm.training.statistics import all_reduce_sums

ROUNDS = 4  # of the blocks of a product, beside NCCL's kernels


def build_strategy(config: Config) -> Strategy | None:
    """None: Lightning's choice for one device."""
    options = config.trainer
    single = options.num_nodes == 1 and options.devices in (1, "1", "auto") and options.strategy == "auto"
    if single and (options.devices != "auto" or options.accelerator == "cpu" or torch.cuda.device_count() <= 1):
        kernels.rounds = 1
        return None
    end_with_launcher()
    backend = "gloo" if options.accelerator == "cpu" or not torch.cuda.is_available() else "nccl"
    kernels.rounds = ROUNDS
    if options.strategy == "fsdp":
        return ShardedStrategy(options, backend)
    torch._dynamo.config.optimize_ddp = False  # it cuts what is compiled at DDP's buckets, and blocks are small pieces
    return ReplicatedStrategy(backend)


class ReplicatedStrategy(DDPStrategy):
    """DDP for all but the weights of experts. Theirs are most of the gradients, and DDP would copy each into a bucket;
    here they are averaged where they lie, in their dtype, while the backward pass goes on."""

    def __init__(self, process_group_backend: str) -> None:
        super().__init__(process_group_backend=process_group_backend)
        self._is_last_micro_batch = True
        self._under_way: list[dist.Work] = []

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        experts = {p for part in model.modules() if isinstance(part, Experts) for p in part.parameters()}
        alone = {name: p for name, p in model.named_parameters() if p in experts}
        for parameter in alone.values():
            parameter.register_post_accumulate_grad_hook(self._average)  # called for those added in place, too
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(alone))
        # counters are no buffers, so none is broadcast. Lightning would do this on another stream, on which DDP then
        # reads gradients while graphs that are recorded on this one take their memory
        devices = self.determine_ddp_device_ids()
        return DistributedDataParallel(model, devices, broadcast_buffers=False, gradient_as_bucket_view=True)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Around the micro-batches of an optimizer step but its last."""
        self._is_last_micro_batch = False
        try:
            with super().block_backward_sync():
                yield
        finally:
            self._is_last_micro_batch = True

    def _average(self, parameter: Any) -> None:
        """Begin to, with the other ranks: all of them come here in the order of one graph, as they come to DDP's
        buckets."""
        if not self._is_last_micro_batch:
            return
        knows_average = self.root_device.type == "cuda"  # gloo does not
        if not knows_average:
            parameter.grad /= self.world_size
        operation = dist.ReduceOp.AVG if knows_average else dist.ReduceOp.SUM
        work = dist.all_reduce(parameter.grad, operation, async_op=True)
        assert work is not None
        self._under_way.append(work)

    def post_backward(self, closure_loss: Tensor) -> None:
        super().post_backward(closure_loss)
        for work in self._under_way:
            work.wait()
        self._under_way.clear()


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2: each rank keeps its part of the parameters, gradients and moments.

    One mesh ("replica", "fsdp", "ep") over all ranks; `trainer.replicas`, what is left, and `trainer.expert_parallel`.
    Experts are dealt out over "ep", and each rank's share is sharded over "fsdp"; all else is sharded over both axes,
    flattened. Replicas hold the same, and their gradients are summed after those of their ranks. Gradients are sums
    over ranks of those of each rank's share of the loss, whatever the axes. Each rank writes and reads its part of a
    checkpoint; of several replicas the first writes.
    """

    def __init__(self, options: TrainerConfig, process_group_backend: str) -> None:
        super().__init__(process_group_backend=process_group_backend, save_distributed_checkpoint=False)
        self.options = options
        self._is_last_micro_batch = True
        self._gathered: list[GatheredExperts] = []

    def setup_environment(self) -> None:
        self._setup_distributed()
        n_replicas, n_ep = self.options.replicas, self.options.expert_parallel
        shape = (n_replicas, self.world_size // (n_replicas * n_ep), n_ep)
        self._device_mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=("replica", "fsdp", "ep"))

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    # ---------------------------------------------------------------------------------------- the model

    def shard(self, model: GPT) -> None:
        """In place, before the model has memory. Units are the blocks, experts included, and the rest; no hook of FSDP2
        lies inside a block, where it would break up what is compiled and disturb what is recomputed. Experts that stay
        whole after a pass are none of FSDP2's (`GatheredExperts`). Those that are dealt out over "ep" are a unit of
        their own, gathered around their block; with nothing to gather they are none, and are multiplied from working
        copies as on one device. What is left of blocks without their experts is little, and several make a unit.

        Routers stay whole on every rank: small (experts x d_model a layer), and float32 however the rest is sent.
        Under bf16-mixed the weights of blocks are sent as bfloat16; those of the rest, where the residual stream
        begins and ends, as float32. Autocast chooses what is computed in which dtype, as on one device, so no unit
        casts its inputs. Gradients are summed in float32, or those of blocks in `reduce_dtype`.
        """
        float32 = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        mixed = float32
        if self.options.precision == "bf16-mixed":
            reduce_dtype = getattr(torch, self.options.reduce_dtype)
            mixed = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype, cast_forward_inputs=False)
        shard = self.device_mesh["fsdp", "ep"]._flatten("shard")
        mesh = self._with_replicas(shard)
        placement = partial(placement_of, n_ranks=shard.size())
        alone = set(router_parameters(model))  # what FSDP2 leaves as it is
        for block in model.all_blocks:
            if block.moe is not None:
                alone |= self._place_experts(block, block.moe, mixed, shard)
        for before, after in pairwise(self._gathered):
            before.after = after
        if self._gathered:
            model.register_forward_pre_hook(torch.compiler.disable(lambda *_: begin(self._gathered)))
        experts_are_alone = self._gathered or self.device_mesh["ep"].size() == self.world_size > 1
        units = units_of(model, alone if experts_are_alone else set())
        for unit in units:
            fully_shard(
                list[nn.Module](unit),
                mesh=mesh,
                mp_policy=mixed,
                shard_placement_fn=placement,
                ignored_params=alone,
                reshard_after_forward=self.options.reshard_after_forward,
            )
        fully_shard(model, mesh=mesh, mp_policy=float32)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        fetch_ahead(units)
        if not self.options.reshard_after_forward:
            keep_memory(model.all_blocks)

    def _place_experts(
        self, block: Block, moe: MoELayer, policy: MixedPrecisionPolicy, shard: DeviceMesh
    ) -> set[nn.Parameter]:
        """Over "ep", if it has several ranks, and the share of each over "fsdp" likewise; what needs no FSDP2 then."""
        fsdp, ep, experts = self.device_mesh["fsdp"], self.device_mesh["ep"], moe.experts
        experts.keeps_copies = False  # what is sent has the dtype that is multiplied
        if ep.size() == 1:
            if not gathers_experts(self.options, experts.gate_up.shape[0], shard.size()):
                return set()
            dtypes = policy.param_dtype or torch.float32, policy.reduce_dtype or torch.float32
            gathered = GatheredExperts(experts, shard, *dtypes)
            block.register_forward_pre_hook(torch.compiler.disable(lambda *_: gathered.hold()))  # after those of FSDP2
            self._gathered.append(gathered)
            return set(experts.parameters())
        moe.exchange = ExpertParallel(ep.get_group(), experts.gate_up.shape[0], self.options.static_exchange)
        deal_out(experts, ep)
        block.register_forward_pre_hook(hold_experts)  # after those of FSDP2, which go first
        if fsdp.size() == self.options.replicas == 1:
            experts.keeps_copies = True
            return set(experts.parameters())
        placement = partial(placement_of, n_ranks=fsdp.size(), n_shares=ep.size())
        fully_shard(
            experts,
            mesh=self._with_replicas(fsdp),
            mp_policy=policy,
            shard_placement_fn=placement,
            reshard_after_forward=self.options.reshard_after_forward,
        )
        gather_with(block, experts)
        return set()

    def _with_replicas(self, axis: DeviceMesh) -> DeviceMesh:
        """The mesh of one axis, behind that of the replicas if there are several: FSDP2 shards over the last."""
        assert axis.mesh_dim_names is not None
        return self.device_mesh["replica", axis.mesh_dim_names[0]] if self.options.replicas > 1 else axis

    @property
    def _gpt(self) -> Any:
        """The GPT, which is an FSDPModule now."""
        assert self.lightning_module is not None
        return self.lightning_module.model

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Around the micro-batches of an optimizer step but its last."""
        self._set_last_micro_batch(False)
        try:
            yield
        finally:
            self._set_last_micro_batch(True)

    def _set_last_micro_batch(self, is_last: bool) -> None:
        self._is_last_micro_batch = is_last
        if self.options.accumulate_unreduced:
            self._gpt.set_requires_gradient_sync(is_last)

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Of this rank's share of the loss, so that gradients are summed, not averaged: those of an expert come from
        tokens of several ranks already."""
        return super().backward(closure_loss / self.world_size, optimizer, *args, **kwargs)

    def post_backward(self, closure_loss: Tensor) -> None:
        """The routers' gradients become the sums over ranks, in one all-reduce an optimizer step."""
        if not self._is_last_micro_batch:
            return
        gradients = [each.grad for each in router_parameters(self._gpt) if each.grad is not None]
        sums = all_reduce_sums({str(i): gradient for i, gradient in enumerate(gradients)}) if gradients else {}
        for gradient, summed in zip(gradients, sums.values(), strict=True):
            gradient.copy_(summed)

    # ------------------------------------------------------------------------------------- checkpoints

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return ParallelStrategy.lightning_module_state_dict(self)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return ParallelStrategy.optimizer_state(self, optimizer)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        self.checkpoint_io.save_checkpoint(checkpoint, filepath)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        held = {name: Held(tuple(p.shape), held_part(p)[1]) for name, p in self._gpt.named_parameters()}
        verify_together(Path(checkpoint_path))
        return load_training(Path(checkpoint_path), held)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        state = {name: like(full, own.get(name)) for name, full in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        states = []
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            parts = {
                i: {key: like(value, parameters[i]) for key, value in values.items()}
                for i, values in saved["state"].items()
            }
            states.append({**saved, "state": parts})
        ParallelStrategy.load_optimizer_state_dict(self, {"optimizer_states": states})


def begin(layers: list[GatheredExperts]) -> None:
    """A forward pass: the first layer's experts are gathered beside the embedding."""
    for layer in layers:
        layer.forget()
    layers[0].fetch()


def router_parameters(model: GPT) -> list[nn.Parameter]:
    return [parameter for layer in model.moe_layers for parameter in layer.router.parameters()]


def placement_of(parameter: nn.Parameter, n_ranks: int, n_shares: int = 1) -> Shard:
    """Of one of `n_shares` of a parameter: rows, or whole experts. Where the experts cannot be dealt out evenly, a part
    of each, if that can."""
    uneven = parameter.ndim == 3 and parameter.shape[0] // n_shares % n_ranks != 0
    return Shard(1) if uneven and parameter.shape[1] % n_ranks == 0 else Shard(0)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def hold_experts(block: Block, inputs: Any) -> None:
    assert block.moe is not None
    block.moe.experts.hold()


def units_of(model: GPT, alone: set[nn.Parameter]) -> list[list[Block]]:
    """The blocks, each by itself. With `alone`, which needs no FSDP2, those of the main model in groups, as long as
    what else they hold is at most SMALL_UNIT parameters: sending it takes less time than the host needs to begin."""
    units: list[list[Block]] = []
    room = 0
    for block in model.all_blocks:
        size = sum(parameter.numel() for parameter in block.parameters() if parameter not in alone)
        if alone and size <= room and block in model.blocks:
            units[-1].append(block)
        else:
            units.append([block])
            room = SMALL_UNIT
        room -= size
    return units


def fetch_ahead(units: list[list[Block]]) -> None:
    """Let the next unit be gathered while one computes. By itself FSDP2 would begin once the host comes to the next
    block: too late where it does not run far ahead, and certainly where it waits for the number of tokens. In the
    backward pass it begins in time, but only with one of the units where experts are another."""
    parts: list[list[Any]] = []
    for unit in units:
        experts = [block.moe.experts for block in unit if block.moe is not None]
        parts.append([unit[0], *(each for each in experts if isinstance(each, FSDPModule))])
    for before, after in pairwise(parts):
        before[0].set_modules_to_forward_prefetch(after)
        if len(before) + len(after) > 2:
            after[0].set_modules_to_backward_prefetch(before)


def keep_memory(blocks: list[Block]) -> None:
    """What is gathered lies in the same place each time, as CUDA graphs need it. At the peak all of it is there anyway.

    torch has no public way to that.
    """
    for unit in (part for block in blocks for part in block.modules() if isinstance(part, FSDPModule)):
        group = unit._get_fsdp_state()._fsdp_param_group
        for parameter in group.fsdp_params if group is not None else []:
            setattr(parameter, "free_unsharded_param", lambda: None)  # noqa: B010


def gather_with(block: Block, experts: Any) -> None:
    """Let a unit inside `block` be gathered, freed and reduced when the block is, as one unit with two meshes.

    torch 2.13 has a public way for that (`ShardPlacementResult`), 2.11 has none.
    """
    state = experts._get_fsdp_state()
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()
    block.register_forward_pre_hook(state._pre_forward, prepend=True, with_kwargs=True)
    block.register_forward_hook(state._post_forward)


def why_no_cuda_graphs(trainer: pl.Trainer) -> tuple[str, str] | None:
    """Why compiled blocks cannot be recorded, and what would change that; None if they can."""
    if trainer.strategy.root_device.type != "cuda":
        return "there is no CUDA device", "use auto"
    if isinstance(trainer.strategy, ShardedStrategy):
        options = trainer.strategy.options
        if options.reshard_after_forward:
            problem = "weights that are gathered for a block lie elsewhere each time"
            return problem, "set trainer.reshard_after_forward=false, or use auto"
        if options.accumulate_unreduced and trainer.accumulate_grad_batches > 1:
            problem = "gradients that are not sent yet lie where the next micro-batch writes its own"
            return problem, "set trainer.accumulate_unreduced=false, or use auto"
    return None
