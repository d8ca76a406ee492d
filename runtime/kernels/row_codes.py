"""Rows quantised to eight bits on a GPU: what norms, gates and linears share; the arithmetic is activation_codes'."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from pressd.runtime.kernels.activation_codes import FP8, HALF_RANGE
from pressd.runtime.kernels.registry import QuantizedRows
from pressd.runtime.kernels.variants import Variant

# The widest row that one program holds.
MAX_WIDTH = 32768


@triton.jit
def codes_of(row, largest, HALF_RANGE: tl.constexpr, IS_INT8: tl.constexpr):
    """Return (codes as float32, scale) of a row float32 whose largest absolute value is known."""
    scale = tl.maximum(tl.div_rn(largest, HALF_RANGE), 1.1754943508222875e-38)
    # Maxima pass over NaN, and codes of int8 have none: a row keeps it in its scale, as in the reference.
    is_spoilt = tl.max((row != row).to(tl.int32), 0) > 0
    scale = tl.where(is_spoilt, float("nan"), scale)
    scaled = tl.div_rn(row, scale)
    if IS_INT8:
        # Between 2^23 and 2^24 there are whole numbers alone: the sum rounds half to even, the difference is exact.
        codes = tl.minimum(tl.maximum((scaled + 12582912.0) - 12582912.0, -127.0), 127.0)
    else:
        codes = tl.minimum(tl.maximum(scaled, -448.0), 448.0)
    return codes, scale


@triton.jit
def quantize(x, codes, scales, width, stride, HALF_RANGE: tl.constexpr, IS_INT8: tl.constexpr, BLOCK: tl.constexpr):
    """One program for each row of x [T, width]."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    row = tl.load(x + token * stride + column, mask=inside, other=0.0).to(tl.float32)
    values, scale = codes_of(row, tl.max(tl.abs(row), 0), HALF_RANGE, IS_INT8)
    tl.store(codes + token * width + column, values.to(codes.dtype.element_ty), mask=inside)
    tl.store(scales + token, scale)


def quantize_rows(x: torch.Tensor, codes: torch.dtype) -> QuantizedRows:
    """Quantise x [T, K <= MAX_WIDTH] by the largest value of each row."""
    found = empty_rows(x.size(0), x.size(1), codes, x.device)
    if x.size(0):
        block, num_warps = block_of(x.size(1))
        quantize[(x.size(0),)](
            x,
            found.codes,
            found.scale,
            x.size(1),
            x.stride(0),
            HALF_RANGE=HALF_RANGE[codes],
            IS_INT8=codes == torch.int8,
            BLOCK=block,
            num_warps=num_warps,
        )
    return found


def empty_rows(num_rows: int, width: int, codes: torch.dtype, device: torch.device) -> QuantizedRows:
    """Allocate, without clearing."""
    return QuantizedRows(
        codes=torch.empty(num_rows, width, dtype=codes, device=device),
        scale=torch.empty(num_rows, 1, dtype=torch.float32, device=device),
    )


def block_of(width: int) -> tuple[int, int]:
    """Return the power of two that holds a row, and the warps for it."""
    block = max(32, triton.next_power_of_2(width))
    return block, min(16, max(1, block // 512))


def variants() -> Iterator[Variant]:
    for codes in (torch.int8, FP8):
        for width in (4096, 14336):
            block, num_warps = block_of(width)
            yield Variant(
                name=f"quantize {width} to {codes}",
                kernel=quantize,
                signature={
                    "x": "*bf16",
                    "codes": "*i8" if codes == torch.int8 else "*fp8e4nv",
                    "scales": "*fp32",
                    "width": "i32",
                    "stride": "i32",
                },
                constants={"HALF_RANGE": HALF_RANGE[codes], "IS_INT8": codes == torch.int8, "BLOCK": block},
                num_warps=num_warps,
                aligned=("width", "stride"),
                oldest=80 if codes == torch.int8 else 89,
            )
