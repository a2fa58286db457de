"""What the Trainer asks of the devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from moelm.config import Config, ConfigError
from moelm.moe import kernels
from moelm.training.preemption import StopSignals
from moelm.training.strategies import ShardedStrategy, why_no_cuda_graphs
from moelm.training.trainer import build_trainer


def test_lightning_asks_no_rank_for_sigterm(tiny: Callable[..., Config]) -> None:
    trainer = build_trainer(tiny({"trainer.stop_within_s": 5}))
    signals: Any = trainer._signal_connector
    assert isinstance(signals, StopSignals)
    assert signals.within_s == 5
    asked: Any = trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor
    assert not hasattr(asked, "__self__")  # Lightning's method


def test_devices_that_cannot_share_the_experts_are_refused(tiny: Callable[..., Config]) -> None:
    config = tiny({"trainer.devices": 3, "trainer.strategy": "fsdp", "trainer.expert_parallel": 2})
    with pytest.raises(ConfigError, match=r"expert_parallel.*2 does not divide the 3 devices"):
        build_trainer(config)


def test_a_limit_of_nccl_that_is_no_number_is_refused(tiny: Callable[..., Config], monkeypatch: Any) -> None:
    monkeypatch.setenv("NCCL_MAX_CTAS", "many")
    with pytest.raises(ConfigError, match=r"NCCL_MAX_CTAS: 'many' is no whole number"):
        build_trainer(tiny({"trainer.devices": 2, "trainer.strategy": "ddp"}))


def test_cuda_graphs_are_refused_where_there_is_no_gpu(tiny: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match=r"trainer.compile: cuda_graphs: there is no CUDA device"):
        build_trainer(tiny({"trainer.compile": "cuda_graphs"}))


def test_cuda_graphs_want_one_micro_batch_a_step(tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = property(lambda strategy: torch.device("cuda", 0))
    monkeypatch.setattr(SingleDeviceStrategy, "root_device", gpu)
    assert why_no_cuda_graphs(build_trainer(tiny())) == ""
    with pytest.raises(ConfigError, match=r"a step has 2 micro-batches"):
        build_trainer(tiny({"trainer.compile": "cuda_graphs", "optim.micro_batch_size": 8}))


def test_cuda_graphs_want_gathered_weights_in_one_place(tiny: Callable[..., Config], monkeypatch: Any) -> None:
    monkeypatch.setattr(ShardedStrategy, "root_device", property(lambda strategy: torch.device("cuda", 0)))
    fsdp = {"trainer.compile": "cuda_graphs", "trainer.devices": 2, "trainer.strategy": "fsdp"}
    with pytest.raises(ConfigError, match=r"cuda_graphs: weights that .* \(trainer.reshard_after_forward\)"):
        build_trainer(tiny({**fsdp, "optim.micro_batch_size": 8}))
    build_trainer(tiny({**fsdp, "optim.micro_batch_size": 8, "trainer.reshard_after_forward": False}))


def test_replicas_that_devices_cannot_make_are_refused(tiny: Callable[..., Config]) -> None:
    changes = {"trainer.devices": 4, "trainer.strategy": "fsdp", "trainer.expert_parallel": 2, "trainer.replicas": 4}
    with pytest.raises(ConfigError, match=r"replicas.*4 does not divide the 4 devices / 2 \(trainer.expert_parallel\)"):
        build_trainer(tiny(changes))


def test_ddp_cuts_nothing_that_is_compiled_and_products_leave_nccl_its_room(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "processors_left_free", 0)
    monkeypatch.setenv("NCCL_MAX_CTAS", "8")
    build_trainer(tiny())
    assert kernels.processors_left_free == 0
    with torch._dynamo.config.patch(optimize_ddp=True):
        build_trainer(tiny({"trainer.devices": 2, "trainer.strategy": "ddp", "optim.micro_batch_size": 8}))
        assert not torch._dynamo.config.optimize_ddp
    assert kernels.processors_left_free == 8
