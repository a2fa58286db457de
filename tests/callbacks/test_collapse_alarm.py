"""The alarm: silent for a healthy router, once for a collapsing one, and gone on a resume with what it did."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import summary_of

from moelm.callbacks.collapse_alarm import CollapseAlarm, CollapseAlarmConfig, judge, read_alarms
from moelm.config import Config
from moelm.train import train
from moelm.training.checkpoint_io import step_folder

HEALTHY: dict[str, Any] = {
    "n_experts": 16,
    "dead": [0, 1],
    "effective": [15.0, 8.1],
    "logit_rms": [2.0, 9.0],
    "first_logit_rms": [1.0, 0.5],
}


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        ({}, {}),
        ({"dead": [0, 2]}, {"dead_experts": 1}),
        ({"dead": [3, 2]}, {"dead_experts": 0}),
        ({"effective": [15.0, 7.9]}, {"effective_experts": 1}),
        ({"logit_rms": [2.0, 10.1]}, {"logits": 1}),  # 10 x max(0.5, 1)
        ({"logit_rms": [31.0, 2.0], "first_logit_rms": [8.0, 2.0]}, {"logits": 0}),
        ({"logit_rms": [29.0, 2.0], "first_logit_rms": [8.0, 2.0]}, {}),
        ({"logit_rms": [], "first_logit_rms": []}, {}),
        ({"logit_rms": [2.0, float("nan")]}, {"logits": 1}),
        ({"dead": [8, 0], "effective": [15, 1]}, {"dead_experts": 0, "effective_experts": 1}),
    ],
)
def test_the_bounds_by_hand(change: dict[str, Any], kinds: dict[str, int]) -> None:
    found = judge(CollapseAlarmConfig(), **{**HEALTHY, **change})
    assert {kind: layer for kind, (layer, _) in found.items()} == kinds


def test_logits_may_grow_tenfold_from_what_they_were_at_the_end_of_the_grace(tiny: Callable[..., Config]) -> None:
    said = []

    class Alarm(CollapseAlarm):
        def _warn(self, module: Any, kind: str, layer: int, what: str) -> None:
            said.append((module.step, kind, layer))

    alarm, load_ME = Alarm(CollapseAlarmConfig("collapse_alarm", grace_steps=50), tiny()), torch.ones(2, 8)
    for step, rms in ((40, 0.1), (50, 2.0), (60, 19.0), (70, 21.0), (80, 25.0)):
        last_step = SimpleNamespace(load_ME=load_ME, observed_M={"logit_sq": torch.tensor([1.0, rms**2])})
        recent_load = SimpleNamespace(total=lambda: load_ME)
        alarm.observe(SimpleNamespace(step=step, last_step=last_step, recent_load=recent_load))  # type: ignore[arg-type]
    assert said == [(70, "logits", 1)]


def collapsing(**alarm: Any) -> dict[str, Any]:
    """A router without balance, large steps and one expert a token: the winner takes all."""
    return {
        "model.moe.top_k": 1,
        "model.moe.balancers": [],
        "model.init.std": 0.1,
        "optim.lr": 1e-1,
        "optim.schedule": {"name": "constant"},  # the same whatever max_steps is
        "callbacks": [{"name": "collapse_alarm", "grace_steps": 50, **alarm}, "expert_counts"],
    }


def test_a_collapse_is_said_once_with_its_remedy(
    tiny: Callable[..., Config], capfd: pytest.CaptureFixture[str]
) -> None:
    def run(max_steps: int) -> Config:
        alarm = collapsing(effective_share=0.9)
        return tiny({**alarm, "trainer.max_steps": max_steps, "checkpoint.every_n_steps": 30})

    config = run(70)
    train(config)
    said = capfd.readouterr().err
    alarms = read_alarms(config.run_folder)
    assert said.count("collapse alarm, layer") == len(alarms) >= 1
    assert "remedy: raise the coef" in said
    assert len({alarm.kind for alarm in alarms}) == len(alarms)
    assert "effective_experts" in {alarm.kind for alarm in alarms}
    assert all(alarm.step >= 50 and not alarm.stopped for alarm in alarms)
    events = EventAccumulator(str(config.run_folder))
    events.Reload()
    for alarm in alarms:
        (event,) = events.Tensors(f"alarm/{alarm.kind}/text_summary")
        assert event.step == alarm.step
        assert alarm.message in event.tensor_proto.string_val[0].decode()

    train(run(90), resume="auto")
    later = [alarm for alarm in read_alarms(config.run_folder) if alarm.step > 70]
    assert read_alarms(config.run_folder) == [*alarms, *later]
    assert not {alarm.kind for alarm in later} & {alarm.kind for alarm in alarms}, "said twice"

    train(run(90), resume=str(step_folder(config.run_folder, 30)))
    assert read_alarms(config.run_folder) == [*alarms, *later], "cut off, and said again"
    shown = plugin_event_accumulator.EventAccumulator(str(config.run_folder))  # which drops what was cut off
    shown.Reload()
    for alarm in alarms:
        assert [event.step for event in shown.Tensors(f"alarm/{alarm.kind}/text_summary")] == [alarm.step]


def test_a_run_that_the_alarm_stops_ends_like_any_other(
    tiny: Callable[..., Config], capfd: pytest.CaptureFixture[str]
) -> None:
    config = tiny({**collapsing(stop=True), "trainer.max_steps": 200, "data.val_every_n_steps": 200})
    summary = train(config)
    (first, *_) = read_alarms(config.run_folder)
    assert first.stopped
    assert summary["step"] == first.step < 200
    assert summary_of(config.run_folder)["val/ce"] == summary["val/ce"] is not None
    assert step_folder(config.run_folder, first.step).is_dir()
    assert "collapse_alarm.stop ends the run" in capfd.readouterr().err
    lines = (config.run_folder / "expert_counts.jsonl").read_text().splitlines()
    assert f'"last_step":{first.step}' in lines[0]


def test_a_balanced_run_is_left_in_peace(tiny: Callable[..., Config], capfd: pytest.CaptureFixture[str]) -> None:
    config = tiny({"trainer.max_steps": 100, "callbacks": [{"name": "collapse_alarm", "grace_steps": 50}]})
    train(config)
    assert "alarm" not in capfd.readouterr().err
    assert read_alarms(config.run_folder) == []
