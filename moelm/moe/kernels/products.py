"""The grouped products of the experts, on rows sorted by expert: torch's, or on a Hopper GPU those of `hopper.py`.

Rows past offsets_E[-1] belong to no expert: what they hold is not read, and in a result they are undefined.
"""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from moelm.moe.kernels.rows import spread, swiglu

log = logging.getLogger(__name__)

ROWS = 128  # of a tile of `hopper.py`


def up_product(rows_RD: Tensor, gate_up_EDF: Tensor, offsets_E: Tensor, tiles: Tensor | None) -> tuple[Tensor, Tensor]:
    """(gate_up [R, 2F], h [R, F]): gate_up_r = rows_r W^e, and h = silu(gate) up of them once they are rounded.

    4 R D F operations; reads R D + 2 E D F and writes 3 R F elements, with torch's product 2 R F more are read.
    """
    if tiles is None:
        gate_up_R2F = F.grouped_mm(rows_RD, gate_up_EDF, offs=offsets_E)
        return gate_up_R2F, swiglu(gate_up_R2F, offsets_E)
    pair: tuple[Tensor, Tensor] = _hopper().rows_product(
        rows_RD, gate_up_EDF, tiles, gate_up_EDF.shape[2] // 2, swiglu=True
    )
    return pair


def product(rows_RK: Tensor, w: Tensor, offsets_E: Tensor, tiles: Tensor | None, *, transposed: bool = False) -> Tensor:
    """[R, N] rows_r W^e, or with `transposed` rows_r W^eT. 2 R K N operations on R K + E K N + R N elements."""
    if tiles is None:
        return F.grouped_mm(rows_RK, w.mT if transposed else w, offs=offsets_E)
    n = w.shape[1 if transposed else 2]
    out_RN: Tensor = _hopper().rows_product(rows_RK, w, tiles, n, transposed=transposed)[0]
    return out_RN


def weight_gradient(a_RM: Tensor, b_RN: Tensor, offsets_E: Tensor, tiles: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[E, M, N] in `dtype`: the sum of a_r^T b_r over the rows of each expert. 2 R M N operations on R M + R N + E M N
    elements. Rows of b past the last offset must be finite."""
    if tiles is None:
        return F.grouped_mm(a_RM.mT, b_RN, offs=offsets_E).to(dtype)
    grad_EMN: Tensor = _hopper().weight_gradient(a_RM, b_RN, offsets_E)
    return grad_EMN.to(dtype)


def tile_rows(x: Tensor) -> int:
    """How many rows a tile of `spread` has, if the products of `hopper.py` are used for rows like `x`; else 0."""
    return ROWS if x.dtype == torch.bfloat16 and x.is_cuda and x.numel() and _hopper_works(x.device) else 0


@cache
def _hopper() -> ModuleType:
    from moelm.moe.kernels import hopper  # here, since other Tritons may lack what it imports

    return hopper


@cache
def _hopper_works(device: torch.device) -> bool:
    """Gluon is young and changes: where its kernels do not compile, or compute something else, torch's are used."""
    if torch.cuda.get_device_capability(device) != (9, 0):
        return False
    try:
        for _ in range(2):  # launched by Triton, and as `launch.py` remembers them
            _compare_with_torch(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of whatever kind: Triton raises its own, Python those of names that have changed
        log.warning(
            "experts: torch's grouped product, since Gluon's fails with Triton %s: %r", triton.__version__, error
        )
        return False
    return True


def _compare_with_torch(device: torch.device) -> None:
    """Raises if a kernel of `hopper.py` errs by more than rounding. The sizes let a block of threads have a second
    tile, more steps than there are stages, and ends of rows, of columns and of sums inside a tile."""
    generator = torch.Generator(device).manual_seed(0)
    rows_RD, wide_RF, w_EDF = (
        torch.randn(shape, device=device, generator=generator).bfloat16()
        for shape in ((8440, 328), (8440, 592), (3, 328, 592))
    )
    offsets_E = torch.tensor([5000, 5000, 8440], dtype=torch.int32, device=device)
    in_order_T1 = torch.arange(len(rows_RD), dtype=torch.int32, device=device).unsqueeze(1)
    (rows_RD, tiles), hopper = spread(rows_RD, in_order_T1, offsets_E, ROWS), _hopper()
    gate_up_R2F, hidden_RF = hopper.rows_product(rows_RD, w_EDF, tiles, 296, swiglu=True)
    product_RF = F.grouped_mm(rows_RD, w_EDF, offs=offsets_E)
    for found, wanted in (
        (gate_up_R2F, product_RF),
        (hidden_RF, swiglu(product_RF, offsets_E)),
        (hopper.rows_product(rows_RD, w_EDF, tiles, 592)[0], product_RF),
        (
            hopper.rows_product(wide_RF, w_EDF, tiles, 328, transposed=True)[0],
            F.grouped_mm(wide_RF, w_EDF.mT, offs=offsets_E),
        ),
        (hopper.weight_gradient(rows_RD, wide_RF, offsets_E), F.grouped_mm(rows_RD.mT, wide_RF, offs=offsets_E)),
    ):
        error = (found.float() - wanted.float()).abs().max() / wanted.float().abs().max()
        if not error <= 2**-7:
            raise ValueError(f"an error of {error.item():.1e}")
