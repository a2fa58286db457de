"""A step whose loss or gradient norm is not finite changes nothing, and a run does not go on with many of them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mishaps  # noqa: F401  registers the callback
import pytest
import torch
from test_preemption import DDP, run
from test_resume import assert_same, assert_same_state, named
from tiny_runs import Recorder, scalars_of

from moelm.config import Config, make_named
from moelm.train import train
from moelm.training.bad_steps import Evidence, LossSpikeError, NonFiniteError
from moelm.training.checkpoint_io import load_training, load_weights, newest_checkpoint, step_folder

CHANGES = {
    "model.moe.router": {"name": "top_k", "score": "sigmoid", "selection_bias": True},
    "model.moe.balancers": [{"name": "loss_free", "rate": 0.01}],
    "trainer.max_steps": 6,
    "trainer.log_every_n_steps": 1,
    "optim.micro_batch_size": 8,
    "checkpoint.every_n_steps": 1,
    "data.val_every_n_steps": 50,
}


def poisoned(config: Config, recorded: bool = True, name: str = "poisoned") -> Config:
    config = named(config, name, recorded)
    return dataclasses.replace(config, callbacks=[*config.callbacks, make_named("callback", "poisoned")])


@pytest.mark.parametrize(("optimizer", "limit"), [("adamw", 1.0), ("muon", None)])
def test_a_step_left_out_changes_no_weight_no_moment_and_no_bias(
    tiny: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    optimizer: str,
    limit: float | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("POISON", "1,4 0")
    special = {"optim.optimizer": optimizer, "trainer.gradient_clip_val": limit, "trainer.max_skipped_steps": 2}
    config = poisoned(tiny({**CHANGES, **special}))
    train(config)
    before, after, later = (step_folder(config.run_folder, step) for step in (3, 4, 5))
    assert_same(load_weights(before), load_weights(after))
    states = [load_training(folder)["optimizer_states"][0]["state"] for folder in (before, after, later)]
    assert_same(states[0], states[1])
    assert all(state["step"] == 2 for state in states[0].values() if "step" in state)
    weights = load_weights(later)
    assert any(not torch.equal(value, weights[name]) for name, value in load_weights(after).items())
    assert all(value.isfinite().all() for value in weights.values())
    assert [value for _, value in scalars_of(config.run_folder)["train/skipped_steps"]] == [1, 1, 1, 2, 2, 2]
    assert "step 4: loss nan, gradient norm nan; samples 48 to 63 of" in capsys.readouterr().err
    monkeypatch.setenv("POISON", "7 0")
    longer = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, max_steps=8))
    with pytest.raises(NonFiniteError, match="step 7"):
        train(longer, resume="auto")  # with the two of before


@pytest.mark.parametrize("every", [1, 5])
def test_a_run_ends_before_it_saves_what_is_not_as_it_should_be(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    monkeypatch.setenv("POISON", "3 0")
    config = poisoned(tiny({**CHANGES, "checkpoint.every_n_steps": every, "trainer.log_every_n_steps": 50}))
    message = r"(?s)step 3: loss nan.*by layer: 0: nan, 1: nan; .* layer 0\n.*max_skipped_steps"
    with pytest.raises(NonFiniteError, match=message):
        train(config)
    assert len(Recorder.made[-1].biases) == 3
    assert newest_checkpoint(config.run_folder) == (step_folder(config.run_folder, 2) if every == 1 else None)


def test_a_weight_that_is_not_finite_is_not_saved(tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(recorder: Recorder, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.step == 3:
            pl_module.model.norm.weight.data[0] = torch.inf

    monkeypatch.setattr(Recorder, "on_train_batch_end", spoil)
    config = named(tiny(CHANGES), "spoilt")
    with pytest.raises(NonFiniteError, match=r"step 3: norm\.weight holds what is no number"):
        train(config)
    assert newest_checkpoint(config.run_folder) == step_folder(config.run_folder, 2)


JUMPS = {
    "model.moe.router": CHANGES["model.moe.router"],
    "model.moe.balancers": CHANGES["model.moe.balancers"],
    "trainer.max_steps": 24,
    "trainer.max_loss_spike": 1.5,
    "data.val_every_n_steps": 50,
    "checkpoint.every_n_steps": 1,
    "checkpoint.keep_last": 30,
    "optim.micro_batch_size": 8,
    "callbacks": [],
}


def test_a_loss_that_jumps_is_left_out_or_ends_the_run_and_what_is_usual_survives_a_resume(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POISON", "5,20,22 0 50")  # at step 5 it is not yet known what is usual
    straight, broken = (poisoned(tiny(JUMPS), name=name) for name in ("straight", "broken"))
    for config in (straight, broken):
        config.trainer.max_skipped_steps = 2
    train(straight)
    said = capsys.readouterr().err
    assert "step 5:" not in said
    assert "step 22: cross-entropy " in said
    assert "more than trainer.max_loss_spike=1.5 times the usual; samples 336 to 351" in said
    assert "left out, 2 of at most 2" in said
    before, after = (load_weights(step_folder(straight.run_folder, step)) for step in (19, 20))
    assert_same(before, after)
    biases = Recorder.made[-1].biases
    assert torch.equal(biases[18], biases[19])
    assert not torch.equal(biases[17], biases[18])
    Recorder.raise_after = 18
    with pytest.raises(RuntimeError, match="the machine is gone"):
        train(broken)
    Recorder.raise_after = None
    broken.trainer.max_skipped_steps = 1
    with pytest.raises(LossSpikeError, match="step 22: cross-entropy"):
        train(broken, resume="auto")
    assert newest_checkpoint(broken.run_folder) == step_folder(broken.run_folder, 21)
    for step in (17, 20, 21):
        assert_same_state(*(step_folder(config.run_folder, step) for config in (straight, broken)))


def test_a_gradient_without_numbers_is_named() -> None:
    model = torch.nn.ModuleDict({name: torch.nn.Linear(1, 1, bias=False) for name in "abc"})
    norms = [torch.tensor(value) for value in (torch.nan, torch.inf, 1.0)]
    evidence = Evidence(torch.tensor(1.0), torch.tensor([3.0, 4.0]), list(model.parameters()), norms)
    assert evidence.describe(model, ["0", "2"]) == (
        "largest router logit by layer: 0: 3, 2: 4; 2 of 3 gradients have none, nearest to the loss b.weight"
    )


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_all_ranks_stop_when_one_has_no_numbers(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    monkeypatch.setenv("POISON", "3 1")
    config = poisoned(
        tiny({**CHANGES, **DDP, "trainer.strategy": strategy, "optim.micro_batch_size": 4}), recorded=False
    )
    result = run(config, tmp_path, "SIGTERM never 0")
    assert time.time() - float((config.run_folder / "poisoned").read_text()) < 10
    assert result.returncode == 2, result.stderr[-3000:]
    message = "error: step 3: loss nan, gradient norm nan; samples 32 to 47 of the order of samples; on rank 1; largest"
    assert result.stderr.count(message) == result.stderr.count("error: ") == 1, result.stderr[-3000:]
    assert "Traceback" not in result.stderr
    assert "signal" not in result.stderr
    assert newest_checkpoint(config.run_folder) == step_folder(config.run_folder, 2)
