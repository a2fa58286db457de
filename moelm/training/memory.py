"""Does a run fit this machine? Known from its shapes before memory is taken: Linux promises more than it has, and then
kills."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import lightning.pytorch as pl
import torch

from moelm.config import Config, ConfigError, UserError
from moelm.model.size import training_memory

PROCESS_BYTES = 2**28  # what Python and torch take, at least
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of versions 2 and 1


def check_memory(config: Config, trainer: pl.Trainer) -> None:
    """Raises ConfigError where weights, gradients and moments alone exceed what there is, or the estimate of all, which
    is that of a GPU, does so by more than a factor of two."""
    sharded, device = config.trainer.strategy == "fsdp", trainer.strategy.root_device
    n_replicas = config.trainer.replicas if sharded else trainer.world_size
    needed = training_memory(config, max(1, trainer.world_size // n_replicas), n_replicas)
    on_host = device.type == "cpu"  # whose memory all ranks share
    n_local, process, there = (trainer.num_devices if on_host else 1), on_host * PROCESS_BYTES, device_memory(device)
    states, total = (process + n for n in (needed.weights + needed.gradients + needed.optimizer, needed.total))
    if n_local * max(states, total // 2) <= there:
        return
    what = f"{total / 2**30:,.2f} GiB" + (f" on each of {n_local} devices" if n_local > 1 else "")
    problem = f"a step takes about {what}, and there are {there / 2**30:,.2f} GiB"
    if n_local * states <= there:
        key, remedy = "optim.micro_batch_size", "lower it or data.seq_len, or set trainer.activation_checkpointing"
    elif n_local > 1 and states <= there:
        key, remedy = "trainer.devices", "lower it"
    else:
        key, remedy = "model", "make it smaller, or share it between devices with trainer.strategy=fsdp"
    raise ConfigError(key, problem, f"{remedy}; see python -m moelm.info --config")


def device_memory(device: torch.device) -> int:
    """Bytes; of the host those that this process may have."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    limits += [limit for limit in resource.getrlimit(resource.RLIMIT_AS) if limit != resource.RLIM_INFINITY]
    texts = [file.read_text().strip() for file in map(Path, CGROUP_LIMITS) if file.is_file()]
    return min([*limits, *(int(text) for text in texts if text.isdecimal())])


def out_of_memory(error: RuntimeError) -> UserError | None:
    """What to say of torch's error if it is that."""
    if not (isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)):
        return None
    said = " ".join(str(error).split())[:300]
    remedy = "lower optim.micro_batch_size, set trainer.activation_checkpointing, or make the model smaller"
    return UserError(f"out of memory: {said}\n  remedy: {remedy}; see python -m moelm.info --config")
