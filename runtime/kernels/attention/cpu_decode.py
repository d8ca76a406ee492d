"""Attention of single new tokens over keys and values in the pool, generated for the machine.

Queries that share keys are taken together, `lanes` of them: a vector of scores holds width / lanes keys times lanes
queries, so that maxima, exponentials and sums of all of them are one vector's. Softmax is computed on the way, in
float32 (Milakov and Gimelshein 2018, arXiv 1805.02867), over tiles of keys that stay in the first cache.
"""

import functools
from dataclasses import dataclass

import torch
from llvmlite import ir

from pressd.runtime.kernels.codegen.lanes import STORED, Lanes
from pressd.runtime.kernels.codegen.program import Arguments, Program, Region, compile_region
from pressd.runtime.kernels.codegen.target import Vectors, machine_vectors
from pressd.runtime.kernels.codegen.writer import F32, I32, I64, Function, Slot, Value

TILE = 64  # keys
MOST_LANES = 4
NEGATIVE = -1e30  # a score that no maximum takes
ARGUMENTS = ("query", "keys", "values", "output", "sequences", "segments", "kv_heads")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What is compiled for: `group` queries share a key of `head_dim`; `scale` multiplies their products."""

    group: int
    head_dim: int
    dtype: torch.dtype
    scale: float

    @property
    def lanes(self) -> int:
        """Queries taken together: a power of two, the last ones repeated where there are fewer."""
        lanes = 1
        while lanes < min(self.group, MOST_LANES):
            lanes *= 2
        return lanes


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    output: torch.Tensor,
    sequences: torch.Tensor,
    segments: torch.Tensor,
    shape: Shape,
) -> None:
    """Write the rows of output [T, heads, head_dim] that belong to `sequences`.

    sequences int64 [S, 3]: the row of the query, and the first and the last but one of its segments, int64 [N, 2]: the
    slot of a key, and how many follow from there on.
    """
    kv_heads = keys.size(2)
    _program(shape).run(
        sequences.size(0) * kv_heads,
        query.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        output.data_ptr(),
        sequences.data_ptr(),
        segments.data_ptr(),
        kv_heads,
    )


def why_not_shape(shape: Shape) -> str | None:
    """Return why attention of this shape is not served, or None."""
    if shape.dtype not in STORED:
        return f"computes in float32 at most, not in {shape.dtype}"
    vectors = machine_vectors()
    if vectors is not None and shape.head_dim % vectors.width:
        return f"serves heads of multiples of {vectors.width}, not of {shape.head_dim}"
    return None


@functools.cache
def _program(shape: Shape) -> Program:
    return compile_region(lambda vectors: region(shape, vectors))


def compile_decode(shape: Shape) -> None:
    """Compile before anybody waits for it."""
    _program(shape)


def region(shape: Shape, vectors: Vectors) -> Region:
    """Return attention of many sequences; a piece is one of them times one head of keys."""

    def write(f: Function, arguments: Arguments, piece: Value) -> None:
        _Writer(f, arguments, piece, shape, vectors).write()

    return Region("decode", ARGUMENTS, write)


class _Writer:
    """Writes what a piece does."""

    def __init__(self, f: Function, arguments: Arguments, piece: Value, shape: Shape, vectors: Vectors) -> None:
        self.f, self.shape, self.vectors = f, shape, vectors
        self.lanes = Lanes(f, vectors, vectors.width)
        self.width = vectors.width
        self.size = shape.dtype.itemsize
        self.keys_per_vector = self.width // shape.lanes
        self.batches = [
            [min(first + lane, shape.group - 1) for lane in range(shape.lanes)]
            for first in range(0, shape.group, shape.lanes)
        ]
        self.in_pairs = vectors.bf16_dot and shape.dtype == torch.bfloat16 and shape.head_dim % (2 * self.width) == 0
        kv_heads = arguments.number("kv_heads")
        sequence, head = f.div(piece, kv_heads), f.rem(piece, kv_heads)
        head_bytes = shape.head_dim * self.size
        self.slot_bytes = f.mul(kv_heads, head_bytes)
        own = f.at(arguments.pointer("sequences"), f.mul(sequence, 24))
        row, self.first_segment, self.last_segment = (f.load(I64, f.at(own, 8 * i), 8) for i in range(3))
        self.segments = arguments.pointer("segments")
        start = f.mul(f.add(f.mul(row, kv_heads), head), shape.group * head_bytes)
        self.query, self.output = (f.at(arguments.pointer(name), start) for name in ("query", "output"))
        self.keys, self.values = (f.at(arguments.pointer(name), f.mul(head, head_bytes)) for name in ("keys", "values"))
        self.scores = f.allocate(ir.ArrayType(F32, TILE * shape.lanes))
        self.accumulated = f.allocate(ir.ArrayType(F32, len(self.batches) * shape.lanes * shape.head_dim))

    def write(self) -> None:
        f, lanes = self.f, self.lanes
        peaks = [f.slot(lanes.constant(NEGATIVE)) for _ in self.batches]
        totals = [f.slot(lanes.constant(0.0)) for _ in self.batches]
        with f.loop(0, len(self.batches) * self.shape.lanes * self.shape.head_dim, self.width) as column:
            f.store(lanes.constant(0.0), f.at(self.accumulated, f.mul(column, 4)), 4 * self.width)
        queries = [self._load_queries(batch) for batch in self.batches]
        with f.loop(self.first_segment, self.last_segment) as segment:
            place = f.at(self.segments, f.mul(segment, 16))
            slot, count = (f.load(I64, f.at(place, 8 * i), 8) for i in range(2))
            with f.loop(0, count, TILE) as first:
                number = f.smaller(f.sub(count, first), TILE)
                at_tile = f.mul(f.add(slot, first), self.slot_bytes)
                for index, own in enumerate(queries):
                    keys, values = f.at(self.keys, at_tile), f.at(self.values, at_tile)
                    keep = self._score(own, keys, number, peaks[index], totals[index], values if index == 0 else None)
                    self._accumulate(index, values, number, keep, keys if index == 0 else None)
        for index, batch in enumerate(self.batches):
            self._store(index, batch, totals[index].get())

    def _load_queries(self, batch: list[int]) -> list[list[Value]]:
        """Return each query's vectors, as they meet keys: pairs of bfloat16, or float32, scaled there."""
        f, shape = self.f, self.shape
        found = []
        for number in batch:
            place = f.at(self.query, number * shape.head_dim * self.size)
            found.append([self._vector(place, column) for column in range(0, shape.head_dim, self._step)])
        return found

    @property
    def _step(self) -> int:
        return 2 * self.width if self.in_pairs else self.width

    def _vector(self, place: Value, column: int) -> Value:
        at = self.f.at(place, column * self.size)
        if self.in_pairs:
            return self.f.load(ir.VectorType(STORED[torch.bfloat16], 2 * self.width), at)
        return self.lanes.load(at, self.shape.dtype)

    def _score(
        self,
        queries: list[list[Value]],
        keys: Value,
        count: Value,
        peak: Slot,
        total: Slot,
        fetched: Value | None,
    ) -> Value:
        """Write the weights of a tile's keys to `scores`; return what multiplies all that was before.

        Memory is slower than this: the tile's values, which come next, are `fetched` meanwhile.
        """
        f, lanes, per_vector = self.f, self.lanes, self.keys_per_vector
        highest = f.slot(peak.get())
        of_lane = ir.Constant(lanes.ints, [lane // self.shape.lanes for lane in range(self.width)])
        last = f.sub(count, 1)

        def is_there(first: Value) -> Value:
            left = lanes.splat(f.builder.trunc(f.sub(count, first), I32))
            return f.builder.icmp_signed("<", of_lane, left)

        with f.loop(0, count, per_vector) as first:
            products = []
            for number in range(per_vector):
                offset = f.mul(f.smaller(f.add(first, number), last), self.slot_bytes)
                key = f.at(keys, offset)
                if fetched is not None:
                    self._fetch(f.at(fetched, offset))
                vectors = [self._vector(key, column) for column in range(0, self.shape.head_dim, self._step)]
                for query in queries:
                    products.append(self._product(query, vectors))
            scores = lanes.mul(lanes.sums(products), lanes.constant(self.shape.scale))
            f.store(scores, f.at(self.scores, f.mul(first, 4 * self.shape.lanes)), 4 * self.width)
            seen = f.builder.select(is_there(first), scores, lanes.constant(NEGATIVE))
            highest.set(lanes.larger(seen, highest.get()))
        now = lanes.folded(highest.get(), self.shape.lanes, lanes.larger)
        keep = lanes.exp(lanes.sub(peak.get(), now))
        peak.set(now)
        total.set(lanes.mul(total.get(), keep))
        with f.loop(0, count, per_vector) as first:
            place = f.at(self.scores, f.mul(first, 4 * self.shape.lanes))
            weights = lanes.exp(lanes.sub(f.load(lanes.floats, place, 4 * self.width), now))
            weights = f.builder.select(is_there(first), weights, lanes.constant(0.0))
            f.store(weights, place, 4 * self.width)
            total.set(lanes.add(total.get(), weights))
        return keep

    def _fetch(self, place: Value) -> None:
        """Ask for a key, or a value, that is wanted a tile later."""
        for line in range(0, self.shape.head_dim * self.size, 64):
            self.f.prefetch(self.f.at(place, line))

    def _product(self, query: list[Value], key: list[Value]) -> Value:
        total = self.lanes.constant(0.0)
        for a, b in zip(query, key, strict=True):
            total = self.lanes.dot_pairs(total, a, b) if self.in_pairs else self.lanes.fma(a, b, total)
        return total

    def _accumulate(self, index: int, values: Value, count: Value, keep: Value, fetched: Value | None) -> None:
        """Add the tile's values, weighted, to what is accumulated; the keys of the next are `fetched` meanwhile."""
        f, lanes, shape = self.f, self.lanes, self.shape
        vectors = 4 if self.vectors.registers >= 32 else 2
        part = next(
            p for p in range(min(vectors * self.width, shape.head_dim), 0, -self.width) if shape.head_dim % p == 0
        )
        base = index * shape.lanes * shape.head_dim
        for start in range(0, shape.head_dim, part):
            columns = range(start, start + part, self.width)
            slots = []
            for lane in range(shape.lanes):
                factor = lanes.splat(f.builder.extract_element(keep, ir.Constant(I32, lane)))
                for column in columns:
                    before = f.load(lanes.floats, self._accumulator(base, lane, column), 4 * self.width)
                    slots.append(f.slot(lanes.mul(before, factor)))
            with f.loop(0, count) as key:
                place = f.at(values, f.mul(key, self.slot_bytes))
                if fetched is not None and start == 0:
                    self._fetch(f.at(fetched, f.mul(f.add(key, TILE), self.slot_bytes)))
                own = [lanes.load(f.at(place, column * self.size), shape.dtype) for column in columns]
                for lane in range(shape.lanes):
                    at = f.at(self.scores, f.mul(f.add(f.mul(key, shape.lanes), lane), 4))
                    weight = lanes.splat(f.load(F32, at, 4))
                    for number, vector in enumerate(own):
                        slot = slots[lane * len(own) + number]
                        slot.set(lanes.fma(weight, vector, slot.get()))
            for number, slot in enumerate(slots):
                lane, column = number // len(columns), columns[number % len(columns)]
                f.store(slot.get(), self._accumulator(base, lane, column), 4 * self.width)

    def _accumulator(self, base: int, lane: int, column: int) -> Value:
        return self.f.at(self.accumulated, 4 * (base + lane * self.shape.head_dim + column))

    def _store(self, index: int, batch: list[int], total: Value) -> None:
        f, lanes, shape = self.f, self.lanes, self.shape
        total = lanes.folded(total, shape.lanes, lanes.add)
        base = index * shape.lanes * shape.head_dim
        for lane, number in enumerate(batch):
            if lane and number == batch[lane - 1]:
                continue
            weight = f.builder.fdiv(ir.Constant(F32, 1.0), f.builder.extract_element(total, ir.Constant(I32, lane)))
            for column in range(0, shape.head_dim, self.width):
                value = f.load(lanes.floats, self._accumulator(base, lane, column), 4 * self.width)
                place = f.at(self.output, (number * shape.head_dim + column) * self.size)
                lanes.store(lanes.mul(value, lanes.splat(weight)), place, shape.dtype)
