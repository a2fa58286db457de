"""A resumed run is the same run, to the last bit."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_runs import Recorder, scalars_of, summary_of

from moelm.config import Config, ConfigError, to_yaml
from moelm.data.token_shards import DataError, hash_file
from moelm.model.size import flops_per_token
from moelm.train import train
from moelm.training import lightning_module
from moelm.training.checkpoint_io import load_training, load_weights, step_folder
from moelm.training.rng import seed_rank

STEPS = 60

VARIANTS = {
    "plain": {},
    "accumulation 2": {"optim.micro_batch_size": 8},
    "all experts and dropout": {"model.moe.top_k": 8, "model.dropout": 0.1},
    "dropout and loss-free": {
        "model.dropout": 0.1,
        "model.moe.router": {"name": "top_k", "score": "sigmoid", "selection_bias": True},
        "model.moe.balancers": [{"name": "loss_free"}],
    },
    "a save beside a validation": {"checkpoint.every_n_steps": 20, "model.dropout": 0.1},
    "a worker process": {"data.n_workers": 1, "model.dropout": 0.1},
}
RARE = ("plain", "all experts and dropout", "a worker process")


def named(config: Config, name: str, recorded: bool = True) -> Config:
    from moelm.config import make_named

    run = dataclasses.replace(config.run, name=name)
    callbacks = [*config.callbacks, make_named("callback", "recorder")] if recorded else config.callbacks
    return dataclasses.replace(config, run=run, callbacks=callbacks)


def assert_same(a: Any, b: Any, where: str = "") -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (left, right) in enumerate(zip(a, b, strict=True)):
            assert_same(left, right, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def assert_same_state(a: Path, b: Path) -> None:
    """Weights, biases, moments, schedule, RNG, recent load; all but Lightning's bookkeeping and the run's name."""
    assert_same(load_weights(a), load_weights(b))
    left, right = load_training(a), load_training(b)
    for key in ("optimizer_states", "lr_schedulers", "global_step"):
        assert left[key], key
        assert_same(left[key], right[key], key)
    for key in ("rng_by_rank", "recent_load", "step"):
        assert_same(left["moelm"][key], right["moelm"][key], key)


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[pytest.mark.slow] * (name in RARE)) for name in VARIANTS]
)
def test_a_run_that_died_and_resumed_equals_the_uninterrupted_one_bitwise(
    variant: str, tiny: Callable[..., Config]
) -> None:
    config = tiny({**VARIANTS[variant], "trainer.max_steps": 40})
    straight, broken = named(config, "straight"), named(config, "broken")
    train(straight)
    whole = Recorder.made[-1]
    Recorder.raise_after = 33
    with pytest.raises(RuntimeError, match="the machine is gone"):
        train(broken)
    Recorder.raise_after = None
    train(broken, resume="auto")
    rest = Recorder.made[-1]

    saved = 20 if config.checkpoint.every_n_steps == 20 else 25
    accumulation = 512 // (config.optim.micro_batch_size * 32)
    assert len(rest.batches) == (40 - saved) * accumulation
    assert_same(whole.batches[saved * accumulation :], rest.batches, "token ids")
    assert_same(whole.losses[saved * accumulation :], rest.losses, "losses")
    assert [v for v in whole.validations if v[0] > saved] == rest.validations
    assert_same_state(step_folder(straight.run_folder, 40), step_folder(broken.run_folder, 40))
    assert summary_of(straight.run_folder)["val/ce"] == summary_of(broken.run_folder)["val/ce"]
    assert_same_curves(straight.run_folder, broken.run_folder)


def test_a_run_that_died_before_its_first_checkpoint_begins_anew_with_curves_of_its_own(
    tiny: Callable[..., Config],
) -> None:
    config = tiny({"checkpoint.every_n_steps": 35, "trainer.max_steps": 40})
    straight, broken = named(config, "straight"), named(config, "broken")
    train(straight)
    Recorder.raise_after = 33
    with pytest.raises(RuntimeError, match="the machine is gone"):
        train(broken)
    Recorder.raise_after = None
    train(broken, resume="auto")
    assert_same_curves(straight.run_folder, broken.run_folder)


def assert_same_curves(straight: Path, resumed: Path) -> None:
    a, b = scalars_of(straight), scalars_of(resumed)
    assert a.keys() == b.keys()
    for tag, points in a.items():
        steps = [step for step, _ in b[tag]]
        assert steps == sorted(set(steps)), f"{tag} repeats or goes backward: {steps}"
        if not tag.startswith("perf/"):
            assert points == b[tag], tag


@pytest.mark.slow
def test_a_run_killed_with_sigkill_resumes_bitwise_through_the_command(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    config = named(tiny({"model.dropout": 0.1}), "straight", recorded=False)
    train(config)
    killed = named(config, "killed", recorded=False)
    file = tmp_path / "killed.yaml"
    file.write_text(to_yaml(killed))
    command = [sys.executable, "-m", "moelm.train", "--config", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wait_for(step_folder(killed.run_folder, 25), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    shutil.rmtree(step_folder(killed.run_folder, 50), ignore_errors=True)  # if it was that quick
    shutil.rmtree(step_folder(killed.run_folder, 60), ignore_errors=True)
    subprocess.run([*command, "--resume", "auto"], env=environment, check=True, capture_output=True)
    assert_same_state(step_folder(config.run_folder, STEPS), step_folder(killed.run_folder, STEPS))
    assert summary_of(config.run_folder)["val/ce"] == summary_of(killed.run_folder)["val/ce"]


def wait_for(folder: Path, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 120
    while not folder.exists():
        assert process.poll() is None, "the run ended before its first checkpoint"
        assert time.monotonic() < until, f"{folder} did not appear"
        time.sleep(0.005)


def test_resume_auto_without_a_checkpoint_starts_from_the_beginning(tiny: Callable[..., Config]) -> None:
    config = tiny({"trainer.max_steps": 3})
    stage = config.run_folder / ".step-00000002.tmp-1"  # a kill met the first save
    stage.mkdir(parents=True)
    assert train(config, resume="auto")["step"] == 3
    assert not stage.exists()


def test_a_run_is_not_continued_over_another(tiny: Callable[..., Config]) -> None:
    one, other = (tiny({"trainer.max_steps": 3, "run.name": name}) for name in ("one", "other"))
    train(one)
    train(other)
    before = sorted(path.stat().st_mtime_ns for path in one.run_folder.rglob("*"))
    longer = tiny({"trainer.max_steps": 5, "run.name": "one"})
    for path in (other.run_folder, step_folder(other.run_folder, 3)):
        with pytest.raises(ConfigError, match=rf"run\.name: the run {one.run_folder} exists, and {path} is not of it"):
            train(longer, resume=str(path))
    assert sorted(path.stat().st_mtime_ns for path in one.run_folder.rglob("*")) == before
    assert train(tiny({"trainer.max_steps": 5, "run.name": "new"}), resume=str(other.run_folder))["step"] == 5
    assert train(longer, resume=str(one.run_folder))["step"] == 5


def test_a_run_that_exists_is_refused_and_left_as_it_was(tiny: Callable[..., Config]) -> None:
    config = tiny({"trainer.max_steps": 3})
    train(config)
    before = sorted(path.stat().st_mtime_ns for path in config.run_folder.rglob("*"))
    with pytest.raises(ConfigError, match=r"run\.name.*exists(.|\n)*--resume auto"):
        train(config)
    assert sorted(path.stat().st_mtime_ns for path in config.run_folder.rglob("*")) == before


ANOTHER_RUN = {
    "model.n_layers": 1,
    "model.moe.balancers": [{"name": "switch", "coef": 0.5}],
    "optim.optimizer": "muon",
    "optim.batch_tokens": 1024,
    "data.seq_len": 16,
    "run.seed": 4,
}


def test_a_run_is_not_continued_as_another_run(tiny: Callable[..., Config]) -> None:
    train(tiny({"trainer.max_steps": 2}))
    for key, value in ANOTHER_RUN.items():
        with pytest.raises(ConfigError, match=rf"{key}(.|\n)*was trained with"):
            train(tiny({"trainer.max_steps": 4, key: value}), resume="auto")
    changed = {"model.n_layers": 1, "model.moe.top_k": 1, "optim.lr": 1e-4, "trainer.max_steps": 4}
    with pytest.raises(ConfigError, match=r"moe\.top_k: 1, but .* with 2\n  model\.n_layers: 1 instead of 2\n  remedy"):
        train(tiny(changed), resume="auto")
    assert train(tiny({"trainer.max_steps": 4, "optim.micro_batch_size": 8}), resume="auto")["step"] == 4


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_numbers_of_the_optimizer_may_change_and_count_from_there(
    optimizer: str, tiny: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"optim.optimizer": optimizer, "optim.schedule": {"name": "constant", "warmup_steps": 4}}
    train(tiny({**changes, "trainer.max_steps": 2, "trainer.log_every_n_steps": 1}))
    numbers = {"optim.lr": 1e-3, "optim.betas": [0.5, 0.6], "optim.eps": 1e-4, "optim.weight_decay": 0.3}
    if optimizer == "muon":
        numbers["optim.momentum"] = 0.5
    config = tiny({**changes, **numbers, "trainer.max_steps": 6, "trainer.log_every_n_steps": 1})
    capsys.readouterr()
    train(config, resume="auto")
    said = capsys.readouterr().err
    assert "change optim.betas.0 0.9 -> 0.5, optim.betas.1 0.95 -> 0.6, optim.eps 1e-08 -> 0.0001, optim.lr " in said
    lrs = [value for _, value in scalars_of(config.run_folder)["train/lr"]]
    assert lrs == pytest.approx([7.5e-4, 1.5e-3, 7.5e-4, 1e-3, 1e-3, 1e-3])
    state = load_training(step_folder(config.run_folder, 6))["optimizer_states"][0]
    for group in state["param_groups"]:
        assert (group["eps"], list(group["betas"]), group.get("momentum", 0.5)) == (1e-4, [0.5, 0.6], 0.5)
    assert {group["weight_decay"] for group in state["param_groups"]} == {0.3, 0.0}
    assert train(dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, max_steps=7)), "auto")


@pytest.mark.parametrize("other", ["tokenizer", "data"])
def test_a_run_is_not_continued_on_other_data(other: str, tiny: Callable[..., Config], tmp_path: Path) -> None:
    config = tiny({"trainer.max_steps": 2})
    train(config)
    folder = tmp_path / "shards"
    shutil.copytree(config.data.corpus.path, folder)
    corpus = dataclasses.replace(config.data.corpus, dir=str(folder))
    trainer = dataclasses.replace(config.trainer, max_steps=3)
    moved = dataclasses.replace(config, data=dataclasses.replace(config.data, corpus=corpus), trainer=trainer)
    assert train(moved, resume="auto")["step"] == 3
    manifest = json.loads((folder / "manifest.json").read_text())
    if other == "tokenizer":
        file, entry, key = folder / "tokenizer.json", manifest, "tokenizer_sha256"
        file.write_text(file.read_text() + "\n")
    else:
        entry, key = manifest["splits"]["train"]["code"]["shards"][0], "sha256"
        file = folder / entry["file"]
        file.write_bytes(b"\0\0" + file.read_bytes()[2:])
    entry[key] = hash_file(file)
    del manifest["sha256"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=f"not the {other} that .* was trained (with|on)(.|\n)*another run.name"):
        train(dataclasses.replace(moved, trainer=dataclasses.replace(trainer, max_steps=4)), resume="auto")


def test_a_finished_run_can_be_made_longer_and_its_summary_is_of_all_of_it_but_its_time(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny({"trainer.max_steps": 4, "optim.schedule.name": "constant"}))
    longer = tiny({"trainer.max_steps": 7, "optim.schedule.name": "constant"})
    monkeypatch.setattr("moelm.train.time", SimpleNamespace(perf_counter=iter([10.0, 14.0]).__next__))
    summary = train(longer, resume="auto")
    assert (summary["step"], summary["tokens"]) == (7, 7 * 512)
    assert summary["train_flops"] == 7 * 512 * flops_per_token(longer.model, 32)
    assert (summary["wall_s"], summary["tokens_per_s"]) == (4, 3 * 512 / 4)
    with pytest.raises(ConfigError, match="7 steps are done already"):
        train(longer, resume="auto")


def test_a_run_that_goes_on_with_other_ranks_does_not_draw_the_numbers_of_its_beginning(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def seed_and_draw(*numbers: int) -> None:
        seed_rank(*numbers)
        drawn.append((numbers, float(torch.rand(()))))

    monkeypatch.setattr(lightning_module, "seed_rank", seed_and_draw)
    for steps, resume in ((2, None), (3, "auto")):
        train(tiny({"trainer.max_steps": steps}), resume=resume)
    (first, drawn_first), (second, drawn_second) = drawn
    assert (first[1:], second[1:]) == ((0, 0), (0, 2))
    assert drawn_first != drawn_second
