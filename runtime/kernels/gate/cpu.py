"""The gate of a feed-forward network and rounding to codes in one pass over a row, generated for the machine."""

import functools

import torch

from pressd.runtime.kernels import vnni_rows
from pressd.runtime.kernels.codegen.lanes import Lanes, width_for
from pressd.runtime.kernels.codegen.program import Arguments, Program, Region, compile_region
from pressd.runtime.kernels.codegen.recording import allocate
from pressd.runtime.kernels.codegen.target import Vectors
from pressd.runtime.kernels.codegen.writer import Function, Value
from pressd.runtime.kernels.registry import CodeType, Rows


def silu_mul(gate_up: torch.Tensor, quantize: CodeType | None = None) -> Rows:
    """As `PointwiseKernels` in registry.py says; nothing rounds before it is stored."""
    num_rows, width = gate_up.size(0), gate_up.size(1) // 2
    gate_up = gate_up.contiguous()
    y: Rows
    if quantize is None:
        y = allocate((num_rows, width), gate_up.dtype)
    else:
        y = vnni_rows.empty_rows(num_rows, width, quantize.group_size)
    if num_rows:
        outputs = (y.data_ptr(), 0, 0) if isinstance(y, torch.Tensor) else vnni_rows.addresses(y)
        _program(width, gate_up.dtype, quantize).run(num_rows, gate_up.data_ptr(), *outputs)
    return y


@functools.cache
def _program(width: int, dtype: torch.dtype, quantize: CodeType | None) -> Program:
    return compile_region(lambda vectors: region(width, dtype, quantize, vectors))


def region(width: int, dtype: torch.dtype, quantize: CodeType | None, vectors: Vectors) -> Region:
    """Return the products of rows [2 width]; a piece is a row. Without `quantize`, "codes" are the values."""
    size = dtype.itemsize

    def write(f: Function, arguments: Arguments, row: Value) -> None:
        lanes = Lanes(f, vectors, width_for(vectors, quantize.group_size or width if quantize else width))
        gate = f.at(arguments.pointer("gate_up"), f.mul(row, 2 * width * size))
        up = f.at(gate, width * size)
        one = lanes.constant(1.0)

        def values(column: Value) -> Value:
            offset = f.mul(column, size)
            value = lanes.load(f.at(gate, offset), dtype)
            negated = lanes.sub(lanes.constant(-0.0), value)
            silu = lanes.div(value, lanes.add(one, lanes.exp(negated)))
            return lanes.mul(silu, lanes.load(f.at(up, offset), dtype))

        if quantize is not None:
            vnni_rows.write_codes(f, lanes, arguments, row, width, quantize.group_size, values)
            return
        y = f.at(arguments.pointer("codes"), f.mul(row, width * size))
        with f.loop(0, width, lanes.width) as column:
            lanes.store(values(column), f.at(y, f.mul(column, size)), dtype)

    return Region("silu_mul", ("gate_up", *vnni_rows.OUTPUTS), write)
