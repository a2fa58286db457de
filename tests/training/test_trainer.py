"""What the Trainer asks of the devices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

from moelm.config import Config, ConfigError
from moelm.training.trainer import build_trainer


def test_ranks_are_asked_for_sigterm_only_after_log_steps(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(Trainer, "global_step", 0)
    monkeypatch.setattr(_TrainingEpochLoop, "_broadcast_sigterm_tensor", lambda loop: asked.append(trainer.global_step))
    trainer = build_trainer(tiny({"trainer.log_every_n_steps": 4}))
    for step in range(10):
        monkeypatch.setattr(Trainer, "global_step", step)
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor()
    assert asked == [0, 4, 8]


def test_devices_that_cannot_share_the_experts_are_refused(tiny: Callable[..., Config]) -> None:
    config = tiny({"trainer.devices": 3, "trainer.strategy": "fsdp", "trainer.expert_parallel": 2})
    with pytest.raises(ConfigError, match=r"expert_parallel.*2 does not divide the 3 devices"):
        build_trainer(config)
