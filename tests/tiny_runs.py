"""Fixtures and helpers for whole runs: a corpus and a model so small that a run takes a second."""

from __future__ import annotations

import json
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from moelm import command_line
from moelm.config import Config, NamedConfig, from_dict, register, to_dict
from moelm.config import check as check_config

command_line.import_builtins()
# TensorBoard reads event files in the order of their names, which end in a counter of this process: without leading
# zeros number 10 of one second would come before number 9.
event_file_writer._global_uid = event_file_writer.AtomicCounter(10**6)

TEXTS = {
    "code": ["ast.py", "argparse.py", "copy.py", "csv.py", "enum.py"],
    "more": ["calendar.py", "contextlib.py", "shelve.py", "types.py"],
}
STEPS = 60


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The `data.corpus` section for real Python sources in two domains."""
    folder = tmp_path_factory.mktemp("corpus")
    for domain, names in TEXTS.items():
        (folder / "text" / domain).mkdir(parents=True)
        for name in names:
            shutil.copy(Path(sysconfig.get_path("stdlib"), name), folder / "text" / domain / name)
    source = {"name": "files", "path": str(folder / "text"), "pattern": "**/*.py", "separator": ""}
    return {
        "name": "tiny",
        "dir": str(folder / "shards"),
        "sources": [source],
        "tokenizer": {"vocab_size": 512},
        "val_fraction": 0.03,  # a few of the paragraphs of each domain, whatever Python's version
    }


@pytest.fixture
def tiny(corpus: dict[str, Any], tmp_path: Path) -> Callable[..., Config]:
    """`tiny({"optim.lr": 1e-2, ...})`: the config of a 60-step run in tmp_path, with some keys changed."""

    def make(changes: dict[str, Any] | None = None) -> Config:
        raw: dict[str, Any] = {
            "run": {"name": "tiny", "dir": str(tmp_path / "runs"), "seed": 3},
            "model": {
                "n_layers": 2,
                "d_model": 32,
                "vocab_size": 512,
                "attention": {"name": "gqa", "n_heads": 4, "n_kv_heads": 2},
                "moe": {"n_experts": 8, "top_k": 2, "d_expert": 16},
            },
            "data": {"corpus": corpus, "seq_len": 32, "val_every_n_steps": 20},
            "optim": {"batch_tokens": 512, "micro_batch_size": 16, "lr": 3e-3},
            "trainer": {"max_steps": STEPS, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False},
            "checkpoint": {"every_n_steps": 25, "keep_last": 9},
        }
        for key, value in (changes or {}).items():
            *path, last = key.split(".")
            section: Any = raw
            for name in path:
                section = section.setdefault(name, {})
            section[last] = value
        config = from_dict(Config, raw)
        check_config(config)
        return from_dict(Config, to_dict(config))

    return make


@register("callback", "recorder", NamedConfig)
class Recorder(Callback):
    """Keeps what each micro-batch and each optimizer step was; `raise_after` ends the run like a crash."""

    raise_after: int | None = None
    made: list[Recorder] = []  # noqa: RUF012 the tests read the latest

    def __init__(self, config: NamedConfig, run: Config) -> None:
        self.batches: list[torch.Tensor] = []
        self.losses: list[float] = []
        self.loads: list[torch.Tensor] = []
        self.biases: list[torch.Tensor | None] = []
        self.validations: list[tuple[int, float]] = []
        Recorder.made.append(self)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch["inputs"].clone())
        self.losses.append(float(outputs["loss"]))
        if pl_module.is_step_end:
            if pl_module.last_step.load_ME is not None:
                self.loads.append(pl_module.last_step.load_ME.clone())
            self.biases.append(pl_module.expert_bias_ME)
            if Recorder.raise_after == pl_module.step:
                raise RuntimeError("the machine is gone")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.validations.append((pl_module.step, pl_module.evaluation["all"].ce))


@pytest.fixture(autouse=True)
def fresh_recorders() -> None:
    Recorder.raise_after = None
    Recorder.made.clear()


def scalars_of(run_folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value) of a run's event files, as TensorBoard shows them."""
    events = EventAccumulator(str(run_folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def summary_of(run_folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((run_folder / "summary.json").read_text())
    return loaded
