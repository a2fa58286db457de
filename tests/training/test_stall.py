"""A run that stands still ends and says where; one that compiles, saves or is suspended does not stand still."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from test_resume import named
from tiny_runs import Recorder

from moelm.config import Config
from moelm.train import train
from moelm.training import saving, stall
from moelm.training.stall import StallWatch
from moelm.training.trainer import build_trainer


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The exit codes with which this process would have ended."""
    codes: list[int] = []
    monkeypatch.setattr(stall, "end_process", codes.append)
    return codes


def test_only_a_run_that_stands_still_ends(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, ends: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    steps = {"trainer.max_steps": 7, "checkpoint.every_n_steps": 3, "data.val_every_n_steps": 4}
    config = named(tiny({**steps, "trainer.stall_timeout_s": 0.6}), "still")
    write = saving.write_weights
    at: list[int] = []

    def slow(*args: Any) -> None:
        time.sleep(0.8 if "step-00000003.tmp" in str(args) and "model" in str(args) else 0.0)
        write(*args)

    def halt(recorder: Recorder, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.step == 1:
            time.sleep(0.8)  # it compiles
        assert not ends or pl_module.step > 6
        while pl_module.step == 6 and not ends:
            time.sleep(0.05)
            at[:] = [pl_module.step]

    monkeypatch.setattr(saving, "write_weights", slow)
    monkeypatch.setattr(Recorder, "on_train_batch_end", halt)
    train(config)
    assert ends[0] == 1
    assert at == [6]
    said = capfd.readouterr().err
    assert "rank 0, step 5: no batch has ended for 0.6 s (trainer.stall_timeout_s" in said
    assert "in halt" in said
    time.sleep(0.1)
    assert "stall watch" not in [thread.name for thread in threading.enumerate()]


class Ticks(threading.Event):
    """Of a process that slept: each takes no time for it, however long it took."""

    n = 0

    def wait(self, timeout: float | None = None) -> bool:
        Ticks.n += 1
        return Ticks.n == 200


def test_time_counts_by_ticks_of_this_process(ends: list[int], capfd: pytest.CaptureFixture[str]) -> None:
    watch = StallWatch(100.0)
    watch._limit_s = 150.0
    watch._watch(Ticks())
    assert len(ends) == 200 - 1 - 1 - 150
    assert "no batch has ended for 150 s" in capfd.readouterr().err


def test_a_run_may_go_without(tiny: Callable[..., Config]) -> None:
    for timeout_s, n in ((None, 0), (5.0, 1)):
        trainer = build_trainer(tiny({"trainer.stall_timeout_s": timeout_s}))
        assert sum(isinstance(callback, StallWatch) for callback in trainer.callbacks) == n
