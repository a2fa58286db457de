"""Runs that record what each step was; `python recorded_runs.py FILE` trains the configs of a file one after the other
in this process, which with torchrun's variables in its environment is one rank of several."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch.distributed.tensor import DTensor

import moelm
from moelm import command_line
from moelm.config import Config, NamedConfig, load_config, register, to_yaml
from moelm.train import train
from moelm.training import saving
from moelm.training.shards import held_part
from moelm.training.weight_files import CheckpointError


@register("callback", "full_disk", NamedConfig)
class FullDisk(Callback):
    """What rank 1 writes at step 2 does not fit."""

    def __init__(self, config: NamedConfig, run: Config) -> None:
        self.write, self.run_folder = saving.write_weights, run.run_folder

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        def write(tensors: Any, file: Path, places: Any) -> None:
            if trainer.global_rank == 1 and "step-00000002" in str(file):
                raise OSError(28, "No space left on device")
            self.write(tensors, file, places)

        saving.write_weights = write

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        saving.write_weights = self.write
        (self.run_folder / f"error-{trainer.global_rank}.txt").write_text(str(exception))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


@register("callback", "tape", NamedConfig)
class Tape(Callback):
    """Writes `tape-RANK.pt` into the run's folder: by step what the ranks must agree on."""

    def __init__(self, config: NamedConfig, run: Config) -> None:
        self.run_folder = run.run_folder
        self.steps: list[dict[str, Any]] = []
        self.router_dtypes: set[Any] = set()
        self.samples: list[Any] = []
        self.sent_early = False  # whether a shard of a gradient was there before the last micro-batch of a step

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        held = sum(held_part(parameter)[0].numel() for parameter in pl_module.model.parameters())
        self.share = held / sum(parameter.numel() for parameter in pl_module.model.parameters())
        for layer in pl_module.model.moe_layers:
            self._watch(layer.router)
        if pl_module.config.trainer.compile != True:  # noqa: E712
            projection = pl_module.model.blocks[0].attention.out
            projection.register_forward_pre_hook(lambda module, _: setattr(self, "multiplied", module.weight))

    def _watch(self, router: Any) -> None:
        project = router.project

        def watched(x_TD: torch.Tensor) -> torch.Tensor:
            logits_TE = project(x_TD)
            if torch.compiler.is_compiling():
                return logits_TE  # what follows would break the graph
            rounded = torch.equal(router.weight, router.weight.bfloat16().to(router.weight.dtype))
            state = "rounded" if rounded else "not rounded"
            self.router_dtypes.add((router.weight.dtype, state, logits_TE.dtype))
            return logits_TE

        router.project = watched

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.seed = torch.initial_seed()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.samples.append((pl_module.step, batch["sample_ids"].tolist()))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        gradients = {name: whole(p.grad) for name, p in pl_module.model.named_parameters()}
        self.steps.append({"gradients": {name: g.clone() for name, g in gradients.items()}})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.is_step_end:
            last = pl_module.last_step
            weights = {name: whole(p) for name, p in pl_module.model.named_parameters()}
            self.steps[-1] |= {
                **{"loss": float(last.loss), "norm": float(pl_module.grad_norm), "load": last.load_ME.clone()},
                **{"bias": pl_module.expert_bias_ME, "weights": {name: w.clone() for name, w in weights.items()}},
            }

        elif any(isinstance(parameter, DTensor) and parameter.grad is not None for parameter in pl_module.parameters()):
            self.sent_early = True

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        tape = {"steps": self.steps, "router": self.router_dtypes, "share": self.share, "samples": self.samples}
        tape |= {"sent_early": self.sent_early, "seed": self.seed}
        tape["bytes_left"] = self.multiplied.untyped_storage().nbytes() if hasattr(self, "multiplied") else None
        tape["copies"] = [name for name, _ in pl_module.named_buffers() if name.endswith("_copy")]
        tape["val_ce"] = pl_module.evaluation["all"].ce
        torch.save(tape, self.run_folder / f"tape-{trainer.global_rank}.pt")


def run_all(configs: list[Config], folder: Path, n_ranks: int, timeout: float = 200) -> None:
    """Each config as a run of `n_ranks` processes; all of them in the same processes."""
    jobs = []
    for i, config in enumerate(configs):
        (folder / f"{i}.yaml").write_text(to_yaml(config))
        jobs.append(str(folder / f"{i}.yaml"))
    (folder / "jobs.json").write_text(json.dumps(jobs))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    shared = {"WORLD_SIZE": str(n_ranks), "LOCAL_WORLD_SIZE": str(n_ranks), "GROUP_RANK": "0", "OMP_NUM_THREADS": "1"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "tests"}
    shared["PYTHONPATH"] = os.pathsep.join((str(Path(moelm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")))
    command = [sys.executable, __file__, str(folder / "jobs.json")]
    processes, logs = [], []
    for rank in range(n_ranks):
        logs.append((folder / f"rank-{rank}.log").open("w+"))
        environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(subprocess.Popen(command, env=environment, stdout=logs[-1], stderr=subprocess.STDOUT))
    deadline = time.monotonic() + timeout
    try:  # when one fails the others wait for it
        while any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes) or time.monotonic() > deadline:
                break
            time.sleep(0.05)
    finally:
        said = []
        for process, log in zip(processes, logs, strict=True):
            failed = process.poll() != 0
            process.kill()
            process.wait()
            log.seek(0)
            said.append(log.read()[-3000:] if failed else "")
            log.close()
    assert not any(said), "\n".join(said)


if __name__ == "__main__":
    torch.set_num_threads(1)
    command_line.import_builtins()
    for job in json.loads(Path(sys.argv[1]).read_text()):
        with contextlib.suppress(CheckpointError):  # of a full disk
            train(load_config(job, []), resume="auto")
