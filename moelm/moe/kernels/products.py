"""Which grouped products the experts use: those of `hopper.py` on a Hopper GPU, elsewhere torch's."""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from moelm.moe.kernels.launch import Kernel, cdiv, next_power_of_2
from moelm.moe.kernels.rows import spread, swiglu, swiglu_backward
from moelm.moe.kernels.sorting import sort_by_expert

log = logging.getLogger(__name__)

ROWS = 128  # of a tile of `hopper.py`
# Widths of experts from which on tokens are spread over rows for `hopper.py` too. That takes 2 D (1 + 1 / K) bytes a
# row; the copy engine then brings rows some 5 % faster than threads that gather them, of 2 D F or 4 D F operations.
SPREAD_FROM = 4096


class Tiles(NamedTuple):
    """How the rows are worked on, whatever the load, which the host does not know."""

    tiles_N3: Tensor  # int32 expert, first row, end of the expert's rows; expert -1 for a tile without rows
    experts_E: Tensor  # int32, most rows first: dealt out in turn, work that grows with the rows ends about together


class Here(NamedTuple):
    """Of tokens of which some are still on their way: those that are here, which come first."""

    choice_of_row_R: Tensor
    n_choices: int  # theirs are the first
    n_rows: int  # as many of them have an expert


def hopper_tiles(
    x_TD: Tensor,
    n_rows: int,
    top_k: int,
    d_expert: int,
    offsets_E: Tensor,
    dtype: torch.dtype | None = None,
    here: Here | None = None,
) -> list[Tiles] | None:
    """`row_tiles` if the products of `hopper.py` are used for tokens like these, else None; with `here` two: the tiles
    all of whose rows are here, and the rest. `dtype` is that of the gradients of weights, for the products of a
    backward pass."""
    if x_TD.dtype != torch.bfloat16 or not x_TD.is_cuda or not x_TD.numel():
        return None
    if not _hopper_works(x_TD.device, x_TD.shape[1], d_expert, top_k, dtype):
        return None
    return row_tiles(n_rows, offsets_E, ROWS, here)


def spread_if_wide(x_TD: Tensor, row_of_choice_TK: Tensor, d_expert: int) -> Tensor | None:
    return spread(x_TD, row_of_choice_TK) if d_expert >= SPREAD_FROM else None


