"""What each of several devices holds and sends, by strategy, known from the config alone (docs/parallelism.md)."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

from moelm.config import Config, ConfigError, MoEConfig, TrainerConfig
from moelm.model.size import row_bytes, shapes_of, training_memory

BUSIEST = 1.5  # times its share has the rank with most choices, in the first steps of a run
SMALL_UNIT = 2**24  # parameters that FSDP2 gathers together, of blocks that hold less; where it gathers no experts


@dataclass(frozen=True)
class OnDevices:
    strategy: str  # as the config would say it
    memory: int  # bytes on a device at the peak of a step
    sent: int  # bytes that a device sends in an optimizer step


@dataclass(frozen=True)
class Counts:
    """Parameters, by how FSDP2 treats them."""

    routers: int
    experts: int
    blocks: int  # what else is in blocks
    rest: int
    largest_experts: int  # of one block
    largest_block: int  # what else is in one block

    @property
    def total(self) -> int:
        return self.routers + self.experts + self.blocks + self.rest


def on_devices(config: Config, n_devices: int) -> list[OnDevices]:
    """ddp, fsdp, and fsdp with each degree of expert parallelism that the experts and the devices allow."""
    check_degrees(config.trainer, n_devices)
    counts, moe = count(config), config.model.moe
    degrees = [1]
    if moe is not None and config.model.moe_layers and moe.router.routing == "token_choice":
        n_sharing = n_devices // config.trainer.replicas
        degrees = [n for n in range(1, n_sharing + 1) if n_sharing % n == moe.n_experts % n == 0]
    return [_ddp(config, counts, n_devices), *(_fsdp(config, counts, n_devices, n) for n in degrees)]


def check_degrees(options: TrainerConfig, n_devices: int) -> None:
    """Can `n_devices` share experts and make replicas as they are told? Raises ConfigError."""
    n_left = n_devices
    for key, value in (("expert_parallel", options.expert_parallel), ("replicas", options.replicas)):
        if n_left % value:
            problem = f"{value} does not divide the {n_devices} devices"
            if n_left < n_devices:
                problem += f" / {n_devices // n_left} (trainer.expert_parallel)"
            raise ConfigError(f"trainer.{key}", problem, "choose a divisor, or other trainer.devices")
        n_left //= value


def count(config: Config) -> Counts:
    model = shapes_of(config.model)
    total = sum(parameter.numel() for parameter in model.parameters())
    routers = sum(parameter.numel() for layer in model.moe_layers for parameter in layer.router.parameters())
    experts, others = [0], [0]
    for block in model.all_blocks:
        routed = () if block.moe is None else block.moe.experts.parameters()
        router = () if block.moe is None else block.moe.router.parameters()
        experts.append(sum(parameter.numel() for parameter in routed))
        others.append(sum(p.numel() for p in block.parameters()) - experts[-1] - sum(p.numel() for p in router))
    rest = total - routers - sum(experts) - sum(others)
    return Counts(routers, sum(experts), sum(others), rest, max(experts), max(others))


def ranks_of_token(moe: MoEConfig, n_ranks: int) -> float:
    """To how many ranks a token is sent, on average over choices of equally likely experts."""
    n_away = comb(moe.n_experts - moe.n_experts // n_ranks, moe.top_k) / comb(moe.n_experts, moe.top_k)
    return n_ranks * (1 - n_away)


def _ddp(config: Config, counts: Counts, n_devices: int) -> OnDevices:
    memory = training_memory(config, n_replicas=n_devices)
    buckets = 4 * (counts.total - counts.experts)  # of gradients, which stay
    experts = memory.gradients - buckets
    both = experts + memory.activations if memory.accumulates else max(experts, memory.activations)
    sent = 2 * memory.gradients * (n_devices - 1) // n_devices
    return OnDevices("ddp", memory.weights + memory.optimizer + buckets + both + memory.working, sent)


def gathers_experts(options: TrainerConfig, n_experts: int, n_ranks: int) -> bool:
    """With `fsdp`, without `expert_parallel`: are experts gathered and reduced by themselves, whole ones of each rank
    and kept until the next step? Else FSDP2 does it with the rest of their block."""
    stay = not options.reshard_after_forward and not options.accumulate_unreduced
    return stay and options.replicas == 1 < n_ranks and n_experts % n_ranks == 0


def _fsdp(config: Config, counts: Counts, n_devices: int, n_ep: int) -> OnDevices:
    mixed, moe, n_replicas = config.trainer.precision == "bf16-mixed", config.model.moe, config.trainer.replicas
    s, W = 2 if mixed else 4, n_devices // n_replicas  # ranks that share a replica
    n_fsdp = W // n_ep
    tokens = config.optim.micro_batch_size * config.data.seq_len
    n_micro_batches = max(1, config.optim.batch_tokens // (tokens * n_devices))
    memory = training_memory(config)
    held = counts.routers + (counts.total - counts.routers) // W
    states = (memory.weights + memory.optimizer) * held // counts.total
    # two units gathered, or all, and the gradients of one; the rest with its gradients
    keeps, experts_stay = not config.trainer.reshard_after_forward, n_ep > 1 and n_fsdp == n_replicas == 1
    unit, experts_of_unit = counts.largest_block, counts.largest_experts // n_ep
    gathers = moe is not None and n_ep == 1 and gathers_experts(config.trainer, moe.n_experts, n_devices)
    if experts_stay or gathers:
        unit = min(max(unit, SMALL_UNIT), counts.blocks)
    if experts_stay:
        experts_of_unit = 0
    gathered_blocks = counts.blocks if keeps else min(2 * unit, counts.blocks)
    gathered_experts = counts.experts // n_ep if keeps else 2 * experts_of_unit
    whole = s * (unit + experts_of_unit + gathered_blocks) + 8 * counts.rest
    if not experts_stay:
        whole += s * gathered_experts
    elif mixed:
        whole += 2 * counts.experts // n_ep  # working copies
    r = 2 if config.trainer.reduce_dtype == "bfloat16" else 4
    if gathers:
        whole += (2 * r - s) * experts_of_unit  # gradients of a layer, and those of the one before on their way
    copies = 2 * counts.total if mixed else 0
    activations, gradients = memory.activations, 4 * held
    both = gradients + activations if n_micro_batches > 1 else max(gradients, activations)
    gathered, reduced = n_micro_batches, 1 if config.trainer.accumulate_unreduced else n_micro_batches
    times = 1 if keeps else 2  # that a block is gathered
    others = (times * s * gathered + r * reduced) * counts.blocks + 4 * (gathered + reduced) * counts.rest
    experts = (times * s * (1 if gathers else gathered) + r * reduced) * (counts.experts // n_ep)
    sent = others * (W - 1) / W + experts * (n_fsdp - 1) / n_fsdp + 8 * counts.routers * (n_devices - 1) / n_devices
    of_replica = r * (counts.blocks + counts.experts) + 4 * counts.rest
    sent += 2 * reduced * of_replica / W * (n_replicas - 1) / n_replicas
    if n_ep > 1 and moe is not None:
        static = config.trainer.static_exchange
        n_sent = n_ep if static else ranks_of_token(moe, n_ep)
        rows = tokens * n_sent * len(config.model.routed_layers)
        again = 2 if config.trainer.activation_checkpointing == "full" else 0
        sent += n_micro_batches * (4 + again) * rows * s * config.model.d_model * (n_ep - 1) / n_ep
        choices = tokens * moe.choices_per_token * len(config.model.routed_layers)
        sent += n_micro_batches * 12 * choices * (n_ep - 1)  # ids and gates to all, and the gradients of gates back
        kept = tokens * (n_sent - 1) * s * config.model.d_model  # tokens of others, for backward
        kept += 13 * tokens * moe.choices_per_token * n_ep  # the plan: gates, rows, choices
        row = row_bytes(config.model, mixed, config.trainer.compile is not False)
        kept += ((n_ep if static else BUSIEST) - 1) * tokens * moe.choices_per_token * row
        both += int(kept * (1 if again else len(config.model.routed_layers)))
        if static:  # of one layer, gradients of rows
            width = 3 * moe.d_expert + config.model.d_model // moe.router.n_chunks
            both += (n_ep - 1) * tokens * moe.choices_per_token * s * width
        both += 8 * choices * n_ep if again else 0  # what all ranks chose is kept
    name = "fsdp" + (f", replicas={n_replicas}" if n_replicas > 1 else "")
    name += f", expert_parallel={n_ep}" if n_ep > 1 else ""
    name += ", static_exchange=true" if n_ep > 1 and config.trainer.static_exchange else ""
    name += ", reshard_after_forward=false" if keeps else ""
    return OnDevices(name, states + both + memory.working - copies + whole, int(sent))
