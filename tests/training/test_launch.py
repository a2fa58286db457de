"""No rank outlives what started it, or another that failed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moelm.config import Config, to_yaml

RANK = "import time; from moelm.training.launch import end_with_launcher; end_with_launcher(0.05); time.sleep(60)"
LAUNCHER = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {RANK!r}]).pid, flush=True); input()"


@pytest.mark.parametrize("is_rank", [True, False])
def test_a_rank_ends_when_its_launcher_is_killed(is_rank: bool) -> None:
    environment = {**os.environ, **({"LOCAL_RANK": "1"} if is_rank else {})}
    command = [sys.executable, "-c", LAUNCHER]
    launcher = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    rank = int(launcher.stdout.readline())
    time.sleep(0.5)  # it must have seen who started it
    assert runs(rank)
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + (10 if is_rank else 0.5)
    while runs(rank) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert runs(rank) != is_rank
    if not is_rank:
        os.kill(rank, 9)


def runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


PLUGIN = """
import os, time
from lightning.pytorch.callbacks import Callback
from moelm.config import NamedConfig, register

@register("callback", "fails", NamedConfig)
class Fails(Callback):
    def __init__(self, config, run):
        self.folder = run.run_folder

    def on_train_batch_end(self, trainer, pl_module, *rest):
        (self.folder / f"pid-{trainer.global_rank}").write_text(f"{os.getpid()} {time.time()}")
        if trainer.global_rank == FAILING:
            raise RuntimeError(f"rank {FAILING} is broken")
        time.sleep(100)  # as if it waited for the other one
"""


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_an_exception_on_one_rank_ends_all_within_ten_seconds(
    tiny: Callable[..., Config], tmp_path: Path, failing: int
) -> None:
    plugin, file = tmp_path / "fails.py", tmp_path / "config.yaml"
    plugin.write_text(PLUGIN.replace("FAILING", str(failing)))
    config = tiny({"trainer.devices": 2, "trainer.strategy": "ddp", "optim.micro_batch_size": 8})
    file.write_text(to_yaml(config).replace("callbacks:", "callbacks:\n- name: fails", 1))
    command = [sys.executable, "-m", "moelm.train", "--plugin", str(plugin), "--config", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90)
    ended = time.time()
    assert result.returncode != 0
    assert f"[rank{failing}]: RuntimeError: rank {failing} is broken" in result.stderr
    ranks = [(config.run_folder / f"pid-{rank}").read_text().split() for rank in range(2)]
    while any(runs(int(pid)) for pid, _ in ranks) and time.time() - ended < 10:
        time.sleep(0.1)
    assert not any(runs(int(pid)) for pid, _ in ranks)
    assert time.time() - float(ranks[failing][1]) < 10
