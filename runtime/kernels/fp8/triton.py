"""Eight-bit floats on a GPU that multiplies them, with activations of the same kind."""

# mypy: disable-error-code="no-untyped-call"

from collections.abc import Iterator

import torch

from pressd.runtime.kernels.activation_codes import FP8, by_row
from pressd.runtime.kernels.code_products import TOKENS, product_of_few, variants_of
from pressd.runtime.kernels.fp8 import format as disk
from pressd.runtime.kernels.fp8 import reference
from pressd.runtime.kernels.registry import (
    Device,
    LinearKernel,
    LinearProblem,
    QuantizedRows,
    Tensors,
    why_not_special,
)
from pressd.runtime.kernels.row_codes import MAX_WIDTH, quantize_rows
from pressd.runtime.kernels.triton_device import capability, why_no_triton
from pressd.runtime.kernels.variants import Variant

# The oldest GPU with such tensor cores whose library scales by rows, and what it wants of the sides.
OLDEST = (9, 0)
MULTIPLE = 16


def why_not(problem: LinearProblem, device: Device) -> str | None:
    if reason := why_no_triton(problem.dtype, device) or why_not_special(problem):
        return reason
    if (capability(device) or OLDEST) < OLDEST:
        return f"needs compute capability {'.'.join(map(str, OLDEST))} for products of 8-bit floats"
    if problem.activation_bits != 8:
        return "serves activations in 8 bits"
    if problem.dtype != torch.bfloat16:
        return "serves bfloat16, which the library's product by rows gives"
    if problem.in_features % MULTIPLE or problem.out_features % MULTIPLE:
        return f"serves sides that are multiples of {MULTIPLE}, for cuBLAS"
    if problem.in_features > MAX_WIDTH:
        return f"quantises rows of at most {MAX_WIDTH} inputs"
    return None


def pack(tensors: Tensors, problem: LinearProblem, device: Device) -> Tensors:
    scale = tensors["weight_scale"].to(device.torch_device, torch.float32)
    return {"codes": tensors["weight"].to(device.torch_device).contiguous(), "scale": scale.contiguous()}


def run(x: torch.Tensor, packed: Tensors, problem: LinearProblem) -> torch.Tensor:
    return run_codes(quantize_rows(x, FP8), packed, problem)


def run_codes(x: QuantizedRows, packed: Tensors, problem: LinearProblem) -> torch.Tensor:
    codes, scale = packed["codes"], packed["scale"]
    if x.codes.size(0) <= TOKENS[-1]:
        return product_of_few(x, codes, scale, problem.dtype)
    return torch._scaled_mm(x.codes, codes.t(), scale_a=x.scale, scale_b=scale.t(), out_dtype=problem.dtype)


def variants() -> Iterator[Variant]:
    yield from variants_of(FP8)


KERNEL = LinearKernel(
    name="triton",
    storage=disk.NAME,
    why_not=why_not,
    pack=pack,
    run=run,
    rows=reference.rows,
    codes=by_row(FP8),
    run_codes=run_codes,
)
