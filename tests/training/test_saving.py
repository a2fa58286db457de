"""Checkpoints in parts, and those that are written while training goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from test_checkpoint_io import rewrite_manifest
from test_resume import assert_same, assert_same_state, named, wait_for
from tiny_runs import Recorder

import moelm.train as train_module
from moelm import convert
from moelm.config import Config, UserError, to_yaml
from moelm.evaluate import evaluate
from moelm.train import train
from moelm.training import checkpoint_io, saving
from moelm.training.checkpoint_io import (
    Held,
    find_checkpoint,
    is_valid,
    load_training,
    load_weights,
    moment_files,
    newest_checkpoint,
    step_folder,
    step_folders,
    step_of,
    verify_checkpoint,
    verify_together,
    weight_files,
)
from moelm.training.saving import FolderCheckpointIO
from moelm.training.weight_files import N_BYTES, CheckpointError, Place, TensorFiles, read_weights, write_weights

ASYNCHRONOUS = {"checkpoint.asynchronous": True}


# ------------------------------------------------------------------------------------------------- parts


@pytest.fixture
def grid(tmp_path: Path) -> tuple[dict[str, torch.Tensor], list[Path]]:
    """Tensors, and four files with a part of each: rows and columns, the last of them fewer, or none at all."""
    tensors = {
        "float": torch.randn(5, 7),
        "short": torch.randn(3, 3, 3).bfloat16(),
        "count": torch.arange(6).reshape(2, 3),
        "thin": torch.randn(1, 4),
    }
    files = []
    for i in range(2):
        for j in range(2):
            parts, places = {}, {}
            for name, tensor in tensors.items():
                rows, columns = (-(-n // 2) for n in tensor.shape[:2])
                part = tensor[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
                if part.numel():
                    offset = (i * rows, j * columns, *[0] * (tensor.ndim - 2))
                    parts[name], places[name] = part, Place(offset, tuple(tensor.shape))
            if (i, j) == (1, 1):
                parts["whole"] = tensors["whole"] = torch.tensor(3.5)
            files.append(tmp_path / f"model-{i}{j}.safetensors")
            write_weights(parts, files[-1], places)
    return tensors, files


def test_parts_are_joined_and_any_part_is_read(grid: tuple[dict[str, torch.Tensor], list[Path]]) -> None:
    tensors, files = grid
    joined = TensorFiles(reversed(files))
    assert_same(dict(joined), {name: tensors[name] for name in joined})
    assert_same(read_weights(files), {name: tensors[name] for name in TensorFiles(files)})
    for file in files:  # readers that view the whole file as one tensor need each to begin at a multiple of its type
        header, _ = header_of(file)
        assert not [name for name in tensors.keys() & header.keys() if unaligned(header[name])]
    for rows in (slice(0, 2), slice(2, 4), slice(3, 3), slice(0, 5)):
        for columns in (slice(0, 4), slice(3, 7), slice(6, 7)):
            assert torch.equal(joined.part("float", (rows, columns)), tensors["float"][rows, columns])


def unaligned(entry: dict[str, Any]) -> bool:
    return bool(entry["data_offsets"][0] % N_BYTES[entry["dtype"]])


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    """And what comes after it."""
    content = file.read_bytes()
    (n,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + n]), content[8 + n :]


def retold(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """The same file with other places in its metadata."""
    header, data = header_of(file)
    places = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
    said = change(places)
    header["__metadata__"]["DCP_SHARDING_INFO"] = said if isinstance(said, str) else json.dumps(places)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


PLACES: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda places: "no JSON", "does not say where its parts lie"),
    (lambda places: "[1]", "does not say where its parts lie"),
    (lambda places: places["float"].pop("whole_shape"), "does not say where its parts lie"),
    (lambda places: places["float"].update(saved_offsets=["x", 0]), "does not say where its parts lie"),
    (lambda places: places["float"].update(saved_offsets=[-1, 0]), "float lies outside of its whole"),
    (lambda places: places["float"].update(saved_offsets=[3, 5]), "float lies outside of its whole"),
    (lambda places: places["float"].update(saved_offsets=[3]), "float lies outside of its whole"),
    (lambda places: places["float"].update(saved_offsets=[0, 0]), "float stands in another file of the folder too"),
    (lambda places: places.pop("float"), "float stands in another file of the folder too"),
    (lambda places: places["float"].update(whole_shape=[8, 8]), "float is part of another tensor"),
]


def test_parts_that_do_not_make_a_whole_are_refused(grid: tuple[dict[str, torch.Tensor], list[Path]]) -> None:
    _, files = grid
    with pytest.raises(CheckpointError, match=r"model-00.*model-10\.safetensors have 5 of 6 elements of count"):
        TensorFiles([files[0], files[1], files[2]])
    content = files[3].read_bytes()
    retold(
        files[3], lambda places: places["float"].update(saved_offsets=[2, 3])
    )  # each offset once, and all the elements
    with pytest.raises(CheckpointError, match=r"model-11\.safetensors have some elements of float twice"):
        TensorFiles(files)
    for change, message in PLACES:
        files[3].write_bytes(content)
        retold(files[3], change)
        with pytest.raises(CheckpointError, match=rf"model-11\.safetensors: {message}"):
            TensorFiles(files)


def cut(folder: Path, n: int) -> None:
    """As if n ranks had written the checkpoint."""
    for kind, files in (("model", weight_files(folder)), ("optimizer", moment_files(folder))):
        tensors = {name: tensor.clone() for name, tensor in read_weights(files).items()}
        for file in files:
            file.unlink()
        for i in range(n):
            parts, places = {}, {}
            for name, tensor in tensors.items():
                rows = -(-tensor.shape[0] // n)
                part = tensor[i * rows : (i + 1) * rows]
                if part.numel():
                    place = Place((i * rows, *[0] * (tensor.ndim - 1)), tuple(tensor.shape))
                    parts[name], places[name] = part, place
            write_weights(parts, folder / f"{kind}-{i + 1:05d}-of-{n:05d}.safetensors", places)
    rewrite_manifest(folder)


def test_a_checkpoint_in_parts_evaluates_is_continued_and_becomes_one_again(
    tiny: Callable[..., Config],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny({"trainer.max_steps": 9, "checkpoint.every_n_steps": 6})
    train(config)
    folder, straight = step_folder(config.run_folder, 6), step_folder(config.run_folder, 9)
    whole, ce = tmp_path / "whole", evaluate(folder)["all"].ce
    shutil.copytree(folder, whole)
    cut(folder, 3)
    assert len(list(folder.glob("*-of-00003.safetensors"))) == 6
    assert_same_state(whole, folder)
    assert evaluate(folder)["all"].ce == ce
    other = dataclasses.replace(config, run=dataclasses.replace(config.run, name="other"))
    train(other, resume=str(folder))
    assert_same_state(straight, step_folder(other.run_folder, 9))

    joined = tmp_path / "joined"
    here: Callable[..., int] = lambda arguments, folder: convert.verify(convert.source_of(arguments), folder)  # noqa: E731
    monkeypatch.setattr(convert, "verify_in_a_fresh_process", here)  # which takes seconds to start
    convert.main(["join", "--checkpoint", str(folder), "--out", str(joined)])
    assert "step 6 in one piece" in capsys.readouterr().out
    assert sorted(file.name for file in joined.iterdir()) == sorted(file.name for file in whole.iterdir())
    for file in whole.glob("*.safetensors"):
        assert (joined / file.name).read_bytes() == file.read_bytes(), file.name
    weights = {name: tensor.clone() for name, tensor in load_weights(joined).items()}
    weights["norm.weight"][-1] += 1
    write_weights(weights, joined / "model.safetensors")
    (joined / "config.yaml").write_text((joined / "config.yaml").read_text() + "\n")
    rewrite_manifest(joined)
    with pytest.raises(UserError, match=r"config\.yaml is not that of(.|\n)*norm\.weight differs from its source"):
        convert.main(["join", "--checkpoint", str(folder), "--verify", str(joined)])

    held = Held((512, 31), (slice(0, 512), slice(0, 31)))
    with pytest.raises(CheckpointError, match=r"embedding\.weight has the shape \(512, 32\), the model's is \(512, 31"):
        load_training(folder, {"embedding.weight": held})
    moments = {name: tensor.clone() for name, tensor in read_weights(moment_files(whole)).items()}
    moment = moments.pop("exp_avg.norm.weight")
    for wrong, message in (
        ({"exp_avg.another.weight": moment}, r"training\.pt: has no parameter another\.weight"),
        ({"exp_avg.norm.weight": moment[1:]}, r"exp_avg\.norm\.weight has the shape \(31,\), not that of norm"),
    ):
        write_weights(moments | wrong, whole / "optimizer.safetensors")
        rewrite_manifest(whole)
        with pytest.raises(CheckpointError, match=message):
            load_training(whole)


def test_ranks_verify_a_checkpoint_together(tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    train(tiny({"trainer.max_steps": 1}))
    folder = step_folder(tiny().run_folder, 1)
    tokenizer = folder / "tokenizer.json"  # the fourth of the five files
    tokenizer.write_bytes(tokenizer.read_bytes()[::-1])
    found: list[tuple[int, bool]] = []
    others: list[str | None] = []
    monkeypatch.setattr(checkpoint_io, "world_size", lambda: 3)
    monkeypatch.setattr(checkpoint_io, "gather", lambda value: found.append((at, value is None)) or [value, *others])
    for at in range(3):
        monkeypatch.setattr(checkpoint_io, "rank", lambda at=at: at)
        with contextlib.suppress(CheckpointError):
            verify_together(folder)
    assert found == [(0, False), (1, True), (2, True)]
    monkeypatch.setattr(checkpoint_io, "rank", lambda: 2)
    others[:] = ["x is missing"]
    with pytest.raises(CheckpointError, match="x is missing"):
        verify_together(folder)
    verify_checkpoint(folder, None)
    tokenizer.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: 0 bytes"):
        verify_checkpoint(folder, None)


def test_ranks_that_do_not_find_the_same_checkpoint_say_so(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first, which reads more than sizes, and others."""
    config = tiny({"trainer.max_steps": 2, "checkpoint.every_n_steps": 1})
    others: list[str | None] = []
    monkeypatch.setattr(checkpoint_io, "gather", lambda value: [value, *others])
    monkeypatch.setattr(saving, "verify_together", verify_checkpoint)
    others[:] = [None, str(step_folder(config.run_folder, 1))]
    with pytest.raises(CheckpointError, match=r"(?s)would continue .*step-00000001, None: .*--resume auto"):
        train(config)
    others.clear()
    train(named(config, "found"))
    found = step_folder(named(config, "found").run_folder, 2)
    longer = dataclasses.replace(named(config, "found"), trainer=dataclasses.replace(config.trainer, max_steps=3))
    others[:] = [None]
    with pytest.raises(CheckpointError, match=rf"(?s)step-00000002, None: .*--resume {found}"):
        train(longer, resume="auto")
    others[:] = [str(found)]
    assert train(longer, resume="auto")["step"] == 3


