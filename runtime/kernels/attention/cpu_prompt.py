"""Attention of prompts on a CPU with products of bfloat16 pairs, generated for the machine.

A piece is some tokens of a sequence times one head of keys: the queries that share it are up to ROWS rows of one
matrix. Keys come a tile at a time, transposed so that a vector holds pairs of 16 keys, values as pairs of two rows;
softmax is computed on the way, in float32, and its weights round to bfloat16 (Dao et al. 2022, arXiv 2205.14135).
"""

import functools
from dataclasses import dataclass

import torch
from llvmlite import ir

from pressd.runtime.kernels.codegen.lanes import Lanes
from pressd.runtime.kernels.codegen.program import Arguments, Program, Region, compile_region
from pressd.runtime.kernels.codegen.target import Vectors, machine_vectors
from pressd.runtime.kernels.codegen.writer import BF16, F32, I16, I32, I64, Function, Value

ROWS = 64
TILE = 64  # keys
WIDTH = 16
NEGATIVE = -1e30
SCORE_ROWS, SUM_ROWS, SUM_VECTORS = 16, 8, 2  # of x a register each, while scores and weighted sums are computed
ARGUMENTS = ("query", "keys", "values", "output", "blocks", "kv_heads", "window")
PAIRS = ir.VectorType(BF16, 2 * WIDTH)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What is compiled for: `group` queries share a key of `head_dim`; `scale` multiplies their products."""

    group: int
    head_dim: int
    scale: float

    @property
    def tokens(self) -> int:
        """Tokens of a piece."""
        return ROWS // self.group


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    output: torch.Tensor,
    blocks: torch.Tensor,
    window: int | None,
    shape: Shape,
) -> None:
    """Write the rows of output [T, heads, head_dim] that belong to `blocks`.

    blocks int64 [B, 4] are up to `shape.tokens` tokens each: the row of the first, how many they are, the first's
    position, and the slot of position 0. Slots of a sequence follow each other.
    """
    kv_heads = keys.size(2)
    _program(shape).run(
        blocks.size(0) * kv_heads,
        query.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        output.data_ptr(),
        blocks.data_ptr(),
        kv_heads,
        1 << 40 if window is None else window,
    )


def why_not_shape(group: int, head_dim: int, dtype: torch.dtype) -> str | None:
    """Return why attention of this shape is not served, or None."""
    vectors = machine_vectors()
    if vectors is None or not vectors.bf16_dot or dtype != torch.bfloat16:
        return "needs bfloat16 and a CPU that multiplies pairs of it"
    if head_dim % (2 * WIDTH) or group > ROWS:
        return f"serves heads of multiples of {2 * WIDTH} that at most {ROWS} queries share"
    return None


@functools.cache
def _program(shape: Shape) -> Program:
    return compile_region(lambda vectors: region(shape, vectors))


def region(shape: Shape, vectors: Vectors) -> Region:
    """Return attention of many blocks of tokens; a piece is one of them times one head of keys."""

    def write(f: Function, arguments: Arguments, piece: Value) -> None:
        _Writer(f, arguments, piece, shape, vectors).write()

    return Region("prompt", ARGUMENTS, write)


class _Writer:
    """Writes what a piece does."""

    def __init__(self, f: Function, arguments: Arguments, piece: Value, shape: Shape, vectors: Vectors) -> None:
        self.f, self.shape = f, shape
        self.lanes = Lanes(f, vectors, WIDTH)
        kv_heads = arguments.number("kv_heads")
        block, head = f.div(piece, kv_heads), f.rem(piece, kv_heads)
        self.head_bytes = 2 * shape.head_dim
        self.slot_bytes = f.mul(kv_heads, self.head_bytes)
        own = f.at(arguments.pointer("blocks"), f.mul(block, 32))
        row, self.tokens, self.position, slot = (f.load(I64, f.at(own, 8 * i), 8) for i in range(4))
        self.window = arguments.number("window")
        self.token_bytes = f.mul(self.slot_bytes, shape.group)
        start = f.add(f.mul(row, self.token_bytes), f.mul(head, shape.group * self.head_bytes))
        self.query, self.output = (f.at(arguments.pointer(name), start) for name in ("query", "output"))
        first = f.add(f.mul(slot, self.slot_bytes), f.mul(head, self.head_bytes))
        self.keys, self.values = (f.at(arguments.pointer(name), first) for name in ("keys", "values"))
        self.rows = f.mul(self.tokens, shape.group)
        self.queries = f.allocate(ir.ArrayType(I16, ROWS * shape.head_dim))
        self.turned = f.allocate(ir.ArrayType(I16, TILE * shape.head_dim))  # keys
        self.paired = f.allocate(ir.ArrayType(I16, TILE * shape.head_dim))  # values
        self.scores = f.allocate(ir.ArrayType(F32, ROWS * TILE))
        self.weights = f.allocate(ir.ArrayType(I16, ROWS * TILE))
        self.sums = f.allocate(ir.ArrayType(F32, ROWS * shape.head_dim))
        self.peaks, self.totals, self.keeps = (f.allocate(ir.ArrayType(F32, ROWS)) for _ in range(3))

    def write(self) -> None:
        f = self.f
        self._begin()
        last = f.sub(f.add(self.position, self.tokens), 1)  # the last position that any of the tokens sees
        first = f.sub(f.add(self.position, 1), self.window)
        first = f.builder.select(f.less(first, 0), f.number(0), first)
        with f.loop(first, f.add(last, 1), TILE) as key:
            self._turn_keys(key, last)
            self._pair_values(key, last)
            self._score()
            self._weigh(key)
            self._sum()
        self._finish()

    def _begin(self) -> None:
        """Copy the queries side by side, the last one again where there are fewer than ROWS."""
        f, lanes = self.f, self.lanes
        with f.loop(0, ROWS) as row:
            own = f.smaller(row, f.sub(self.rows, 1))
            token, head = f.div(own, self.shape.group), f.rem(own, self.shape.group)
            source = f.at(self.query, f.add(f.mul(token, self.token_bytes), f.mul(head, self.head_bytes)))
            target = f.at(self.queries, f.mul(row, self.head_bytes))
            for offset in range(0, self.head_bytes, 64):
                f.store(f.load(lanes.ints, f.at(source, offset)), f.at(target, offset), 64)
            for array, value in ((self.peaks, NEGATIVE), (self.totals, 0.0)):
                f.store(ir.Constant(F32, value), f.at(array, f.mul(row, 4)), 4)
            for column in range(0, self.shape.head_dim, WIDTH):
                place = f.at(self.sums, f.add(f.mul(row, 4 * self.shape.head_dim), 4 * column))
                f.store(lanes.constant(0.0), place, 64)

    def _turn_keys(self, first: Value, last: Value) -> None:
        """Transpose a tile: of each 16 keys, for each pair of columns a vector of the 16 pairs."""
        f, lanes = self.f, self.lanes
        for pairs in range(0, self.shape.head_dim // 2, WIDTH):
            with f.loop(0, TILE, WIDTH) as group:
                rows = []
                for number in range(WIDTH):
                    key = f.smaller(f.add(first, f.add(group, number)), last)
                    rows.append(f.load(lanes.ints, f.at(self.keys, f.add(f.mul(key, self.slot_bytes), 4 * pairs))))
                target = f.at(self.turned, f.add(f.mul(group, self.head_bytes), 64 * pairs))
                for number, column in enumerate(lanes.transposed(rows)):
                    f.store(column, f.at(target, 64 * number), 64)

    def _pair_values(self, first: Value, last: Value) -> None:
        """Interleave a tile: of each two values, vectors of pairs of their columns."""
        f = self.f
        half = ir.VectorType(I16, WIDTH)
        mask = ir.Constant(ir.VectorType(I32, 2 * WIDTH), [i // 2 + i % 2 * WIDTH for i in range(2 * WIDTH)])
        with f.loop(0, TILE, 2) as number:
            places = []
            for which in range(2):
                key = f.smaller(f.add(first, f.add(number, which)), last)
                places.append(f.at(self.values, f.mul(key, self.slot_bytes)))
            target = f.at(self.paired, f.mul(number, self.head_bytes))
            for column in range(0, self.shape.head_dim, WIDTH):
                a, b = (f.load(half, f.at(place, 2 * column)) for place in places)
                f.store(f.builder.shuffle_vector(a, b, mask), f.at(target, 4 * column), 64)

    def _score(self) -> None:
        """Multiply all queries with all keys of the tile."""
        f, lanes, pairs = self.f, self.lanes, self.shape.head_dim // 2
        with f.loop(0, TILE, WIDTH) as group:
            keys = f.at(self.turned, f.mul(group, self.head_bytes))
            with f.loop(0, ROWS, SCORE_ROWS) as row:
                queries = f.at(self.queries, f.mul(row, self.head_bytes))
                slots = [f.slot(lanes.constant(0.0)) for _ in range(SCORE_ROWS)]
                with f.loop(0, pairs, 4) as start:
                    for step in range(4):
                        pair = f.add(start, step)
                        own = f.load(PAIRS, f.at(keys, f.mul(pair, 64)), 64)
                        for number, slot in enumerate(slots):
                            at = f.at(queries, f.add(f.mul(pair, 4), number * self.head_bytes))
                            slot.set(lanes.dot_pairs(slot.get(), self._both(f.load(I32, at, 4)), own))
                for number, slot in enumerate(slots):
                    at = f.add(f.mul(f.add(row, number), 4 * TILE), f.mul(group, 4))
                    f.store(slot.get(), f.at(self.scores, at), 64)

    def _both(self, pair: Value) -> Value:
        return self.f.builder.bitcast(self.lanes.splat(pair), PAIRS)

    def _weigh(self, first: Value) -> None:
        """Turn scores into weights of bfloat16, and keep what multiplies each row's earlier sums."""
        f, lanes = self.f, self.lanes
        offsets = ir.Constant(lanes.ints, list(range(WIDTH)))
        negative, zero = lanes.constant(NEGATIVE), lanes.constant(0.0)
        with f.loop(0, ROWS) as row:
            position = f.add(self.position, f.div(row, self.shape.group))
            newest, oldest = f.sub(position, first), f.sub(f.sub(position, self.window), first)
            oldest = f.builder.select(f.less(oldest, -1), f.number(-1), oldest)
            bounds = [lanes.splat(f.builder.trunc(bound, I32)) for bound in (newest, oldest)]
            peak = f.load(F32, f.at(self.peaks, f.mul(row, 4)), 4)
            highest, seen, masks = lanes.splat(peak), [], []
            for column in range(0, TILE, WIDTH):
                at = f.at(self.scores, f.add(f.mul(row, 4 * TILE), 4 * column))
                score = lanes.mul(f.load(lanes.floats, at, 64), lanes.constant(self.shape.scale))
                key = f.builder.add(offsets, lanes.integer(column))
                mask = f.builder.and_(
                    f.builder.icmp_signed("<=", key, bounds[0]), f.builder.icmp_signed(">", key, bounds[1])
                )
                masks.append(mask)
                seen.append(score)
                highest = lanes.larger(f.builder.select(mask, score, negative), highest)
            now = lanes.splat(lanes.largest(highest))
            keep = lanes.exp(lanes.sub(lanes.splat(peak), now))
            total = zero
            for number, (score, mask) in enumerate(zip(seen, masks, strict=True)):
                weight = f.builder.select(mask, lanes.exp(lanes.sub(score, now)), zero)
                at = f.add(f.mul(row, 2 * TILE), 2 * WIDTH * number)
                lanes.store(weight, f.at(self.weights, at), torch.bfloat16)
                total = lanes.add(total, weight)
            before = f.load(F32, f.at(self.totals, f.mul(row, 4)), 4)
            factor = f.builder.extract_element(keep, ir.Constant(I32, 0))
            after = f.builder.fadd(f.builder.fmul(before, factor), lanes.sum(total))
            largest = f.builder.extract_element(now, ir.Constant(I32, 0))
            for array, value in ((self.totals, after), (self.keeps, factor), (self.peaks, largest)):
                f.store(value, f.at(array, f.mul(row, 4)), 4)

    def _sum(self) -> None:
        """Add the tile's weighted values to the sums of all rows."""
        f, lanes = self.f, self.lanes
        row_bytes = 4 * self.shape.head_dim
        columns = range(0, SUM_VECTORS * WIDTH, WIDTH)
        with f.loop(0, self.shape.head_dim, SUM_VECTORS * WIDTH) as start, f.loop(0, ROWS, SUM_ROWS) as row:
            slots = []
            places = []
            for number in range(SUM_ROWS):
                at = f.add(row, number)
                keep = lanes.splat(f.load(F32, f.at(self.keeps, f.mul(at, 4)), 4))
                for column in columns:
                    places.append(f.at(self.sums, f.add(f.mul(at, row_bytes), f.mul(f.add(start, column), 4))))
                    slots.append(f.slot(lanes.mul(f.load(lanes.floats, places[-1], 64), keep)))
            with f.loop(0, TILE, 2) as key:
                pair = f.at(self.paired, f.add(f.mul(key, self.head_bytes), f.mul(start, 4)))
                values = [f.load(PAIRS, f.at(pair, 4 * column), 64) for column in columns]
                for number in range(SUM_ROWS):
                    at = f.add(f.mul(f.add(row, number), 2 * TILE), f.mul(key, 2))
                    weight = self._both(f.load(I32, f.at(self.weights, at), 4))
                    for index, value in enumerate(values):
                        slot = slots[number * SUM_VECTORS + index]
                        slot.set(lanes.dot_pairs(slot.get(), weight, value))
            for slot, place in zip(slots, places, strict=True):
                f.store(slot.get(), place, 64)

    def _finish(self) -> None:
        """Divide by the sums of weights and store the rows that are there."""
        f, lanes = self.f, self.lanes
        with f.loop(0, self.rows) as row:
            total = f.load(F32, f.at(self.totals, f.mul(row, 4)), 4)
            factor = lanes.splat(f.builder.fdiv(ir.Constant(F32, 1.0), total))
            token, head = f.div(row, self.shape.group), f.rem(row, self.shape.group)
            target = f.at(self.output, f.add(f.mul(token, self.token_bytes), f.mul(head, self.head_bytes)))
            for column in range(0, self.shape.head_dim, WIDTH):
                place = f.at(self.sums, f.add(f.mul(row, 4 * self.shape.head_dim), 4 * column))
                value = lanes.mul(f.load(lanes.floats, place, 64), factor)
                lanes.store(value, f.at(target, 2 * column), torch.bfloat16)
