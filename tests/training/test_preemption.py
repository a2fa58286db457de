"""A run that is told to end saves a step, ends in time with the exit code that says so, and continues as if not."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import active_children, get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mishaps  # noqa: F401  registers the callback
import pytest
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from test_resume import assert_same_curves, assert_same_state, named

from moelm.config import Config, ConfigError, make_named, to_yaml
from moelm.train import train
from moelm.training.checkpoint_io import newest_checkpoint, step_folder, step_of
from moelm.training.preemption import EXIT_CODE, Preempted, StopSignals, exit_code, requeue

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
CHANGES = {
    "model.dropout": 0.1,
    "trainer.max_steps": 14,
    "trainer.log_every_n_steps": 2,
    "data.val_every_n_steps": 5,
    "checkpoint.every_n_steps": 6,
    "optim.micro_batch_size": 8,
}


@pytest.fixture(autouse=True)
def nothing_is_ignored() -> Iterator[None]:
    """SIGINT is where a shell started the tests in the background, and SIGHUP under nohup."""
    before = {each: signal.getsignal(each) for each in SIGNALS}
    for each in SIGNALS:
        signal.signal(each, signal.default_int_handler if each == signal.SIGINT else signal.SIG_DFL)
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


def telling(config: Config, name: str) -> Config:
    config = named(config, name, recorded=False)
    return dataclasses.replace(config, callbacks=[*config.callbacks, make_named("callback", "told")])


@pytest.mark.parametrize(
    ("told", "step", "n_workers"),
    [
        ("SIGTERM forward 0", 4, 1),
        ("SIGINT validation 0", 5, 1),
        pytest.param("SIGUSR1 save 0", 6, 0, marks=pytest.mark.slow),
    ],
)
def test_one_process_saves_the_step_it_is_in_and_continues_bitwise(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, told: str, step: int, n_workers: int
) -> None:
    config = tiny({**CHANGES, "data.n_workers": n_workers})
    straight, stopped = telling(config, "straight"), telling(config, "stopped")
    handlers = [signal.getsignal(each) for each in SIGNALS]
    train(straight)
    monkeypatch.setenv("TOLD", told)
    with pytest.raises(Preempted, match=f"step {step} is saved") as held:
        train(stopped)
    assert held.tb is not None
    assert not active_children()  # that loaded data: they would keep the process, whose SIGTERM they leave to it
    assert [signal.getsignal(each) for each in SIGNALS] == handlers
    assert newest_checkpoint(stopped.run_folder) == step_folder(stopped.run_folder, step)
    monkeypatch.delenv("TOLD")
    train(stopped, resume="auto")
    assert_same_state(step_folder(straight.run_folder, 14), step_folder(stopped.run_folder, 14))
    assert_same_curves(straight.run_folder, stopped.run_folder)


def test_a_signal_in_the_last_step_leaves_the_validation_to_the_run_that_continues(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    straight, stopped = (telling(tiny({**CHANGES, "trainer.max_steps": 4}), name) for name in ("straight", "stopped"))
    train(straight)
    monkeypatch.setenv("TOLD", "SIGTERM forward 0")
    with pytest.raises(Preempted, match="step 4 is saved"):
        train(stopped)
    monkeypatch.delenv("TOLD")
    wanted = json.loads((straight.run_folder / "summary.json").read_text())
    capsys.readouterr()
    summary = train(stopped, resume="auto")
    assert summary["val/ce"] == wanted["val/ce"]
    assert (summary["step"], summary["moe/dead_experts"]) == (4, wanted["moe/dead_experts"])
    assert summary["tokens_per_s"] is None
    assert " s since step 4 with validation (- tokens/s)" in capsys.readouterr().out
    assert_same_state(step_folder(straight.run_folder, 4), step_folder(stopped.run_folder, 4))
    assert_same_curves(straight.run_folder, stopped.run_folder)
    with pytest.raises(ConfigError, match="4 steps are done already"):
        train(stopped, resume="auto")


def end_of(act: Callable[[], None]) -> int | None:
    """How a process ends within a second in which `act` runs while its main thread waits, out of Python's reach."""

    def run() -> None:
        signals = StopSignals(within_s=0.3)
        signals.register_signal_handlers()
        threading.Thread(target=act, daemon=True).start()
        library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
        for _ in range(2):
            library.pthread_mutex_lock(mutex)

    process = get_context("fork").Process(target=run)
    process.start()
    process.join(1)
    alive = process.is_alive()
    process.kill()
    return None if alive else process.exitcode


def send(*signals: signal.Signals) -> Callable[[], None]:
    def act() -> None:
        for each in signals:
            time.sleep(0.02)  # two at once are one
            os.kill(os.getpid(), each)

    return act


@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ((signal.SIGTERM,), 1),
        ((signal.SIGHUP,), 1),
        ((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1), 1),
        ((signal.SIGINT,) * 2, 130),
    ],
)
def test_a_run_that_hangs_ends_at_the_deadline_or_with_the_second_interrupt(
    signals: tuple[signal.Signals, ...], code: int
) -> None:
    assert end_of(send(*signals)) == code


def test_no_signal_no_deadline() -> None:
    assert end_of(send()) is None