def make_format_2(folder: Path) -> None:
    step, checkpoint = step_of(folder), load_training(folder)
    del checkpoint["state_dict"], checkpoint["moelm"]["parameters"]
    torch.save(checkpoint, folder / "training.pt")
    (folder / "optimizer.safetensors").unlink()
    rewrite_manifest(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]  # which came later
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 2, "step": step}))


def test_a_checkpoint_of_format_2_is_continued(tiny: Callable[..., Config]) -> None:
    """In which the moments lay in training.pt."""
    config = tiny({"trainer.max_steps": 6, "checkpoint.every_n_steps": 3})
    train(config)
    folder, straight = step_folder(config.run_folder, 3), step_folder(config.run_folder, 6)
    make_format_2(folder)
    other = dataclasses.replace(config, run=dataclasses.replace(config.run, name="other"))
    train(other, resume=str(folder))
    assert_same_state(straight, step_folder(other.run_folder, 6))


# ------------------------------------------------------------------------------------------- asynchronous


def test_what_is_written_while_training_goes_on_is_the_step_at_which_it_was_saved(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where an exception comes meanwhile, and on continuing."""
    steps = {"trainer.max_steps": 30, "checkpoint.every_n_steps": 12, "data.val_every_n_steps": 100}
    straight, broken = named(tiny(steps), "straight"), named(tiny({**steps, **ASYNCHRONOUS}), "broken")
    train(straight)
    write, at = saving.write_weights, []

    def slow(*args: Any) -> None:
        time.sleep(0.2)
        at.append(len(Recorder.made[-1].losses))
        write(*args)

    monkeypatch.setattr(saving, "write_weights", slow)
    Recorder.raise_after = 28
    with pytest.raises(RuntimeError, match="the machine is gone"):
        train(broken)
    Recorder.raise_after = None
    assert max(at) > 24, "nothing was written beside training"
    assert [folder.name for folder in step_folders(broken.run_folder)] == ["step-00000012", "step-00000024"]
    for step in (12, 24):
        assert_same_state(*(step_folder(config.run_folder, step) for config in (straight, broken)))
    train(broken, resume="auto")
    assert_same_state(*(step_folder(config.run_folder, 30) for config in (straight, broken)))
    assert not list(broken.run_folder.glob(".*"))


def test_a_stage_that_cannot_be_made_is_named(tiny: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    empty = {"state_dict": {}, "moelm": {"parameters": [], "step": 1}, "optimizer_states": [{"state": {}}]}
    with pytest.raises(CheckpointError, match=r"file/step-00000001: the checkpoint could not be written"):
        FolderCheckpointIO(tiny()).save_checkpoint(empty, tmp_path / "file" / "step-00000001")


class Unreadable(Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"best": np.float64(1.5)}


def test_what_could_not_be_read_again_is_named_before_anything_is_written(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny({"trainer.max_steps": 3})
    build = train_module.build_trainer

    def with_callback(*arguments: Any) -> pl.Trainer:
        trainer = build(*arguments)
        trainer.callbacks.append(Unreadable())
        return trainer

    monkeypatch.setattr(train_module, "build_trainer", with_callback)
    with pytest.raises(CheckpointError, match=r"the state_dict of Unreadable could not be read again\n  remedy: "):
        train(config)
    assert not list(config.run_folder.glob("*step-*"))


def test_a_checkpoint_that_lacks_only_its_name_is_continued_and_a_stage_is_not(tiny: Callable[..., Config]) -> None:
    """As a kill between two renames leaves them."""
    config = named(tiny({"trainer.max_steps": 2, "checkpoint.every_n_steps": 1}), "killed")
    train(config)
    last = step_folder(config.run_folder, 2)
    stage = last.rename(last.with_name(f".{last.name}.tmp-123"))
    shutil.copytree(stage, f"{stage}-old")
    for name in (".step-00000008.tmp-123", ".step-00000009.tmp-123", ".step-00000009.tmp-123-old"):
        shutil.copytree(stage, stage.with_name(name))  # the first replaces none
    (stage.with_name(".step-00000009.tmp-123") / "manifest.json").write_text("{")
    longer = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, max_steps=3))
    train(longer, resume="auto")
    assert [len(each.losses) for each in Recorder.made] == [2, 1]
    assert [step_of(folder) for folder in step_folders(config.run_folder)][-2:] == [2, 3]
    assert not list(config.run_folder.glob(".*"))


def test_a_checkpoint_that_is_replaced_goes_when_the_new_one_is_in_place(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or stays, if the new one cannot be put there."""
    io = FolderCheckpointIO(config := tiny({"checkpoint.keep_last": 1}))
    target = step_folder(config.run_folder, 1)
    train(dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, max_steps=1)))
    checkpoint = load_training(target)
    replace, remove, removed = os.replace, shutil.rmtree, []

    def look_and_remove(folder: Path, **options: Any) -> None:
        removed.append((folder.name, is_valid(target)))
        remove(folder, **options)

    def fail(source: Path, to: Path) -> None:
        if source.name.startswith(".step") and not source.name.endswith("-old"):
            raise OSError("no room")
        replace(source, to)

    with monkeypatch.context() as patches:
        patches.setattr(shutil, "rmtree", look_and_remove)
        io.save_checkpoint(checkpoint, target)
        assert [valid for name, valid in removed if name.endswith("-old")] == [True]
    facts = (target / "manifest.json").read_bytes()
    with monkeypatch.context() as patches:
        patches.setattr(os, "replace", fail)
        with pytest.raises(CheckpointError, match="no room"):
            io.save_checkpoint(checkpoint, target)
    assert (target / "manifest.json").read_bytes() == facts
    assert is_valid(target)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_kill_at_any_moment_costs_no_more_than_the_save_that_it_met(
    asynchronous: bool, tiny: Callable[..., Config], tmp_path: Path
) -> None:
    """With asynchronous saves also the steps that were made beside it."""
    steps = {"trainer.max_steps": 10**6, "checkpoint.every_n_steps": 1, "checkpoint.keep_last": 2, "callbacks": []}
    config = tiny({**steps, "checkpoint.asynchronous": asynchronous})
    file = tmp_path / "killed.yaml"
    file.write_text(to_yaml(config))
    command = [sys.executable, "-m", "moelm.train", "--config", str(file), "--resume", "auto"]
    rng, newest = random.Random(7), 0
    for _ in range(8):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        wait_for(step_folder(config.run_folder, newest + 2), process)
        assert not [stage for stage in config.run_folder.glob(".*") if str(process.pid) not in stage.name]
        time.sleep(rng.uniform(0, 0.3))
        before = int(step_folders(config.run_folder)[-1].name.removeprefix("step-"))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert all(is_valid(folder) for folder in step_folders(config.run_folder)), "a torn checkpoint is in place"
        found = newest_checkpoint(config.run_folder)
        assert found is not None
        newest = step_of(find_checkpoint(found))
        assert newest >= before
