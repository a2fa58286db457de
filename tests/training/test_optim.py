"""Schedules and parameter groups."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import scalars_of

from moelm.config import Config, ConfigError, OptimConfig, PhaseConfig, ScheduleConfig, load_config, to_yaml
from moelm.model.gpt import GPT
from moelm.model.size import model_size, training_memory
from moelm.train import train
from moelm.training.optim import build_optimizer, kind_of, lr_factor

P = PhaseConfig
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
    (  # OLMoE
        ScheduleConfig(name="phases", warmup_steps=10, phases=[P(0.9, "cosine", 0.1), P(1.0, "linear", 0.0)]),
        {4: 0.5, 9: 1, 10: 1, 30: 0.1 + 0.45 * (1 + math.sqrt(0.5)), 50: 0.55, 90: 0.1, 95: 0.05, 100: 0},
    ),
    (  # DeepSeek-V3
        ScheduleConfig(
            name="phases",
            warmup_steps=2,
            phases=[P(0.68, "constant", 1), P(0.92, "cosine", 0.1), P(0.97, "constant", 0.1), P(1, "constant", 0.03)],
        ),
        {0: 0.5, 1: 1, 67: 1, 68: 1, 80: 0.55, 92: 0.1, 96: 0.1, 97: 0.03, 100: 0.03},
    ),
    (  # warm-up to less than lr; up again; a phase that rounds to no step; 0.07 x 100 is a little above 7
        ScheduleConfig(
            name="phases",
            warmup_steps=4,
            phases=[P(0.07, "constant", 0.4), P(0.074, "constant", 0.2), P(0.5, "linear", 0.8), P(1, "cosine", 0)],
        ),
        {0: 0.1, 3: 0.4, 6: 0.4, 7: 0.2, 28: 0.2 + 0.6 * 21 / 43, 50: 0.8, 75: 0.4, 100: 0},
    ),
]


@pytest.mark.parametrize(("schedule", "expected"), CASES)
def test_a_schedule_has_the_documented_values(schedule: ScheduleConfig, expected: dict[int, float]) -> None:
    factor = lr_factor(schedule, 100)
    assert {step: factor(step) for step in expected} == pytest.approx(expected)


def test_one_phase_of_cosine_is_the_schedule_cosine() -> None:
    cosine = ScheduleConfig(name="cosine", warmup_steps=7, min_lr_ratio=0.2)
    phases = ScheduleConfig(name="phases", warmup_steps=7, phases=[PhaseConfig(1.0, "cosine", 0.2)])
    a, b = lr_factor(cosine, 50), lr_factor(phases, 50)
    assert [a(step) for step in range(60)] == pytest.approx([b(step) for step in range(60)])


PHASES = [{"until": 0.5, "shape": "constant", "to": 1}, {"until": 1, "shape": "linear", "to": 0.1}]


def test_phases_survive_printing_and_an_override_changes_one_of_them(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    config = tiny({"optim.schedule": {"name": "phases", "warmup_steps": 3, "phases": PHASES}})
    assert config.optim.schedule.phases == [PhaseConfig(0.5, "constant", 1.0), PhaseConfig(1.0, "linear", 0.1)]
    file = tmp_path / "printed.yaml"
    file.write_text(to_yaml(config))
    assert load_config(file).optim == config.optim
    changed = load_config(file, ["optim.schedule.phases.1.to=0.25", "optim.optimizer=muon", "optim.momentum=0.9"])
    assert changed.optim.schedule.phases == [PhaseConfig(0.5, "constant", 1.0), PhaseConfig(1.0, "linear", 0.25)]
    assert (changed.optim.optimizer, changed.optim.momentum) == ("muon", 0.9)


def phases(*changes: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A schedule whose phases are PHASES with the changes."""
    changed = [{**phase, **change} for phase, change in zip(PHASES, changes or ({}, {}), strict=True)]
    return {"optim.schedule": {"name": "phases", "phases": changed, **more}}


