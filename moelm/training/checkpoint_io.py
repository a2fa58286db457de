"""Checkpoints on disk: folders `step-XXXXXXXX/` that are either whole or not there.

    model.safetensors    weights and expert biases, under the names of GPT; a converted model has several, model-*
    training.pt          optimizer, schedule, RNG, position; without it the checkpoint holds weights only, which can
                         be evaluated, generate and be converted, but not continued
    config.yaml          the resolved config
    tokenizer.json       may be missing where there is no training.pt
    manifest.json        size and sha256 of each file; written last

`training.pt` loads with `torch.load(weights_only=True)`; nothing else is pickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint

import moelm
from moelm.config import Config, from_dict, read_yaml, to_yaml
from moelm.data.token_shards import hash_file
from moelm.training.lightning_module import MoELightningModule
from moelm.training.weight_files import CheckpointError, read_weights, write_weights

FORMAT = 2
STEP_FOLDER = re.compile(r"step-(\d{8})")
WEIGHT_FILES = "model*.safetensors"
PREFIX = "model."  # of the GPT in the state dict of MoELightningModule


def step_folder(run_folder: Path, step: int) -> Path:
    return run_folder / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The optimizer step of a checkpoint, from its manifest: the folder may have been renamed."""
    return int(_read_manifest(folder)["step"])


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            older = "; an older moelm wrote it, which can still read it" if manifest["format"] == 1 else ""
            raise CheckpointError(f"{folder}: format {manifest['format']}, this moelm reads {FORMAT}{older}")
        _ = int(manifest["step"])
        for name, facts in manifest["files"].items():
            if Path(name).name != name:
                raise CheckpointError(f"{folder}: manifest.json names {name!r}, which is no file of the folder")
            _ = int(facts["bytes"]), str(facts["sha256"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: not a checkpoint (manifest.json: {error})") from None
    return manifest


class FolderCheckpointIO(CheckpointIO):
    """Stages beside the target, writes the manifest last, syncs, then renames: a kill leaves the old or the new."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        target = Path(path)
        stage = target.with_name(f".{target.name}.tmp-{os.getpid()}")
        try:
            shutil.rmtree(stage, ignore_errors=True)
            stage.mkdir(parents=True)
            rest = {key: value for key, value in checkpoint.items() if key != "state_dict"}
            write_weights(
                {name.removeprefix(PREFIX): value for name, value in checkpoint["state_dict"].items()},
                stage / "model.safetensors",
            )
            torch.save(rest, stage / "training.pt")
            (stage / "config.yaml").write_text(to_yaml(self.config), encoding="utf-8")
            shutil.copyfile(self.config.data.corpus.path / "tokenizer.json", stage / "tokenizer.json")
            write_manifest(stage, int(checkpoint["moelm"]["step"]))
            if target.exists():
                shutil.rmtree(target)
            os.replace(stage, target)
            sync(target.parent)
        except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
            shutil.rmtree(stage, ignore_errors=True)
            raise CheckpointError(f"{target}: the checkpoint could not be written: {error}") from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        folder = Path(path)
        verify_checkpoint(folder)
        checkpoint = load_tensors(training_state(folder))
        checkpoint["state_dict"] = {f"{PREFIX}{name}": value for name, value in load_weights(folder).items()}
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        shutil.rmtree(path, ignore_errors=True)


def write_manifest(folder: Path, step: int) -> None:
    files = {}
    for file in sorted(folder.iterdir()):
        sync(file)
        files[file.name] = {"bytes": file.stat().st_size, "sha256": hash_file(file)}
    manifest = {
        "format": FORMAT,
        "step": step,
        "files": files,
        "versions": {"moelm": moelm.__version__, "torch": torch.__version__, "lightning": lightning.__version__},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    sync(folder / "manifest.json")
    sync(folder)


def sync(path: Path) -> None:
    """Until what a file or folder holds is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verify_checkpoint(folder: Path) -> None:
    """Raises CheckpointError that names the first file which is not what the manifest says."""
    files = _read_manifest(folder)["files"]
    for needed in ("config.yaml", WEIGHT_FILES):
        if not any(fnmatchcase(name, needed) for name in files):
            raise CheckpointError(f"{folder / needed}: missing in manifest.json")
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing")
        if file.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"{file}: {file.stat().st_size} bytes, the manifest says {expected['bytes']}")
        if hash_file(file) != expected["sha256"]:
            raise CheckpointError(f"{file}: the content does not match its sha256 in the manifest")


def weight_files(folder: Path) -> list[Path]:
    """The files whose tensors together are the state dict of the GPT, by name."""
    return [folder / name for name in sorted(_read_manifest(folder)["files"]) if fnmatchcase(name, WEIGHT_FILES)]


def training_state(folder: Path) -> Path:
    """What a run continues from. Raises CheckpointError for a checkpoint that holds weights only."""
    if not has_file(folder, "training.pt"):
        raise CheckpointError(
            f"{folder}: holds weights only (no training.pt), so no run can continue from it\n"
            "  remedy: evaluate it, generate with it or convert it; continue a checkpoint that training wrote"
        )
    return folder / "training.pt"


def tokenizer_file(folder: Path) -> Path:
    """Raises CheckpointError for a converted model that came without one."""
    if not has_file(folder, "tokenizer.json"):
        raise CheckpointError(
            f"{folder}: has no tokenizer.json\n"
            "  remedy: convert the model again from a folder that has one, as the `tokenizers` library writes it"
        )
    return folder / "tokenizer.json"


def has_file(folder: Path, name: str) -> bool:
    """Whether the manifest lists it: what lies in the folder besides is no part of the checkpoint."""
    return name in _read_manifest(folder)["files"]


def load_tensors(file: Path) -> dict[str, Any]:
    """A file of tensors and plain values, on the CPU; never unpickles anything else."""
    try:
        loaded: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged or foreign file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{file}: cannot be loaded: {reason}") from None
    return loaded


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The GPT's state dict from a checkpoint, on the CPU, mapped from its files where the platform can."""
    return read_weights(weight_files(folder))


def load_checkpoint_config(folder: Path) -> Config:
    return from_dict(Config, read_yaml(folder / "config.yaml"))


def is_valid(folder: Path) -> bool:
    try:
        verify_checkpoint(folder)
    except CheckpointError:
        return False
    return True


def step_folders(run_folder: Path) -> list[Path]:
    """Oldest first, valid or not."""
    if not run_folder.is_dir():
        return []
    return sorted(path for path in run_folder.iterdir() if STEP_FOLDER.fullmatch(path.name) and path.is_dir())


def newest_checkpoint(run_folder: Path) -> Path | None:
    """The newest valid checkpoint, by content; an invalid one is passed over."""
    return next((folder for folder in reversed(step_folders(run_folder)) if is_valid(folder)), None)


def find_checkpoint(path: str | Path) -> Path:
    """A run folder (its newest valid checkpoint) or a step folder. Raises CheckpointError."""
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give a run's folder or one of its step-XXXXXXXX")
    if (folder / "manifest.json").exists() or STEP_FOLDER.fullmatch(folder.resolve().name):
        verify_checkpoint(folder)
        return folder
    newest = newest_checkpoint(folder)
    if newest is None:
        raise CheckpointError(f"{folder}: no valid checkpoint (step-XXXXXXXX/manifest.json) in it")
    return newest


def set_aside_later(run_folder: Path, step: int) -> None:
    """Before a run continues from `step`: later checkpoints, damaged or of a branch that is left, are renamed to
    `step-XXXXXXXX.left`, so that neither `auto` nor the pruning takes them for this run's; stale stages go."""
    for folder in step_folders(run_folder):
        if int(folder.name.removeprefix("step-")) > step:
            left = folder.with_name(f"{folder.name}.left")
            shutil.rmtree(left, ignore_errors=True)
            folder.rename(left)
            print(f"{folder} is later than the checkpoint that is continued: renamed to {left.name}", file=sys.stderr)
    for stage in run_folder.glob(".step-*.tmp-*"):
        shutil.rmtree(stage, ignore_errors=True)


class StepCheckpoint(Checkpoint):
    """Saves every n optimizer steps and at the end, after the validation if one is due, and keeps the last k."""

    def __init__(self, config: Config) -> None:
        self.every, self.keep_last, self.run_folder = (
            config.checkpoint.every_n_steps,
            config.checkpoint.keep_last,
            config.run_folder,
        )
        self._saved_step = -1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, MoELightningModule)
        if pl_module.is_step_end and not pl_module.is_validation_step:
            self._save_if_due(trainer, pl_module)  # else after the validation

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._save_if_due(trainer, pl_module, force=trainer.should_stop)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save_if_due(trainer, pl_module, force=True)

    def _save_if_due(self, trainer: pl.Trainer, module: pl.LightningModule, force: bool = False) -> None:
        assert isinstance(module, MoELightningModule)
        step = trainer.global_step
        due = step % self.every == 0 or force or module.must_stop
        if not due or step == self._saved_step:
            return
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)  # what is still queued is training, not saving
        self._saved_step, started = step, time.perf_counter()
        trainer.save_checkpoint(step_folder(self.run_folder, step))
        if trainer.is_global_zero:
            for old in [folder for folder in step_folders(self.run_folder) if is_whole(folder)][: -self.keep_last]:
                shutil.rmtree(old, ignore_errors=True)
        module.paused_s += time.perf_counter() - started


def is_whole(folder: Path) -> bool:
    """Has a manifest: it was complete when it was renamed into place. Cheaper than `is_valid`."""
    return (folder / "manifest.json").is_file()
