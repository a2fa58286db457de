"""Checkpoints on disk: folders `step-XXXXXXXX/` that are either whole or not there.

    model.safetensors      weights and expert biases, under the names of GPT
    optimizer.safetensors  moments, under "<moment>.<parameter>"
    training.pt            all else of the optimizer, schedule, RNG, position; without it the checkpoint holds weights
                           only, which can be evaluated, generate and be converted, but not continued
    config.yaml            the resolved config
    tokenizer.json         may be missing where there is no training.pt
    manifest.json          size and sha256 of each file, and of what else it says itself; written last

There may be several `model-*` and `optimizer-*` (of a converted model, of a run whose ranks wrote one each), of which
each has some tensors or a part of each (`weight_files.py`). `training.pt` loads with `torch.load(weights_only=True)`;
nothing else is pickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from fnmatch import fnmatchcase
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch

import moelm
from moelm.config import Config, from_dict, read_yaml
from moelm.data.token_shards import hash_file, is_sealed, read_json, sealed
from moelm.training.statistics import gather, rank, world_size
from moelm.training.training_file import check_moments, check_training
from moelm.training.weight_files import CheckpointError, TensorFiles, read_weights

FORMAT = 3
STEP_FOLDER = re.compile(r"step-(\d{8})")
WEIGHT_FILES, MOMENT_FILES = "model*.safetensors", "optimizer*.safetensors"
PREFIX = "model."  # of the GPT in the state dict of MoELightningModule
Facts = dict[str, Any]


class Held(NamedTuple):
    """Which part of a parameter a rank has."""

    whole: tuple[int, ...]  # shape
    slices: tuple[slice, ...]


def step_folder(run_folder: Path, step: int) -> Path:
    return run_folder / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The optimizer step of a checkpoint, from its manifest: the folder may have been renamed."""
    return int(_read_manifest(folder)["step"])


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = read_json(folder / "manifest.json")
        if manifest["format"] not in (2, FORMAT):  # in 2 the moments lie in training.pt
            age = "an older" if manifest["format"] == 1 else "a newer"
            problem = f"format {manifest['format']}, this moelm reads {FORMAT} and 2"
            raise CheckpointError(f"{folder}: {problem}\n  remedy: {age} moelm wrote it, which can still read it")
        if type(manifest["step"]) is not int or not is_sealed(manifest):
            raise CheckpointError(f"{folder}: manifest.json is damaged: its content does not match its own sha256")
        _ = manifest["versions"]["lightning"]
        for name, facts in manifest["files"].items():
            if Path(name).name != name:
                raise CheckpointError(f"{folder}: manifest.json names {name!r}, which is no file of the folder")
            _ = int(facts["bytes"]), str(facts["sha256"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: not a checkpoint (manifest.json: {error})") from None
    return manifest


def write_manifest(folder: Path, step: int, known: Mapping[str, Facts] | None = None) -> None:
    """Of all files in the folder; of those that are `known`, the size only is looked up. Raises OSError."""
    files = {}
    for file in sorted(folder.iterdir()):
        files[file.name] = facts = (known or {}).get(file.name) or synced_facts(file)
        if file.stat().st_size != facts["bytes"]:
            raise OSError(f"{file.name} has {file.stat().st_size} bytes, {facts['bytes']} were written")
    manifest = {
        "format": FORMAT,
        "step": step,
        "files": files,
        "versions": {"moelm": moelm.__version__, "torch": torch.__version__, "lightning": version("lightning")},
    }
    (folder / "manifest.json").write_text(json.dumps(sealed(manifest), indent=1), encoding="utf-8")
    sync(folder / "manifest.json")
    sync(folder)


def synced_facts(file: Path) -> Facts:
    """What the manifest says of a file, once it is on the disk. Raises OSError."""
    sync(file)
    return {"bytes": file.stat().st_size, "sha256": hash_file(file)}


def sync(path: Path) -> None:
    """Until what a file or folder holds is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verify_checkpoint(folder: Path, share: slice | None = slice(None)) -> None:
    """Raises CheckpointError that names the first file which is not what the manifest says. The content is read of that
    `share` of the files only; None: of none."""
    manifest = _read_manifest(folder)
    files = manifest["files"]
    moments = (MOMENT_FILES,) if manifest["format"] == FORMAT and "training.pt" in files else ()
    for needed in ("config.yaml", WEIGHT_FILES, *moments):
        if not any(fnmatchcase(name, needed) for name in files):
            raise CheckpointError(f"{folder / needed}: missing in manifest.json")
    read = set() if share is None else set(sorted(files)[share])
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing")
        if file.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"{file}: {file.stat().st_size} bytes, the manifest says {expected['bytes']}")
        if name in read and hash_file(file) != expected["sha256"]:
            raise CheckpointError(f"{file}: the content does not match its sha256 in the manifest")


def verify_together(folder: Path) -> None:
    """Each rank reads its share of the files, and all hear what is wrong. Raises CheckpointError."""
    problem = None
    try:
        verify_checkpoint(folder, slice(rank(), None, world_size()))
    except CheckpointError as error:
        problem = str(error)
    for said in gather(problem):
        if said:
            raise CheckpointError(said)


def continue_together(folder: Path | None) -> None:
    """Raises CheckpointError on all ranks if they do not mean the same checkpoint, of which only the first reads more
    than the sizes beforehand; None: there is none."""
    found = gather(None if folder is None else str(folder))
    if len(set(found)) > 1:
        named = ", ".join(sorted({str(each) for each in found}))
        problem = f"not all ranks would continue the same checkpoint, but {named}: one of them is damaged"
        raise CheckpointError(f"{problem}\n  remedy: start again, with --resume {found[0] or 'auto'}")


def file_facts(folder: Path) -> dict[str, Facts]:
    """Of each file, what the manifest says."""
    return dict(_read_manifest(folder)["files"])


def weight_files(folder: Path) -> list[Path]:
    """The files whose tensors together are the state dict of the GPT, by name."""
    return _listed(folder, WEIGHT_FILES)


def moment_files(folder: Path) -> list[Path]:
    return _listed(folder, MOMENT_FILES)


def _listed(folder: Path, pattern: str) -> list[Path]:
    return [folder / name for name in sorted(file_facts(folder)) if fnmatchcase(name, pattern)]


def training_state(folder: Path) -> Path:
    """What a run continues from. Raises CheckpointError for a checkpoint that holds weights only."""
    if not has_file(folder, "training.pt"):
        raise CheckpointError(
            f"{folder}: holds weights only (no training.pt), so no run can continue from it\n"
            "  remedy: evaluate it, generate with it or convert it; continue a checkpoint that training wrote"
        )
    return folder / "training.pt"


def validation_is_due(folder: Path) -> bool:
    """Was the run told to end in the validation after that step?"""
    found = load_tensors(training_state(folder))
    own = found.get("moelm") if isinstance(found, dict) else None  # who loads all of it says what is wrong with it
    return isinstance(own, dict) and bool(own.get("validation_due"))


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
    return name in file_facts(folder)


def load_tensors(file: Path) -> dict[str, Any]:
    """A file of tensors and plain values, on the CPU; never unpickles anything else."""
    try:
        loaded: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged or foreign file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{file}: cannot be loaded: {reason}") from None
    return loaded


def load_training(folder: Path, held: Mapping[str, Held] | None = None) -> dict[str, Any]:
    """What Lightning saved in a verified checkpoint, on the CPU. Of a parameter that `held` names, and of its moments,
    only that part is read.

    Raises CheckpointError, also where the checkpoint has a tensor of another shape than `held`.
    """
    held = held or {}
    file = training_state(folder)
    checkpoint, manifest, where = load_tensors(file), _read_manifest(folder), str(file)
    step = manifest["step"]
    check_training(checkpoint, step, manifest["versions"]["lightning"], where)
    checkpoint["lr_schedulers"] = [{"last_epoch": step, "_step_count": step + 1, "lr_lambdas": []}]  # no more is needed
    weights, moments = TensorFiles(weight_files(folder)), TensorFiles(moment_files(folder))
    checkpoint["state_dict"] = {f"{PREFIX}{name}": _part(weights, name, held.get(name), folder) for name in weights}
    optimizer, names = checkpoint["optimizer_states"][0], checkpoint["moelm"].get("parameters", ())
    states, numbers = optimizer["state"], {name: i for i, name in enumerate(names)}
    for stored in moments:
        key, _, name = stored.partition(".")
        if name not in numbers or name not in weights:
            raise CheckpointError(f"{where}: has no parameter {name}, of which there are moments")
        if moments.shapes[stored] != weights.shapes[name]:
            raise CheckpointError(f"{folder}: {stored} has the shape {moments.shapes[stored]}, not that of {name}")
        states.setdefault(numbers[name], {})[key] = _part(moments, stored, held.get(name), folder)
    check_moments(states, sum(len(group["params"]) for group in optimizer["param_groups"]), where)
    return checkpoint


def _part(tensors: TensorFiles, name: str, held: Held | None, folder: Path) -> torch.Tensor:
    if held is None:
        return tensors[name]
    if tensors.shapes[name] != held.whole:
        raise CheckpointError(f"{folder}: {name} has the shape {tensors.shapes[name]}, the model's is {held.whole}")
    return tensors.part(name, held.slices)


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


def newest_checkpoint(run_folder: Path, share: slice | None = slice(None)) -> Path | None:
    """The newest valid checkpoint, by content; an invalid one is passed over, which is said. `share`: see
    `verify_checkpoint`."""
    for folder in reversed(step_folders(run_folder)):
        try:
            verify_checkpoint(folder, share)
        except CheckpointError as error:
            if share == slice(None):  # by one rank of all
                print(f"passed over: {error}", file=sys.stderr)
        else:
            return folder
    return None


def find_checkpoint(path: str | Path, share: slice | None = slice(None)) -> Path:
    """A run folder (its newest valid checkpoint) or a step folder. Raises CheckpointError."""
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder\n  remedy: give a run's folder or one of its step-XXXXXXXX")
    if (folder / "manifest.json").exists() or STEP_FOLDER.fullmatch(folder.resolve().name):
        verify_checkpoint(folder, share)
        return folder
    newest = newest_checkpoint(folder, share)
    if newest is None:
        raise CheckpointError(f"{folder}: no valid checkpoint (step-XXXXXXXX/manifest.json) in it")
    return newest


def set_aside_later(run_folder: Path, step: int) -> None:
    """Before a run continues from `step`: later checkpoints, damaged or of a branch that is left, are renamed to
    `step-XXXXXXXX.left`, `.left-2` and so on, so that neither `auto` nor the pruning takes them for this run's; stale
    stages go."""
    for folder in step_folders(run_folder):
        if int(folder.name.removeprefix("step-")) > step:
            names = (f"{folder.name}.left{f'-{i}' * (i > 1)}" for i in count(1))  # none that is there already
            left = next(path for path in map(folder.with_name, names) if not path.exists())
            folder.rename(left)
            print(f"{folder} is later than the checkpoint that is continued: renamed to {left.name}", file=sys.stderr)
    for stage in run_folder.glob(".step-*.tmp-*"):
        shutil.rmtree(stage, ignore_errors=True)


def finish_rename(run_folder: Path) -> None:
    """Where a kill came between the two renames that put a checkpoint in another's place (`saving.py`), the second.
    By the first rank, before a run looks for what it continues."""
    for replaced in run_folder.glob(".step-*.tmp-*-old"):
        stage = replaced.with_name(replaced.name.removesuffix("-old"))
        target = replaced.with_name(replaced.name[1:].partition(".")[0])
        if not target.exists() and is_valid(stage):
            stage.rename(target)


def is_whole(folder: Path) -> bool:
    """Has a manifest: it was complete when it was renamed into place. Cheaper than `verify_checkpoint`."""
    return (folder / "manifest.json").is_file()
