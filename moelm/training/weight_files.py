"""Weights in safetensors files: written whole, opened with errors that name the file, read without running anything."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from moelm.config import UserError

METADATA = {"format": "pt"}  # without it transformers refuses the file


class CheckpointError(UserError):
    """A folder or file of weights that is not what it should be."""


def open_weights(file: Path) -> Any:
    """A `safe_open` handle for `with`, tensors on the CPU. What it returns may be mapped: pages that were read count as
    memory of this process until the handle and its tensors are gone. Raises CheckpointError for anything but a whole
    file."""
    try:
        return safe_open(file, framework="pt", device="cpu")
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not a whole safetensors file: {_first_line(error)}") from None


def read_tensor(handle: Any, name: str, file: Path) -> torch.Tensor:
    """Raises CheckpointError for a tensor that is not there or of a type that torch does not have."""
    try:
        tensor: torch.Tensor = handle.get_tensor(name)
    except (SafetensorError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file}: {name} cannot be read: {_first_line(error)}") from None
    return tensor


def read_weights(files: Iterable[Path]) -> dict[str, torch.Tensor]:
    """All tensors of all files together. Raises CheckpointError, also for a name that two files have."""
    return {name: read_tensor(handle, name, file) for name, file, handle in _each_tensor(files)}


def _each_tensor(files: Iterable[Path]) -> Iterator[tuple[str, Path, Any]]:
    seen: set[str] = set()
    for file in files:
        with open_weights(file) as handle:
            for name in handle.keys():  # noqa: SIM118  the handle is no mapping
                if name in seen:
                    raise CheckpointError(f"{file}: {name} stands in another file of the folder too")
                seen.add(name)
                yield name, file, handle


class TensorFiles(Mapping[str, torch.Tensor]):
    """The tensors of several files by name. Each look-up reads a copy and keeps none, so that a model can be walked
    through that does not fit in memory."""

    KEPT_OPEN = 2**26  # bytes read through one mapping: it counts as memory of this process until it is closed

    def __init__(self, files: Iterable[Path]) -> None:
        """Raises CheckpointError like `read_weights`, before any tensor is read."""
        self.file_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, file, handle in _each_tensor(files):
            self.file_of[name] = file
            self.shapes[name] = tuple(handle.get_slice(name).get_shape())
        self._open: tuple[Path, Any] | None = None
        self._n_read = 0

    def __getitem__(self, name: str) -> torch.Tensor:
        file = self.file_of[name]
        if self._open is None or self._open[0] != file or self._n_read > self.KEPT_OPEN:
            self._open, self._n_read = None, 0  # the old mapping goes before there is a new one
            self._open = (file, open_weights(file))
        tensor = read_tensor(self._open[1], name, file).clone()
        self._n_read += tensor.nbytes
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.file_of)

    def __len__(self) -> int:
        return len(self.file_of)


def write_weights(weights: Mapping[str, torch.Tensor], file: Path) -> None:
    """Raises OSError if the file cannot be written."""
    file.touch()
    mode = file.stat().st_mode  # what the umask gives; safetensors would make it readable for its owner only
    try:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, file, metadata=METADATA)
    except SafetensorError as error:  # what it makes of a full disk
        raise OSError(_first_line(error)) from error
    file.chmod(mode)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
