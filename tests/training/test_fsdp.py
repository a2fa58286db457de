"""Two FSDP2 processes are the same run as two DDP processes and as one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_runs import run_all

from moelm.config import Config, ConfigError
from moelm.train import train
from moelm.training.checkpoint_io import load_weights, step_folder

N_STEPS = 5
# With this eps the second moment counts for nothing: plain SGD with a learning rate of 0.3
SGD = {"optim.betas": [0.0, 0.95], "optim.eps": 1e4, "optim.lr": 3e3, "optim.weight_decay": 0.0}
CHANGES = {
    **SGD,
    "model.moe.router": {"name": "top_k", "score": "sigmoid", "selection_bias": True},
    "model.moe.balancers": [{"name": "loss_free", "rate": 0.01}, {"name": "z_loss", "coef": 0.01}],
    "optim.micro_batch_size": 4,  # 4 micro-batches a step on one process, 2 on each of two
    "optim.schedule": {"name": "constant"},
    "trainer.max_steps": N_STEPS,
    "trainer.gradient_clip_val": 0.3,  # below every norm here
    "trainer.limit_val_batches": 1,
    "callbacks": ["tape"],
}
SHARDED = {"trainer.strategy": "fsdp", "trainer.devices": 2}


@pytest.fixture
def make(tiny: Callable[..., Config]) -> Callable[..., Config]:
    return lambda name, changes: tiny({**CHANGES, **changes, "run.name": name})


def tapes(config: Config, n_ranks: int = 1) -> list[dict[str, Any]]:
    return [torch.load(config.run_folder / f"tape-{rank}.pt", weights_only=True) for rank in range(n_ranks)]



VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "idle experts, uneven shares, checkpointing full, gradients sent once a step": {
        **{"model.moe.n_experts": 255, "model.moe.top_k": 1, "model.moe.d_expert": 8, "model.tied_embeddings": False},
        **{"trainer.activation_checkpointing": "full", "trainer.accumulate_unreduced": True},
    },
    "bf16": {"trainer.precision": "bf16-mixed"},
    "adamw, dropout, to step 3": {"optim.eps": 1e-8, "optim.lr": 1e-3, "trainer.max_steps": 3},
}


@pytest.mark.timeout(400)
def test_x(make, tmp_path):
    import copy
    from dataclasses import replace
    runs = {}
    for i, (n, v) in enumerate(VARIANTS.items()):
        two = {**SHARDED, **v}
        one = {k: x for k, x in v.items() if k != "trainer.accumulate_unreduced"}
        runs[n] = make(f"one-{i}", one), make(f"two-{i}", two)
        train(runs[n][0])
    run_all([t for _, t in runs.values()], tmp_path, 2)
    for n, (o, c) in runs.items():
        a = tapes(o)[0]
        print(n)
        for t in tapes(c, 2):
            print(t["share"], t["router"], a["router"])
            for s, (x, y) in enumerate(zip(a["steps"], t["steps"])):
                print(s, x["loss"]-y["loss"], x["norm"], x["norm"]-y["norm"], x["load"].min(), (x["load"]-y["load"]).abs().max(), (x["bias"]-y["bias"]).abs().max(),
                 max((float((x["gradients"][k]-y["gradients"][k]).norm()/x["gradients"][k].norm()),k) for k in x["gradients"]),
                 max(float((x["weights"][k]-y["weights"][k]).norm()/x["weights"][k].norm()) for k in x["gradients"]))
