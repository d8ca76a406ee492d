"""Int8 weights on a GPU: with int8 activations (W8A8), or without, as eight-bit words."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from pressd.runtime.kernels.activation_codes import by_row
from pressd.runtime.kernels.code_products import TOKENS, product_of_few, variants_of
from pressd.runtime.kernels.int8 import format as disk
from pressd.runtime.kernels.integer_codes import dequantize
from pressd.runtime.kernels.packed_int import triton as words
from pressd.runtime.kernels.registry import (
    Device,
    LinearKernel,
    LinearProblem,
    QuantizedRows,
    Tensors,
    why_not_special,
)
from pressd.runtime.kernels.row_codes import MAX_WIDTH, quantize_rows
from pressd.runtime.kernels.row_codes import variants as row_variants
from pressd.runtime.kernels.triton_device import why_no_triton
from pressd.runtime.kernels.variants import Variant

# torch._int_mm wants sides that are multiples of this, and more rows than a tile of its own has.
MULTIPLE = 8
SCALE_BLOCK = 1024


def why_not(problem: LinearProblem, device: Device) -> str | None:
    if reason := why_no_triton(problem.dtype, device) or why_not_special(problem):
        return reason
    if problem.group_size is not None:
        return "serves one scale per output row"
    if problem.activation_bits == 8 and (problem.in_features % MULTIPLE or problem.out_features % MULTIPLE):
        return f"serves sides that are multiples of {MULTIPLE}, for cuBLAS"
    if problem.activation_bits == 8 and problem.in_features > MAX_WIDTH:
        return f"quantises rows of at most {MAX_WIDTH} inputs"
    return None


def pack(tensors: Tensors, problem: LinearProblem, device: Device) -> Tensors:
    codes, scale = tensors["weight"].to(device.torch_device), tensors["weight_scale"].to(device.torch_device)
    if problem.activation_bits == 16:
        return words.pack_codes(codes, scale, problem)
    return {"codes": codes.contiguous(), "scale": scale.contiguous()}


def run(x: torch.Tensor, packed: Tensors, problem: LinearProblem) -> torch.Tensor:
    if problem.activation_bits == 16:
        return words.run(x, packed, problem)
    return run_codes(quantize_rows(x, torch.int8), packed, problem)


def run_codes(x: QuantizedRows, packed: Tensors, problem: LinearProblem) -> torch.Tensor:
    codes, scale = packed["codes"], packed["scale"]
    if x.codes.size(0) <= TOKENS[-1]:
        return product_of_few(x, codes, scale, problem.dtype)
    return scaled(torch._int_mm(x.codes, codes.t()), x.scale, scale, problem.dtype)


def rows(ids: torch.Tensor, packed: Tensors, problem: LinearProblem) -> torch.Tensor:
    if problem.activation_bits == 16:
        return words.rows(ids, packed, problem)
    return dequantize(packed["codes"][ids], packed["scale"][ids], problem.dtype)


@triton.jit
def scale_sums(sums, x_scales, scales, y, out_features, BLOCK: tl.constexpr):
    """y [T, N] = sums int32 [T, N] * x_scales [T] * scales [N]; a program makes a part of one row."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < out_features
    total = tl.load(sums + token * out_features + column, mask=inside, other=0).to(tl.float32)
    own = tl.load(scales + column, mask=inside, other=0.0).to(tl.float32)
    value = total * tl.load(x_scales + token) * own
    tl.store(y + token * out_features + column, value.to(y.dtype.element_ty), mask=inside)


def scaled(sums: torch.Tensor, x_scale: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return sums int32 [T, N] times x_scale [T, 1] and scale [N, 1]."""
    y = torch.empty(sums.shape, dtype=dtype, device=sums.device)
    grid = (sums.size(0), triton.cdiv(sums.size(1), SCALE_BLOCK))
    scale_sums[grid](sums, x_scale, scale, y, sums.size(1), BLOCK=SCALE_BLOCK, num_warps=4)
    return y


def variants() -> Iterator[Variant]:
    yield from variants_of(torch.int8)
    yield from row_variants()
    yield Variant(
        name="scale_sums",
        kernel=scale_sums,
        signature={"sums": "*i32", "x_scales": "*fp32", "scales": "*bf16", "y": "*bf16", "out_features": "i32"},
        constants={"BLOCK": SCALE_BLOCK},
        aligned=("out_features",),
    )


KERNEL = LinearKernel(
    name="triton",
    storage=disk.NAME,
    why_not=why_not,
    pack=pack,
    run=run,
    rows=rows,
    codes=by_row(torch.int8),
    run_codes=run_codes,
)
