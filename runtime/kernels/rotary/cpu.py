"""Norms of heads, rotation and the write to the pool in one pass over a row, generated for the machine."""

import functools

import torch
from llvmlite import ir

from pressd.runtime.kernels.codegen.lanes import Lanes, width_for
from pressd.runtime.kernels.codegen.program import Arguments, Program, Region, compile_region, float_bits
from pressd.runtime.kernels.codegen.recording import allocate
from pressd.runtime.kernels.codegen.target import Vectors
from pressd.runtime.kernels.codegen.writer import I64, Function, Value
from pressd.runtime.kernels.norm.cpu import inverse_length

ARGUMENTS = ("qkv", "positions", "cos", "sin", "gain", "epsilon", "query", "keys", "values", "slots")


def rotate_and_write(
    qkv: torch.Tensor,
    positions: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norm_gain: torch.Tensor | None,
    epsilon: float,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> torch.Tensor:
    """As `RotateAndWrite` in registry.py says, from whole tables; nothing rounds before it is stored."""
    assert positions is not None
    head_dim = keys.size(-1)
    num_rows = qkv.size(0)
    query = allocate((num_rows, num_heads, head_dim), qkv.dtype)
    if num_rows:
        program = _program(num_heads, num_kv_heads, head_dim, qkv.dtype, norm_gain is not None)
        program.run(
            num_rows,
            qkv.data_ptr(),
            positions.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            0 if norm_gain is None else norm_gain.data_ptr(),
            float_bits(epsilon),
            query.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            slots.data_ptr(),
        )
    return query


@functools.cache
def _program(num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, norms: bool) -> Program:
    return compile_region(lambda vectors: region(num_heads, num_kv_heads, head_dim, dtype, norms, vectors))


def region(
    num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, norms: bool, vectors: Vectors
) -> Region:
    """Return the rotation of rows [num_heads + 2 num_kv_heads, head_dim]; a piece is a row."""
    size, half = dtype.itemsize, head_dim // 2
    head_bytes = head_dim * size

    def write(f: Function, arguments: Arguments, row: Value) -> None:
        lanes = Lanes(f, vectors, width_for(vectors, half))
        source = f.at(arguments.pointer("qkv"), f.mul(row, (num_heads + 2 * num_kv_heads) * head_bytes))
        position = f.load(I64, f.at(arguments.pointer("positions"), f.mul(row, 8)), 8)
        cos, sin = (f.at(arguments.pointer(name), f.mul(position, 4 * half)) for name in ("cos", "sin"))
        query = f.at(arguments.pointer("query"), f.mul(row, num_heads * head_bytes))
        slot = f.load(I64, f.at(arguments.pointer("slots"), f.mul(row, 8)), 8)
        keys, values = (
            f.at(arguments.pointer(name), f.mul(slot, num_kv_heads * head_bytes)) for name in ("keys", "values")
        )

        def head(index: Value, target: Value, first: int) -> None:
            place = f.at(source, f.mul(f.add(index, first), head_bytes))
            gain = f.at(arguments.pointer("gain"), f.mul(f.add(index, first), head_bytes))
            _rotate(
                f, lanes, arguments, place, gain if norms else None, cos, sin, f.at(target, f.mul(index, head_bytes))
            )

        with f.loop(0, num_heads) as index:
            head(index, query, 0)
        with f.when(f.builder.icmp_signed(">=", slot, f.number(0))):
            with f.loop(0, num_kv_heads) as index:
                head(index, keys, num_heads)
            own = f.at(source, (num_heads + num_kv_heads) * head_bytes)
            with f.loop(0, num_kv_heads * head_dim, lanes.width) as column:
                kind = ir.VectorType(ir.IntType(8 * size), lanes.width)
                offset = f.mul(column, size)
                f.store(f.load(kind, f.at(own, offset)), f.at(values, offset))

    def _rotate(
        f: Function,
        lanes: Lanes,
        arguments: Arguments,
        place: Value,
        gain: Value | None,
        cos: Value,
        sin: Value,
        target: Value,
    ) -> None:
        scale = None
        if gain is not None:
            squares = f.slot(lanes.constant(0.0))
            with f.loop(0, head_dim, lanes.width) as column:
                value = lanes.load(f.at(place, f.mul(column, size)), dtype)
                squares.set(lanes.fma(value, value, squares.get()))
            scale = inverse_length(f, lanes, arguments, squares.get(), head_dim)
        with f.loop(0, half, lanes.width) as column:
            parts = []
            for start in (0, half):
                offset = f.mul(f.add(column, start), size)
                value = lanes.load(f.at(place, offset), dtype)
                if scale is not None:
                    value = lanes.mul(lanes.mul(value, scale), lanes.load(f.at(gain, offset), dtype))
                parts.append(value)
            first, second = parts
            c, s = (lanes.load(f.at(table, f.mul(column, 4)), torch.float32) for table in (cos, sin))
            turned = lanes.sub(lanes.mul(first, c), lanes.mul(second, s))
            lanes.store(turned, f.at(target, f.mul(column, size)), dtype)
            turned = lanes.fma(second, c, lanes.mul(first, s))
            lanes.store(turned, f.at(target, f.mul(f.add(column, half), size)), dtype)

    return Region("rotate", ARGUMENTS, write)
