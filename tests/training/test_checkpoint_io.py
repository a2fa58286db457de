"""Checkpoint folders are whole or not there, and load nothing that could run."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moelm.config import Config
from moelm.train import train
from moelm.training.checkpoint_io import (
    CheckpointError,
    find_checkpoint,
    load_checkpoint_config,
    newest_checkpoint,
    step_folder,
    step_folders,
    write_manifest,
)


@pytest.fixture
def run(tiny: Callable[..., Config]) -> Config:
    config = tiny({"trainer.max_steps": 6, "checkpoint.every_n_steps": 2})
    train(config)
    return config


def test_the_newest_valid_checkpoint_is_found_by_content_and_a_torn_one_is_passed_over(run: Config) -> None:
    assert [folder.name for folder in step_folders(run.run_folder)] == [f"step-{n:08d}" for n in (2, 4, 6)]
    assert find_checkpoint(run.run_folder).name == "step-00000006"
    with (step_folder(run.run_folder, 6) / "model.pt").open("r+b") as file:
        file.truncate(1000)
    assert find_checkpoint(run.run_folder).name == "step-00000004"
    (step_folder(run.run_folder, 4) / "manifest.json").unlink()
    assert find_checkpoint(run.run_folder).name == "step-00000002"
    flipped = step_folder(run.run_folder, 2) / "training.pt"
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    assert newest_checkpoint(run.run_folder) is None
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        find_checkpoint(run.run_folder)
    with pytest.raises(CheckpointError, match=r"training\.pt: the content does not match"):
        find_checkpoint(step_folder(run.run_folder, 2))


def test_every_tensor_file_loads_with_weights_only(run: Config) -> None:
    files = list(run.run_folder.rglob("*.pt"))
    assert len(files) == 6
    for file in files:
        torch.load(file, weights_only=True)
    others = {file.suffix for file in run.run_folder.rglob("*") if file.is_file() and file.suffix != ".pt"}
    assert {suffix for suffix in others if not suffix[1:].isdigit()} == {".yaml", ".json", ".jsonl"}


def test_a_planted_pickle_is_refused_and_not_executed(run: Config, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "executed",))

    folder = step_folder(run.run_folder, 6)
    (folder / "training.pt").write_bytes(pickle.dumps({"moelm": Bomb()}))
    (folder / "manifest.json").unlink()
    write_manifest(folder, 6)  # as an attacker would
    with pytest.raises(CheckpointError, match=r"training\.pt: cannot be loaded"):
        train(run_longer(run), resume=str(folder))
    assert not (tmp_path / "executed").exists()


def run_longer(run: Config) -> Config:
    run.trainer.max_steps = 8
    return run


def test_continuing_from_an_earlier_checkpoint_sets_the_later_ones_aside(run: Config) -> None:
    (step_folder(run.run_folder, 6) / "manifest.json").write_text("{}")  # a damaged one counts as well
    stale = run.run_folder / ".step-00000004.tmp-1"
    stale.mkdir()
    run.checkpoint.every_n_steps = run.checkpoint.keep_last = 1
    run.trainer.max_steps = 5
    train(run, resume=str(step_folder(run.run_folder, 2)))
    assert [folder.name for folder in step_folders(run.run_folder)] == ["step-00000005"]
    assert {folder.name for folder in run.run_folder.glob("*.left")} == {"step-00000004.left", "step-00000006.left"}
    assert not stale.exists()


def test_a_renamed_checkpoint_can_be_continued(run: Config) -> None:
    best = step_folder(run.run_folder, 4).rename(run.run_folder / "best")
    assert train(run_longer(run), resume=str(best))["step"] == 8


def test_only_the_last_k_checkpoints_are_kept(tiny: Callable[..., Config]) -> None:
    config = tiny({"trainer.max_steps": 7, "checkpoint.every_n_steps": 2, "checkpoint.keep_last": 2})
    train(config)
    assert [folder.name for folder in step_folders(config.run_folder)] == ["step-00000006", "step-00000007"]
    assert not [path for path in config.run_folder.iterdir() if path.name.startswith(".")], "a stage was left"


def test_checkpoints_fall_on_optimizer_steps_under_accumulation(tiny: Callable[..., Config]) -> None:
    config = tiny({"trainer.max_steps": 6, "checkpoint.every_n_steps": 3, "optim.micro_batch_size": 4})
    train(config)
    assert [folder.name for folder in step_folders(config.run_folder)] == ["step-00000003", "step-00000006"]
    manifest = json.loads((step_folder(config.run_folder, 3) / "manifest.json").read_text())
    assert manifest["step"] == 3
    assert set(manifest["files"]) == {"config.yaml", "model.pt", "tokenizer.json", "training.pt"}


def test_a_checkpoint_carries_its_config(run: Config) -> None:
    assert load_checkpoint_config(step_folder(run.run_folder, 6)) == run


def test_a_folder_that_cannot_be_written_is_named_and_the_last_checkpoint_stays(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny({"trainer.max_steps": 6, "checkpoint.every_n_steps": 2})
    real_save, saves = torch.save, []

    def full_disk(*args: object, **kwargs: object) -> None:
        saves.append(1)
        if len(saves) > 2:
            Path(str(args[1])).write_bytes(b"the part that still fitted")
            raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos")  # what torch.save raises
        real_save(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(CheckpointError, match=r"step-00000004(.|\n)*could not be written"):
        train(config)
    assert [folder.name for folder in step_folders(config.run_folder)] == ["step-00000002"]
    assert find_checkpoint(config.run_folder).name == "step-00000002"
    assert not [path for path in config.run_folder.iterdir() if path.name.startswith(".")]
