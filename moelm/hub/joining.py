"""A checkpoint in parts -> the same one with whole tensors: one file of weights, one of moments."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from moelm.hub.streaming import Written
from moelm.hub.verification import compare_shapes, compare_values, raise_if
from moelm.training.checkpoint_io import (
    file_facts,
    find_checkpoint,
    moment_files,
    step_of,
    verify_checkpoint,
    weight_files,
    write_manifest,
)
from moelm.training.weight_files import DTYPES, TensorFiles, write_whole

KINDS = {"model": weight_files, "optimizer": moment_files}


class Join:
    """The constructor finds out whether it can be done, without reading a tensor. Raises UserError."""

    def __init__(self, checkpoint: Path) -> None:
        self.step = find_checkpoint(checkpoint)
        self.tensors = {kind: TensorFiles(files) for kind, files_of in KINDS.items() if (files := files_of(self.step))}
        in_parts = {file.name for tensors in self.tensors.values() for file in tensors.files}
        self.others = {name: facts for name, facts in file_facts(self.step).items() if name not in in_parts}

    def write(self, out: Path, name: str) -> Written:
        """Fill the empty folder `out`, one tensor at a time in memory. Raises UserError."""
        for other in self.others:
            shutil.copyfile(self.step / other, out / other)
        for kind, tensors in self.tensors.items():
            write_whole(tensors, out / f"{kind}.safetensors")
        write_manifest(out, step_of(self.step))
        n_parameters = sum(math.prod(shape) for shape in self.tensors["model"].shapes.values())
        n_bytes = sum(file.stat().st_size for file in out.iterdir())
        there = set(self.tensors["model"].dtypes.values())
        dtypes = sorted(str(dtype).removeprefix("torch.") for dtype, name in DTYPES.items() if name in there)
        return Written(f"step {step_of(self.step)} in one piece", n_parameters, n_bytes, dtypes)


def verify_join(source: Join, checkpoint: Path) -> int:
    """How many tensors were compared: each part as its file has it with its place in the whole. Raises UserError with
    all that is wrong."""
    verify_checkpoint(checkpoint)
    found = {name: facts for name, facts in file_facts(checkpoint).items() if not name.endswith(".safetensors")}
    names = sorted(found.keys() | source.others.keys())
    reasons = [f"{name} is not that of {source.step}" for name in names if found.get(name) != source.others.get(name)]
    if step_of(checkpoint) != step_of(source.step):
        reasons.append(f"is of step {step_of(checkpoint)}, not {step_of(source.step)}")
    n_compared = 0
    for kind, parts in source.tensors.items():
        whole = TensorFiles([checkpoint / f"{kind}.safetensors"])
        if wrong := compare_shapes(parts.shapes, whole.shapes):
            reasons += wrong
            continue
        for name, pieces in parts.pieces.items():
            tensor = whole[name]
            for piece in pieces:
                reasons += compare_values(name, tensor[piece.slices], parts.stored(name, piece))
            n_compared += 1
    raise_if(checkpoint, reasons)
    return n_compared
