"""Rows rounded to int8 on a CPU that has VNNI, as integer_codes.quantize_activations rounds them: what norms, gates and
linears share.

A group of a row is held in registers; a row without groups is kept in float32 until its maximum is known.
"""

import functools
from collections.abc import Callable

import torch
from llvmlite import ir

from pressd.runtime.kernels.codegen.lanes import Lanes, width_for
from pressd.runtime.kernels.codegen.program import Arguments, Program, Region, compile_region
from pressd.runtime.kernels.codegen.recording import allocate
from pressd.runtime.kernels.codegen.target import Vectors
from pressd.runtime.kernels.codegen.writer import F32, Function, Value
from pressd.runtime.kernels.integer_codes import HALF_RANGE_8
from pressd.runtime.kernels.registry import SUM_FACTOR, CodeType, QuantizedRows

LARGEST = 127.0
LINE = 64
# Between rows of codes: those of 8,192 bytes would otherwise lie in one set of the cache, which holds 8 of them.
PADDING = 64
OUTPUTS = ("codes", "scale", "sums")

# Writes the values of some columns of the row, from one on: a vector of float32.
Values = Callable[[Value], Value]


def row_stride(width: int) -> int:
    """Return the bytes from a row of codes to the next."""
    return -(-width // LINE) * LINE + PADDING


def empty_rows(num_rows: int, width: int, group_size: int | None) -> QuantizedRows:
    """Allocate, without clearing."""
    groups = width // (group_size or width)
    return QuantizedRows(
        codes=allocate((num_rows, row_stride(width)), torch.int8)[:, :width],
        scale=allocate((num_rows, groups), torch.float32),
        sums=allocate((num_rows, groups), torch.int32),
    )


def addresses(rows: QuantizedRows) -> tuple[int, int, int]:
    """Return what a region with OUTPUTS among its arguments is told."""
    assert rows.sums is not None
    return rows.codes.data_ptr(), rows.scale.data_ptr(), rows.sums.data_ptr()


def write_codes(
    f: Function, lanes: Lanes, arguments: Arguments, row: Value, width: int, group_size: int | None, values: Values
) -> None:
    """Write what rounds one row of `width` columns to its codes, scales and sums."""
    group = group_size or width
    groups = width // group
    codes = f.at(arguments.pointer("codes"), f.mul(row, row_stride(width)))
    scales, sums = (f.at(arguments.pointer(name), f.mul(row, 4 * groups)) for name in ("scale", "sums"))
    for_group = _held if group_size is not None and group <= 8 * lanes.width else _kept
    with f.loop(0, groups) as index:
        first = f.mul(index, group)
        scale, total = for_group(f, lanes, group, f.at(codes, first), lambda column: values(f.add(first, column)))
        offset = f.mul(index, 4)
        f.store(scale, f.at(scales, offset), 4)
        f.store(f.mul(total, SUM_FACTOR), f.at(sums, offset), 4)


def _held(f: Function, lanes: Lanes, group: int, codes: Value, values: Values) -> tuple[Value, Value]:
    """Round a group that registers hold; return its scale and the sum of its codes."""
    held = [values(f.number(column)) for column in range(0, group, lanes.width)]
    largest = spoilt = lanes.constant(0.0)
    for vector in held:
        largest, spoilt = _seen(lanes, vector, largest, spoilt)
    scale = _scale(f, lanes, largest, spoilt)
    divisor = lanes.splat(scale)
    total = lanes.integer(0)
    for number, vector in enumerate(held):
        whole = _code(lanes, vector, divisor)
        f.store(lanes.to_bytes(whole), f.at(codes, number * lanes.width))
        total = f.builder.add(total, whole)
    return scale, lanes.sum(total)


def _kept(f: Function, lanes: Lanes, group: int, codes: Value, values: Values) -> tuple[Value, Value]:
    """Round a group of any size, by way of memory."""
    memory = f.allocate(ir.ArrayType(F32, group))
    largest, spoilt = f.slot(lanes.constant(0.0)), f.slot(lanes.constant(0.0))
    with f.loop(0, group, lanes.width) as column:
        vector = values(column)
        f.store(vector, f.at(memory, f.mul(column, 4)), 4 * lanes.width)
        seen = _seen(lanes, vector, largest.get(), spoilt.get())
        largest.set(seen[0])
        spoilt.set(seen[1])
    scale = _scale(f, lanes, largest.get(), spoilt.get())
    divisor = lanes.splat(scale)
    total = f.slot(lanes.integer(0))
    with f.loop(0, group, lanes.width) as column:
        vector = f.load(lanes.floats, f.at(memory, f.mul(column, 4)), 4 * lanes.width)
        whole = _code(lanes, vector, divisor)
        f.store(lanes.to_bytes(whole), f.at(codes, column))
        total.set(f.builder.add(total.get(), whole))
    return scale, lanes.sum(total.get())


def _seen(lanes: Lanes, vector: Value, largest: Value, spoilt: Value) -> tuple[Value, Value]:
    """Maxima pass over NaN, and codes have none: 0 times it, which is added to the scale, keeps it."""
    return lanes.larger(lanes.abs(vector), largest), lanes.fma(vector, lanes.constant(0.0), spoilt)


def _scale(f: Function, lanes: Lanes, largest: Value, spoilt: Value) -> Value:
    scale = f.builder.fdiv(lanes.largest(largest), ir.Constant(F32, HALF_RANGE_8))
    tiny = ir.Constant(F32, torch.finfo(torch.float32).tiny)
    scale = f.builder.select(f.builder.fcmp_ordered(">", scale, tiny), scale, tiny)
    return f.builder.fadd(scale, lanes.sum(spoilt))


def _code(lanes: Lanes, vector: Value, divisor: Value) -> Value:
    """Return whole numbers of 32 bits; what is no number becomes the largest."""
    whole = lanes.whole(lanes.div(vector, divisor))
    bounded = lanes.larger(lanes.smaller(whole, lanes.constant(LARGEST)), lanes.constant(-LARGEST))
    return lanes.to_ints(bounded)


def quantize_rows(x: torch.Tensor, group_size: int | None) -> QuantizedRows:
    """Quantise x [T, K], contiguous, to int8 by the largest value of each row or group of a row."""
    num_rows, width = x.shape
    rows = empty_rows(num_rows, width, group_size)
    if num_rows:
        _program(width, group_size, x.dtype).run(num_rows, x.data_ptr(), *addresses(rows))
    return rows


@functools.cache
def _program(width: int, group_size: int | None, dtype: torch.dtype) -> Program:
    return compile_region(lambda vectors: region(width, group_size, dtype, vectors))


def region(width: int, group_size: int | None, dtype: torch.dtype, vectors: Vectors) -> Region:
    """Return the rounding of rows; a piece is a row."""

    def write(f: Function, arguments: Arguments, row: Value) -> None:
        lanes = Lanes(f, vectors, width_for(vectors, group_size or width))
        x = f.at(arguments.pointer("x"), f.mul(row, width * dtype.itemsize))

        def values(column: Value) -> Value:
            return lanes.load(f.at(x, f.mul(column, dtype.itemsize)), dtype)

        write_codes(f, lanes, arguments, row, width, group_size, values)

    return Region("quantize", ("x", *OUTPUTS), write)


def code_type(group_size: int | None) -> CodeType:
    """Return what rows that this module makes are."""
    return CodeType(dtype=torch.int8, group_size=group_size, has_sums=True)
