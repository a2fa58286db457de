"""Real runs of `moelm.train` on the machine at hand: each rank a process, forked from one that has imported everything,
so that a run begins in half a second."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import lcm
from multiprocessing import get_all_start_methods, get_context, set_start_method
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_only

from moelm import command_line, train
from moelm.config import Config, UserError, load_config, to_dict
from moelm.data.prepare import prepare
from moelm.training.checkpoint_io import newest_checkpoint, step_of
from moelm.training.preemption import EXIT_CODE

PLUGIN = "moelm.verify.witnesses"
LIMIT_S = 600.0  # of a run that ends by itself
_LIBRARY = sysconfig.get_path("stdlib")
TINY: dict[str, Any] = {  # what can go wrong in a run is on
    "model": {
        **{"n_layers": 2, "d_model": 32, "vocab_size": 320, "dropout": 0.1, "init": {"std": 0.1}},
        "attention": {"name": "gqa", "n_heads": 4, "n_kv_heads": 2},
        "moe": {
            **{"n_experts": 8, "top_k": 2, "d_expert": 16},
            "router": {"name": "top_k", "score": "sigmoid", "selection_bias": True, "jitter": 0.1},
            "balancers": [{"name": "loss_free", "rate": 0.01}, "switch", "z_loss"],
        },
    },
    "data": {
        "corpus": {
            "sources": [
                {"name": "files", "path": f"{_LIBRARY}/{domain}", "pattern": pattern, "separator": ""}
                for domain, pattern in (("json", "*coder.py"), ("curses", "*.py"))
            ],
            "tokenizer": {"vocab_size": 320},
            "val_fraction": 0.1,
        },
        "seq_len": 64,
    },
    "optim": {"batch_tokens": 1024, "micro_batch_size": 4, "lr": 3e-3},
    "trainer": {"accelerator": "cpu"},
}
SHRUNK = (
    *("trainer.enable_progress_bar=false", "trainer.log_every_n_steps=1", "trainer.limit_val_batches=2"),
    *("trainer.profile=false", "optim.schedule={name: cosine, warmup_steps: 2}", "checkpoint.keep_last=2"),
)


class Broken(Exception):  # noqa: N818
    """A promise is not kept: how."""


class Row(NamedTuple):
    """A promise. `check` returns what it measured, in words, and raises Broken."""

    name: str
    check: Callable[[], str]


class Lab:
    """The config under test, and the folder of its runs: in `run.dir`, since that file system is the one that counts.
    It stays where something failed."""

    def __init__(
        self,
        file: str | None,
        overrides: Sequence[str],
        devices: Sequence[int] = (),
        n: int = 0,
        plugins: Sequence[str] = (),
    ) -> None:
        """`n`: repetitions of what is random. Raises UserError."""
        self.plugins = [PLUGIN, *plugins]
        command_line.import_plugins(self.plugins)
        self.is_tiny, self.n = file is None, n
        self.runs: list[Run] = []
        self._straight: dict[tuple[Any, ...], Run] = {}
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as tiny:
            json.dump(TINY, tiny)
            tiny.flush()
            config = load_config(file or tiny.name, [*overrides, *SHRUNK])
        self.on_cuda = config.trainer.accelerator != "cpu" and torch.cuda.is_available()
        self.most = torch.cuda.device_count() if self.on_cuda else 8
        self.devices = tuple(devices) or (1, 2)[: self.most]
        if not 1 <= min(self.devices) <= max(self.devices) <= self.most:
            raise UserError(
                f"--devices: 1 to {self.most} here\n  remedy: trainer.accelerator=cpu takes processes for devices"
            )
        micro_batch = self._micro_batch(config)
        try:
            Path(config.run.dir).mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix="verify-", dir=config.run.dir)).resolve()
        except OSError as error:
            raise UserError(f"run.dir: {config.run.dir}: {error.strerror}") from None
        own = [] if file else [f"data.corpus.dir={self.folder / 'data'}"]
        if file is None:
            file = str(self.folder / "tiny.yaml")
            Path(file).write_text(json.dumps(TINY))
        self.arguments = ["--config", file, *overrides, *SHRUNK, *own, f"run.dir={self.folder}"]
        self.arguments.append(f"optim.micro_batch_size={micro_batch}")
        self.config = load_config(file, self.arguments[2:])
        self.shards = prepare(self.config.data.corpus, progress=False)
        self.other_disk = other_disk(self.folder)
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # a process that asked CUDA itself cannot be forked
        self.context = get_context("forkserver")
        self.context.set_forkserver_preload([__name__])

    def _micro_batch(self, config: Config) -> int:
        """Sequences, at most as many as the config has, so that a step can be divided among all numbers of devices."""
        samples, wanted = config.optim.batch_tokens // config.data.seq_len, config.optim.micro_batch_size
        ranks = lcm(*self.devices)
        if samples % ranks:
            problem = f"a step of {samples} sequences cannot be divided among {ranks} devices"
            raise UserError(f"--devices: {problem}\n  remedy: --devices 1, or other optim.batch_tokens")
        ranks = lcm(ranks, 4) if samples % lcm(ranks, 4) == 0 else ranks
        return max(n for n in range(1, wanted + 1) if samples % (ranks * n) == 0)

    @property
    def bound(self) -> float:
        """How far float numbers of runs that ought to be the same may differ: relative L2 of a tensor."""
        return 1e-3 if self.on_cuda else 0.0  # some kernels of CUDA add in any order

    @property
    def batch_samples(self) -> int:
        return self.config.optim.batch_tokens // self.config.data.seq_len

    def close(self, keep: bool) -> None:
        for run in self.runs:
            run.kill()
        for folder in (self.other_disk, None if keep else self.folder):
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)

    def start(
        self,
        name: str,
        *overrides: str,
        ranks: int = 1,
        resume: bool = False,
        witnesses: Iterable[str | Mapping[str, Any]] = (),
        as_command: bool = False,
    ) -> Run:
        """Begin a run in the folder `name`; several ranks as torchrun starts them, or with `as_command` as Lightning
        does in `python -m moelm.train`."""
        callbacks = [*to_dict(self.config)["callbacks"], "verify_tape", *witnesses]
        spread = [f"trainer.devices={ranks}", f"trainer.strategy={'ddp' if ranks > 1 else 'auto'}"]
        arguments = [*self.arguments, *spread, *overrides, f"run.name={name}", f"callbacks={json.dumps(callbacks)}"]
        config = load_config(arguments[1], arguments[2:])
        arguments += [f"--plugin={plugin}" for plugin in self.plugins] + (["--resume=auto"] if resume else [])
        if resume:
            time.sleep(1.01 - time.time() % 1)  # TensorBoard orders what processes wrote by the second
        environment = {} if self.other_disk is None else {"TMPDIR": str(self.other_disk)}
        log = self.folder / f"{name}.log"
        processes: list[Any] = []
        if as_command:
            command = [sys.executable, "-m", "moelm.train", *arguments]
            with log.open("ab") as out:
                processes = [Command(command, stdout=out, stderr=out, env={**os.environ, **environment})]
        else:
            port = free_port()
            for rank in range(ranks):
                variables = environment | (torchrun_variables(rank, ranks, port) if ranks > 1 else {})
                process = self.context.Process(target=train_here, args=(arguments, str(log), variables))
                process.start()
                processes.append(process)
        self.runs.append(Run(config, processes, log))
        return self.runs[-1]

    def straight(self, *overrides: str, ranks: int, witnesses: Iterable[str] = ()) -> Run:
        """A run that nothing disturbs, one for each kind."""
        key = (*overrides, ranks)
        if key not in self._straight:
            name = f"straight-{len(self._straight)}"
            self._straight[key] = self.start(name, *overrides, ranks=ranks, witnesses=witnesses)
            self._straight[key].must_end_with(0)
        return self._straight[key]


class Command(subprocess.Popen[bytes]):
    """Looks like what multiprocessing starts."""

    @property
    def exitcode(self) -> int | None:
        return self.poll()


class Run:
    def __init__(self, config: Config, processes: list[Any], log: Path) -> None:
        self.config, self.processes, self.log, self.folder = config, processes, log, config.run_folder

    @property
    def codes(self) -> list[int | None]:
        """Exit codes by rank, None of what still runs."""
        return [each.exitcode for each in self.processes]

    def wait(self, limit_s: float = LIMIT_S, grace_s: float = 1.0) -> list[int]:
        """Exit codes. What still runs `grace_s` after one has failed is killed, as torchrun does."""
        until, has_failed = time.monotonic() + limit_s, False
        while None in self.codes:
            time.sleep(0.01)
            if not has_failed and any(code not in (None, 0, EXIT_CODE) for code in self.codes):
                until, has_failed = time.monotonic() + grace_s, True
            if time.monotonic() > until:
                self.kill()
                if not has_failed:
                    raise Broken(f"still ran after {limit_s:g} s{self.last_words}")
        return [code for code in self.codes if code is not None]

    def must_end_with(self, code: int) -> None:
        codes = self.wait()
        if set(codes) != {code}:
            raise Broken(f"ended with {codes}, not {code}{self.last_words}")

    def kill(self) -> None:
        for each in self.processes:
            each.kill()
        while None in self.codes:
            time.sleep(0.001)

    @property
    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
        errors = [i for i, line in enumerate(lines) if line.startswith("error: ")]
        return ": " + "\n".join(lines[errors[-1] if errors else -1 :]) if lines else ""

    @property
    def newest_step(self) -> int:
        """Of the newest valid checkpoint; 0 without one."""
        newest = newest_checkpoint(self.folder)
        return 0 if newest is None else step_of(newest)

    def lines(self, kind: str, rank: int = 0) -> list[dict[str, Any]]:
        """What a witness wrote."""
        file = self.folder / f"{kind}-{rank}.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def since_mishap(self) -> float:
        """Seconds since the first one. Raises Broken."""
        times = [float(file.read_text()) for file in self.folder.glob("mishap-*")]
        if not times:
            raise Broken(f"ended with {self.codes} before the mishap{self.last_words}")
        return time.time() - min(times)


def train_here(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    """`python -m moelm.train` in this process, which was forked for that."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ |= environment
    tempfile.tempdir = None  # looked up before, as was the rank
    rank_zero_only.rank = int(environment.get("RANK", 0))  # type: ignore[attr-defined]
    set_start_method(get_all_start_methods()[0], force=True)  # of what loads data, as in the command
    sys.argv = ["moelm.train", *arguments]
    command_line.run(train.main)


def torchrun_variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    size = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    return {**size, "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "v"}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def other_disk(folder: Path) -> Path | None:
    """A folder for temporary files on another file system than `folder`, where there is one."""
    for place in ("/dev/shm", tempfile.gettempdir(), str(Path.home())):
        if os.path.isdir(place) and os.access(place, os.W_OK) and os.stat(place).st_dev != folder.stat().st_dev:
            return Path(tempfile.mkdtemp(prefix="verify-", dir=place))
    return None
