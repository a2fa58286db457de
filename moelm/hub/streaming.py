"""What both directions of a conversion share: layer by layer, file by file, and nothing half-written."""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from moelm.config import ModelConfig, UserError
from moelm.hub.reading import HubError
from moelm.hub.weights import Weight
from moelm.model.size import shapes_of
from moelm.training.checkpoint_io import sync
from moelm.training.weight_files import write_weights

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
STORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHARD_BYTES = 2**29


@dataclass
class Written:
    """What a conversion wrote."""

    architecture: str
    n_parameters: int
    n_bytes: int
    dtypes: list[str]
    notes: list[str] = field(default_factory=list)


def cast(tensor: Tensor, name: str, dtype: str, is_state: bool) -> Tensor:
    """The tensor as it is written. `dtype`: of DTYPES; auto keeps what is stored, but float16, which moelm does not
    train in, becomes float32. What is no parameter but state (the selection bias) is float32 always.

    Raises HubError for a tensor of quantised or whole numbers.
    """
    if tensor.dtype not in STORED_DTYPES:
        raise HubError(f"{name} is {tensor.dtype}", ["only float32, bfloat16 and float16 can be converted"])
    as_stored = torch.float32 if tensor.dtype == torch.float16 else tensor.dtype
    return tensor.to(torch.float32 if is_state else DTYPES[dtype] or as_stored)


def empty_state(config: ModelConfig) -> tuple[dict[str, Tensor], set[str]]:
    """The state dict of the model on the meta device, and the names in it that are state, not parameters.

    Raises ConfigError for sizes beyond what any tensor can have.
    """
    model = shapes_of(config)
    tensors = dict(model.state_dict())
    return tensors, tensors.keys() - {name for name, _ in model.named_parameters()}


def by_layer(weights: Iterable[Weight], doing: str) -> Iterator[Weight]:
    """The weights in their order, with a progress bar that counts layers (what stands outside them counts as one)."""

    def layer(weight: Weight) -> str:
        found = re.match(r"blocks\.\d+\.", weight.ours[0])
        return found[0] if found else ""

    groups = [list(group) for _, group in itertools.groupby(weights, layer)]
    for group in tqdm(groups, desc=doing, unit="layer", file=sys.stderr, leave=False, disable=None):
        yield from group


class ShardWriter:
    """Collects tensors and writes them to model-00001.safetensors and so on, whenever enough of them are together."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self.files: list[Path] = []
        self.file_of: dict[str, Path] = {}
        self.n_elements = self.n_bytes = 0
        self.dtypes: set[torch.dtype] = set()
        self._waiting: dict[str, Tensor] = {}
        self._waiting_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        self._waiting[name] = tensor
        self._waiting_bytes += tensor.nbytes
        self.n_elements += tensor.numel()
        self.n_bytes += tensor.nbytes
        self.dtypes.add(tensor.dtype)
        if self._waiting_bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what waits. Call it once at the end. Raises OSError."""
        if self._waiting:
            file = self.folder / f"model-{len(self.files) + 1:05d}.safetensors"
            write_weights(self._waiting, file)
            self.file_of |= dict.fromkeys(self._waiting, file)
            self.files.append(file)
        self._waiting, self._waiting_bytes = {}, 0


def remove_abandoned_stages(target: Path) -> None:
    """What a conversion to `target` left behind that was killed."""
    for stage in target.parent.glob(f".{glob.escape(target.name)}.tmp-*"):
        process = stage.name.rpartition("-")[2]
        if process.isdecimal() and (int(process) == os.getpid() or not _runs(int(process))):
            shutil.rmtree(stage, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is another user's
        return True
    return True


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A new folder beside `target` that becomes `target` when the block ends. If it raises, nothing is left.

    Raises UserError if there is a `target`, or no place for it.
    """
    if target.exists() or target.is_symlink():
        raise UserError(f"--out: {target} exists\n  remedy: name a folder that does not, or delete it")
    missing = [folder for folder in target.parents if not folder.exists()]
    remove_abandoned_stages(target)
    stage = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        stage.mkdir(parents=True)
        yield stage
        for file in stage.iterdir():
            sync(file)
        sync(stage)
        os.rename(stage, target)  # refused if a file or a folder with something in it came there meanwhile
        sync(target.parent)
    except BaseException as error:
        shutil.rmtree(stage, ignore_errors=True)
        for folder in missing:  # innermost first
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"--out: {target} cannot be written: {error}") from error
        raise
