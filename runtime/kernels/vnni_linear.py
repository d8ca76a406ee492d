"""Linears with int8 activations on a CPU that multiplies bytes: what 4- and 8-bit storages share."""

from collections.abc import Callable

import torch

from pressd.runtime.kernels import vnni_lines, vnni_rows
from pressd.runtime.kernels.codegen import pool
from pressd.runtime.kernels.codegen.target import machine_vectors
from pressd.runtime.kernels.registry import (
    CodeType,
    Device,
    LinearKernel,
    LinearProblem,
    QuantizedRows,
    Tensors,
    why_not_special,
)
from pressd.runtime.kernels.vnni_product import Shape, compile_product, multiply

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INPUT_MULTIPLE = 32
MAX_INPUTS = (2**31 - 1) // (255 * 127)  # of a group: unsigned times signed bytes, summed up in 32 bits


def why_no_vnni(device: Device) -> str | None:
    """Return why generated kernels do not run on a device, or None."""
    if device.kind != "cpu":
        return f"runs on the CPU only, not on {device.kind}"
    if machine_vectors() is None:
        return "this CPU has neither AVX-512 with VNNI nor AVX-VNNI"
    if pool.openmp() is None:
        return "PyTorch's threads cannot be shared: it has no GNU OpenMP"
    return None


def why_not_pointwise(dtype: torch.dtype, device: Device) -> str | None:
    """Return why norms, gates and rotations are not generated, or None."""
    if (reason := why_no_vnni(device)) is not None:
        return reason
    return None if dtype in DTYPES else f"computes in float32 at most, not in {dtype}"


def why_not(problem: LinearProblem, device: Device) -> str | None:
    if (reason := why_no_vnni(device)) is not None:
        return reason
    if (reason := why_not_special(problem)) is not None:
        return reason
    if problem.bits not in vnni_lines.BITS or problem.activation_bits != 8:
        return f"serves 4- and 8-bit weights with 8-bit activations, not w{problem.bits}a{problem.activation_bits}"
    if problem.dtype not in DTYPES:
        return f"computes in float32 at most, not in {problem.dtype}"
    if problem.in_features % INPUT_MULTIPLE:
        return f"needs a multiple of {INPUT_MULTIPLE} inputs, not {problem.in_features}"
    if (problem.group_size or problem.in_features) > MAX_INPUTS:
        return f"sums up to {MAX_INPUTS} columns in 32 bits, not {problem.in_features}"
    padded = vnni_lines.blocks_of(problem.out_features) * vnni_lines.BLOCK
    if padded > 1.1 * problem.out_features:
        return f"would keep more than a tenth beyond {problem.out_features} rows: blocks of {vnni_lines.BLOCK}"
    return None


def pack(codes: Callable[[slice], torch.Tensor], scale: torch.Tensor, problem: LinearProblem) -> Tensors:
    """Pack a weight of which `codes` returns some rows, int8; compile what will multiply it."""
    if scale.dtype not in DTYPES:
        scale = scale.to(torch.float32)
    compile_product(shape_of(problem, scale.dtype))
    lines = vnni_lines.empty(problem.out_features, problem.in_features, problem.bits)
    step = vnni_lines.rows_at_a_time(problem.in_features)
    for start in range(0, problem.out_features, step):
        vnni_lines.write(lines, start, codes(slice(start, min(start + step, problem.out_features))), problem.bits)
    return {"lines": lines, "scale": vnni_lines.pack_scale(scale)}


def run(x: torch.Tensor, packed: Tensors, problem: LinearProblem) -> torch.Tensor:
    return run_codes(vnni_rows.quantize_rows(x, problem.group_size), packed, problem)


def run_codes(x: QuantizedRows, packed: Tensors, problem: LinearProblem) -> torch.Tensor:
    scale = packed["scale"]
    return multiply(x, packed["lines"], scale, shape_of(problem, scale.dtype), problem.out_features)


def rows(ids: torch.Tensor, packed: Tensors, problem: LinearProblem) -> torch.Tensor:
    return vnni_lines.gather(ids, packed["lines"], packed["scale"], problem.bits, problem.dtype)


def codes_wanted(problem: LinearProblem) -> CodeType:
    return vnni_rows.code_type(problem.group_size)


def kernel(storage: str, pack: Callable[[Tensors, LinearProblem, Device], Tensors]) -> LinearKernel:
    """Return the kernel of a storage format, which only `pack` knows."""
    return LinearKernel(
        name="cpu-vnni",
        storage=storage,
        why_not=why_not,
        pack=pack,
        run=run,
        rows=rows,
        codes=codes_wanted,
        run_codes=run_codes,
    )


def shape_of(problem: LinearProblem, scale_dtype: torch.dtype) -> Shape:
    return Shape(
        bits=problem.bits,
        in_features=problem.in_features,
        group_size=problem.group_size,
        scale_dtype=scale_dtype,
        dtype=problem.dtype,
    )
