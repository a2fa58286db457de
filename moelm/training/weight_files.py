"""Tensors in safetensors files: whole, or in parts that several processes wrote; written piece by piece, opened with
errors that name the file, read without running anything.

A file of parts says in its metadata where each lies in its whole, as torch.distributed.checkpoint's
HuggingFaceStorageWriter does (and with the whole's shape); its reader takes these files too.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from moelm.config import UserError

METADATA = {"format": "pt"}  # without it transformers refuses the file
PLACES = "DCP_SHARDING_INFO"
DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
}
N_BYTES = {name: dtype.itemsize for dtype, name in DTYPES.items()}


class CheckpointError(UserError):
    """A folder or file of weights that is not what it should be."""

    remedy = "put a whole copy in its place, or name another checkpoint (step-XXXXXXXX)"


class Place(NamedTuple):
    """Where a part lies in the whole tensor."""

    offset: tuple[int, ...]
    whole: tuple[int, ...]  # shape


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


class Piece(NamedTuple):
    """What one file holds of a tensor."""

    file: Path
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(start, start + n) for start, n in zip(self.offset, self.shape, strict=True))


def overlap(pieces: Iterable[Piece]) -> bool:
    """Do two of them have the same element? Counted in the grid that all their edges make."""
    dims = zip(*(piece.slices for piece in pieces), strict=True)
    edges = [sorted({edge for each in dim for edge in (each.start, each.stop)}) for dim in dims]
    cell = [{edge: i for i, edge in enumerate(dim)} for dim in edges]
    count = torch.zeros([len(dim) - 1 for dim in edges], dtype=torch.int32)
    for piece in pieces:
        count[tuple(slice(c[each.start], c[each.stop]) for c, each in zip(cell, piece.slices, strict=True))] += 1
    return bool((count > 1).any())


class TensorFiles(Mapping[str, torch.Tensor]):
    """The tensors of several files by name, those in parts joined. Each look-up reads a copy and keeps none, so that a
    model can be walked through that does not fit in memory."""

    KEPT_OPEN = 2**26  # bytes read through one mapping: it counts as memory of this process until it is closed

    def __init__(self, files: Iterable[Path]) -> None:
        """Raises CheckpointError before any tensor is read, also for one that two files have and for one that the
        files do not have all of."""
        self.files = list(files)
        self.pieces: dict[str, list[Piece]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}  # as safetensors names them
        for file in self.files:
            with open_weights(file) as handle:
                places = _read_places(handle, file)
                for name in handle.keys():  # noqa: SIM118  the handle is no mapping
                    described = handle.get_slice(name)
                    self._add(name, file, tuple(described.get_shape()), described.get_dtype(), places.get(name))
        for name, pieces in self.pieces.items():
            there, whole = sum(math.prod(piece.shape) for piece in pieces), math.prod(self.shapes[name])
            files_of = ", ".join(sorted(piece.file.name for piece in pieces))
            if there != whole:
                raise CheckpointError(f"{pieces[0].file.parent}: {files_of} have {there} of {whole} elements of {name}")
            if len(pieces) > 1 and overlap(pieces):
                raise CheckpointError(f"{pieces[0].file.parent}: {files_of} have some elements of {name} twice")
        self._open: dict[Path, Any] = {}
        self._n_read = 0

    def _add(self, name: str, file: Path, shape: tuple[int, ...], dtype: str, place: Place | None) -> None:
        offset, whole = place or ((0,) * len(shape), shape)
        sizes = zip(offset, shape, whole, strict=False)
        if not len(offset) == len(whole) == len(shape) or any(a < 0 or a + n > size for a, n, size in sizes):
            raise CheckpointError(f"{file}: {name} lies outside of its whole")
        others = self.pieces.setdefault(name, [])
        if others and (place is None or offset in {other.offset for other in others}):
            raise CheckpointError(f"{file}: {name} stands in another file of the folder too")
        if others and (whole, dtype) != (self.shapes[name], self.dtypes[name]):
            raise CheckpointError(f"{file}: {name} is part of another tensor than in the other files")
        others.append(Piece(file, offset, shape))
        self.shapes[name], self.dtypes[name] = whole, dtype

    @property
    def file_of(self) -> dict[str, Path]:
        """The first file that has some of a tensor."""
        return {name: pieces[0].file for name, pieces in self.pieces.items()}

    def part(self, name: str, held: tuple[slice, ...]) -> torch.Tensor:
        """A copy of some of a tensor, read from where it lies."""
        if self._n_read > self.KEPT_OPEN:
            self._open, self._n_read = {}, 0  # old mappings go before there are new ones
        part: torch.Tensor | None = None
        for piece in self.pieces[name]:
            ranges = list(zip(held, piece.slices, strict=True))
            both = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in ranges]
            if any(each.start >= each.stop for each in both) and part is not None:
                continue
            stored = self.stored(name, piece)
            if part is None:
                part = torch.empty([each.stop - each.start for each in held], dtype=stored.dtype)
            if all(each.start < each.stop for each in both):
                part[_within(both, held)] = stored[_within(both, piece.slices)]
        assert part is not None
        self._n_read += part.nbytes
        return part

    def stored(self, name: str, piece: Piece) -> torch.Tensor:
        """Mapped from its file."""
        if piece.file not in self._open:
            self._open[piece.file] = open_weights(piece.file)
        return read_tensor(self._open[piece.file], name, piece.file)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.part(name, tuple(slice(0, n) for n in self.shapes[name]))

    def __iter__(self) -> Iterator[str]:
        return iter(self.pieces)

    def __len__(self) -> int:
        return len(self.pieces)


def _within(part: Iterable[slice], of: Iterable[slice]) -> tuple[slice, ...]:
    return tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(part, of, strict=True))


def _read_places(handle: Any, file: Path) -> dict[str, Place]:
    try:
        said = json.loads((handle.metadata() or {}).get(PLACES, "{}"))
        return {
            name: Place(*(tuple(map(int, place[key])) for key in ("saved_offsets", "whole_shape")))
            for name, place in said.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{file}: does not say where its parts lie: {_first_line(error)}") from None


def read_weights(files: Iterable[Path]) -> dict[str, torch.Tensor]:
    """All tensors of all files together, mapped where they are whole. Raises CheckpointError, also for a name that two
    files have."""
    tensors = TensorFiles(files)
    whole = {name: len(pieces) == 1 for name, pieces in tensors.pieces.items()}
    return {name: tensors.stored(name, tensors.pieces[name][0]) if whole[name] else tensors[name] for name in whole}


def write_weights(weights: Mapping[str, torch.Tensor], file: Path, places: Mapping[str, Place] | None = None) -> None:
    """Those that `places` names are parts. Raises OSError if the file cannot be written."""
    described = {name: (DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in weights.items()}
    _write(described, weights.__getitem__, file, places or {})


def write_whole(tensors: TensorFiles, file: Path) -> None:
    """Into one file, one tensor after the other in memory. Raises OSError and CheckpointError."""
    if other := set(tensors.dtypes.values()) - N_BYTES.keys():
        raise CheckpointError(f"{next(iter(tensors.file_of.values())).parent}: has tensors of the type {min(other)}")
    described = {name: (tensors.dtypes[name], tensors.shapes[name]) for name in tensors}
    _write(described, tensors.__getitem__, file, {})


def _write(
    described: Mapping[str, tuple[str, tuple[int, ...]]],
    tensor_of: Callable[[str], torch.Tensor],
    file: Path,
    places: Mapping[str, Place],
) -> None:
    metadata = dict(METADATA)
    if places:  # torch wants to know of all tensors then
        all_places = {name: Place((0,) * len(shape), shape) for name, (_, shape) in described.items()} | dict(places)
        said = {name: {"saved_offsets": offset, "whole_shape": whole} for name, (offset, whole) in all_places.items()}
        metadata[PLACES] = json.dumps(said)
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    names = sorted(described, key=lambda name: (-N_BYTES[described[name][0]], name))  # so that each is aligned
    for name in names:
        dtype, shape = described[name]
        begin, end = end, end + N_BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    other = file.with_name(f".{file.name}.tmp")  # the tensors may be mapped from the file that is replaced
    with other.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            flat = tensor_of(name).detach().cpu().contiguous().reshape(-1)
            out.write(flat.view(torch.uint8).numpy().data)
    os.replace(other, file)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