def row_tiles(n_rows: int, offsets_E: Tensor, size: int, here: Here | None = None) -> list[Tiles]:
    """Each expert's rows, `size` at a time; as many tiles as `n_rows` can need. With `here` twice: the tiles all of
    whose rows are here, and the rest."""
    E = offsets_E.shape[0]
    n_first, n_tiles, block = min(n_rows, n_rows // size + E), 0, 64
    if here:  # in steps, since a launch is remembered by its numbers
        n_first, rest = here.n_rows // size + E, (n_rows - here.n_rows) // size + 2 * E
        n_first, n_tiles = cdiv(n_first, block) * block, cdiv(rest, block) * block
    n_tiles += n_first
    tiles_N3, experts_E = offsets_E.new_empty(n_tiles, 3), torch.empty_like(offsets_E)
    _row_tiles[cdiv(max(n_first, n_tiles - n_first, E), block), 2 if here else 1, 1](
        offsets_E,
        here.choice_of_row_R if here else None,
        tiles_N3,
        experts_E,
        n_first,
        n_tiles,
        here.n_choices if here else 0,
        E,
        next_power_of_2(E),
        size,
        block,
    )
    return [
        Tiles(part_N3, experts_E) for part_N3 in ((tiles_N3[:n_first], tiles_N3[n_first:]) if here else (tiles_N3,))
    ]


def row_tiles_reference(n_rows: int, offsets_E: Tensor, size: int) -> Tiles:
    ends = offsets_E.tolist()
    tiles = [(e, row, end) for e, end in enumerate(ends) for row in range(ends[e - 1] if e else 0, end, size)]
    tiles += [(-1, 0, 0)] * (min(n_rows, n_rows // size + len(ends)) - len(tiles))
    tiles_N3 = torch.tensor(tiles, dtype=torch.int32, device=offsets_E.device).view(-1, 3)
    return Tiles(tiles_N3, offsets_E.diff(prepend=offsets_E.new_zeros(1)).argsort(descending=True, stable=True).int())


@Kernel
@triton.jit(do_not_specialize=["n_first", "n_tiles", "n_choices"])
def _row_tiles(
    offsets_E,
    choice_of_row_R,
    tiles_N3,
    experts_E,
    n_first,
    n_tiles,
    n_choices,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    e = tl.arange(0, BLOCK_E)
    end = tl.load(offsets_E + e, mask=e < E, other=0)
    start = tl.load(offsets_E + e - 1, mask=(e > 0) & (e < E), other=0)
    n, first = tl.where(e < E, tl.cdiv(end - start, SIZE), 0), start
    if choice_of_row_R is not None:  # whose expert's lie in their order: by halving, after how many tiles others begin
        low, high = tl.zeros_like(n), n
        while tl.max(high - low, 0) > 0:
            middle = (low + high) // 2
            row = tl.minimum(start + (middle + 1) * SIZE, end) - 1
            is_here = tl.load(choice_of_row_R + row, mask=low < high, other=n_choices) < n_choices
            low, high = tl.where(is_here, middle + 1, low), tl.where(is_here, high, middle)
        if tl.program_id(1) == 0:
            n, n_tiles = low, n_first
        else:
            first += low * SIZE
            n, n_tiles, tiles_N3 = n - low, n_tiles - n_first, tiles_N3 + 3 * n_first
    last = tl.cumsum(n, 0)
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mine_end = tl.load(offsets_E + tile, mask=tile < E, other=0)
    mine_start = tl.load(offsets_E + tile - 1, mask=(tile > 0) & (tile < E), other=0)
    rows, mine_rows = tl.where(e < E, end - start, -1)[None, :], (mine_end - mine_start)[:, None]
    before = (rows > mine_rows) | ((rows == mine_rows) & (e[None, :] < tile[:, None]))
    tl.store(experts_E + tl.sum(before.to(tl.int32), 1), tile, mask=(tile < E) & (tl.program_id(1) == 0))
    expert = tl.sum((last[None, :] <= tile[:, None]).to(tl.int32), 1)
    mine = e[None, :] == expert[:, None]
    row = tl.sum(tl.where(mine, (first - (last - n) * SIZE)[None, :], 0), 1) + tile * SIZE
    stop = tl.sum(tl.where(mine, end[None, :], 0), 1)
    inside = tile < n_tiles
    tl.store(tiles_N3 + 3 * tile, tl.where(expert < E, expert, -1), mask=inside)
    tl.store(tiles_N3 + 3 * tile + 1, row, mask=inside)
    tl.store(tiles_N3 + 3 * tile + 2, stop, mask=inside)


@cache
def hopper() -> ModuleType:
    from moelm.moe.kernels import hopper  # here, since other Tritons may lack what it imports

    return hopper


@cache
def _hopper_works(device: torch.device, d_in: int, d_expert: int, top_k: int, dtype: torch.dtype | None) -> bool:
    """Gluon is young and changes: where its kernels do not compile, or compute something else, torch's are used. Asked
    of the very binaries that will be used, so that it costs no compilation of its own."""
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        log.warning("experts: torch's grouped product, since this GPU is %d.%d and no Hopper (9.0)", *capability)
        return False
    try:
        for _ in range(2):  # launched by Triton, and as `launch.py` remembers them
            _compare_with_torch(device, d_in, d_expert, top_k, dtype)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of whatever kind: Triton raises its own, Python those of names that have changed
        log.warning(
            "experts: torch's grouped product, since Gluon's fails with Triton %s: %r", triton.__version__, error
        )
        return False
    return True


def _compare_with_torch(device: torch.device, D: int, F_: int, K: int, dtype: torch.dtype | None) -> None:
    """Raises if a kernel of `hopper.py` errs by more than rounding: of the forward pass, or with `dtype` of the other.

    Rows enough that blocks of threads have more than one tile and sums more steps than there are stages; experts end
    inside a tile, one is idle, and some choices are of "none", of which most have no row, as those of experts that
    other ranks hold.
    """
    generator = torch.Generator(device).manual_seed(0)
    T, E = cdiv(16880, K), 3
    x_TD, grad_y_TD, up_EDF, down_EFD = (
        torch.randn(shape, device=device, generator=generator).bfloat16()
        for shape in ((T, D), (T, D), (E, D, 2 * F_), (E, F_, D))
    )
    ids_TK = torch.randint(0, 2 * E, (T, K), device=device, generator=generator).clamp(max=E)
    gates_TK = torch.rand(T, K, device=device, generator=generator)
    row_of_choice_TK, choice_of_row_R, offsets_E = sort_by_expert(torch.where(ids_TK == 1, 0, ids_TK), E)
    n_used, ours = int(offsets_E[-1]), hopper()
    R = n_used + 77
    choice_of_row_R = choice_of_row_R[:R]
    (tiles,) = row_tiles(R, offsets_E, ROWS)
    rows_RD, x_RD = spread(x_TD, row_of_choice_TK)[:R], spread_if_wide(x_TD, row_of_choice_TK, F_)
    gate_up_R2F = F.grouped_mm(rows_RD, up_EDF, offs=offsets_E)
    h_RF = swiglu(gate_up_R2F, offsets_E)
    found: tuple[Tensor, ...]
    wanted: tuple[Tensor, ...]
    if dtype is None:
        found = *ours.up_product(x_TD, choice_of_row_R, K, up_EDF, [tiles], x_RD), ours.product(h_RF, down_EFD, tiles)
        wanted = gate_up_R2F, h_RF, F.grouped_mm(h_RF, down_EFD, offs=offsets_E)
    else:
        grad_rows_RD = spread(grad_y_TD, row_of_choice_TK)[:R]
        grad_h_RF = F.grouped_mm(grad_rows_RD, down_EFD.mT, offs=offsets_E)
        *grads, grad_gates_TK = swiglu_backward(grad_h_RF, gate_up_R2F, gates_TK, choice_of_row_R, offsets_E)
        grad_y_RD = spread_if_wide(grad_y_TD, row_of_choice_TK, F_)
        by_token = choice_of_row_R, K, offsets_E, tiles, dtype, None
        batch = grad_y_TD, gates_TK, choice_of_row_R, offsets_E
        mine = ours.down_backward(*batch, down_EFD, gate_up_R2F, [tiles], grad_y_RD)
        found = (
            *mine,
            ours.product(grads[0], up_EDF, tiles, transposed=True),
            ours.weight_gradient(x_TD, mine[0], *by_token, x_RD),
            ours.weight_gradient(grad_y_TD, mine[1], *by_token, grad_y_RD, rows_first=True),
        )
        wanted = (
            *grads,
            torch.where(row_of_choice_TK < R, grad_gates_TK, 0.0),
            F.grouped_mm(grads[0], up_EDF.mT, offs=offsets_E),
            F.grouped_mm(rows_RD.mT, grads[0], offs=offsets_E),
            F.grouped_mm(grads[1].mT, grad_rows_RD, offs=offsets_E),
        )
    for one, other in zip(found, wanted, strict=True):
        n = n_used if len(one) == R else None  # of rows the last are of nobody
        error = (one[:n].float() - other[:n].float()).abs().max() / other[:n].float().abs().max()
        if not error <= 2**-7:
            raise ValueError(f"an error of {error.item():.1e}")
