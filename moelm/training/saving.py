"""How a checkpoint comes to the disk: every rank that holds a part of the model writes that part, beside training if
wanted, into one stage; the first makes a checkpoint of the stage when all parts are there."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor
from torch.distributed.tensor import DTensor

from moelm.config import Config, to_yaml
from moelm.training.checkpoint_io import (
    PREFIX,
    is_whole,
    load_training,
    step_folder,
    step_folders,
    sync,
    synced_facts,
    verify_together,
    write_manifest,
)
from moelm.training.lightning_module import MoELightningModule
from moelm.training.preemption import received
from moelm.training.shards import held_part, is_first_holder
from moelm.training.statistics import gather, rank, world_size
from moelm.training.weight_files import CheckpointError, Place, write_weights

PATIENCE_S = 5.0  # for other ranks after an exception, and for a file system to show what another host made


class FolderCheckpointIO(CheckpointIO):
    """Stages beside the target, writes the manifest last, syncs, then renames: a kill leaves the old or the new.

    With `fsdp` every rank must call `save_checkpoint`, and its files are named by rank; otherwise one does.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self._save: Save | None = None  # the last one, until it is settled
        self._copies: dict[str, Tensor] = {}  # of what training changes while it is written

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Returns when the checkpoint is there, or with `checkpoint.asynchronous` when training may go on. Raises
        CheckpointError, then for the save before, on every rank that saves."""
        self.settle()
        target = Path(path)
        parts, rest = self._split(checkpoint)
        training, error = pickled(rest) if rank() == 0 else (b"", None)
        stage, error = self._gather(self._open_stage(target, error))[0]
        if error:
            raise CheckpointError(could_not(target, error))
        if self.config.checkpoint.asynchronous:
            parts = self._copied(parts)
        step = checkpoint["moelm"]["step"]
        self._save = Save(self.config, Path(stage), target, step, parts, training, self._n_ranks)
        self._save.start()
        if not self.config.checkpoint.asynchronous:
            self.settle()

    def settle(self) -> None:
        """Returns when the last save is a checkpoint. Raises CheckpointError, on every rank that saves."""
        if self._save is None:
            return
        save = self._save
        save.written.wait()
        errors = self._gather(save.error)
        if any(errors):
            save.abandoned.set()  # or the first rank would wait for a part that does not come
        save.join()
        errors += self._gather(save.error)
        self._save = None
        if any(errors):
            shutil.rmtree(save.stage, ignore_errors=True)
            raise CheckpointError(could_not(save.target, next(filter(None, errors))))

    def settle_alone(self) -> None:
        """After an exception: as far as that goes without asking other ranks, which may be gone."""
        if self._save is None:
            return
        save, self._save = self._save, None
        save.written.wait()
        save.join(PATIENCE_S)  # the others have theirs to write too
        save.abandoned.set()
        save.join()
        if save.error:
            print(could_not(save.target, save.error), file=sys.stderr)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        verify_together(Path(path))
        return load_training(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        shutil.rmtree(path, ignore_errors=True)

    @property
    def _n_ranks(self) -> int:
        """That save."""
        return world_size() if self.config.trainer.strategy == "fsdp" else 1

    def _gather(self, value: Any) -> list[Any]:
        return gather(value) if self._n_ranks > 1 else [value]

    def _open_stage(self, target: Path, error: str | None) -> tuple[str, str | None]:
        """The first rank's is the one that counts; `error`: there is nothing to save."""
        stage = target.with_name(f".{target.name}.tmp-{os.getpid()}")
        try:
            if rank() == 0 and error is None:
                shutil.rmtree(stage, ignore_errors=True)
                stage.mkdir()  # not its parent: where a mount has vanished that would be a place on another disk
        except OSError as problem:
            error = str(problem)
        return str(stage), error

    def _split(self, checkpoint: dict[str, Any]) -> tuple[dict[str, Parts], dict[str, Any]]:
        """This rank's tensors by the kind of file, and all else."""
        weights = {name.removeprefix(PREFIX): tensor for name, tensor in checkpoint["state_dict"].items()}
        moments: dict[str, Tensor] = {}
        scalars: dict[int, dict[str, Any]] = {}
        names, optimizer = checkpoint["moelm"]["parameters"], checkpoint["optimizer_states"][0]
        for i, values in optimizer["state"].items():
            large = {key for key, value in values.items() if isinstance(value, Tensor) and value.ndim}
            moments |= {f"{key}.{names[i]}": values[key] for key in large}
            scalars[i] = {key: value for key, value in values.items() if key not in large}
        rest = {key: value for key, value in checkpoint.items() if key != "state_dict"}
        rest["optimizer_states"] = [{**optimizer, "state": scalars}]
        return {"model": own_parts(weights), "optimizer": own_parts(moments)}, rest

    def _copied(self, parts: Mapping[str, Parts]) -> dict[str, Parts]:
        """In memory of the host that is kept for the next save; pinned, so that a GPU copies at its bus's speed."""
        copied: dict[str, Parts] = {}
        for kind, (tensors, places) in parts.items():
            copies = {}
            for name, tensor in tensors.items():
                copy = self._copies.get(f"{kind}/{name}")
                if copy is None:
                    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
                    self._copies[f"{kind}/{name}"] = copy
                copies[name] = copy.copy_(tensor, non_blocking=True)
            copied[kind] = Parts(copies, places)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return copied


