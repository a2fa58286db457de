"""Between two log steps the host never waits for the GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from test_distributed import run
from tiny_runs import scalars_of, summary_of

from moelm.config import Config, NamedConfig, register
from moelm.train import train
from moelm.training import adamw

WARM_UP = 3  # steps in which kernels are compiled and tuned, which waits
EVERY = 5
SIGMOID_WITH_BIAS = {"name": "top_k", "score": "sigmoid", "selection_bias": True}


@register("callback", "no_host_sync", NamedConfig)
class NoHostSync(Callback):
    """Makes PyTorch raise on every wait for the device, but for the steps that are logged."""

    n_watched = 0

    def __init__(self, config: NamedConfig, run: Config) -> None:
        pass

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        next_step = pl_module.step + 1
        logged = next_step % EVERY == 0 or next_step == pl_module.config.trainer.max_steps
        watched = next_step > WARM_UP and not logged
        NoHostSync.n_watched += watched
        torch.cuda.set_sync_debug_mode("error" if watched else "default")


@pytest.mark.gpu
@pytest.mark.parametrize("compile_blocks", [False, True, "cuda_graphs"])
@pytest.mark.parametrize(
    "special",
    [
        {"model.moe.balancers": ["switch", "z_loss", "global_batch"]},
        {"model.moe.router": SIGMOID_WITH_BIAS, "model.moe.balancers": ["loss_free", "sequence"]},
        {"model.moe.router": "gshard", "model.moe.dispatch": {"name": "capacity", "drop": "probability"}},
        {"model.moe.router": "base", "model.moe.balancers": ["z_loss"]},
        {"model.moe.router": "expert_choice", "model.moe.balancers": ["none"], "trainer.max_loss_spike": 9.0},
        {"model.moe.router": "reinforce"},
        {"model.moe.router": "noisy_top_k", "trainer.activation_checkpointing": "full"},
        {"data.seq_len": 512, "optim.batch_tokens": 8192},  # so many tokens that kernels for many are chosen
    ],
    ids=["global_batch", "loss_free", "capacity", "base", "expert_choice", "reinforce", "recomputed", "large"],
)
def test_no_wait_for_the_device_between_log_steps(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, special: dict[str, Any], compile_blocks: bool | str
) -> None:
    monkeypatch.setattr(adamw, "LARGE", 1024)
    changes: dict[str, Any] = {
        "model.moe.d_expert": 16,
        "trainer.accelerator": "cuda",
        "trainer.precision": "bf16-mixed",
        "trainer.compile": compile_blocks,
        "trainer.log_every_n_steps": EVERY,
        "trainer.max_steps": 18,
        "callbacks": [*(callback.name for callback in Config().callbacks), "no_host_sync"],
        "optim.micro_batch_size": 8,
        **special,
    }
    NoHostSync.n_watched = 0
    try:
        config = tiny(changes)
        train(config)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # each micro-batch of each step but the logged ones
    assert NoHostSync.n_watched == 11 * config.optim.batch_tokens // (8 * config.data.seq_len)


@pytest.mark.gpu
def test_the_watch_sees_a_wait() -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones(1, device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


KEPT = {"trainer.strategy": "fsdp", "trainer.reshard_after_forward": False}


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", [{}, {"trainer.strategy": "ddp"}, KEPT], ids=["one", "ddp", "fsdp"])
@pytest.mark.parametrize(("compile_blocks", "n_micro_batches"), [("auto", 1), ("auto", 3), ("cuda_graphs", 3)])
def test_compiled_runs_learn_what_a_plain_one_does(
    tiny: Callable[..., Config],
    tmp_path: Path,
    compile_blocks: str,
    n_micro_batches: int,
    strategy: dict[str, Any],
) -> None:
    """With the default callbacks, and with validations, whose graphs lie between those of training."""
    changes: dict[str, Any] = {
        "model.moe.d_expert": 16,
        "trainer.accelerator": "cuda",
        "trainer.precision": "bf16-mixed",
        "trainer.log_every_n_steps": EVERY,
        "trainer.max_steps": 30,
        "data.val_every_n_steps": 7,
        "optim.micro_batch_size": 8,
    }
    losses = []
    for special in ({"trainer.compile": False}, {"trainer.compile": compile_blocks, **strategy}):
        name = f"compile-{special['trainer.compile']}"
        config = tiny({**changes, **special, "run.name": name})
        config.optim.batch_tokens = 8 * n_micro_batches * config.data.seq_len
        if strategy:
            run(config, tmp_path)  # by itself, since process groups stay
        else:
            train(config)
        val_ce = summary_of(config.run_folder)["val/ce"]
        losses.append([*(loss for _, loss in scalars_of(config.run_folder)["train/ce"]), val_ce])
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)
    assert losses[0][-1] < 0.95 * losses[0][0]
