"""GPTQ's sweep on a GPU: rows are independent, so a program keeps a few of them in registers for a whole block."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from pressd.runtime.kernels.gptq.reference import BLOCK
from pressd.runtime.kernels.variants import Variant

ROWS = 16


@triton.jit
def sweep_rows(
    weight,
    factor,
    scale,
    codes,
    errors,
    num_rows,
    width,
    GROUPS: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program rounds ROWS rows of [num_rows, width], width at most BLOCK, column by column."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    is_row = row < num_rows
    inside = is_row[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    left = tl.load(weight + at, mask=inside, other=0.0)
    rounded = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    lost = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for index in range(width):
        is_own = column == index
        value = tl.sum(tl.where(is_own[None, :], left, 0.0), 1)
        own = tl.load(scale + row * GROUPS + index * GROUPS // width, mask=is_row, other=1.0)
        # Whole numbers alone are between 2^23 and 2^24: the sum rounds half to even, the difference is exact.
        nearest = (tl.div_rn(value, own) + 12582912.0) - 12582912.0
        nearest = tl.minimum(tl.maximum(nearest, -HALF), HALF - 1.0)
        error = tl.div_rn(value - nearest * own, tl.load(factor + index * width + index))
        follows = tl.load(factor + index * width + column, mask=(column > index) & (column < width), other=0.0)
        left -= error[:, None] * follows[None, :]
        rounded = tl.where(is_own[None, :], nearest[:, None], rounded)
        lost = tl.where(is_own[None, :], error[:, None], lost)
    tl.store(codes + at, rounded.to(tl.int8), mask=inside)
    tl.store(errors + at, lost, mask=inside)


def sweep(
    weight: torch.Tensor, factor: torch.Tensor, scale: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `Sweep` in reference.py says; everything is contiguous."""
    num_rows, width = weight.shape
    assert width <= BLOCK
    assert all(part.is_contiguous() for part in (weight, factor, scale)), "rows are read one after another"
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    errors = torch.empty_like(weight)
    if num_rows:
        sweep_rows[(triton.cdiv(num_rows, ROWS),)](
            weight,
            factor,
            scale,
            codes,
            errors,
            num_rows,
            width,
            GROUPS=scale.size(1),
            HALF=float(1 << (bits - 1)),
            ROWS=ROWS,
            BLOCK=BLOCK,
            num_warps=4,
        )
    return codes, errors


def variants() -> Iterator[Variant]:
    for groups in (1, 4):
        yield Variant(
            name=f"sweep {groups} groups",
            kernel=sweep_rows,
            signature={
                **dict.fromkeys(("weight", "factor", "scale"), "*fp32"),
                "codes": "*i8",
                "errors": "*fp32",
                "num_rows": "i32",
                "width": "i32",
            },
            constants={"GROUPS": groups, "HALF": 8.0, "ROWS": ROWS, "BLOCK": BLOCK},
            aligned=("num_rows", "width"),
        )
