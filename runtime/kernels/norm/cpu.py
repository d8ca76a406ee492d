"""Residual, root-mean-square norm and rounding to codes in one pass over a row, generated for the machine."""

import functools

import torch
from llvmlite import ir

from pressd.runtime.kernels import vnni_rows
from pressd.runtime.kernels.codegen.lanes import Lanes, width_for
from pressd.runtime.kernels.codegen.program import Arguments, Program, Region, compile_region, float_bits
from pressd.runtime.kernels.codegen.recording import allocate
from pressd.runtime.kernels.codegen.target import Vectors
from pressd.runtime.kernels.codegen.writer import F32, Function, Value
from pressd.runtime.kernels.registry import CodeType, Rows


def add_norm(
    x: torch.Tensor, delta: torch.Tensor | None, gain: torch.Tensor, epsilon: float, quantize: CodeType | None = None
) -> tuple[torch.Tensor, Rows]:
    """As `PointwiseKernels` in registry.py says; the sum rounds to x's type, the norm only as it is stored."""
    num_rows, width = x.shape
    x = x.contiguous()
    total = x if delta is None else allocate((num_rows, width), x.dtype)
    y: Rows
    if quantize is None:
        y = allocate((num_rows, width), x.dtype)
    else:
        y = vnni_rows.empty_rows(num_rows, width, quantize.group_size)
    if num_rows:
        outputs = (y.data_ptr(), 0, 0) if isinstance(y, torch.Tensor) else vnni_rows.addresses(y)
        added = 0 if delta is None else delta.contiguous().data_ptr()
        bits = float_bits(epsilon)
        program = _program(width, x.dtype, delta is not None, quantize)
        program.run(num_rows, x.data_ptr(), added, gain.data_ptr(), bits, total.data_ptr(), *outputs)
    return total, y


@functools.cache
def _program(width: int, dtype: torch.dtype, adds: bool, quantize: CodeType | None) -> Program:
    return compile_region(lambda vectors: region(width, dtype, adds, quantize, vectors))


def region(width: int, dtype: torch.dtype, adds: bool, quantize: CodeType | None, vectors: Vectors) -> Region:
    """Return the norm of rows of `width`; a piece is a row. Without `quantize`, "codes" are the values."""
    size = dtype.itemsize

    def write(f: Function, arguments: Arguments, row: Value) -> None:
        lanes = Lanes(f, vectors, width_for(vectors, quantize.group_size or width if quantize else width))
        start = f.mul(row, width * size)
        x, delta, total = (f.at(arguments.pointer(name), start) for name in ("x", "delta", "total"))
        gain = arguments.pointer("gain")
        squares = f.slot(lanes.constant(0.0))
        with f.loop(0, width, lanes.width) as column:
            offset = f.mul(column, size)
            value = lanes.load(f.at(x, offset), dtype)
            if adds:
                place = f.at(total, offset)
                lanes.store(lanes.add(value, lanes.load(f.at(delta, offset), dtype)), place, dtype)
                value = lanes.load(place, dtype)
            squares.set(lanes.fma(value, value, squares.get()))
        scale = inverse_length(f, lanes, arguments, squares.get(), width)

        def values(column: Value) -> Value:
            offset = f.mul(column, size)
            summed = lanes.load(f.at(total, offset), dtype)
            return lanes.mul(lanes.mul(summed, scale), lanes.load(f.at(gain, offset), dtype))

        if quantize is not None:
            vnni_rows.write_codes(f, lanes, arguments, row, width, quantize.group_size, values)
            return
        y = f.at(arguments.pointer("codes"), start)
        with f.loop(0, width, lanes.width) as column:
            lanes.store(values(column), f.at(y, f.mul(column, size)), dtype)

    return Region("add_norm", ("x", "delta", "gain", "epsilon", "total", *vnni_rows.OUTPUTS), write)


def inverse_length(f: Function, lanes: Lanes, arguments: Arguments, squares: Value, width: int) -> Value:
    """Write 1 / sqrt(mean + "epsilon") of the squares of `width` values, summed up by lane; return it in every lane."""
    mean = f.builder.fdiv(lanes.sum(squares), ir.Constant(F32, float(width)))
    root = f.intrinsic("llvm.sqrt.f32", F32, f.builder.fadd(mean, arguments.float("epsilon")))
    return lanes.splat(f.builder.fdiv(ir.Constant(F32, 1.0), root))
