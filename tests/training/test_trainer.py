"""What the Trainer asks of the devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from moelm.config import Config, ConfigError
from moelm.model.gpt import GPT
from moelm.moe import kernels
from moelm.training.lightning_module import MoELightningModule
from moelm.training.preemption import StopSignals
from moelm.training.strategies import ReplicatedStrategy, ShardedStrategy
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


def test_cuda_graphs_are_refused_where_there_is_no_gpu(tiny: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match=r"trainer.compile: cuda_graphs: there is no CUDA device"):
        build_trainer(tiny({"trainer.compile": "cuda_graphs"}))


def test_auto_records_cuda_graphs_but_under_fsdp_with_several_micro_batches_a_step(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for strategy in (SingleDeviceStrategy, ReplicatedStrategy, ShardedStrategy):
        monkeypatch.setattr(strategy, "root_device", property(lambda _: torch.device("cuda", 0)))
    monkeypatch.setattr(ShardedStrategy, "shard", lambda *_: None)
    monkeypatch.setattr(GPT, "compile_blocks", lambda model, cuda_graphs: found.append(cuda_graphs))
    monkeypatch.setattr(GPT, "to_empty", lambda model, device: model)
    monkeypatch.setattr("moelm.training.lightning_module.initialize", lambda *_: None)
    kept = {"trainer.devices": 2, "trainer.strategy": "fsdp", "trainer.reshard_after_forward": False}
    ddp = {"trainer.devices": 2, "trainer.strategy": "ddp"}
    spreads: list[dict[str, Any]] = [{}, ddp, kept]
    for compiled, micro_batch in (("auto", 8), ("auto", 4), ("cuda_graphs", 4), (True, 8)):
        for spread in spreads:
            config = tiny({"trainer.compile": compiled, "optim.micro_batch_size": micro_batch, **spread})
            module = MoELightningModule(config, [], 0)
            module.trainer = build_trainer(config)
            module.configure_model()
    assert found == [True, True, True, True, True, False, True, True, True, False, False, False]


def test_cuda_graphs_want_gathered_weights_and_unsent_gradients_to_stay(
    tiny: Callable[..., Config], monkeypatch: Any
) -> None:
    monkeypatch.setattr(ShardedStrategy, "root_device", property(lambda strategy: torch.device("cuda", 0)))
    fsdp = {"trainer.compile": "cuda_graphs", "trainer.devices": 2, "trainer.strategy": "fsdp"}
    with pytest.raises(
        ConfigError, match=r"cuda_graphs: weights that .*\n.*set trainer.reshard_after_forward=false, or use auto"
    ):
        build_trainer(tiny({**fsdp, "optim.micro_batch_size": 8}))
    kept = {**fsdp, "optim.micro_batch_size": 4, "trainer.reshard_after_forward": False}
    build_trainer(tiny(kept))
    with pytest.raises(
        ConfigError, match=r"cuda_graphs: gradients that .*\n.*set trainer.accumulate_unreduced=false, or use auto"
    ):
        build_trainer(tiny({**kept, "trainer.accumulate_unreduced": True}))


def test_replicas_that_devices_cannot_make_are_refused(tiny: Callable[..., Config]) -> None:
    changes = {"trainer.devices": 4, "trainer.strategy": "fsdp", "trainer.expert_parallel": 2, "trainer.replicas": 4}
    with pytest.raises(ConfigError, match=r"replicas.*4 does not divide the 4 devices / 2 \(trainer.expert_parallel\)"):
        build_trainer(tiny(changes))


def test_ddp_cuts_nothing_that_is_compiled_and_products_let_nccl_in(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "rounds", 1)
    build_trainer(tiny())
    assert kernels.rounds == 1
    with torch._dynamo.config.patch(optimize_ddp=True):
        build_trainer(tiny({"trainer.devices": 2, "trainer.strategy": "ddp", "optim.micro_batch_size": 8}))
        assert not torch._dynamo.config.optimize_ddp
    assert kernels.rounds > 1


def test_a_gpu_that_is_not_there_is_named(tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"trainer\.accelerator: gpu, but there is no CUDA device\n  remedy: use cpu"):
        build_trainer(tiny({"trainer.accelerator": "gpu"}))
