"""The Lightning Trainer that a config asks for."""

from __future__ import annotations

import dataclasses
import logging
import os
import warnings
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

from moelm.callbacks.profile import Profile
from moelm.callbacks.progress_bar import StepProgressBar
from moelm.config import OWN_TRAINER_KEYS, Config, ConfigError, build
from moelm.model.devices import check_degrees
from moelm.moe.kernels import HAS_TRITON, INTERPRETED
from moelm.training.preemption import StopSignals
from moelm.training.saving import FolderCheckpointIO, StepCheckpoint
from moelm.training.stall import StallWatch
from moelm.training.strategies import build_strategy, why_no_cuda_graphs


def build_trainer(config: Config, resume_step: int | None = None) -> pl.Trainer:
    """`resume_step`: TensorBoard hides what was logged after it, so that a curve never runs backward."""
    options = {
        name: value
        for name, value in dataclasses.asdict(config.trainer).items()
        if name not in OWN_TRAINER_KEYS and value is not None
    }
    progress = options.pop("enable_progress_bar")
    if options["accelerator"] != "cpu":  # Lightning's auto would take an Apple GPU, which has no float64
        options["accelerator"] = "cuda" if torch.cuda.is_available() or options["accelerator"] != "auto" else "cpu"
    _check_fused(config, options["accelerator"])
    if options["accelerator"] != "cpu" and not torch.cuda.is_available():
        problem = f"{config.trainer.accelerator}, but there is no CUDA device"
        raise ConfigError("trainer.accelerator", problem, "use cpu or auto")
    strategy = build_strategy(config)
    options |= {"strategy": strategy} if strategy is not None else {}
    callbacks: list[Callback] = [Profile(config)] if config.trainer.profile else []
    callbacks += [build("callback", callback, config) for callback in config.callbacks]
    if progress:
        callbacks.append(StepProgressBar(config))
    if config.trainer.stall_timeout_s is not None:
        callbacks.append(StallWatch(config.trainer.stall_timeout_s))
    torch.set_float32_matmul_precision(config.trainer.float32_matmul_precision)
    _silence_lightning()
    try:
        trainer = pl.Trainer(
            **options,
            max_epochs=-1,
            check_val_every_n_epoch=None,
            val_check_interval=config.data.val_every_n_steps,
            use_distributed_sampler=False,
            enable_model_summary=False,
            inference_mode=config.trainer.strategy != "fsdp",  # what FSDP2 makes in that mode would serve no training
            logger=RunLogger(
                config.run.dir,
                name=config.run_name,
                version="",
                purge_step=(resume_step or 0) + 1,  # 0 too: a run that died before its first checkpoint begins anew
            ),
            callbacks=[*callbacks, StepCheckpoint(config)],
            plugins=[FolderCheckpointIO(config)],
            enable_progress_bar=progress,
        )
    except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
        raise ConfigError("trainer", f"Lightning refuses it: {' '.join(str(error).split())}") from error
    _check_nodes(trainer)
    _set_intervals(trainer, config)
    _check_cuda_graphs(trainer, config)
    _replace_signals(trainer, StopSignals(config.trainer.stop_within_s))
    return trainer


def _check_nodes(trainer: pl.Trainer) -> None:
    """Alone a process would wait half an hour for others that nobody told of it."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    started = environment is not None and environment.creates_processes_externally
    if trainer.num_nodes > 1 and not started and "MASTER_ADDR" not in os.environ:
        problem = f"{trainer.num_nodes}, but no launcher started this process, and MASTER_ADDR is not set"
        raise ConfigError("trainer.num_nodes", problem, "use torchrun or srun, see docs/parallelism.md")


def _check_fused(config: Config, accelerator: str) -> None:
    moe = config.model.moe
    if moe is None or moe.experts.backend != "fused" or INTERPRETED:
        return
    if accelerator == "cpu" or not HAS_TRITON:
        problem = "fused needs " + ("a CUDA device" if accelerator == "cpu" else "triton, which is not installed")
        raise ConfigError("model.moe.experts.backend", problem, "use auto, grouped or loop")


class RunLogger(TensorBoardLogger):
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """One event for all scalars of a step: an event each costs a millisecond for some dozens of tags."""
        values = [Summary.Value(tag=tag, simple_value=float(value)) for tag, value in metrics.items()]
        self.experiment._get_file_writer().add_summary(Summary(value=values), step)

    def save(self) -> None:
        """Without the empty hparams.yaml: the run folder has config.yaml."""
        self.experiment.flush()


def _set_intervals(trainer: pl.Trainer, config: Config) -> None:
    """Accumulation and validation in micro-batches, now that the number of devices is known."""
    check_degrees(config.trainer, trainer.world_size)
    micro_tokens = config.optim.micro_batch_size * config.data.seq_len * trainer.world_size
    if config.optim.batch_tokens % micro_tokens:
        multiple = max(1, round(config.optim.batch_tokens / micro_tokens)) * micro_tokens
        raise ConfigError(
            "optim.batch_tokens",
            f"{config.optim.batch_tokens} is not a multiple of micro_batch_size x seq_len x devices = {micro_tokens}",
            f"lower optim.micro_batch_size, or try {multiple}",
        )
    trainer.accumulate_grad_batches = config.optim.batch_tokens // micro_tokens
    trainer.val_check_interval = config.data.val_every_n_steps * trainer.accumulate_grad_batches


def _check_cuda_graphs(trainer: pl.Trainer, config: Config) -> None:
    why_not = why_no_cuda_graphs(trainer)
    if config.trainer.compile == "cuda_graphs" and why_not:
        problem, remedy = why_not
        raise ConfigError("trainer.compile", f"cuda_graphs: {problem}", remedy)


def _replace_signals(trainer: pl.Trainer, signals: StopSignals) -> None:
    """Lightning's handlers wait for the other ranks, which hangs, and so does the host before every micro-batch, to ask
    whether one was told to end, while the GPU runs dry."""
    trainer._signal_connector = signals  # type: ignore[assignment]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def _silence_lightning() -> None:
    """Advice that does not hold here: the loader has no workers on purpose, the epoch is endless on purpose; and
    its announcements, which `moelm.train` makes in fewer lines."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)  # of checkpointing and in-place ops
    for message in (
        ".*does not have many workers.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*no `epoch`.*",
        ".*`max_epochs`.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*`broadcast_buffers` is deprecated.*",  # since torch 2.13, and 2.11 has nothing else
        ".*Slicing a flattened dim from root mesh.*",  # up to torch 2.13 the only way
        ".*recommended to use `self.log.*sync_dist=True.*",
        ".*FSDP2-wrapped module .* returned a view tensor.*",  # statistics, into which nothing writes
    ):
        warnings.filterwarnings("ignore", message=message)


def hardware(trainer: pl.Trainer) -> str:
    """One phrase for the console: what this run runs on."""
    device: Any = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{trainer.world_size} x {name}" if trainer.world_size > 1 else name
