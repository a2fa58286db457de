"""Two runs that want one folder: the second is refused, and nobody waits for one that is gone."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moelm import command_line
from moelm.config import Config, ConfigError, UserError, to_yaml
from moelm.train import main, train
from moelm.training import run_lock as module
from moelm.training.run_lock import run_lock

HOLD = """
import os, sys
from pathlib import Path
from moelm.training.run_lock import run_lock
with run_lock(Path(sys.argv[1])):
    child = os.fork()
    if child == 0:  # as what loads data
        import time
        time.sleep(60)
    print(child, flush=True)
    input()
"""


@pytest.fixture
def holder(tiny: Callable[..., Config]) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD, str(tiny().run_folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    yield process
    process.kill()
    os.kill(child, signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize("resume", [[], ["--resume", "auto"]])
def test_the_second_run_in_a_folder_is_refused_until_the_first_is_gone(
    tiny: Callable[..., Config],
    holder: subprocess.Popen[str],
    resume: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tiny({"trainer.max_steps": 1})
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    monkeypatch.setattr("sys.argv", ["train", "--config", str(tmp_path / "c.yaml"), *resume])
    with pytest.raises(SystemExit) as stop:
        command_line.run(main)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    host = os.uname().nodename
    assert f"error: run.name: the run {config.run_folder} is being trained by process {holder.pid} on {host}" in said
    assert "remedy: wait for it or end it, or choose another run.name" in said
    assert [file.name for file in config.run_folder.iterdir()] == ["run.lock"]
    holder.kill()
    holder.wait()
    assert (config.run_folder / "run.lock").exists()
    command_line.run(main)
    assert not (config.run_folder / "run.lock").exists()


def test_a_rank_that_is_not_the_first_asks_for_no_lock(
    tiny: Callable[..., Config], holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moelm.train._is_first_rank", lambda: False)
    assert train(tiny({"trainer.max_steps": 1}))["step"] == 1


def test_a_run_that_is_refused_leaves_no_folder(tiny: Callable[..., Config]) -> None:
    config = tiny({"trainer.max_steps": 1})
    config.optim.micro_batch_size = 3
    with pytest.raises(ConfigError):
        train(config)
    assert not config.run_folder.exists()


def test_the_file_of_a_run_that_ends_just_now_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, file, n = module.fcntl.lockf, tmp_path / "run.lock", []

    def late(descriptor: int, *flags: int) -> None:
        n.append(descriptor)
        if len(n) == 1:
            file.unlink()  # by its holder, between open and lock
        lock(descriptor, *flags)

    monkeypatch.setattr(module.fcntl, "lockf", late)
    with run_lock(tmp_path):
        assert len(n) == 2
        assert json.loads(file.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize(
    ("number", "message"), [(37, "has no file locks"), (5, "run.dir: .* nothing can be written there")]
)
def test_a_file_system_without_locks_is_said_and_one_that_fails_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, message: str
) -> None:
    def fail(*_: int) -> None:
        raise OSError(number, "?")

    monkeypatch.setattr(module.fcntl, "lockf", fail)
    try:
        with run_lock(tmp_path):
            said = capsys.readouterr().err
    except UserError as error:
        said = str(error)
    assert re.search(message, said)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"run\.dir: .*file/run: nothing can be written there: Not a dir(.|\n)*remedy"),
        run_lock(tmp_path / "file/run"),
    ):
        pass
