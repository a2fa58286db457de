"""Checkpoint folders are whole or not there, and load nothing that could run."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import named
from tiny_runs import Recorder

from moelm.config import Config, UserError, to_yaml
from moelm.data.token_shards import sealed
from moelm.evaluate import evaluate
from moelm.generate import main as generate_main
from moelm.train import train
from moelm.training import saving
from moelm.training.checkpoint_io import (
    CheckpointError,
    find_checkpoint,
    load_checkpoint_config,
    load_training,
    load_weights,
    newest_checkpoint,
    set_aside_later,
    step_folder,
    step_folders,
    write_manifest,
)
from moelm.training.loading import load_model
from moelm.training.weight_files import write_weights


@pytest.fixture
def run(tiny: Callable[..., Config]) -> Config:
    config = tiny({"trainer.max_steps": 6, "checkpoint.every_n_steps": 2})
    train(config)
    return config


def test_the_newest_valid_checkpoint_is_found_by_content_and_a_torn_one_is_passed_over(run: Config) -> None:
    assert [folder.name for folder in step_folders(run.run_folder)] == [f"step-{n:08d}" for n in (2, 4, 6)]
    assert find_checkpoint(run.run_folder).name == "step-00000006"
    with (step_folder(run.run_folder, 6) / "model.safetensors").open("r+b") as file:
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


def test_every_file_of_tensors_loads_without_running_anything(run: Config) -> None:
    files = list(run.run_folder.rglob("*.pt"))
    assert {file.name for file in files} == {"training.pt"}
    assert len(files) == 3
    for file in files:
        torch.load(file, weights_only=True)
    others = {file.suffix for file in run.run_folder.rglob("*") if file.is_file() and file.suffix != ".pt"}
    assert {suffix for suffix in others if not suffix[1:].isdigit()} == {".yaml", ".json", ".jsonl", ".safetensors"}


class Bomb:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.file,))


def test_a_planted_pickle_is_refused_and_not_executed(run: Config, tmp_path: Path) -> None:
    folder = step_folder(run.run_folder, 6)
    (folder / "training.pt").write_bytes(pickle.dumps({"moelm": Bomb(tmp_path / "executed")}))
    rewrite_manifest(folder)
    with pytest.raises(CheckpointError, match=r"training\.pt: cannot be loaded"):
        train(run_longer(run), resume=str(folder))
    assert not (tmp_path / "executed").exists()


def rewrite_manifest(folder: Path) -> None:
    """As an attacker would: the checksums are right again."""
    (folder / "manifest.json").unlink()
    write_manifest(folder, 6)


def flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0x40]) + content[at + 1 :]


DAMAGE: dict[str, Callable[[bytes, Path], bytes]] = {
    "truncated": lambda content, _: content[:-100],
    "empty": lambda content, _: b"",
    "longer": lambda content, _: content + b"\0" * 8,
    "a header that is no JSON": lambda content, _: flip(content, 8),
    "a header of another length": lambda content, _: flip(content, 0),
    "a header longer than the file": lambda content, _: flip(content, 5),
    "a pickle": lambda content, tmp_path: pickle.dumps({"embedding.weight": Bomb(tmp_path / "executed")}),
    "a pickle of torch": lambda content, tmp_path: torch_pickle(Bomb(tmp_path / "executed")),
}


def torch_pickle(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save({"embedding.weight": value}, buffer)
    return buffer.getvalue()


def test_damaged_weights_are_one_clear_error_and_nothing_is_executed(run: Config, tmp_path: Path) -> None:
    folder = step_folder(run.run_folder, 6)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for kind, damage in DAMAGE.items():
        file.write_bytes(damage(whole, tmp_path))
        with pytest.raises(CheckpointError, match=r"model\.safetensors: "):
            find_checkpoint(folder)  # by its checksum
        rewrite_manifest(folder)
        find_checkpoint(folder)
        for load in (lambda: load_model(folder), lambda: train(run_longer(run), resume=str(folder))):
            with pytest.raises(CheckpointError, match=r"model\.safetensors: not a whole safetensors file: ") as error:
                load()
            assert len(str(error.value).splitlines()) == 1, kind
    assert not (tmp_path / "executed").exists()


def test_weights_that_do_not_fit_the_config_are_named(run: Config) -> None:
    folder = step_folder(run.run_folder, 6)
    weights = load_weights(folder)
    weights["another.weight"] = weights.pop("norm.weight")
    write_weights(weights, folder / "model.safetensors")
    rewrite_manifest(folder)
    with pytest.raises(CheckpointError, match=r"do not fit its config(.|\n)*norm\.weight(.|\n)*another\.weight"):
        load_model(folder)


def split_weights(folder: Path) -> None:
    """One file of weights becomes two, as a converted model has them."""
    weights = {name: tensor.clone() for name, tensor in load_weights(folder).items()}
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    for i, part in enumerate((names[::2], names[1::2])):
        write_weights({name: weights[name] for name in part}, folder / f"model-{i:05d}.safetensors")
    rewrite_manifest(folder)


def test_weights_may_lie_in_several_files(run: Config) -> None:
    folder = step_folder(run.run_folder, 6)
    before = {name: tensor.clone() for name, tensor in load_weights(folder).items()}
    split_weights(folder)
    after = load_weights(folder)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert train(run_longer(run), resume=str(folder))["step"] == 8


def test_a_tensor_in_two_files_is_refused(run: Config) -> None:
    folder = step_folder(run.run_folder, 6)
    write_weights({"norm.weight": load_weights(folder)["norm.weight"].clone()}, folder / "model-2.safetensors")
    rewrite_manifest(folder)
    with pytest.raises(CheckpointError, match=r"norm\.weight stands in another file"):
        load_weights(folder)


def test_a_file_that_the_manifest_does_not_list_is_no_part_of_the_checkpoint(run: Config) -> None:
    folder = step_folder(run.run_folder, 6)
    write_weights({"another.weight": torch.ones(1)}, folder / "model-2.safetensors")
    assert "another.weight" not in load_weights(find_checkpoint(folder))


def test_without_the_state_of_training_a_checkpoint_still_evaluates_and_generates_but_is_not_continued(
    run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--checkpoint", str(run.run_folder), "--prompt", "def", "--max-new-tokens", "8"]
    generate_main(arguments)
    text = capsys.readouterr().out
    expected = evaluate(run.run_folder)["all"].ce
    data = tmp_path / "same.yaml"
    data.write_text(to_yaml(run.data.corpus))
    folder = step_folder(run.run_folder, 6)
    (folder / "training.pt").unlink()
    rewrite_manifest(folder)
    assert find_checkpoint(run.run_folder) == folder
    generate_main(arguments)
    assert capsys.readouterr().out == text
    assert evaluate(folder, data)["all"].ce == expected
    with pytest.raises(UserError, match=r"no data of its own(.|\n)*--data"):
        evaluate(folder)
    (folder / "training.pt").write_bytes(b"")  # not in the manifest, so it is not there
    for resume in ("auto", str(folder)):
        with pytest.raises(CheckpointError, match="holds weights only"):
            train(run_longer(run), resume=resume)


def test_without_a_tokenizer_evaluate_and_generate_say_so(run: Config) -> None:
    folder = step_folder(run.run_folder, 6)
    (folder / "tokenizer.json").unlink()
    rewrite_manifest(folder)
    for command in (lambda: generate_main(["--checkpoint", str(folder)]), lambda: evaluate(folder)):
        with pytest.raises(CheckpointError, match=r"has no tokenizer\.json(.|\n)*remedy"):
            command()


MANIFESTS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda manifest: manifest.update(format=1), r"format 1, this moelm reads 3 and 2\n  remedy: an older"),
    (lambda manifest: manifest.update(format=4), r"format 4, this moelm reads 3 and 2\n  remedy: a newer"),
    (lambda manifest: manifest.pop("step"), "not a checkpoint"),
    (lambda manifest: manifest["files"].pop("model.safetensors"), r"model\*\.safetensors: missing in manifest"),
    (lambda manifest: manifest["files"].pop("optimizer.safetensors"), r"optimizer\*\.safetensors: missing in manifest"),
    (lambda manifest: manifest["files"].pop("config.yaml"), r"config\.yaml: missing in manifest"),
    (lambda manifest: manifest["files"].update({"../x": {"bytes": 1, "sha256": ""}}), "no file of the folder"),
    (lambda manifest: manifest["files"].update({"x": {"bytes": 1, "sha256": ""}}), "x: missing"),
    (lambda manifest: manifest["files"].update({"x": {}}), "not a checkpoint"),
]


def test_a_manifest_that_is_not_right_is_refused(run: Config) -> None:
    folder = step_folder(run.run_folder, 6)
    text = (folder / "manifest.json").read_text()
    for change, message in MANIFESTS:
        manifest = json.loads(text)
        del manifest["sha256"]  # as an older moelm left it
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(CheckpointError, match=message):
            find_checkpoint(folder)
    (folder / "manifest.json").write_text(text.replace('"step": 6', '"step": 7'))
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged: its content does not match its own sha256"):
        find_checkpoint(folder)
    manifest = json.loads(text)
    del manifest["sha256"]
    (folder / "manifest.json").write_text(json.dumps(sealed({**manifest, "step": 7})))
    with pytest.raises(CheckpointError, match=r"training\.pt: is of step 6, manifest\.json says 7"):
        train(run_longer(run), resume=str(folder))


def set_first(state: dict[str, Any], key: str, value: Any) -> None:
    state["optimizer_states"][0]["state"][0][key] = value


TRAININGS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda state: state.pop("TokenDataModule"), "TokenDataModule is NoneType, not dict"),
    (lambda state: state["TokenDataModule"].update(fingerprint=3), r"TokenDataModule\.fingerprint is int, not str"),
    (lambda state: state["moelm"].update(step=5), "is of step 5, manifest.json says 6"),
    (lambda state: state.update({"pytorch-lightning_version": "x"}), "another version of Lightning"),
    (lambda state: state["moelm"]["rng_by_rank"][0]["python"][1].pop(), r"moelm\.rng_by_rank"),
    (lambda state: state["moelm"].update(recent_load=torch.zeros(3)), r"moelm\.recent_load has no right shape"),
    (lambda state: state["moelm"].update(recent_losses=torch.zeros(3)), r"moelm\.recent_losses has no right shape"),
    (lambda state: state["moelm"].update(validation_due="yes"), r"moelm\.validation_due is not true or false"),
    (lambda state: state["callbacks"].update(RunCard=[]), "no dict"),
    (lambda state: state["optimizer_states"].clear(), "no state of one optimizer"),
    (lambda state: state["optimizer_states"][0]["param_groups"][0].pop("params"), "no parameter groups"),
    (lambda state: state["optimizer_states"][0]["param_groups"][0]["params"].pop(), "do not hold its parameters"),
    (lambda state: state["moelm"]["parameters"].pop(), "do not hold its parameters"),
    (lambda state: state["moelm"]["parameters"].insert(0, [state["moelm"]["parameters"].pop()]), "do not hold"),
    (lambda state: state["optimizer_states"][0]["state"].update(x={}), "a state of 'x', which is no parameter"),
    (lambda state: set_first(state, "other", torch.zeros(1)), "the optimizer's state of parameter 0 is step, other"),
    (lambda state: set_first(state, "step", torch.zeros(1)), "step of parameter 0 is no number"),
]


def test_what_training_pt_holds_is_checked_before_anything_reads_it(run: Config) -> None:
    file = step_folder(run.run_folder, 6) / "training.pt"
    for change, message in TRAININGS:
        state = torch.load(file, weights_only=True)
        whole = file.read_bytes()
        change(state)
        torch.save(state, file)
        rewrite_manifest(file.parent)
        with pytest.raises(CheckpointError, match=rf"training\.pt: .*{message}"):
            load_training(file.parent)
        file.write_bytes(whole)
        rewrite_manifest(file.parent)
    load_training(file.parent)


def test_counters_that_follow_from_the_step_are_not_read(run: Config) -> None:
    file = step_folder(run.run_folder, 6) / "training.pt"
    state = torch.load(file, weights_only=True)
    state["loops"], state["lr_schedulers"], state["global_step"] = {}, [{"last_epoch": 1000}], 77
    torch.save(state, file)
    rewrite_manifest(file.parent)
    assert train(run_longer(run), resume=str(file.parent))["step"] == 8


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


def test_a_checkpoint_that_was_set_aside_stays_when_another_of_its_step_is(run: Config) -> None:
    for i in range(3):
        folder = step_folder(run.run_folder, 8)
        folder.mkdir()
        (folder / "which").write_text(str(i))
        set_aside_later(run.run_folder, 6)
    left = [step_folder(run.run_folder, 8).with_name(f"step-00000008.left{end}") for end in ("", "-2", "-3")]
    assert [(folder / "which").read_text() for folder in left] == ["0", "1", "2"]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew_over_them(run: Config) -> None:
    before = sorted(run.run_folder.iterdir())
    for folder in step_folders(run.run_folder):
        (folder / "training.pt").write_text("x")
    with pytest.raises(UserError, match=r"none of its 3 checkpoints is valid, the newest is step-00000006\n  remedy"):
        train(run, resume="auto")
    assert sorted(run.run_folder.iterdir()) == before


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
    names = {"config.yaml", "model.safetensors", "optimizer.safetensors", "tokenizer.json", "training.pt"}
    assert set(manifest["files"]) == names


def test_a_checkpoint_carries_its_config(run: Config) -> None:
    assert load_checkpoint_config(step_folder(run.run_folder, 6)) == run


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("writer", ["write_weights", "write_manifest"])
def test_a_folder_that_cannot_be_written_is_named_and_the_last_checkpoint_stays(
    writer: str, asynchronous: bool, tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = {"trainer.max_steps": 6, "checkpoint.every_n_steps": 2}
    config = tiny({**steps, "checkpoint.asynchronous": asynchronous, "checkpoint.keep_last": 1})
    write = getattr(saving, writer)

    def full_disk(*args: Any) -> None:
        if any("step-00000004" in str(each) for each in args if isinstance(each, Path)):
            raise OSError(28, "No space left on device")
        write(*args)

    monkeypatch.setattr(saving, writer, full_disk)
    with pytest.raises(CheckpointError, match=r"step-00000004(.|\n)*could not be written: .*No space left"):
        train(config)
    assert [folder.name for folder in step_folders(config.run_folder)] == ["step-00000002"]
    assert find_checkpoint(config.run_folder).name == "step-00000002"
    assert not [path for path in config.run_folder.iterdir() if path.name.startswith(".")]


def test_a_log_that_cannot_be_written_is_named(tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moelm.training.trainer.RunLogger.log_metrics", full_disk)
    with pytest.raises(UserError, match="runs/tiny: cannot be written: No space left"):
        train(tiny({"trainer.max_steps": 1}))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's
def test_a_mount_that_vanishes_is_named_and_nothing_is_written_below_it(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    steps = {"trainer.max_steps": 6, "checkpoint.every_n_steps": 2, "trainer.log_every_n_steps": 50}
    config, gone = named(tiny(steps), "run"), tmp_path / "gone"

    def vanish(recorder: Recorder, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.step == 3:
            config.run_folder.parent.rename(gone)
            config.run_folder.parent.mkdir()  # what is mounted on

    monkeypatch.setattr(Recorder, "on_train_batch_end", vanish)
    with pytest.raises(CheckpointError, match=r"runs/run/step-00000004: the checkpoint could not be .*No such"):
        train(config)
    assert list(config.run_folder.parent.iterdir()) == []
    assert find_checkpoint(gone / "run").name == "step-00000002"


@pytest.mark.parametrize("resume", [None, "auto"])
def test_no_run_begins_in_a_folder_that_is_a_checkpoint(
    run: Config, tiny: Callable[..., Config], resume: str | None
) -> None:
    step_folder(run.run_folder, 6).rename(run.run_folder.parent / "imported")
    checkpoint = run.run_folder.parent / "imported"
    before = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    with pytest.raises(UserError, match=r"run\.name: .*imported is itself a checkpoint"):
        train(tiny({"run.name": "imported"}), resume=resume)
    assert {file.name: file.read_bytes() for file in checkpoint.iterdir()} == before