WITHOUT = {"until": 0.5, "shape": "constant"}
BAD = [  # changes, key, words
    ({"optim.optimizer": "lion"}, "optim.optimizer", "allowed: adamw, muon"),
    ({"optim.momentum": 0.9}, "optim.momentum", "0.9 has no effect with the optimizer adamw"),
    ({"optim.moments": "bf16"}, "optim.moments", "allowed: float32, bfloat16"),
    ({"optim.optimizer": "muon", "optim.moments": "bfloat16"}, "optim.moments", "set optimizer: adamw"),
    ({"optim.optimizer": "muon", "optim.momentum": 1.0}, "optim.momentum", "must be < 1"),
    ({"optim.schedule": {"name": "cosine", "phases": PHASES}}, "optim.schedule.phases", "set name: phases"),
    (phases(min_lr_ratio=0.2), "optim.schedule.min_lr_ratio", "set name: linear or cosine or wsd"),
    (phases(milestones=[0.5]), "optim.schedule.milestones", "no effect with the schedule phases"),
    ({"optim.schedule": {"name": "phases"}}, "optim.schedule.phases", "is empty"),
    ({"optim.schedule": {"name": "phases", "phases": 3}}, "optim.schedule.phases", "3 is not a list"),
    ({"optim.schedule": {"name": "phases", "phases": PHASES[0]}}, "optim.schedule.phases", "until: ..., shape: ..."),
    ({"optim.schedule": {"name": "phases", "phases": ["cosine"]}}, "optim.schedule.phases.0", "not a mapping"),
    ({"optim.schedule": {"name": "phases", "phases": [WITHOUT]}}, "optim.schedule.phases.0.to", "is missing"),
    (phases({}, {"until": 0.5}), "optim.schedule.phases.1.until", "0.5 does not follow 0.5"),
    (phases({}, {"until": 0.9}), "optim.schedule.phases.1.until", "goes until 1.0"),
    (phases({}, {"until": 1.1}), "optim.schedule.phases.1.until", "must be <= 1"),
    (phases({"until": 0}, {}), "optim.schedule.phases.0.until", "must be > 0"),
    (phases({"to": -0.1}, {}), "optim.schedule.phases.0.to", "must be >= 0"),
    (phases({"to": 10}, {}), "optim.schedule.phases.0.to", "must be <= 1"),
    (phases({"shape": "cosin"}, {}), "optim.schedule.phases.0.shape", "did you mean cosine"),
    (phases({"too": 1}, {}), "optim.schedule.phases.0.too", "unknown key"),
    (phases({}, {"until": None}), "optim.schedule.phases.1.until", "null is not a finite number"),
    (phases({"until": 0.001}, {}), "optim.schedule.phases.0.until", "no step of trainer.max_steps = 60"),
    (phases({"until": 0.999}, {}), "optim.schedule.phases.1.until", "fewer phases"),
    (phases(warmup_steps=30), "optim.schedule.warmup_steps", "ends at step 30"),
    (phases(warmup_steps=60), "optim.schedule.warmup_steps", "max_steps = 60"),
]


@pytest.mark.parametrize(("changes", "key", "words"), BAD)
def test_an_optimizer_or_schedule_that_makes_no_sense_is_refused(
    tiny: Callable[..., Config], changes: dict[str, Any], key: str, words: str
) -> None:
    with pytest.raises(ConfigError) as error:
        tiny(changes)
    assert error.value.key == key
    assert words in str(error.value)


def test_the_memory_of_muon_has_one_moment_for_matrices(tiny: Callable[..., Config]) -> None:
    config, with_muon = tiny(), tiny({"optim.optimizer": "muon"})
    total = model_size(config.model).total
    adamw, muon = (training_memory(each).optimizer for each in (config, with_muon))
    assert adamw == 8 * total
    assert training_memory(tiny({"optim.moments": "bfloat16"})).optimizer == 4 * total
    assert muon == 4 * (total + config.model.vocab_size * config.model.d_model)


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


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_empty_no_decay_decays_everything(tiny: Callable[..., Config], optimizer: str) -> None:
    """As OLMoE does: with gradients of zero all that is left of a step is W <- (1 - lr * decay) W."""
    config = tiny({"optim.no_decay": [], "optim.optimizer": optimizer, "optim.lr": 0.5, "optim.weight_decay": 0.2})
    model = GPT(config.model)
    for parameter in model.parameters():
        parameter.data.fill_(2.0)
        parameter.grad = torch.zeros_like(parameter)
    build_optimizer(model, config.optim).step()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, torch.tensor(1.8)), name