def pickled(rest: Mapping[str, Any]) -> tuple[bytes, str | None]:
    """As `training.pt` holds it, and what is wrong with it if it could never be read again."""
    if (content := _readable(rest)) is not None:
        return content, None
    bad = [name for name, state in rest.get("callbacks", {}).items() if _readable(state) is None]
    problem = f"the state_dict of {', '.join(bad) or 'something'} could not be read again"
    return b"", f"{problem}\n  remedy: let it hold numbers, text, lists, dicts and tensors only"


def _readable(value: Any) -> bytes | None:
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception:  # whatever pickle meets
        return None
    return buffer.getvalue()


class Parts(NamedTuple):
    """What a rank writes into a file."""

    tensors: dict[str, Tensor]
    places: dict[str, Place]  # of those that are not whole


def own_parts(tensors: Mapping[str, Any]) -> Parts:
    """What this rank holds of sharded tensors, without a copy; of whole ones the first rank writes all."""
    own, places = {}, {}
    for name, tensor in tensors.items():
        part, slices = held_part(tensor)
        if part.numel() and (is_first_holder(tensor) if isinstance(tensor, DTensor) else rank() == 0):
            own[name] = part.detach()
            if part.shape != tensor.shape:
                places[name] = Place(tuple(each.start for each in slices), tuple(tensor.shape))
    return Parts(own, places)