def test_a_run_that_was_started_to_outlive_its_terminal_does() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        assert end_of(send(signal.SIGHUP)) is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_slurm_job_asks_to_start_again_only_after_the_signal_for_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $* >> {tmp_path}/asked\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    signals = StopSignals(60)
    trainer: Any = SimpleNamespace(_signal_connector=signals)
    for received, variables in [
        (signal.SIGUSR1, {}),
        (signal.SIGTERM, {"SLURM_JOB_ID": "7"}),
        (signal.SIGUSR1, {"SLURM_JOB_ID": "7"}),
        (signal.SIGUSR1, {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "8", "SLURM_ARRAY_TASK_ID": "2"}),
    ]:
        signals.received = received
        for key, value in variables.items():
            monkeypatch.setenv(key, value)
        requeue(trainer)
    assert (tmp_path / "asked").read_text() == "requeue 7\nrequeue 8_2\n"


@pytest.mark.slow
def test_a_job_of_slurm_saves_asks_to_start_again_and_continues(tiny: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $* >> {tmp_path}/asked\n")
    (tmp_path / "scontrol").chmod(0o755)
    job = {"JOB_ID": "7", "JOB_NAME": "train", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    job |= {"NTASKS_PER_NODE": "1", "NNODES": "1", "NODELIST": "localhost"}
    slurm = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", **{f"SLURM_{k}": v for k, v in job.items()}}
    config = telling(tiny(CHANGES), "job")
    assert check_stopped(run(config, tmp_path, "SIGUSR1 forward 0", **slurm), config.run_folder, [0]) == 4
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    result = run(config, tmp_path, "SIGUSR1 never 0", "--resume", "auto", **slurm)
    assert result.returncode == 0, result.stderr[-3000:]
    assert newest_checkpoint(config.run_folder) == step_folder(config.run_folder, 14)


@pytest.mark.parametrize(
    ("environment", "local_rank", "code"),
    [(LightningEnvironment, 0, 75), (LightningEnvironment, 1, 0), (TorchElasticEnvironment, 1, 75)],
)
def test_only_what_lightning_started_ends_with_zero(environment: type[Any], local_rank: int, code: int) -> None:
    connector = SimpleNamespace(cluster_environment=environment())
    trainer: Any = SimpleNamespace(_accelerator_connector=connector, local_rank=local_rank)
    assert exit_code(trainer) == code


def run(config: Config, folder: Path, told: str, *overrides: str, **variables: str) -> subprocess.CompletedProcess[str]:
    file = folder / "config.yaml"
    file.write_text(to_yaml(config))
    plugin = str(Path(__file__).with_name("mishaps.py"))
    command = [sys.executable, "-m", "moelm.train", "--plugin", plugin, "--config", str(file), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOLD": told, **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def check_stopped(result: subprocess.CompletedProcess[str], run_folder: Path, ranks: list[int]) -> int:
    """The step that was saved."""
    ended = time.time()
    assert result.returncode == EXIT_CODE, result.stderr[-3000:]
    newest = newest_checkpoint(run_folder)
    assert newest is not None
    assert f"step {step_of(newest)} is saved; continue with --resume auto" in result.stderr
    assert "Traceback" not in result.stderr
    for rank in ranks:
        _, told = (run_folder / f"told-{rank}").read_text().split()
        assert ended - float(told) < 10
    return step_of(newest)


DDP = {"trainer.strategy": "ddp", "trainer.devices": 2}
CASES = {  # what is told, the step that is saved: the step after next one begins, or the next that is saved anyway
    "SIGTERM forward 1": 5,
    "SIGTERM forward all": 5,
    "SIGUSR1 validation 0": 5,
    "SIGINT save 1": 6,
}


@pytest.mark.slow
@pytest.mark.parametrize("told", CASES)
def test_two_ranks_save_together_whichever_is_told(tiny: Callable[..., Config], tmp_path: Path, told: str) -> None:
    config = telling(tiny({**CHANGES, **DDP}), "two")
    rank = told.split()[-1]
    stopped = check_stopped(run(config, tmp_path, told), config.run_folder, [0, 1] if rank == "all" else [int(rank)])
    assert stopped == CASES[told]


@pytest.mark.slow
def test_no_rank_ends_before_the_first_has_saved_and_asked_for_the_job_again(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    """What launched them would end the first one for it."""
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\nsleep 1\necho $* >> {tmp_path}/asked\n")
    (tmp_path / "scontrol").chmod(0o755)
    config = telling(tiny({**CHANGES, **DDP, "checkpoint.asynchronous": True}), "slow")
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    plugin = str(Path(__file__).with_name("mishaps.py"))
    options = ["--standalone", "--nproc-per-node=2", "-m", "moelm.train", "--plugin", plugin, "--config", str(file)]
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path, "SLURM_JOB_ID": "7", "SLOW_S": "2"}
    environment["TOLD"] = "SIGUSR1 forward all"
    command = [sys.executable, "-m", "torch.distributed.run", *options]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert "step 5 is saved; continue with --resume auto" in result.stderr, result.stderr[-3000:]
    assert [(config.run_folder / f"ended-{rank}").read_text() for rank in (0, 1)] == ["step-00000005"] * 2
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    assert re.search(r"rank +: 0 .*\n +exitcode +: 75 ", result.stderr), result.stderr[-3000:]
