"""How tensors of transformers become ours and back: each `Weight` is one exact correspondence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Weight:
    """Tensors of ours and the tensors of theirs that hold the same numbers. Mostly one of ours; DBRX keeps q, k and v
    in one tensor, which can only be written whole.

    `join` takes theirs to ours and `split` ours to theirs, in the order of the names; they are inverse to the last bit.
    Results may share memory with what was given.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    join: Callable[[list[Tensor]], list[Tensor]]
    split: Callable[[list[Tensor]], list[Tensor]]

    def to_ours(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Ours by name; of `tensors`, which may load lazily, only `theirs` are looked up."""
        joined = self.join([tensors[name] for name in self.theirs])
        return dict(zip(self.ours, joined, strict=True))

    def to_theirs(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Theirs by name; of `tensors` only `ours` are looked up."""
        parts = self.split([tensors[name] for name in self.ours])
        return dict(zip(self.theirs, parts, strict=True))


def same(ours: str, theirs: str) -> Weight:
    return Weight((ours,), (theirs,), list, list)


def same_in_float32(ours: str, theirs: str) -> Weight:
    """The selection bias: small steps are lost in fewer bits, so it is float32 on both sides."""
    return Weight((ours,), (theirs,), lambda each: [each[0].float()], lambda each: [each[0].float()])


def side_by_side(ours: str, *theirs: str) -> Weight:
    """Ours holds the rows of theirs one after the other, equally many of each."""
    n = len(theirs)
    return Weight((ours,), theirs, lambda parts: [torch.cat(parts)], lambda each: list(each[0].chunk(n)))


def cut(ours: tuple[str, ...], theirs: str, rows: list[int]) -> Weight:
    """Theirs holds the rows of ours one after the other, so many of each."""
    return Weight(ours, (theirs,), lambda each: list(each[0].split(rows)), lambda parts: [torch.cat(parts)])


def experts_apart(ours: str, theirs: str, n_experts: int, gate: str, up: str, down: str) -> Iterator[Weight]:
    """`theirs.3.gate.weight` and so on, [out, in], one tensor an expert -> [E, in, out]."""
    names = tuple(f"{theirs}.{e}.{part}.weight" for e in range(n_experts) for part in (gate, up))
    yield Weight((f"{ours}.gate_up",), names, _join_gate_up, _split_gate_up)
    names = tuple(f"{theirs}.{e}.{down}.weight" for e in range(n_experts))
    yield Weight((f"{ours}.down",), names, _join_down, lambda each: [down.T.contiguous() for down in each[0]])


def _join_gate_up(parts: list[Tensor]) -> list[Tensor]:
    return [torch.stack([torch.cat([gate, up]).T for gate, up in zip(parts[::2], parts[1::2], strict=True)])]


def _split_gate_up(each: list[Tensor]) -> list[Tensor]:
    return [part.T.contiguous() for expert in each[0] for part in expert.chunk(2, -1)]


def _join_down(parts: list[Tensor]) -> list[Tensor]:
    return [torch.stack([part.T for part in parts])]


def experts_together(ours: str, theirs: str) -> Iterator[Weight]:
    """`theirs.gate_up_proj` [E, out, in], gate before up, and `theirs.down_proj` -> [E, in, out]."""
    yield transposed(f"{ours}.gate_up", f"{theirs}.gate_up_proj")
    yield transposed(f"{ours}.down", f"{theirs}.down_proj")


def transposed(ours: str, theirs: str) -> Weight:
    """Each matrix of a stack."""
    return Weight((ours,), (theirs,), _transpose, _transpose)


def _transpose(each: list[Tensor]) -> list[Tensor]:
    return [each[0].mT.contiguous()]


def taking_turns(ours: str, theirs: str) -> Weight:
    """Along the last axis theirs has gate and up in turns, ours all of gate before all of up (gpt-oss)."""

    def join(each: list[Tensor]) -> list[Tensor]:
        return [torch.cat([each[0][..., ::2], each[0][..., 1::2]], -1)]

    def split(each: list[Tensor]) -> list[Tensor]:
        return [torch.stack(each[0].chunk(2, -1), -1).flatten(-2)]

    return Weight((ours,), (theirs,), join, split)
