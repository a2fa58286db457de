"""The counts of a run: exact, whole, and the same after a crash."""

from __future__ import annotations

import dataclasses
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import Recorder

from moelm.callbacks.expert_counts import FILE, read_expert_counts
from moelm.config import Config, UserError, make_named, to_yaml
from moelm.train import train
from moelm.training.checkpoint_io import load_tensors, step_folder

COUNTS = {"callbacks": [{"name": "expert_counts", "every_n_steps": 20}]}
CAPACITY = {"model.moe.dispatch": {"name": "capacity", "capacity_factor": 1.0}}


def sums(run_folder: Path, what: str = "load") -> list[int]:
    """All choices of the run by MoE layer."""
    intervals = read_expert_counts(run_folder).intervals
    return torch.tensor([getattr(interval, what) for interval in intervals]).sum((0, 2)).tolist()


def test_the_sum_is_top_k_times_tokens(tiny: Callable[..., Config]) -> None:
    config = tiny({**COUNTS, "optim.micro_batch_size": 8, "trainer.max_steps": 47})
    train(config)
    assert sums(config.run_folder) == [2 * 47 * 512] * 2
    spans = [(each.first_step, each.last_step) for each in read_expert_counts(config.run_folder).intervals]
    assert spans == [(1, 20), (21, 40), (41, 47)]


def test_each_interval_is_the_sum_of_its_steps(tiny: Callable[..., Config]) -> None:
    config = tiny({**COUNTS, "trainer.log_every_n_steps": 15})
    config = dataclasses.replace(config, callbacks=[*config.callbacks, make_named("callback", "recorder")])
    train(config)
    intervals = read_expert_counts(config.run_folder).intervals
    assert [each.last_step for each in intervals] == [30, 45, 60]  # at the log step after a multiple of 20
    for each in intervals:
        steps = Recorder.made[-1].loads[each.first_step - 1 : each.last_step]
        assert torch.stack(steps).sum(0).tolist() == each.load


def test_what_capacity_dropped_is_counted_and_otherwise_not_written(tiny: Callable[..., Config]) -> None:
    config = tiny({**COUNTS, **CAPACITY, "trainer.max_steps": 5})
    train(config)
    assert all(
        0 < kept < load for kept, load in zip(sums(config.run_folder, "kept"), sums(config.run_folder), strict=True)
    )
    roomy = {"name": "capacity", "capacity_factor": 8.0}
    config = tiny({**COUNTS, "model.moe.dispatch": roomy, "trainer.max_steps": 5, "run.name": "roomy"})
    train(config)
    assert "kept" not in (config.run_folder / FILE).read_text()
    assert sums(config.run_folder, "kept") == sums(config.run_folder)


def test_validations_are_counted_by_domain(tiny: Callable[..., Config]) -> None:
    config = tiny(COUNTS)
    train(config)
    validations = read_expert_counts(config.run_folder).validations
    assert list(validations) == [20, 40, 60]
    for domains in validations.values():
        assert list(domains) == ["code", "more"]
        for load in domains.values():
            assert sum(load[0]) == sum(load[1]) > 0
    totals = [[sum(load[0]) for load in domains.values()] for domains in validations.values()]
    assert totals[0] == totals[1] == totals[2]


@pytest.mark.parametrize("died_after", [pytest.param(33, marks=pytest.mark.slow), 58])
def test_a_run_that_died_and_resumed_leaves_the_file_of_the_uninterrupted_one(
    died_after: int, tiny: Callable[..., Config]
) -> None:
    config = tiny({**COUNTS, **CAPACITY})
    recorded = [*config.callbacks, make_named("callback", "recorder")]
    files = []
    for name in ("straight", "broken"):
        config = dataclasses.replace(config, callbacks=recorded, run=dataclasses.replace(config.run, name=name))
        files.append(config.run_folder / FILE)
        if name == "straight":
            train(config)
            continue
        Recorder.raise_after = died_after
        with pytest.raises(RuntimeError, match="the machine is gone"):
            train(config)
        Recorder.raise_after = None
        with files[1].open("a") as stream:
            stream.write('{"first_step":41,"last_st')  # torn by the kill
        assert len(read_expert_counts(config.run_folder).intervals) == died_after // 20
        train(config, resume="auto")
    assert files[0].read_text() == files[1].read_text()
    state = load_tensors(step_folder(config.run_folder, 50) / "training.pt")["callbacks"]
    assert int(state["ExpertCountsWriter"]["load_ME"].sum()) == 2 * 2 * 10 * 512


def test_a_run_that_goes_on_after_its_end_counts_nothing_twice(tiny: Callable[..., Config]) -> None:
    config = tiny({**COUNTS, "trainer.max_steps": 30})
    train(config)
    train(tiny({**COUNTS, "trainer.max_steps": 50}), resume="auto")
    assert sums(config.run_folder) == [2 * 50 * 512] * 2


def test_an_interval_closed_after_the_last_save_is_not_counted_twice(tiny: Callable[..., Config]) -> None:
    """`collapse_alarm` behind `expert_counts` in the list: at its stop the interval is still open and is saved so."""
    alarm = {"name": "collapse_alarm", "grace_steps": 50, "effective_share": 0.9999, "stop": True}
    changes = {"callbacks": ["expert_counts", alarm], "trainer.max_steps": 80, "data.val_every_n_steps": 80}
    assert train(tiny(changes))["step"] < 80
    folder = tiny(changes).run_folder
    stopped = read_expert_counts(folder).intervals[-1].last_step
    assert sums(folder) == [2 * stopped * 512] * 2
    train(tiny(changes), resume="auto")  # warned already, so it goes on
    assert sums(folder) == [2 * 80 * 512] * 2


def test_a_damaged_line_is_named_and_no_file_is_no_counts(tmp_path: Path) -> None:
    assert read_expert_counts(tmp_path).intervals == []
    (tmp_path / FILE).write_text('{"first_step":1,"last_step":2,"load":[[1]]}\nwhat\n')
    with pytest.raises(UserError, match="line 2"):
        read_expert_counts(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_count_what_one_counts(tiny: Callable[..., Config], tmp_path: Path) -> None:
    """With every callback on: what is collective must be so on both ranks, or this hangs."""
    config = tiny({"trainer.max_steps": 20, "optim.micro_batch_size": 8, "optim.lr": 1e-9})
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    for name, options in (("one", []), ("two", ["trainer.strategy=ddp", "trainer.devices=2"])):
        command = [sys.executable, "-m", "moelm.train", "--config", str(file), f"run.name={name}", *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        assert result.returncode == 0, result.stderr[-3000:]
    one, two = (read_expert_counts(config.run_folder.parent / name) for name in ("one", "two"))
    assert sums(config.run_folder.parent / "two") == [2 * 20 * 512] * 2
    assert [each.last_step for each in one.intervals] == [each.last_step for each in two.intervals] == [20]
    for domain, load in one.validations[20].items():
        assert [sum(layer) for layer in load] == [sum(layer) for layer in two.validations[20][domain]]
    pictures = [co_activation_of(config.run_folder.parent / name) for name in ("one", "two")]
    assert pictures[0].shape == pictures[1].shape
    assert (pictures[0] == pictures[1]).mean() > 0.99  # weights differ by rounding, so a choice here and there may


def co_activation_of(run_folder: Path) -> np.ndarray:
    events = EventAccumulator(str(run_folder))
    events.Reload()
    (image,) = events.Images("moe/co_activation/layer_00")
    return np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