class Save(threading.Thread):
    """What one rank does for one checkpoint. Talks with no other rank: each leaves a marker in the stage."""

    def __init__(
        self,
        config: Config,
        stage: Path,
        target: Path,
        step: int,
        parts: Mapping[str, Parts],
        training: bytes,
        n_ranks: int,
    ) -> None:
        super().__init__(name=f"save {target.name}")
        self.config, self.stage, self.target, self.step = config, stage, target, step
        self.parts, self.training, self.rank, self.n_ranks = parts, training, rank(), n_ranks
        self.error: str | None = None
        self.written = threading.Event()
        self.abandoned = threading.Event()

    def run(self) -> None:
        try:
            self._write()
        except Exception as error:  # whatever it is, the main thread must hear of it
            self.error = str(error) or type(error).__name__
        self.written.set()
        try:
            if self.rank == 0 and not self.error:
                self._wait_for_others()
                self._publish()
        except Exception as error:
            self.error = str(error) or type(error).__name__

    def _marker(self, of: int) -> Path:
        return self.stage / f".part-{of + 1:05d}.json"

    def _write(self) -> None:
        until = time.monotonic() + PATIENCE_S
        while not self.stage.is_dir():
            if time.monotonic() > until:
                raise OSError(f"rank {self.rank} does not see {self.stage}; run.dir must be on a disk that all share")
            time.sleep(0.05)
        files = []
        for kind, (tensors, places) in self.parts.items():
            if tensors:
                place = f"-{self.rank + 1:05d}-of-{self.n_ranks:05d}" if self.n_ranks > 1 else ""
                files.append(self.stage / f"{kind}{place}.safetensors")
                write_weights(tensors, files[-1], places)
        if self.rank == 0:
            files += [self.stage / name for name in ("training.pt", "config.yaml", "tokenizer.json")]
            files[-3].write_bytes(self.training)
            files[-2].write_text(to_yaml(self.config), encoding="utf-8")
            shutil.copyfile(self.config.data.corpus.path / "tokenizer.json", files[-1])
        marker = self._marker(self.rank)
        unnamed = marker.with_suffix(".tmp")
        unnamed.write_text(json.dumps({file.name: synced_facts(file) for file in files}))
        os.replace(unnamed, marker)

    def _wait_for_others(self) -> None:
        missing = [self._marker(i) for i in range(self.n_ranks)]
        while missing := [marker for marker in missing if not marker.exists()]:
            if self.abandoned.wait(0.02) or not threading.main_thread().is_alive():
                raise OSError("not all ranks have written their parts")

    def _publish(self) -> None:
        facts: dict[str, Any] = {}
        for marker in map(self._marker, range(self.n_ranks)):
            facts |= json.loads(marker.read_text())
            marker.unlink()
        write_manifest(self.stage, self.step, facts)
        replaced = [renamed_away(self.target)] if self.target.exists() else []  # saved before a late validation
        try:
            os.replace(self.stage, self.target)  # `finish_rename` does it after a kill that comes here
        except OSError:
            for old in replaced:
                os.replace(old, self.target)
            raise
        sync(self.target.parent)
        whole = [folder for folder in step_folders(self.config.run_folder) if is_whole(folder)]
        for old in replaced + [renamed_away(folder) for folder in whole[: -self.config.checkpoint.keep_last]]:
            shutil.rmtree(old, ignore_errors=True)


def renamed_away(folder: Path) -> Path:
    """Before it is deleted: a kill leaves it whole, or what the next start removes as it does a stage."""
    gone = folder.with_name(f".{folder.name}.tmp-{os.getpid()}-old")
    os.replace(folder, gone)
    return gone


def could_not(target: Path, error: str) -> str:
    remedy = "mend that (room, rights, the disk), then continue with --resume auto"
    return f"{target}: the checkpoint could not be written: {error}\n  remedy: {remedy}"


class StepCheckpoint(Checkpoint):
    """Saves every n optimizer steps and at the end, after the validation if one is due."""

    def __init__(self, config: Config) -> None:
        self.every, self.run_folder = config.checkpoint.every_n_steps, config.run_folder
        self._saved_step = -1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, MoELightningModule)
        if pl_module.is_step_end and not pl_module.is_validation_step:
            self._save_if_due(trainer, pl_module)  # else after the validation

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        assert isinstance(pl_module, MoELightningModule)
        if pl_module.must_stop and not trainer.sanity_checking:
            self._save_if_due(trainer, pl_module)  # the run that continues will validate

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, MoELightningModule)
        if not trainer.sanity_checking:
            self._save_if_due(trainer, pl_module, force=trainer.should_stop or pl_module.is_late_validation)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save_if_due(trainer, pl_module, force=True)
        checkpoint_io(trainer).settle()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        checkpoint_io(trainer).settle_alone()

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
        module.must_stop |= any(gather(received(trainer) is not None))  # one step more would be one save more
        if module.must_stop:
            checkpoint_io(trainer).settle()  # by all ranks, before they end
        module.paused_s += time.perf_counter() - started


def checkpoint_io(trainer: pl.Trainer) -> FolderCheckpointIO:
    plugin = trainer.strategy.checkpoint_io
    assert isinstance(plugin, FolderCheckpointIO)
    return plugin
