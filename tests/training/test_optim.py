"""Schedules and parameter groups."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from tiny_runs import scalars_of

from moelm.config import Config, OptimConfig, ScheduleConfig
from moelm.model.gpt import GPT
from moelm.train import train
from moelm.training.optim import build_optimizer, kind_of, lr_factor

CASES = [  # schedule, {step: factor} for 100 steps
    (ScheduleConfig(name="constant"), {0: 1, 99: 1}),
    (ScheduleConfig(name="constant", warmup_steps=10), {0: 0.1, 4: 0.5, 9: 1, 10: 1, 99: 1}),
    (ScheduleConfig(name="linear", warmup_steps=20, min_lr_ratio=0.2), {19: 1, 20: 1, 60: 0.6, 100: 0.2}),
    (
        ScheduleConfig(name="cosine", min_lr_ratio=0.1),
        {0: 1, 50: 0.55, 25: 0.1 + 0.45 * (1 + math.sqrt(0.5)), 100: 0.1},
    ),
    (
        ScheduleConfig(name="wsd", warmup_steps=10, decay_steps=20, min_lr_ratio=0.0),
        {10: 1, 80: 1, 90: 0.5, 100: 0},
    ),
    (ScheduleConfig(name="wsd", min_lr_ratio=0.0), {89: 1, 95: 0.5}),
    (ScheduleConfig(name="step", milestones=[0.6, 0.9]), {59: 1, 60: 0.316, 89: 0.316, 90: 0.316**2}),
]


@pytest.mark.parametrize(("schedule", "expected"), CASES)
def test_a_schedule_has_the_documented_values(schedule: ScheduleConfig, expected: dict[int, float]) -> None:
    factor = lr_factor(schedule, 100)
    assert {step: factor(step) for step in expected} == pytest.approx(expected)


def test_the_logged_learning_rate_is_the_one_that_the_step_used(tiny: Callable[..., Config]) -> None:
    config = tiny(
        {
            "optim.schedule": {"name": "linear", "warmup_steps": 2, "min_lr_ratio": 0.0},
            "optim.lr": 0.01,
            "trainer.max_steps": 6,
            "trainer.log_every_n_steps": 1,
        }
    )
    train(config)
    rates = [value for _, value in scalars_of(config.run_folder)["train/lr"]]
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.0075, 0.005, 0.0025])


@pytest.mark.parametrize("tied", [True, False])
def test_norms_biases_and_embeddings_are_not_decayed_unless_told(tiny: Callable[..., Config], tied: bool) -> None:
    router = {"name": "top_k", "trained_bias": True}
    model = GPT(tiny({"model.tied_embeddings": tied, "model.moe.router": router}).model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = build_optimizer(model, OptimConfig(weight_decay=0.3)).param_groups
    free = {names[id(p)] for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    dimensions = {name: parameter.ndim for name, parameter in model.named_parameters()}
    assert {kind_of(name, dimensions[name]) for name in free} == {"norm", "bias", "embedding"}
    assert "embedding.weight" in free
    assert "head.weight" not in free
    assert sum(len(group["params"]) for group in groups) == len(names)
    everything = build_optimizer(model, OptimConfig(no_decay=[])).param_groups
    assert [group["weight_decay"] for group in everything] == [0.1]
