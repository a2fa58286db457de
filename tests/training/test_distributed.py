"""Two DDP processes on one machine are the same run as one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_resume import assert_same_state
from tiny_runs import scalars_of, summary_of

from moelm.config import Config, to_yaml
from moelm.training.checkpoint_io import load_tensors, load_weights, step_folder

CHANGES = {
    "model.moe.router": {"name": "top_k", "score": "sigmoid", "selection_bias": True},
    "model.moe.balancers": [{"name": "loss_free", "rate": 0.01}, {"name": "z_loss", "coef": 0.01}],
    "optim.micro_batch_size": 4,
    "trainer.max_steps": 6,
    "trainer.log_every_n_steps": 1,
    "checkpoint.every_n_steps": 3,
}


def run(config: Config, folder: Path, *overrides: str) -> None:
    file = folder / "config.yaml"
    file.write_text(to_yaml(config))
    command = [sys.executable, "-m", "moelm.train", "--config", str(file), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_ddp_processes_equal_one_process(tiny: Callable[..., Config], tmp_path: Path) -> None:
    config = tiny(CHANGES)
    ddp = ["trainer.strategy=ddp", "trainer.devices=2"]
    run(config, tmp_path, "run.name=one")
    run(config, tmp_path, "run.name=two", *ddp)
    one, two = (config.run_folder.parent / name for name in ("one", "two"))
    a, b = (load_weights(step_folder(folder, 3)) for folder in (one, two))
    for name in a:
        if name.endswith("expert_bias"):
            assert torch.equal(a[name], b[name]), name
        else:
            assert (a[name] - b[name]).norm() < 2e-3 * a[name].norm(), name
    curves = [scalars_of(folder) for folder in (one, two)]
    for tag in (
        "train/ce",
        "train/grad_norm",
        "aux/z_loss",
        "moe/max_violation",
        "moe/layer_01/effective_experts",
    ):
        for (step, x), (_, y) in zip(curves[0][tag][:3], curves[1][tag][:3], strict=True):
            assert x == pytest.approx(y, rel=1e-3), (tag, step)
    assert curves[0]["train/ce"][0][1] == pytest.approx(curves[1]["train/ce"][0][1], rel=1e-6)
    assert curves[0]["moe/max_violation"][0][1] == curves[1]["moe/max_violation"][0][1]
    assert summary_of(one)["val/ce"] == pytest.approx(summary_of(two)["val/ce"], rel=1e-3)
    assert summary_of(one)["tokens"] == summary_of(two)["tokens"]
    states = load_tensors(step_folder(two, 3) / "training.pt")["moelm"]["rng_by_rank"]
    assert len(states) == 2
    assert not torch.equal(states[0]["torch"], states[1]["torch"])


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_ddp_run_resumes_bitwise_on_two_ranks_and_goes_on_on_one(tiny: Callable[..., Config], tmp_path: Path) -> None:
    config = tiny({**CHANGES, "model.dropout": 0.1})
    ddp = ["trainer.strategy=ddp", "trainer.devices=2", "run.name=two"]
    run(config, tmp_path, *ddp)
    folder = config.run_folder.parent / "two"
    straight = step_folder(folder, 6).rename(folder / "straight")
    run(config, tmp_path, *ddp, "--resume", "auto")
    assert_same_state(straight, step_folder(folder, 6))
    run(config, tmp_path, "run.name=two", "trainer.max_steps=8", "--resume", "auto")
    assert summary_of(folder)["step"] == 8
