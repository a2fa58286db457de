"""Weights in safetensors files: written whole, opened with errors that name the file, read without running anything."""

from __future__ import annotations

import contextlib
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


@contextlib.contextmanager
def open_weights(file: Path) -> Iterator[Any]:
    """A `safe_open` handle, tensors on the CPU. What it returns may be mapped: pages that were read count as memory of
    this process until the handle and its tensors are gone. Raises CheckpointError for anything but a whole file."""
    try:
        handle = safe_open(file, framework="pt", device="cpu")
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not a whole safetensors file: {_first_line(error)}") from None
    with handle:
        yield handle


def read_tensor(handle: Any, name: str, file: Path) -> torch.Tensor:
    """Raises CheckpointError for a tensor that is not there or of a type that torch does not have."""
    try:
        tensor: torch.Tensor = handle.get_tensor(name)
    except (SafetensorError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file}: {name} cannot be read: {_first_line(error)}") from None
    return tensor


def read_weights(files: Iterable[Path]) -> dict[str, torch.Tensor]:
    """All tensors of all files together. Raises CheckpointError, also for a name that two files have."""
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        with open_weights(file) as handle:
            for name in handle.keys():  # noqa: SIM118  the handle is no mapping
                if name in weights:
                    raise CheckpointError(f"{file}: {name} stands in another file of the folder too")
                weights[name] = read_tensor(handle, name, file)
    return weights


def write_weights(weights: Mapping[str, torch.Tensor], file: Path) -> None:
    """Raises OSError if the file cannot be written."""
    try:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, file, metadata=METADATA)
    except SafetensorError as error:  # what it makes of a full disk
        raise OSError(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
