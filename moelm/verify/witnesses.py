"""Callbacks for runs under test, as a plugin: one disturbs a run, the others write down what it does."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from dataclasses import dataclass, field
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.distributed.tensor import DTensor

from moelm.config import Config, ConfigError, NamedConfig, register, setting
from moelm.moe.types import TokenChoice


@dataclass
class MishapConfig(NamedConfig):
    what: str = setting("SIGTERM", allowed=("SIGTERM", "SIGINT", "SIGUSR1", "SIGKILL", "nan", "error"))
    when: str = setting("forward", allowed=("forward", "validation", "save"))
    step: int = setting(1, ge=1)  # the optimizer step that is being made, or validated, or saved
    ranks: list[int] = field(default_factory=lambda: [0])


@register("callback", "verify_mishap", MishapConfig)
class Mishap(Callback):
    """Once. `mishap-STEP-RANK` in the run's folder then holds the time, in seconds since 1970."""

    def __init__(self, config: MishapConfig, run: Config) -> None:
        self.config, self.folder = config, run.run_folder
        self.hook: Any = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._perhaps("forward", trainer, pl_module, pl_module.step + 1)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.hook is not None:
            self.hook.remove()

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._perhaps("validation", trainer, pl_module, pl_module.step)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        self._perhaps("save", trainer, pl_module, pl_module.step)

    def _perhaps(self, now: str, trainer: Any, module: Any, step: int) -> None:
        what, mark = self.config.what, self.folder / f"mishap-{step}-{trainer.global_rank}"
        if now != self.config.when or step != self.config.step or trainer.global_rank not in self.config.ranks:
            return
        if mark.exists():
            return
        mark.write_text(str(time.time()))
        if what == "error":
            raise RuntimeError(f"planted on rank {trainer.global_rank}")
        if what == "nan":
            self.hook = module.model.embedding.register_forward_hook(lambda *outcome: outcome[-1] * float("nan"))
            return
        for pid in (*(worker.pid for worker in active_children()), os.getpid()):  # as a terminal or SLURM does
            if pid is not None:
                os.kill(pid, getattr(signal, what))
        time.sleep(0.1)  # a thread takes note


class Witness(Callback):
    """Appends lines of JSON to a file of its rank in the run's folder, each in one write: a kill leaves whole lines."""

    kind = ""

    def __init__(self, config: NamedConfig, run: Config) -> None:
        self.run = run

    def write(self, trainer: Any, line: dict[str, Any]) -> None:
        with (self.run.run_folder / f"{self.kind}-{trainer.global_rank}.jsonl").open("ab", buffering=0) as file:
            file.write(json.dumps({"pid": os.getpid(), **line}).encode() + b"\n")


@register("callback", "verify_tape", NamedConfig)
class Tape(Witness):
    """By optimizer step: a hash of this rank's batches, in their order, and the loss of each."""

    kind = "tape"

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._begin()

    def _begin(self) -> None:
        self.batches, self.losses = hashlib.sha256(), list[str]()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        for key in ("sample_ids", "inputs", "targets"):
            self.batches.update(batch[key].cpu().numpy().tobytes())
        self.losses.append(float(outputs["loss"]).hex())
        if pl_module.is_step_end:
            line = {"step": pl_module.step, "batches": self.batches.hexdigest(), "losses": self.losses}
            self.write(trainer, line)
            self._begin()


@dataclass
class CountsConfig(NamedConfig):
    def check(self, key: str, config: Config) -> None:
        if config.model.moe is None:
            raise ConfigError(key, "a dense model counts no experts", "remove it, or set model.moe")


@register("callback", "verify_counts", CountsConfig)
class Counts(Witness):
    """By optimizer step: choices and tokens, counted at the outputs of this rank's routers and in its batches; and what
    the run says of all ranks."""

    kind = "counts"

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        n_experts = pl_module.config.model.moe.n_experts
        self.load = [[0] * n_experts for _ in pl_module.model.moe_layers]
        self.tokens = self.n_micro_batches = 0
        for i, layer in enumerate(pl_module.model.moe_layers):
            layer.router.register_forward_hook(lambda router, given, made, i=i: self._count(router, i, made[0]))

    def _count(self, router: Any, layer: int, routing: Any) -> None:
        if not router.training or torch._C._current_graph_task_id() != -1:  # recomputed in a backward pass
            return
        if isinstance(routing, TokenChoice):
            for expert in routing.expert_ids_TK.flatten().tolist():
                if expert < len(self.load[layer]):
                    self.load[layer][expert] += 1
        else:
            for expert, token_ids in enumerate(routing.token_ids_EC.tolist()):
                self.load[layer][expert] += len(token_ids)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.tokens += batch["inputs"].numel()
        self.n_micro_batches += 1
        if not pl_module.is_step_end:
            return
        bias_ME = pl_module.expert_bias_ME
        said = {
            "step": pl_module.step,
            "load": pl_module.last_step.load_ME.long().tolist(),
            "bias": None if bias_ME is None else bias_ME.tolist(),
        }
        found = {"load": self.load, "tokens": self.tokens, "micro_batches": self.n_micro_batches}
        self.write(trainer, {"said": said, "found": found})
        self.load = [[0] * len(layer) for layer in self.load]


@register("callback", "verify_gradients", NamedConfig)
class Gradients(Callback):
    """Leaves `gradients-RANK.pt`: by optimizer step what the ranks must agree on, whole tensors."""

    def __init__(self, config: NamedConfig, run: Config) -> None:
        self.run, self.steps = run, list[dict[str, Any]]()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.steps.append({"gradients": {name: whole(p.grad) for name, p in pl_module.model.named_parameters()}})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not pl_module.is_step_end:
            return
        last, bias_ME = pl_module.last_step, pl_module.expert_bias_ME
        self.steps[-1] |= {
            **{"loss": float(last.loss), "norm": float(pl_module.grad_norm)},
            "weights": {name: whole(p) for name, p in pl_module.model.named_parameters()},
            "load": None if last.load_ME is None else last.load_ME.cpu(),
            "bias": None if bias_ME is None else bias_ME.cpu(),
        }

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        torch.save(self.steps, self.run.run_folder / f"gradients-{trainer.global_rank}.pt")


def whole(tensor: Tensor) -> Tensor:
    """A copy on the CPU; of a sharded one all ranks must ask for it."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().clone()


@register("callback", "verify_syncs", NamedConfig)
class Syncs(Witness):
    """In order of time: each file or folder that was synced, and each checkpoint with its files when it was renamed
    into place."""

    kind = "syncs"

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        fsync, replace = os.fsync, os.replace

        def noted_fsync(descriptor: int) -> None:
            fsync(descriptor)
            self.write(trainer, {"at": time.monotonic(), "synced": identity(os.fstat(descriptor))})

        def noted_replace(source: Any, target: Any) -> None:
            stage, name = Path(source), Path(target).name
            if name.startswith("step-") and stage.is_dir():
                files = {file.name: identity(file.stat()) for file in (stage, *stage.iterdir())}
                folder = identity(stage.parent.stat())
                line = {"at": time.monotonic(), "checkpoint": name, "files": files, "folder": folder}
                self.write(trainer, line)
            replace(source, target)

        for name, noted in (("fsync", noted_fsync), ("replace", noted_replace)):
            setattr(os, name, noted)


def identity(facts: os.stat_result) -> list[int]:
    return [facts.st_dev, facts.st_ino]
