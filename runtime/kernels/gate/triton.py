"""The gate of a feed-forward network and rounding to codes in one launch."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from pressd.runtime.kernels.activation_codes import HALF_RANGE
from pressd.runtime.kernels.registry import CodeType, QuantizedRows
from pressd.runtime.kernels.row_codes import block_of, codes_of, empty_rows
from pressd.runtime.kernels.variants import Variant

# Columns of one program where no row has to be seen as a whole.
COLUMNS = 1024


@triton.jit
def product_of(gate_up, at, column, inside, width):
    """Return silu(gate) * up of some columns of a row, rounded as the reference does: after each of the two."""
    DTYPE: tl.constexpr = gate_up.dtype.element_ty
    gate = tl.load(gate_up + at + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + width + column, mask=inside, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(DTYPE).to(tl.float32)
    return (silu * up).to(DTYPE)


@triton.jit
def gate_part(gate_up, y, width, BLOCK: tl.constexpr):
    """y [T, width] from gate_up [T, 2 width]: a program makes a part of one row."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    value = product_of(gate_up, token * 2 * width, column, inside, width)
    tl.store(y + token * width + column, value, mask=inside)


@triton.jit
def gate_row(gate_up, codes, scales, width, HALF_RANGE: tl.constexpr, IS_INT8: tl.constexpr, BLOCK: tl.constexpr):
    """Codes [T, width] and scales [T]: a program makes a row."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = product_of(gate_up, token * 2 * width, column, inside, width).to(tl.float32)
    value = tl.where(inside, value, 0.0)
    found, scale = codes_of(value, tl.max(tl.abs(value), 0), HALF_RANGE, IS_INT8)
    tl.store(codes + token * width + column, found.to(codes.dtype.element_ty), mask=inside)
    tl.store(scales + token, scale)


def silu_mul(gate_up: torch.Tensor, quantize: CodeType | None = None) -> torch.Tensor | QuantizedRows:
    """As `PointwiseKernels` in registry.py says; gate_up is contiguous."""
    num_rows, width = gate_up.size(0), gate_up.size(1) // 2
    if quantize is None:
        y = torch.empty(num_rows, width, dtype=gate_up.dtype, device=gate_up.device)
        if num_rows:
            gate_part[(num_rows, triton.cdiv(width, COLUMNS))](gate_up, y, width, BLOCK=COLUMNS, num_warps=4)
        return y
    rows = empty_rows(num_rows, width, quantize.dtype, gate_up.device)
    if num_rows:
        block, num_warps = block_of(width)
        gate_row[(num_rows,)](
            gate_up,
            rows.codes,
            rows.scale,
            width,
            HALF_RANGE=HALF_RANGE[quantize.dtype],
            IS_INT8=quantize.dtype == torch.int8,
            BLOCK=block,
            num_warps=num_warps,
        )
    return rows


def variants() -> Iterator[Variant]:
    yield Variant(
        name="silu_mul",
        kernel=gate_part,
        signature={"gate_up": "*bf16", "y": "*bf16", "width": "i32"},
        constants={"BLOCK": COLUMNS},
        aligned=("width",),
    )
    block, num_warps = block_of(14336)
    for quantize, name in ((torch.int8, "*i8"), (torch.float8_e4m3fn, "*fp8e4nv")):
        yield Variant(
            name=f"silu_mul to {name}",
            kernel=gate_row,
            signature={"gate_up": "*bf16", "codes": name, "scales": "*fp32", "width": "i32"},
            constants={"HALF_RANGE": HALF_RANGE[quantize], "IS_INT8": quantize == torch.int8, "BLOCK": block},
            num_warps=num_warps,
            aligned=("width",),
            oldest=80 if quantize == torch.int8 else 89,
        )
