"""Residual, root-mean-square norm and rounding to codes in one launch, a program for each row."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from pressd.runtime.kernels.activation_codes import HALF_RANGE
from pressd.runtime.kernels.registry import CodeType, Rows
from pressd.runtime.kernels.row_codes import block_of, codes_of, empty_rows
from pressd.runtime.kernels.variants import Variant


@triton.jit
def add_and_norm(
    x,
    delta,
    gain,
    total,
    y,
    scales,
    width,
    epsilon,
    ADDS: tl.constexpr,
    QUANTIZES: tl.constexpr,
    IS_INT8: tl.constexpr,
    HALF_RANGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row of [T, width]; y gets values, or codes and a scale for each row."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    at = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, BLOCK)
    inside = column < width
    row = tl.load(x + at + column, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        row += tl.load(delta + at + column, mask=inside, other=0.0).to(tl.float32)
        rounded = row.to(DTYPE)
        tl.store(total + at + column, rounded, mask=inside)
        row = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(row * row, 0) / width + epsilon)
    own = tl.load(gain + column, mask=inside, other=0.0).to(tl.float32)
    # As the reference rounds: the normalised value, then its product with the gain.
    value = (own * (row * scale).to(DTYPE).to(tl.float32)).to(DTYPE)
    if QUANTIZES:
        wide = value.to(tl.float32)
        codes, code_scale = codes_of(wide, tl.max(tl.abs(wide), 0), HALF_RANGE, IS_INT8)
        tl.store(y + at + column, codes.to(y.dtype.element_ty), mask=inside)
        tl.store(scales + tl.program_id(0), code_scale)
    else:
        tl.store(y + at + column, value, mask=inside)


def add_norm(
    x: torch.Tensor, delta: torch.Tensor | None, gain: torch.Tensor, epsilon: float, quantize: CodeType | None = None
) -> tuple[torch.Tensor, Rows]:
    """As `PointwiseKernels` in registry.py says; x and delta are contiguous."""
    num_rows, width = x.shape
    total = x if delta is None else torch.empty_like(x)
    codes = None if quantize is None else quantize.dtype
    y: Rows = torch.empty_like(x) if codes is None else empty_rows(num_rows, width, codes, x.device)
    if num_rows:
        block, num_warps = block_of(width)
        values, scales = (y, x) if isinstance(y, torch.Tensor) else (y.codes, y.scale)
        add_and_norm[(num_rows,)](
            x,
            x if delta is None else delta,
            gain,
            total,
            values,
            scales,
            width,
            epsilon,
            ADDS=delta is not None,
            QUANTIZES=codes is not None,
            IS_INT8=codes == torch.int8,
            HALF_RANGE=1.0 if codes is None else HALF_RANGE[codes],
            BLOCK=block,
            num_warps=num_warps,
        )
    return total, y


def variants() -> Iterator[Variant]:
    block, num_warps = block_of(4096)
    codes = {None: "*bf16", torch.int8: "*i8", torch.float8_e4m3fn: "*fp8e4nv"}
    for quantize, name in codes.items():
        for adds in (False, True):
            pointers = dict.fromkeys(("x", "delta", "gain", "total"), "*bf16") | {"y": name}
            yield Variant(
                name=f"add_norm {'with' if adds else 'without'} delta to {name}",
                kernel=add_and_norm,
                signature=pointers
                | {"scales": "*bf16" if quantize is None else "*fp32", "width": "i32", "epsilon": "fp32"},
                constants={
                    "ADDS": adds,
                    "QUANTIZES": quantize is not None,
                    "IS_INT8": quantize == torch.int8,
                    "HALF_RANGE": 1.0 if quantize is None else HALF_RANGE[quantize],
                    "BLOCK": block,
                },
                num_warps=num_warps,
                aligned=("width",),
                oldest=89 if quantize == torch.float8_e4m3fn else 80,
            )
