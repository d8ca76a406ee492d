"""Products of rows of 8-bit codes with 4- or 8-bit weights, in integer dot products of four bytes (VNNI).

A weight lies in the lines of vnni_lines.py, unsigned: c + 8 or c + 128. What that adds to a sum is the offset times the
sum of the row's codes, which the accumulator starts with, negated.

A tile is some rows of x times one block of 16 outputs: a register holds the sums of one row. Weights are read as one
stream; what they wait for is memory, so they are fetched PREFETCH bytes ahead, across the end of a page, where the
hardware's own prefetcher stops.
"""

import functools
from dataclasses import dataclass

import torch
from llvmlite import ir

from pressd.runtime.kernels.codegen.lanes import Lanes
from pressd.runtime.kernels.codegen.program import Arguments, Program, Region, compile_region
from pressd.runtime.kernels.codegen.recording import allocate
from pressd.runtime.kernels.codegen.target import Vectors, machine_vectors
from pressd.runtime.kernels.codegen.writer import F32, I32, I64, POINTER, Function, Slot, Value
from pressd.runtime.kernels.registry import QuantizedRows
from pressd.runtime.kernels.vnni_lines import BLOCK, LINE, inputs_per_line
from pressd.runtime.kernels.vnni_rows import row_stride

PREFETCH = 8192
UNROLLED = 4  # lines
# A part of a weight that stays in a core's second cache while several tiles of rows meet it.
CACHED = 384 << 10
# Up to so many rows, each thread streams its own stretch of a weight: pieces that are taken in turn would cut it up. Of
# each stretch a share is one piece; the rest is taken in turn, so many pieces a thread, lest one waits for the other.
STREAMED_ROWS = 4
STREAMED_SHARE, TAIL = 0.8, 4
PIECES = 4  # for each thread otherwise, at least
# Rows of a tile: of one among many, whose codes should stay in the first cache, and of one that is alone. That may be
# more than registers hold, with sums of groups in memory: it unpacks the weight once.
MOST_ROWS, MOST_ALONE = 12, 16
ARGUMENTS = (
    *("weight", "scale", "codes", "row_scale", "sums", "output"),
    *("rows", "tiles", "outputs", "large", "per_large", "per_piece"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a product is compiled for; `group_size` None is one scale per output row."""

    bits: int
    in_features: int
    group_size: int | None
    scale_dtype: torch.dtype
    dtype: torch.dtype

    @property
    def group(self) -> int:
        return self.group_size or self.in_features

    @property
    def groups(self) -> int:
        return self.in_features // self.group

    @property
    def per_line(self) -> int:
        """Inputs in a line."""
        return inputs_per_line(self.bits)

    @property
    def block_bytes(self) -> int:
        return self.in_features // self.per_line * LINE

    @property
    def row_stride(self) -> int:
        """Bytes from a row of codes to the next."""
        return row_stride(self.in_features)


def most_rows(shape: Shape, vectors: Vectors) -> tuple[int, int]:
    """Return the most rows of a tile: of one among several, and of one that is alone."""
    per_row = BLOCK // vectors.width * (2 if shape.groups > 1 else 1)
    held = min(MOST_ROWS, (vectors.registers - 6) // per_row)
    return held, MOST_ALONE if vectors.width == BLOCK else held


def multiply(x: QuantizedRows, weight: torch.Tensor, scale: torch.Tensor, shape: Shape, outputs: int) -> torch.Tensor:
    """Return [T, outputs] for rows of x as vnni_rows makes them, and lines and scales as vnni_lines does."""
    num_rows = x.codes.size(0)
    output = allocate((num_rows, outputs), shape.dtype)
    if num_rows and outputs:
        assert x.sums is not None
        vectors = machine_vectors()
        assert vectors is not None
        held, alone = most_rows(shape, vectors)
        tiles = 1 if num_rows <= alone else -(-num_rows // held)
        blocks = -(-outputs // BLOCK)
        large, per_large, per_piece = _pieces(shape, num_rows, tiles, blocks, torch.get_num_threads())
        _program(shape).run(
            large + -(-(blocks - large * per_large) // per_piece),
            weight.data_ptr(),
            scale.data_ptr(),
            x.codes.data_ptr(),
            x.scale.data_ptr(),
            x.sums.data_ptr(),
            output.data_ptr(),
            num_rows,
            tiles,
            outputs,
            large,
            per_large,
            per_piece,
        )
    return output


def _pieces(shape: Shape, num_rows: int, tiles: int, blocks: int, threads: int) -> tuple[int, int, int]:
    """Return how many large pieces come first, their blocks, and the blocks of those that follow."""
    if num_rows <= STREAMED_ROWS:
        per_large = int(blocks * STREAMED_SHARE / threads)
        return threads, per_large, max(1, -(-(blocks - threads * per_large) // (TAIL * threads)))
    even = -(-blocks // (PIECES * threads))
    return 0, 0, even if tiles == 1 else max(1, min(even, CACHED // shape.block_bytes))


@functools.cache
def _program(shape: Shape) -> Program:
    return compile_region(lambda vectors: region(shape, vectors))


def compile_product(shape: Shape) -> None:
    """Compile a product before anybody waits for it."""
    _program(shape)


def region(shape: Shape, vectors: Vectors) -> Region:
    """Return the product of all rows; a piece is `per_piece` blocks, which all tiles of rows meet one after another."""

    def write(work: Function, arguments: Arguments, piece: Value) -> None:
        _, most = most_rows(shape, vectors)
        _write_piece(work, arguments, piece, shape, [_tile(work.module, shape, vectors, n + 1) for n in range(most)])

    return Region("product", ARGUMENTS, write)


def _write_piece(work: Function, arguments: Arguments, piece: Value, shape: Shape, by_rows: list[ir.Function]) -> None:
    rows, tiles, outputs, large, per_large, per_piece = (arguments.number(name) for name in ARGUMENTS[6:])
    blocks = work.div(work.add(outputs, BLOCK - 1), BLOCK)
    is_large = work.builder.icmp_signed("<", piece, large)
    behind = work.add(work.mul(large, per_large), work.mul(work.sub(piece, large), per_piece))
    first = work.builder.select(is_large, work.mul(piece, per_large), behind)
    length = work.builder.select(is_large, per_large, per_piece)
    last = work.smaller(work.add(first, length), blocks)
    weight = work.at(arguments.pointer("weight"), work.mul(first, shape.block_bytes))
    scale = work.at(arguments.pointer("scale"), work.mul(first, _scale_bytes(shape)))
    row_bytes = work.mul(outputs, shape.dtype.itemsize)
    left = work.sub(outputs, work.mul(first, BLOCK))
    with work.loop(0, tiles) as tile:
        # What later tiles meet lies in the cache: they fetch what they are about to read anyway.
        ahead = work.builder.select(work.less(tile, 1), work.number(PREFETCH), work.number(0))
        start = work.div(work.mul(tile, rows), tiles)
        stop = work.div(work.mul(work.add(tile, 1), rows), tiles)
        own = [
            work.at(arguments.pointer("codes"), work.mul(start, shape.row_stride)),
            work.at(arguments.pointer("row_scale"), work.mul(start, 4 * shape.groups)),
            work.at(arguments.pointer("sums"), work.mul(start, 4 * shape.groups)),
            work.at(
                arguments.pointer("output"),
                work.add(work.mul(start, row_bytes), work.mul(first, BLOCK * shape.dtype.itemsize)),
            ),
        ]
        builder = work.builder
        after = builder.append_basic_block("tile_done")
        choice = builder.switch(work.sub(stop, start), after)
        for number, function in enumerate(by_rows, 1):
            block = builder.append_basic_block(f"rows_{number}")
            choice.add_case(ir.Constant(I64, number), block)
            builder.position_at_end(block)
            builder.call(function, [weight, scale, *own, row_bytes, work.sub(last, first), left, ahead])
            builder.branch(after)
        builder.position_at_end(after)


def _scale_bytes(shape: Shape) -> int:
    """Bytes of the scales of a block."""
    return shape.groups * BLOCK * shape.scale_dtype.itemsize


def _tile(module: ir.Module, shape: Shape, vectors: Vectors, rows: int) -> ir.Function:
    """Write the function of tiles of so many rows; it does `blocks` blocks, of which `left` outputs are there."""
    f = Function(module, f"tile_{rows}", [*[POINTER] * 6, I64, I64, I64, I64])
    weight, scale, codes, row_scale, sums, output, row_bytes, blocks, left, ahead = f.arguments
    lanes = Lanes(f, vectors, vectors.width)
    parts = BLOCK // lanes.width
    with f.loop(0, blocks) as block:
        lines = f.at(weight, f.mul(block, shape.block_bytes))
        scales = f.at(scale, f.mul(block, _scale_bytes(shape)))
        zero = lanes.constant(0.0)
        totals = [[f.slot(zero) for _ in range(parts)] for _ in range(rows)]
        with f.loop(0, shape.groups) as group:
            accumulators = _dots(f, lanes, shape, rows, lines, codes, sums, group, ahead)
            for part in range(parts):
                offset = part * lanes.width * shape.scale_dtype.itemsize
                own = f.at(scales, f.add(f.mul(group, BLOCK * shape.scale_dtype.itemsize), offset))
                column_scale = lanes.load(own, shape.scale_dtype)
                for row in range(rows):
                    place = f.at(row_scale, f.add(f.mul(group, 4), 4 * shape.groups * row))
                    by_row = lanes.splat(f.load(F32, place, 4))
                    value = lanes.mul(lanes.to_floats(accumulators[row][part]), by_row)
                    if shape.groups == 1:
                        totals[row][part].set(lanes.mul(value, column_scale))
                    else:
                        totals[row][part].set(lanes.fma(value, column_scale, totals[row][part].get()))
        _write_output(f, lanes, shape, output, row_bytes, block, left, totals)
    return f.finish()


def _dots(
    f: Function,
    lanes: Lanes,
    shape: Shape,
    rows: int,
    lines: Value,
    codes: Value,
    sums: Value,
    group: Value,
    ahead: Value,
) -> list[list[Value]]:
    """Write the sums of one group: for each row, the vectors of a block."""
    parts = BLOCK // lanes.width
    # Few rows would wait for their own last sum: they get several that are added up.
    chains = {1: 4, 2: 2, 3: 2}.get(rows * parts, 1)
    shift = {4: 0, 8: 4}[shape.bits]  # sums are those of codes times -8
    starts = []
    for row in range(rows):
        start = lanes.splat(f.load(I32, f.at(sums, f.add(f.mul(group, 4), 4 * shape.groups * row)), 4))
        starts.append(start if shift == 0 else f.builder.shl(start, lanes.integer(shift)))
    accumulators = [
        [[f.slot(starts[row] if chain == 0 else lanes.integer(0)) for chain in range(chains)] for _ in range(parts)]
        for row in range(rows)
    ]
    group_lines = shape.group // shape.per_line
    unrolled = next(count for count in range(min(UNROLLED, group_lines), 0, -1) if group_lines % count == 0)
    first_line = f.mul(group, group_lines * LINE)
    first_code = f.mul(group, shape.group)
    with f.loop(0, group_lines, unrolled) as line:
        place = f.at(lines, f.add(first_line, f.mul(line, LINE)))
        own_codes = f.at(codes, f.add(first_code, f.mul(line, shape.per_line)))
        for number in range(unrolled):
            f.prefetch(f.at(place, f.add(ahead, number * LINE)))
            quads = _quads(f, lanes, shape, place, number)
            for half, vectors in enumerate(quads):
                for row in range(rows):
                    offset = row * shape.row_stride + number * shape.per_line + 4 * half
                    four = lanes.splat(f.load(I32, f.at(own_codes, offset), 4))
                    for part, vector in enumerate(vectors):
                        slot = accumulators[row][part][(number * len(quads) + half) % chains]
                        slot.set(lanes.dot_bytes(slot.get(), vector, four))
    return [[_total(f, chain) for chain in row] for row in accumulators]


def _quads(f: Function, lanes: Lanes, shape: Shape, place: Value, number: int) -> list[list[Value]]:
    """Load a line: for each four inputs, the vectors of unsigned bytes of a block."""
    parts = BLOCK // lanes.width
    loaded = [f.load(lanes.ints, f.at(place, number * LINE + part * lanes.width * 4), 32) for part in range(parts)]
    if shape.bits == 8:
        return [loaded]
    mask, four = lanes.integer(0x0F0F0F0F), lanes.integer(4)
    low = [f.builder.and_(vector, mask) for vector in loaded]
    high = [f.builder.and_(f.builder.lshr(vector, four), mask) for vector in loaded]
    return [low, high]


def _total(f: Function, chain: list[Slot]) -> Value:
    total = chain[0].get()
    for slot in chain[1:]:
        total = f.builder.add(total, slot.get())
    return total


def _write_output(
    f: Function,
    lanes: Lanes,
    shape: Shape,
    output: Value,
    row_bytes: Value,
    block: Value,
    left: Value,
    totals: list[list[Slot]],
) -> None:
    first = f.mul(block, BLOCK)
    for part in range(BLOCK // lanes.width):
        column = f.add(first, part * lanes.width)
        remaining = f.sub(left, column)
        places = [
            f.at(output, f.add(f.mul(row_bytes, row), f.mul(column, shape.dtype.itemsize)))
            for row in range(len(totals))
        ]
        values = [row[part].get() for row in totals]
        with f.either(f.less(remaining, lanes.width)) as (short, whole):
            with short:
                for value, place in zip(values, places, strict=True):
                    lanes.store_first(remaining, value, place, shape.dtype)
            with whole:
                for value, place in zip(values, places, strict=True):
                    lanes.store(value, place, shape.dtype)
